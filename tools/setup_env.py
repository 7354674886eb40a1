"""What `make` asks and does about the Python environment, and the demo. Standard library only: nothing is
installed yet. Where there is no make, the first two commands do what is needed.

setup_env.py setup                   makes .venv unless this Python has torch, and builds the native half
setup_env.py demo                    the same, then trains, renders and scores the sample scene
setup_env.py active                  prints "yes" if this Python has torch and is not the project's .venv
setup_env.py name                    prints a short name for this environment
setup_env.py check requirements.in   says which of the listed packages this Python lacks; exit code 1 if any
setup_env.py venv FOLDER LOCK        makes a virtual environment with exactly the packages of a lock file
setup_env.py native FOLDER           builds and installs the native half with this Python's torch
setup_env.py info PYTHON             says what was built for this Python; builds nothing
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)

# The packages that hold what a machine may lack, by package manager.
VENV = f"python3.{sys.version_info[1]}-venv"
MANAGERS = {
    "apt": ("apt install", {"venv": VENV, "compiler": "g++"}),
    "dnf": ("dnf install", {"venv": "python3", "compiler": "gcc-c++"}),
    "zypper": ("zypper install", {"venv": "python3", "compiler": "gcc-c++"}),
    "pacman": ("pacman -S", {"venv": "python", "compiler": "gcc"}),
}


# Succeeds where the native half is installed.
BUILT = "import importlib.util; raise SystemExit(not importlib.util.find_spec('diff_gaussian_rasterization'))"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\n{message}\n")


def run(*command, **environment) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([str(part) for part in command], env={**os.environ, **environment})
    if done.returncode:
        fail(f"That failed (exit code {done.returncode}): {' '.join(map(str, command))}")


def require(**missing: str | None) -> None:
    """Say all at once what this machine lacks, with the one command that installs it; or go on in silence."""
    lacks = {name: text for name, text in missing.items() if text}
    if not lacks:
        return
    lines = ["This machine lacks", *(f"    {text}" for text in lacks.values())]
    manager = next((name for name in MANAGERS if shutil.which(name)), None)
    install, packages = MANAGERS[manager] if manager else ("", {})
    if wanted := [packages[name] for name in lacks if name in packages]:
        sudo = "sudo " if os.geteuid() else ""
        lines += ["This installs it:", f"    {sudo}{install} {' '.join(wanted)}"]
    fail("\n".join([*lines, "Nothing was downloaded yet: run make again when that is done."]))


def no_python() -> str | None:
    if sys.version_info[:2] >= OLDEST:
        return None
    found = f"{sys.executable} is {sys.version.split()[0]}"
    return f"Python 3.10 or newer ({found}; `make PYTHON=python3.12` chooses another one)"


def no_compiler() -> str | None:
    named = os.environ.get("CXX")
    if any(shutil.which(cxx.split()[0]) for cxx in ([named] if named else ["g++", "c++", "clang++"])):
        return None
    return f"the C++ compiler that CXX names ({named})" if named else "a C++ compiler"


def no_venv(python: Path) -> str | None:
    """What keeps this Python from making the environment of that one."""
    if no_python() or has_pip(python) or importlib.util.find_spec("ensurepip") or working_uv():
        return None
    return f"the venv module of {sys.executable}"


def in_venv() -> bool:
    return Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()


def active() -> None:
    print("yes" if importlib.util.find_spec("torch") and not in_venv() else "no")


def name() -> None:
    print(
        f"python{sys.version_info[0]}.{sys.version_info[1]}-"
        + hashlib.sha1(sys.prefix.encode()).hexdigest()[:8]
    )


def listed(requirements: Path) -> list[str]:
    """Names of the packages in a requirements.in, those of included files too."""
    names = []
    for line in requirements.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            names += listed(requirements.parent / line[3:].strip())
        elif line:
            names.append(re.split(r"[^A-Za-z0-9_.-]", line)[0])
    return names


def check(requirements: str) -> None:
    """The environment is the user's own: say what is missing, change nothing."""
    if not importlib.util.find_spec("diff_gaussian_rasterization"):
        require(python=no_python(), compiler=no_compiler())
    missing = []
    for package in listed(Path(requirements)):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    print(f"Using the active Python as it is: {sys.executable}, torch {importlib.metadata.version('torch')}")
    needed = [package for package in missing if package not in OPTIONAL]
    if spared := [package for package in missing if package in OPTIONAL]:
        print(f"Going on without {', '.join(spared)} ({'; '.join(OPTIONAL[p] for p in spared)}).")
    if needed:
        fail(
            f"This Python lacks {', '.join(needed)}.\n"
            f"Either add {'it' if len(needed) == 1 else 'them'}:\n"
            f"    {sys.executable} -m pip install {' '.join(needed)}\n"
            "or let the project make an environment of its own in .venv/:\n"
            "    make demo ISOLATED=1"
        )


