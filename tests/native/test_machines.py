"""The CPU part on machines that are not this one: what runs under an emulator, and what at least compiles.

The tools come from elsewhere, and where they are missing the tests are skipped: `apt install qemu-user
g++-aarch64-linux-gnu`, and zig (`pip install ziglang`), by its name on PATH or as the variable ZIG.
"""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "submodules/diff-gaussian-rasterization"
SETUP = runpy.run_path(str(PACKAGE / "setup.py"), run_name="build")
ZIG = [os.environ.get("ZIG", "zig"), "c++"]


@dataclass
class Machine:
    compiler: list[str]
    machine: str  # as in setup.py
    flags: list[str]  # after those of setup.py
    runner: list[str] | None  # None: it is only compiled

    def lacks(self) -> list[str]:
        return [tool[0] for tool in (self.compiler, self.runner) if tool and not shutil.which(tool[0])]


# What is only compiled is not optimized: that takes a quarter of the time.
MACHINES = {
    "arm64 Linux": Machine(["aarch64-linux-gnu-g++"], "arm64", ["-static"], ["qemu-aarch64"]),
    "arm64 macOS": Machine([*ZIG, "-target", "aarch64-macos"], "arm64", ["-O0"], None),
    "x86-64 Windows": Machine([*ZIG, "-target", "x86_64-windows-gnu"], "x86_64", ["-O0"], None),
}


def commands(machine: Machine, folder: Path) -> tuple[list[list[str]], list[str]]:
    """How to compile every file, and how to link them."""
    isas = SETUP["ISAS"][machine.machine]
    known = [f"-DTILESPLAT_HAS_{isa.upper()}" for isa in isas]
    compiler = [*machine.compiler, *SETUP["CXX_FLAGS"], *machine.flags, f"-I{PACKAGE / 'csrc'}", *known]
    files = [(source, []) for source in sorted((PACKAGE / "csrc/cpu").glob("*.cpp"))]
    files = [(source, []) for source, _ in files if not source.name.endswith(".isa.cpp")]
    files += [
        (PACKAGE / "csrc/cpu/kernels.isa.cpp", [*flags, f"-DTILESPLAT_ISA={isa}"])
        for isa, flags in isas.items()
    ]
    files += [(ROOT / "tests/native/machine.cpp", [])]
    objects = [str(folder / f"{i}.o") for i in range(len(files))]
    compile_all = [[*compiler, *own, "-c", str(s), "-o", o] for (s, own), o in zip(files, objects)]
    return compile_all, [*machine.compiler, *machine.flags, *objects, "-o", str(folder / "machine")]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout + done.stderr
    return done.stdout


def build(machine: Machine, folder: Path) -> Path:
    compile_all, link = commands(machine, folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, compile_all))
    run(link)
    return folder / "machine"


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_the_cpu_part_compiles_and_computes(name, tmp_path):
    machine = MACHINES[name]
    if lacks := machine.lacks():
        pytest.skip(f"needs {', '.join(lacks)}")
    program = build(machine, tmp_path)
    if machine.runner is None:
        return
    said = run([*machine.runner, str(program)])
    assert said.endswith("all is well\n") and "neon: " in said and "scalar: " in said, said


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_this_machine_computes_without_torch(tmp_path):
    """With the objects of the build, where one is in the source folder."""
    builds = sorted(PACKAGE.glob("build/*torch*/cpu"), key=lambda path: path.stat().st_mtime)
    if not builds:
        pytest.skip("the package was not built in its source folder")
    program, objects = tmp_path / "machine", [str(path) for path in builds[-1].glob("*.o")]
    driver = str(ROOT / "tests/native/machine.cpp")
    flags = [*SETUP["CXX_FLAGS"], "-O1", f"-I{PACKAGE / 'csrc'}", "-fopenmp"]
    run(["g++", *flags, driver, *objects, "-o", str(program)])
    assert run([str(program)]).endswith("all is well\n")
