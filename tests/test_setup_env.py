"""What `make` says on a machine that lacks something: all of it at once, before anything is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup_env

ROOT = Path(__file__).resolve().parent.parent
APT = shutil.which("apt") or "/usr/bin/apt"


@pytest.fixture
def machine(monkeypatch):
    """A machine whose PATH has these programs and whose Python has these modules; what is run is recorded."""
    has = {"apt", "g++", "ensurepip"}
    ran = []
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: f"/usr/bin/{name}" if name in has else None)
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: name in has or None)
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup_env, "run", lambda *command, **_: ran.append(" ".join(map(str, command))))
    return has, ran


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        setup_env.venv(*arguments)
    return str(stop.value)


def test_bare_debian_is_told_everything_at_once(machine, tmp_path, capsys):
    has, ran = machine
    has -= {"g++", "ensurepip"}
    said = refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    assert "a C++ compiler" in said and f"the venv module of {sys.executable}" in said
    assert f"\n    apt install python3.{sys.version_info[1]}-venv g++\n" in said
    assert not ran and not (tmp_path / "venv").exists() and not capsys.readouterr().out


def test_only_what_is_missing_is_named(machine, tmp_path, capsys, monkeypatch):
    has, ran = machine
    has.remove("ensurepip")
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: 1000)
    said = refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    assert f"\n    sudo apt install python3.{sys.version_info[1]}-venv\n" in said
    assert "compiler" not in said and not ran


def test_other_systems(machine, tmp_path, capsys):
    has, ran = machine
    has -= {"g++", "apt"}
    assert "install" not in refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    has.add("dnf")
    assert "\n    dnf install gcc-c++\n" in refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    assert not ran


def test_old_python_has_no_package_of_its_own(machine, tmp_path, capsys, monkeypatch):
    has, ran = machine
    has -= {"g++", "ensurepip"}
    monkeypatch.setattr(setup_env, "OLDEST", (3, 99))
    said = refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    assert "Python 3.10 or newer" in said and "make PYTHON=" in said and "\n    apt install g++\n" in said
    assert not ran


def test_compiler_that_CXX_names_is_the_one_that_counts(machine, tmp_path, capsys, monkeypatch):
    has, ran = machine
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    said = refusal(capsys, str(tmp_path / "venv"), "requirements.txt")
    assert "the C++ compiler that CXX names (no-such-compiler -O3)" in said
    monkeypatch.setenv("CXX", "g++ -g")
    setup_env.venv(str(tmp_path / "venv"), "requirements.txt")
    assert len(ran) == 2


def test_complete_machine_goes_on(machine, tmp_path):
    has, ran = machine
    setup_env.venv(str(tmp_path / "venv"), "requirements.txt")
    assert ran[0] == f"{sys.executable} -m venv {tmp_path / 'venv'}"
    assert "pip install" in ran[1] and ran[1].endswith("--require-hashes -r requirements.txt")


def test_python_without_ensurepip_stops_before_it_makes_anything(tmp_path):
    """The real program, with a PATH that has nothing but apt."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt").symlink_to(APT if Path(APT).exists() else "/bin/true")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ensurepip'] = None\n")
    environment = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), "venv", str(tmp_path / "venv"), "none.txt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert f"apt install python3.{sys.version_info[1]}-venv g++" in done.stderr
    assert not (tmp_path / "venv").exists()


# --- the demo -----------------------------------------------------------------------------------------------


def test_demo_makes_what_is_missing_or_older_than_what_it_is_made_of(tmp_path, monkeypatch, capsys):
    made = []

    def make(target, python, *command):
        made.append(command[1] if command[0] == "-m" else command[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("31 dB\n")

    monkeypatch.setattr(setup_env, "setup", lambda: Path(sys.executable))
    monkeypatch.setattr(setup_env, "make", make)
    for name, value in {
        "DEMO": tmp_path / "a demo",
        "SAMPLE": tmp_path / "sample",
        "ITERATIONS": "200",
    }.items():
        monkeypatch.setenv(name, str(value))
    setup_env.demo()
    everything = ["sample_scene", "train.py", "render.py", "metrics.py", "tools.contact_sheet", "report.py"]
    assert made == everything and capsys.readouterr().out.startswith("31 dB\nGround truth")
    made.clear()
    setup_env.demo()
    assert not made
    (tmp_path / "a demo/test/ours_200/names.json").unlink()
    setup_env.demo()
    assert made == everything[2:]


def test_setup_without_make(machine, monkeypatch):
    """As `make setup`: .venv where no Python has torch; the native half where it is missing."""
    has, ran = machine
    monkeypatch.setattr(setup_env, "has_pip", lambda python: True)
    monkeypatch.setattr(setup_env.subprocess, "run", lambda *_: subprocess.CompletedProcess(_, 1))
    monkeypatch.setattr(setup_env.Path, "exists", lambda path: False)
    monkeypatch.setattr(setup_env.Path, "touch", lambda path: None)
    monkeypatch.chdir(ROOT)
    python = setup_env.setup()
    assert python == setup_env.python_of(".venv") and "pip install" in ran[0]
    assert ran[1].endswith("tools/setup_env.py native submodules/diff-gaussian-rasterization")


# --- make info ----------------------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_make_info_builds_nothing(tmp_path):
    (tmp_path / "submodules").mkdir()
    for name in ("Makefile", "tools/setup_env.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    done = make(tmp_path, "info", "ISOLATED=1")
    assert (
        done.returncode and "Nothing is built for .venv/bin/python yet: `make setup` does it." in done.stderr
    )
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before
    assert "native" not in make(ROOT, "-nB", "info").stdout


def test_make_info_tells_what_is_built():
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), "info", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "self-check   cpu scalar: ok" in done.stdout
