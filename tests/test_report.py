"""report.py: one page that says what the folder says, and loads nothing else."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import metrics
import render
import report
import train
from arguments import parse_train
from tests import tiny_scenes
from tests.test_video import frames
from utils import svg, video
from viewer import report as page
from viewer.facts import gather

CPU = ["--device", "cpu"]
ABOVE = "Cameras from above"
RUN = ["--eval", "--llffhold", "4", "--lambda_dssim", "0.25", "--no-fused", "--test_iterations", "5", "10"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two models, rendered and scored."""
    folder = tmp_path_factory.mktemp("report")
    tiny_scenes.colmap_scene(folder / "data")
    for name, more in (("one", []), ("two", ["--opacity_lr", "0.05"])):
        run = [
            "-s",
            str(folder / "data"),
            "-m",
            str(folder / name),
            *RUN,
            *more,
            "--disable_viewer",
            "--quiet",
        ]
        assert train.main([*run, "--iterations", "20", *CPU]) == 0
        assert render.main(["-m", str(folder / name), "--skip_train", "--quiet", *CPU]) == 0
        assert metrics.main(["-m", str(folder / name), "--lpips", "none", *CPU]) == 0
    return folder


def test_each_command_names_the_next_one(trained, capsys):
    folder = trained / "one"
    last = (folder / "train.log").read_text().splitlines()[-2:]
    assert [line.split(maxsplit=1)[1] for line in last] == [
        f"python view.py -m {folder}",
        f"python render.py -m {folder}",
    ]
    both = ["-m", str(folder), str(trained / "two")]
    assert metrics.main([*both, "--lpips", "none", *CPU]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Next: python report.py {' '.join(both)}"


@pytest.fixture
def models(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "models"))