# What one can do without, and what is lost then.
OPTIONAL = {
    "pi-heif": "no HEIC photos",
    "opencv-python-headless": "no videos",
    "torchvision": "no LPIPS",
    "lpips": "no LPIPS",
    "tensorboard": "no TensorBoard curves",
    "ninja": "the ninja on PATH builds",
    "wheel": "setuptools builds wheels itself",
    "hypothesis": "property tests are skipped",
    "ruff": "no make lint",
    "clang-format": "no make lint",
    "pyright": "no make types",
    "mypy": "a test of types is skipped",
}


def python_of(folder: str) -> Path:
    return Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv(folder: str, lock: str) -> None:
    start = time.monotonic()
    python = python_of(folder)
    require(python=no_python(), venv=no_venv(python), compiler=no_compiler())
    print(f"Setting up {folder}/ from {lock}: a few GB, mostly torch. Later runs skip this.", flush=True)
    if uv := working_uv():
        if not python.exists():
            run(uv, "venv", "--quiet", "--python", sys.executable, folder)
        run(uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", lock)
    else:
        if not has_pip(python):
            run(sys.executable, "-m", "venv", folder)
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        run(python, "-m", "pip", "install", *quiet, "--require-hashes", "-r", lock)
    print(f"{folder}/ is ready ({time.monotonic() - start:.0f} s)")


def native(folder: str) -> None:
    """One shared library for what is here: the CPU always; CUDA for a GPU, or if TILESPLAT_CUDA=1 says so."""
    start = time.monotonic()
    wish = os.environ.get("TILESPLAT_CUDA", "")
    if not wish and not has_gpu():
        wish = "0"
        if shutil.which("nvcc"):
            print("No NVIDIA GPU is visible: building for the CPU alone (TILESPLAT_CUDA=1 adds CUDA).")
    options = ["--no-build-isolation", "--no-deps", "--force-reinstall"]
    if has_pip(sys.executable):
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-index"]
        run(sys.executable, "-m", "pip", "install", *quiet, *options, f"./{folder}", TILESPLAT_CUDA=wish)
    elif uv := working_uv():
        run(
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            sys.executable,
            *options,
            f"./{folder}",
            TILESPLAT_CUDA=wish,
        )
    else:
        fail(f"{sys.executable} has no pip: python -m ensurepip adds it.")
    print(f"The native half is built and installed ({time.monotonic() - start:.0f} s)")


# ---- without make ----------------------------------------------------------------------------------------


def environment() -> Path:
    """The Python to work with: this one if it has torch, else that of .venv/, which is made if need be."""
    if importlib.util.find_spec("torch"):
        if not in_venv():
            check("requirements.in")
        return Path(sys.executable)
    stamp = Path(".venv/packages")
    if not stamp.exists():
        venv(".venv", "requirements.txt")
        stamp.touch()
    return python_of(".venv")


def setup() -> Path:
    os.chdir(ROOT)
    python = environment()
    if subprocess.run([python, "-c", BUILT]).returncode:
        run(python, "tools/setup_env.py", "native", NATIVE)
    return python


# What the demo makes, one after the other: a file, what it is made of, and the command. Names in braces are
# variables of the environment, with these defaults.
NATIVE = "submodules/diff-gaussian-rasterization"
DEFAULTS = {"ITERATIONS": "1000", "DEMO": "output/demo", "SAMPLE": "output/sample", "VIEWS": "60"}
ROOMS = ("arguments", "gaussian_renderer", "per_view", "scene", "strategies", "training", "utils")
SOURCES = ("train.py", "render.py", "metrics.py", *(f"{room}/**/*.py" for room in ROOMS))
# A thirtieth of the published length: steps are larger; Gaussians are added from the start, more sparingly.
SHORT = (
    "--disable_viewer --iterations {ITERATIONS} --test_iterations {ITERATIONS} "
    "--position_lr_max_steps {ITERATIONS} --position_lr_init 0.0003 --feature_lr 0.01 --opacity_lr 0.05 "
    "--scaling_lr 0.015 --densify_from_iter 150 --densify_until_iter {DENSIFY_UNTIL} "
    "--densify_grad_threshold 0.0004"
)
POINTS = "{SAMPLE}/sparse/0/points3D.bin"
SPLATS = "{DEMO}/point_cloud/iteration_{ITERATIONS}/point_cloud.ply"
NAMES = "{DEMO}/test/ours_{ITERATIONS}/names.json"
SCORES = "{DEMO}/metrics.txt"
SHEET, REPORT = "{DEMO}/contact_sheet.png", "{DEMO}/report.html"
DEMO = [
    (POINTS, ("sample_scene/*.py",), "-m sample_scene {SAMPLE} --views {VIEWS}"),
    (SPLATS, (POINTS, *SOURCES), "train.py -s {SAMPLE} -m {DEMO} --overwrite --eval " + SHORT),
    (NAMES, (SPLATS,), "render.py -m {DEMO} --iteration {ITERATIONS} --skip_train"),
    (SCORES, (NAMES,), "metrics.py -m {DEMO}"),
    (SHEET, (SCORES, "tools/contact_sheet.py"), "-m tools.contact_sheet -m {DEMO} --iteration {ITERATIONS}"),
    (REPORT, (SCORES, "report.py", "viewer/*"), "report.py -m {DEMO}"),
]  # fmt: skip


def demo() -> None:
    """Train the sample scene, render and score it; skip what is newer than what it is made of."""
    python = setup()
    values = {name: os.environ.get(name, default) for name, default in DEFAULTS.items()}
    values["DENSIFY_UNTIL"] = str(int(values["ITERATIONS"]) * 3 // 4)
    fill = lambda text: text.format(**values)  # noqa: E731
    for target, sources, command in DEMO:
        path = Path(fill(target))
        if is_stale(path, [fill(source) for source in sources]):
            make(path, python, *map(fill, command.split()))
    print(Path(fill(SCORES)).read_text(), end="")
    print("Ground truth, render and error side by side:", fill(SHEET))
    print("All about it on one page, for your browser:", fill(REPORT))


def is_stale(target: Path, sources: list[str]) -> bool:
    """Whether it is not there, or older than a source: a path or a pattern below the project."""
    if not target.exists():
        return True
    made = target.stat().st_mtime
    found = (path for source in sources for path in (ROOT.glob(source) if "*" in source else [Path(source)]))
    return any(path.stat().st_mtime > made for path in found)


def make(target: Path, *command) -> None:
    """Runs what makes a file; scores are what the command prints."""
    if target.suffix != ".txt":
        return run(*command)
    print("+", " ".join(map(str, command)), ">", target, flush=True)
    with target.open("w") as file:
        done = subprocess.run([str(part) for part in command], stdout=file)
    if done.returncode:
        target.unlink()
        fail(f"That failed (exit code {done.returncode}): {' '.join(map(str, command))}")


def info(python: str) -> None:
    if not shutil.which(python) or subprocess.run([python, "-c", BUILT]).returncode:
        fail(f"Nothing is built for {python} yet: `make setup` does it.")
    raise SystemExit(subprocess.run([python, "-m", "diff_gaussian_rasterization"]).returncode)


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout.startswith(b"GPU")
    except (OSError, subprocess.TimeoutExpired):
        return False


def has_pip(python) -> bool:
    try:
        return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def working_uv() -> str | None:
    uv = shutil.which("uv")
    return uv if uv and subprocess.run([uv, "--version"], capture_output=True).returncode == 0 else None


if __name__ == "__main__":
    commands = {
        "setup": setup, "demo": demo, "active": active, "name": name, "check": check, "venv": venv,
        "native": native, "info": info,
    }  # fmt: skip
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        fail(str(__doc__))
    commands[sys.argv[1]](*sys.argv[2:])
