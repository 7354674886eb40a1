"""What `make` asks and does about the Python environment. Standard library only: nothing is installed yet.

setup_env.py active                  prints "yes" if this Python has torch and is not the project's .venv
setup_env.py name                    prints a short name for this environment
setup_env.py check requirements.in   says which of the listed packages this Python lacks; exit code 1 if any
setup_env.py venv FOLDER LOCK        makes a virtual environment with exactly the packages of a lock file
setup_env.py native FOLDER           builds and installs the native half with this Python's torch
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

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)


def fail(message: str) -> None:
    raise SystemExit(f"\n{message}\n")


def run(*command, **environment) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([str(part) for part in command], env={**os.environ, **environment})
    if done.returncode:
        fail(f"That failed (exit code {done.returncode}): {' '.join(map(str, command))}")


def active() -> None:
    ours = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
    print("yes" if importlib.util.find_spec("torch") and not ours else "no")


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
            names.append(re.match(r"[A-Za-z0-9_.-]+", line)[0])
    return names


def check(requirements: str) -> None:
    """The environment is the user's own: say what is missing, change nothing."""
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
}


def venv(folder: str, lock: str) -> None:
    start, folder = time.monotonic(), Path(folder)
    if sys.version_info < OLDEST:
        fail(
            f"Python must be 3.10 or newer, got {sys.version.split()[0]} ({sys.executable}).\n"
            "Choose another one: make PYTHON=python3.12"
        )
    if not any(shutil.which(cxx) for cxx in [os.environ.get("CXX", "g++"), "g++", "c++", "clang++"]):
        fail("No C++ compiler was found: install one (Debian, Ubuntu: apt install g++), or set CXX to yours.")
    print(f"Setting up {folder}/ from {lock}: a few GB, mostly torch. Later runs skip this.", flush=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if uv := working_uv():
        if not python.exists():
            run(uv, "venv", "--quiet", "--python", sys.executable, folder)
        run(uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", lock)
    else:
        if not has_pip(python):
            if not importlib.util.find_spec("ensurepip"):
                fail(
                    "This Python cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)."
                )
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
    commands = {"active": active, "name": name, "check": check, "venv": venv, "native": native}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        fail(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