class Reader(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def written(*flags) -> Path:
    assert report.main(["-m", *map(str, flags)]) == 0
    return Path(flags[0]) / "report.html"


def test_the_page_says_what_the_folder_says(models, capsys):
    path = written(models / "one")
    found = Reader(path)
    scores = json.loads((models / "one/results.json").read_text())["ours_20"]
    assert f"{scores['PSNR']:.2f} dB" in found.text and f"{scores['SSIM']:.4f}" in found.text
    for shown in ("lambda_dssim", "0.25", "--no-fused", "CPU thread"):
        assert shown in found.text
    measured = json.loads((models / "one/per_view.json").read_text())["ours_20"]["PSNR"]
    names = json.loads((models / "one/test/ours_20/names.json").read_text())
    worst_first = [names[file] for file in sorted(measured, key=measured.get)]
    shown = [
        attrs["alt"].removeprefix("photo of ") for attrs in found.of("img") if "photo of" in attrs["alt"]
    ]
    assert shown == [worst_first[-1], *worst_first], "the best as the title, then the worst first"
    charts = [attrs["aria-label"] for attrs in found.of("svg")]
    assert charts == [
        "Loss",
        "PSNR",
        "Gaussians",
        "Memory",
        "Time of an iteration",
        "Test views by PSNR",
        ABOVE,
    ]
    assert f"Report: {path}" in capsys.readouterr().out


def test_nothing_is_loaded_and_all_pictures_have_words(models):
    path = written(models / "one", models / "two")
    found = Reader(path)
    for tag, attrs in found.tags:
        for name in ("src", "href", "data"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    assert all(attrs.get("alt") for attrs in found.of("img"))
    sliders = [attrs for attrs in found.of("input") if attrs["type"] == "range"]
    assert all(attrs.get("aria-label") for attrs in [*found.of("svg"), *sliders])
    assert "http" not in re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", path.read_text())
    assert found.of("html")[0]["lang"] == "en" and found.of("title")


def test_two_models_are_compared(models):
    found = Reader(written(models / "one", models / "two"))
    assert "Comparison" in found.text and "opacity_lr" in found.text
    for name in ("one", "two"):
        scores = json.loads((models / name / "results.json").read_text())["ours_20"]
        assert f"{scores['PSNR']:.3f}" in found.text
    assert "two test: " in found.text and "one train: " in found.text, "curves of both"


def test_a_name_stays_text(models):
    evil = "<img src=x onerror=alert(1)>&\"'</script>.png"
    folder = models / "one"
    names = json.loads((folder / "test/ours_20/names.json").read_text())
    names["00000.png"] = evil
    (folder / "test/ours_20/names.json").write_text(json.dumps(names))
    config = (folder / "config.json").read_text().replace(json.dumps(str(folder)), json.dumps(evil))
    (folder / "config.json").write_text(config)
    renamed = folder.rename(models / "<b>one")
    found = Reader(written(renamed))
    assert evil in found.text and "<b>one" in found.text
    assert not [attrs for _, attrs in found.tags if "onerror" in attrs]
    assert not any(attrs.get("src") == "x" for _, attrs in found.tags)


def test_the_same_but_for_the_date(models, monkeypatch):
    first = written(models / "one").read_bytes()
    monkeypatch.setattr(page.time, "strftime", lambda form: "another day")
    dated = re.sub(rb"Written on [\d: -]+", b"Written on another day", first)
    assert written(models / "one").read_bytes() == dated


def test_the_command_trains_it_again(models):
    facts = gather(models / "two")
    words = shlex.split(facts.command)
    assert words[:2] == ["python", "train.py"]
    told = parse_train(words[2:])
    stored = json.loads((models / "two/config.json").read_text())
    assert vars(told.opt) == stored["OptimizationParams"] and vars(told.pipe) == stored["PipelineParams"]
    assert vars(told.model) == stored["ModelParams"]
    skip = {"quiet": False, "device": "cpu"}
    assert vars(told.run) | skip == stored["RunParams"] | skip


def test_defaults_of_a_strategy_are_no_changes(models):
    config = json.loads((models / "one/config.json").read_text())
    config["OptimizationParams"] |= {"strategy": "mcmc", "opacity_lr": 0.05, "cap_max": 1_000_000}
    config["OptimizationParams"]["densify_until_iter"] = 25_000
    (models / "one/config.json").write_text(json.dumps(config))
    changed = gather(models / "one").changed
    assert changed["strategy"] == ("mcmc", "adc")
    assert not {"opacity_lr", "cap_max", "densify_until_iter"} & set(changed)


def test_the_size_is_kept(models, monkeypatch, capsys):
    monkeypatch.setattr(page, "FEWEST", 1)
    monkeypatch.setattr(page, "FOR_PICTURES", 0.004)  # of a megabyte
    path = written(models / "one", "--max_mb", "1")
    found = Reader(path)
    assert len(found.of("figure")) == 2 and "Pictures of 1 of 2 views" in found.text
    assert "it has only pictures of 1 of 2 views" in capsys.readouterr().out
    assert path.stat().st_size <= 1e6


def test_films_of_the_folder_are_inside(models):
    video.write(frames(4), 4, models / "one/orbit.mp4", 24, "av1")
    found = Reader(written(models / "one"))
    (film,) = found.of("video")
    assert film["src"].startswith("data:video/mp4;base64,") and "orbit.mp4" in found.text


@pytest.mark.parametrize("gone", ["test", "results.json", "per_view.json", "summary.json", "cameras.json",
                                  "split.json", "config.json", "train.log"])  # fmt: skip
def test_what_is_missing_is_left_out(models, gone):
    for path in (models / "one").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if gone == "config.json":
        (models / "one/cfg_args").unlink()
    found = Reader(written(models / "one"))
    assert ("run render.py" in found.text) == (gone == "test")


def test_an_empty_folder_and_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "run render.py" in Reader(written(tmp_path / "empty")).text
    assert report.main(["-m", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said", [([], "model_paths is empty"), (["-m", "a", "--to", "a.pdf"], "to must be")]
)
def test_flags_that_cannot_be_meant(flags, said, capsys):
    with pytest.raises(SystemExit):
        report.main(flags)
    assert said in capsys.readouterr().err


def contrast(a: str, b: str) -> float:
    """As WCAG 2 has it."""

    def light(color: str) -> float:
        color = color if len(color) == 6 else "".join(c + c for c in color)
        parts = [int(color[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_by_day_and_by_night():
    schemes = re.findall(r":root \{(.*?)\}", (page.HERE / "report.css").read_text(), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): #(\w+)", scheme))
        for name in ("ink", "soft", "s0", "s1", "s2", "s3", "s4", "s5"):
            for paper in ("paper",) if name.startswith("s") and name != "soft" else ("paper", "panel"):
                assert contrast(colors[name], colors[paper]) >= 4.5, (name, colors[name])


def test_in_a_browser(browser, models):
    path = written(models / "one")
    tab = browser.new_page(viewport={"width": 900, "height": 700})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(f"file://{path}")
    slider = tab.locator("input[type=range]").first
    slider.fill("20")
    assert tab.locator(".pair").first.evaluate("e => e.style.getPropertyValue('--at')") == "20%"
    error = tab.locator(".pair img.error").first
    assert error.evaluate("e => getComputedStyle(e).opacity") == "0"
    tab.locator(".pair input").first.check()
    assert error.evaluate("e => getComputedStyle(e).opacity") == "1"
    assert not said and [url for url in asked if not url.startswith("data:")] == [f"file://{path}"]
    wide = tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide, "nothing sticks out"
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(f"file://{path}")
    assert plain.locator("figure").count() == 3 and "dB" in plain.locator("body").inner_text()


def test_the_splats_are_inside(browser, models):
    pytest.importorskip("viewer.embed", reason="the page that draws splats is not here")
    path = written(models / "one")
    tab = browser.new_page(viewport={"width": 900, "height": 700})
    tab.goto(f"file://{path}")
    assert tab.locator("iframe").count() == 0
    tab.locator("button[data-splats]").click()
    frame = tab.frames[-1]
    frame.wait_for_function("window.__ready || window.__error", timeout=60_000)
    assert frame.evaluate("window.__ready && !window.__error")
    without = written(models / "one", "--no-splats")
    assert not Reader(without).of("button")


def test_charts():
    drawn = svg.chart("A < B", [svg.Line("x", [(0, 1.0), (10, float("nan")), (20, 3.0)])], "dB")
    assert "A &lt; B (dB)" in drawn and "nan" not in drawn
    (line,) = (text.split() for text in re.findall(r'points="([^"]*)"', drawn))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line)
    assert (x0, x1) == (svg.LEFT, svg.WIDTH - svg.RIGHT) and (y0, y1) == (svg.HEIGHT - svg.BOTTOM, svg.TOP)
    assert (
        svg.chart("empty", [svg.Line("x", [])]) == svg.histogram("empty", []) == svg.plan("empty", []) == ""
    )
    many = svg.thinned([(k, 2 * k) for k in range(1000)])
    assert len(many) == 200 and many[0] == (2.0, 4.0) and many[-1] == (997.0, 1994.0)
    assert svg.Axis.of([3.0, 97.0], 0, 1).ticks() == [0, 50, 100]
    assert svg.histogram("same", [5.0, 5.0]).count("<title>2 from") == 1
