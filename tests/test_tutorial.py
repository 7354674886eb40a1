"""docs/tutorial.md and docs/baselines.md: code that runs, true quotes, flags that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import full_eval
from arguments import ConvertParams, MetricsParams, RenderParams, parse_train
from tests import tiny_scenes

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "baselines.md")}
BLOCKS = re.findall(r"^```python\n# ([^\n]+)\n(.*?)^```", PAGES["tutorial.md"], re.M | re.S)
REFERENCE = ROOT / "submodules/diff-gaussian-rasterization/diff_gaussian_rasterization/reference.py"
FENCES = [
    fence for page in PAGES.values() for fence in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
]
COMMANDS = [line for language, text in FENCES if not language for line in text.splitlines()]
GROUPS = {"render.py": RenderParams, "metrics.py": MetricsParams, "convert.py": ConvertParams}


def body(name: str) -> str:
    """Of a function of reference.py."""
    source = REFERENCE.read_text(encoding="utf-8")
    return re.search(rf"^def {name}\(.*?(?=^(?:def|class|# ---)|\Z)", source, re.M | re.S)[0]


@pytest.mark.parametrize("title, lines", [b for b in BLOCKS if b[0].startswith("reference.py")])
def test_quotes_are_lines_of_the_reference(title, lines):
    code = body(title.removeprefix("reference.py: ")).splitlines()
    assert lines.splitlines() == [line for line in code if line in lines.splitlines()], title


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    python, *words = shlex.split(command)
    assert python == "python"
    program, words = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if program == "train.py":
        parse_train(words)
    elif program == "full_eval.py":
        words = [word for word in words if word != "--matrix" and not word.endswith(".json")]
        assert full_eval.parse(words).output_path
    elif program in GROUPS:
        known = [f"--{name}" for name in GROUPS[program].__dataclass_fields__] + ["-m", "-s"]
        assert all(word in known for word in words if word.startswith("-"))
    else:
        help = subprocess.run(
            [sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=True
        )
        assert all(word in help.stdout for word in words if word.startswith("-"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", PAGES[page])
    assert targets and not [name for name in targets if not (ROOT / "docs" / name).exists()]


def test_two_gaussians_are_drawn_and_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = dict(BLOCKS)
    exec(code["one.py"], {})
    pixels = np.array(Image.open("one.png"))
    assert pixels.shape == (96, 128, 3) and pixels[48, 64, 0] > 200 > 100 > pixels[48, 64, 2]
    exec(code["fit.py"].replace("STEPS = 200", "STEPS = 41"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2


def test_the_short_schedule_trains(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "data")
    options = parse_train(["-s", str(data), "--config", str(ROOT / "docs/short.json")])
    assert (options.opt.iterations, options.opt.densify_until_iter) == (1000, 750)
