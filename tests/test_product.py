"""What surrounds the code agrees with itself: lock, environments, README, Makefile, contact sheet."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import contact_sheet, flags_page
from tools.setup_env import listed
from utils.files import DataError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def locked(name: str) -> dict[str, list[str]]:
    """Package -> its pinned versions (one per range of Python versions)."""
    pins: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", (ROOT / name).read_text(), re.M):
        pins.setdefault(package.lower(), []).append(version)
    return pins


# --- dependencies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-capture"])
def test_lock_pins_and_hashes_everything_that_is_asked_for(name):
    pins, text = locked(f"{name}.txt"), (ROOT / f"{name}.txt").read_text()
    missing = [package for package in listed(ROOT / f"{name}.in") if package.lower() not in pins]
    assert not missing, f"make lock: {missing}"
    assert len(pins) > 20
    for block in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        assert "--hash=sha256:" in block, f"no hash: {block.splitlines()[0]}"
    assert "://" not in text and "--index" not in text, "a lock names packages, not where they come from"


def test_locks_agree_with_each_other_and_with_the_pins():
    base = locked("requirements.txt")
    for more in (locked("requirements-dev.txt"), locked("requirements-capture.txt")):
        assert {package: more.get(package) for package in base} == base
    for package, version in re.findall(r"^([a-z]+)==(\S+)", (ROOT / "requirements.in").read_text(), re.M):
        assert base[package] == [version]


def test_conda_environment_installs_the_lock():
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pip = lines[lines.index("- pip:") + 1 :]
    assert pip == ["- -r requirements-dev.txt"], "all Python packages come from the lock"
    major, minor = re.search(r"- python=(\d+)\.(\d+)", text).groups()
    oldest = tuple(
        map(int, re.search(r'target-version = "py(\d)(\d+)"', (ROOT / "pyproject.toml").read_text()).groups())
    )
    assert (int(major), int(minor)) >= oldest == (3, 10)


def test_each_dependency_has_its_reason():
    for package in listed(ROOT / "requirements-dev.in") + listed(ROOT / "requirements-capture.in"):
        assert re.search(rf"^\| .*\b{re.escape(package)}\b", ARCHITECTURE, re.M), f"what is {package} for?"


# --- README -------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.split()) <= 900


def test_flags_page_is_that_of_the_code():
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), "python -m tools.flags_page"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"
    assert "TODO" not in text and "<!--" not in text, "nothing is left open"


def test_architecture_names_rooms_that_exist():
    rooms = ARCHITECTURE.split("## What it stands on")[0]
    for name in re.findall(r"`([\w./-]+(?:/|\.py))`", rooms):
        places = [ROOT, ROOT / "submodules/diff-gaussian-rasterization"]
        places += [ROOT / "training", ROOT / "strategies", ROOT / "per_view", ROOT / "scene"]
        assert any((place / name).exists() for place in places), f"docs/architecture.md names {name}"


def test_readme_commands_are_makefile_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)|`make (\w+)", README, re.M)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"make {''.join(target)}"


def test_readme_pictures_are_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).stat().st_size < 400 * 1024 for picture in pictures)


# --- the repository -----------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in text
        and "Version 2.0, January 2004" in text
        and "END OF TERMS AND CONDITIONS" in text
    )


def test_no_file_knows_one_machine_or_one_registry():
    private = re.compile("|".join(["/" + "work/", "/" + "root/", "py" + "pi.org", "files.python" + "hosted"]))
    texts = [path for path in tracked() if path.suffix not in {".npz", ".png", ".jpg", ".bin", ".ply"}]
    assert len(texts) > 20
    found = [path.name for path in texts if private.search(path.read_text(errors="ignore"))]
    assert not found


def test_repository_stays_small():
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 12 << 20
    assert max(sizes.values()) < 4 << 20, max(sizes, key=sizes.get)


# --- make ---------------------------------------------------------------------------------------------------


def make(*arguments: str) -> str:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_demo_sets_up_first():
    """The steps behind it are tested in test_setup_env.py."""
    steps = make("demo", "-B")
    assert 0 < steps.index("setup_env.py native") < steps.index("setup_env.py demo")


def test_make_isolated_uses_its_own_environment():
    steps = make("test", "-B", "ISOLATED=1")
    assert "venv .venv requirements.txt" in steps and ".venv/bin/python -m pytest" in steps


def test_missing_packages_are_named(tmp_path):
    (tmp_path / "requirements.in").write_text("torch\nno-such-package-of-ours>=1  # for nothing\n")
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), "check", str(tmp_path / "requirements.in")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "lacks no-such-package-of-ours" in done.stderr
        and "pip install no-such-package-of-ours" in done.stderr
    )


# --- contact sheet ------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("gt", "renders"):
        (tmp_path / "test" / "ours_30" / part).mkdir(parents=True)
    for k in range(5):
        truth = rng.integers(0, 200, (30, 40, 3), np.uint8)
        other = truth.copy()
        other[10:20, 10:20] += 50
        Image.fromarray(truth).save(tmp_path / f"test/ours_30/gt/{k:05d}.png")
        Image.fromarray(other).save(tmp_path / f"test/ours_30/renders/{k:05d}.png")
    return tmp_path


def test_contact_sheet_shows_truth_render_and_error(rendered):
    sheet = np.array(contact_sheet.draw(rendered / "test/ours_30", 3)).astype(int)
    assert sheet.shape == (
        contact_sheet.HEAD + 3 * (30 + contact_sheet.LABEL) + contact_sheet.GAP,
        3 * contact_sheet.NARROWEST + 4 * 6,
        3,
    )
    top, gap = contact_sheet.HEAD, contact_sheet.GAP
    left = [gap + k * (contact_sheet.NARROWEST + gap) for k in range(3)]
    cells = [sheet[top : top + 30, at : at + 40] for at in left]
    assert cells[0].std() > 30
    assert (cells[1] - cells[0])[10:20, 10:20].min() == 50 and np.array_equal(cells[0][:10], cells[1][:10])
    assert cells[2][12:18, 12:18].mean() > 100 > 20 > cells[2][:8, :8].mean()


def test_contact_sheet_leaves_out_what_does_not_count(tmp_path):
    """Half of the picture is wrong and masked; in the other half all is off by 0.1: 20 dB."""
    truth = np.full((20, 30, 3), 102, np.uint8)
    render, mask = truth + np.uint8(25.5), np.zeros_like(truth)
    render[:, :15], mask[:, 15:] = 255, 255
    for part, picture in (("gt", truth), ("renders", render), ("masks", mask)):
        (tmp_path / part).mkdir()
        Image.fromarray(picture).save(tmp_path / part / "00000.png")
    row = contact_sheet.read_row(tmp_path, "00000.png")
    assert (row.error[:, :15] == 0).all() and (row.error[:, 15:] > 0.09).all()
    assert row.scores() == ("20.17 dB", "mean 0.0980, brightest from 0.25")
    assert contact_sheet.draw(tmp_path, 4).width >= 3 * contact_sheet.NARROWEST, "captions need room"


def test_contact_sheet_goes_to_the_folder_or_file_that_is_told(rendered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    for to in (folder, folder / "new" / "sheet.jpg"):
        assert contact_sheet.main(["-m", str(rendered), "--to", str(to)]) == 0
    assert contact_sheet.main(["-m", str(rendered)]) == 0
    found = {path.relative_to(folder) for path in folder.rglob("*.*")}
    assert found == {Path("contact_sheet.png"), Path("new/sheet.jpg")}
    assert (rendered / "contact_sheet.png").is_file()


def test_contact_sheet_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="run render.py first"):
        contact_sheet.newest(tmp_path)
