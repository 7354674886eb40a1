"""Builds ONE shared library out of csrc/, for the CPU always and for CUDA when nvcc is found.

    pip install --no-build-isolation .          install
    python setup.py build_ext --inplace         for developers: rebuild what changed, in place

The library registers its operators with TORCH_LIBRARY and knows nothing of Python, so it is loaded with
torch.ops.load_library and works with every Python version. This script only decides what to compile and how,
writes that down as a ninja file under build/, and runs ninja, which recompiles exactly what changed.

What goes in: every csrc/**/*.cpp and, for CUDA, csrc/**/*.cu, found by name.
  csrc/cpu/NAME.isa.cpp     compiled once for each instruction set in ISAS, with -DTILESPLAT_ISA=<name>
  csrc/cuda/, ops*_cuda.cpp only when CUDA is on; ops_no_cuda.cpp only when it is off
  EXTRA_FLAGS               flags of single files

Environment:
  TILESPLAT_CUDA=0|1        never / always build the CUDA part (default: when nvcc and a CUDA torch are there)
  TORCH_CUDA_ARCH_LIST      such as "8.6;9.0+PTX" (default: the visible GPUs, else the common ones)
  CUDA_HOME, CXX, MAX_JOBS  as everywhere; options in CXX come before ours, so that -O3 stays
  NVCC_APPEND_FLAGS         nvcc's own: -lineinfo shows lines in profilers; the library is twice as large
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "libtilesplat.so"
PACKAGE = "diff_gaussian_rasterization"

WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
# -ffast-math is not among these: it breaks NaN checks and the rounding trick of 2^x.
# -O3 is not for speed alone: at -O1 and -O2, g++ 12 and 13 let arrays of a kernel share their stack while
# both are in use, and gradients of means come out 4 % wrong (right with -fno-ivopts or -fstack-reuse=none).
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
             "-fno-trapping-math", "-ffp-contract=fast", *WARNINGS]  # fmt: skip
# torch's C++ library, by its file name: a compiler that finds no libstdc++.so takes libstdc++.a without a
# word, and with that second copy inside ours, putting a number into a message writes nothing or crashes.
SHARED_STDLIB = ["-l:libstdc++.so.6"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda",
              "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xcudafe", "--diag_suppress=20012"]  # fmt: skip

# Instruction sets per machine, best first; the last runs everywhere.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
ISAS = {
    "x86_64": {
        "avx512": [
            "-mavx512f",
            "-mavx512dq",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512cd",
            *AVX2,
            "-mprefer-vector-width=512",
        ],  # fmt: skip
        "avx2": AVX2,
        "scalar": [],
    },
    "arm64": {"neon": [], "scalar": []},
    "other": {"scalar": []},
}

# Flags of single files, by path below csrc/, where the compiler takes them. Double is for tests of gradients:
# it need not be fast, and compiles in half the time, to the same bits. (Why the second flag: see -O3 above.)
EXTRA_FLAGS = {"cpu/kernels_double.cpp": ["-O1", "-fstack-reuse=none"]}

# What we compile for without TORCH_CUDA_ARCH_LIST and without a GPU, as far as nvcc knows them.
COMMON_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
NAMED_ARCHS = {"Turing": "7.5", "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}


def fail(sentence: str) -> NoReturn:
    """Stop with one sentence instead of a traceback."""
    raise SystemExit(f"\ndiff-gaussian-rasterization: {sentence}\n")


# ---- what is on this machine ---------------------------------------------------------------------


def check_sources() -> None:
    """A library without operators builds too: what registers them must be there."""
    glue = [
        "ops.cpp", "ops_cpu.cpp", "ops_cuda.cpp", "ops_no_cuda.cpp", "ops_stages.cpp", "ops_stages_cpu.cpp",
        "ops_stages_cuda.cpp", "ops_dealt.cpp", "ops_dealt_cuda.cpp",
    ]  # fmt: skip
    if missing := [name for name in glue if not (CSRC / name).is_file()]:
        fail(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in {CSRC}: this copy of "
            "the sources is incomplete, so get a complete one."
        )


def torch_required() -> str:
    """What the metadata asks for: of a wheel, the torch release it was built for; of sources, any."""
    if "sdist" in sys.argv:
        return "torch"
    try:
        return f"torch=={'.'.join(version('torch').split('.')[:2])}.*"
    except PackageNotFoundError:
        return "torch"


def find_torch():
    try:
        import torch
    except ImportError:
        fail(
            "PyTorch was not found by this build: install torch first, and then run "
            "`pip install --no-build-isolation ./submodules/diff-gaussian-rasterization` (without that flag, "
            "pip builds in an empty environment, where your torch cannot be seen)."
        )
    if sys.platform == "win32":
        fail("building on Windows itself is not supported: build under WSL2, where both parts work.")
    return torch


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        if path := shutil.which(name.split()[0]):
            return " ".join([path, *name.split()[1:]])
    fail(
        f"no C++ compiler was found (tried {wanted or 'g++, c++, clang++'}): install one "
        "(`apt install g++`, or `conda install -c conda-forge gxx`), or set CXX to yours."
    )


def find_ninja() -> str:
    try:
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
    except ImportError:
        packaged = Path("none")
    if packaged.is_file() and packaged.is_absolute():
        return str(packaged)
    return shutil.which("ninja") or fail(
        "ninja was not found: `pip install ninja` (or apt, conda), then try again."
    )


def find_cuda_home() -> Path | None:
    """The first likely folder that has the toolkit's headers: the nvcc on PATH may be a wrapper elsewhere."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates += [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
    if conda := os.environ.get("CONDA_PREFIX"):
        candidates += [conda]
    candidates += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), "/opt/cuda"]
    for folder in filter(None, candidates):
        folder = Path(folder)
        headers = [folder / "include", *folder.glob("targets/*/include")]
        if (folder / "bin/nvcc").exists() and any((h / "cuda_runtime_api.h").exists() for h in headers):
            return folder
    return None


def want_cuda(torch) -> Path | None:
    """The toolkit to build the CUDA part with, or None for a CPU build."""
    wish = os.environ.get("TILESPLAT_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"TILESPLAT_CUDA must be 0 or 1, got {wish!r}.")
    if wish == "0":
        return None
    home = find_cuda_home()
    forced = wish == "1"
    if torch.version.cuda is None:
        if forced:
            fail(
                f"TILESPLAT_CUDA=1 needs a torch with CUDA, but torch {torch.__version__} has none: "
                "install a CUDA build of torch."
            )
        return None
    if home is None:
        if forced:
            fail(
                "TILESPLAT_CUDA=1, but no nvcc with its headers was found: install the CUDA toolkit, or set "
                "CUDA_HOME to where it is."
            )
        print("nvcc was not found: building the CPU part alone", file=sys.stderr)
        return None
    version = nvcc_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        fail(
            f"{home}/bin/nvcc is CUDA {version}, but torch {torch.__version__} was built with CUDA "
            f"{torch.version.cuda}: install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it, "
            "or set TILESPLAT_CUDA=0 to build the CPU part alone."
        )
    return home


def nvcc_version(home: Path) -> str:
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else fail(f"{home}/bin/nvcc does not say which release it is: {text!r}.")


def cuda_archs(torch, home: Path) -> list[str]:
    """Such as ["8.6", "9.0+PTX"]: what the user lists, else the visible GPUs, else the common ones."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        for name, numbers in NAMED_ARCHS.items():
            listed = listed.replace(name, numbers)
        archs = [a for a in re.split(r"[;,\s]+", listed) if a]
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                fail(f'TORCH_CUDA_ARCH_LIST must list architectures such as "8.6;9.0+PTX", got {arch!r}.')
        return archs
    try:
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    except RuntimeError:
        visible = set()
    if visible:
        return [f"{major}.{minor}" for major, minor in sorted(visible)]
    text = subprocess.run(
        [home / "bin/nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    known = [a for a in COMMON_ARCHS if f"sm_{a.replace('.', '')}" in text.split()]
    return known[:-1] + [known[-1] + "+PTX"]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def isas(compiler: str) -> dict[str, list[str]]:
    """The instruction sets to build for: those of this machine whose flags the compiler takes."""
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
    known = ISAS.get(machine, ISAS["other"])
    return {name: flags for name, flags in known.items() if compiles(compiler, flags)}


def compiles(compiler: str, flags: list[str], into: str = "-c") -> bool:
    command = [*compiler.split(), *flags, "-x", "c++", into, "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0


# ---- the ninja file ------------------------------------------------------------------------------


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(path) -> str:
    return f"'{path}'" if " " in str(path) else str(path)


class NinjaFile:
    """What to compile and how, as text for ninja."""

    def __init__(self, torch, folder: Path):
        self.folder = folder
        self.objects: dict[str, list[str]] = {"cpu": [], "cuda": []}
        self.edges: list[str] = []
        self.compiler = find_compiler()
        self.isas = isas(self.compiler)
        self.cuda_home = want_cuda(torch)
        self.archs = cuda_archs(torch, self.cuda_home) if self.cuda_home else []
        self.cuda_include = [f"-isystem {shell(i)}" for i in self._cuda_folders("include")]
        self.torch_dir = Path(torch.__file__).parent
        self.abi = int(torch.compiled_with_cxx11_abi())
        self.openmp = next(
            (f for f in (["-fopenmp"], ["-Xpreprocessor", "-fopenmp"]) if compiles(self.compiler, f)), []
        )
        self._add_sources()

    # An inline function that several objects hold is kept once, from the first of them. So plain objects come
    # first, and each instruction set before the greater ones: no caller gets code for a greater set.
    def _add_sources(self) -> None:
        by_isa = []
        for source in sorted(CSRC.rglob("*.cpp")) + sorted(CSRC.rglob("*.cu")):
            name = source.relative_to(CSRC).as_posix()
            is_cuda = name.startswith("cuda/") or name.endswith("_cuda.cpp") and name != "ops_no_cuda.cpp"
            if name == "ops_no_cuda.cpp" if self.cuda_home else is_cuda:
                continue
            extra = EXTRA_FLAGS.get(name, [])
            extra = extra if compiles(self.compiler, extra) else []
            part = "cuda" if is_cuda else "cpu"
            if name.endswith(".isa.cpp"):
                by_isa.append((source, name, extra))
            else:
                rule = "nvcc" if name.endswith(".cu") else "cxx"
                self._edge(
                    rule,
                    source,
                    f"{name}.o",
                    extra + (self.cuda_include if rule == "cxx" and is_cuda else []),
                    part,
                )
        for isa, flags in reversed(self.isas.items()):
            for source, name, extra in by_isa:
                self._edge(
                    "cxx", source, f"{name}.{isa}.o", [*flags, f"-DTILESPLAT_ISA={isa}", *extra], "cpu"
                )

    def _edge(self, rule: str, source: Path, obj: str, flags: list[str], part: str) -> None:
        self.objects[part].append(escape(obj))
        self.edges.append(f"build {escape(obj)}: {rule} {escape(source)}\n  extra = {' '.join(flags)}")

    def text(self) -> str:
        has_isa = [f"-DTILESPLAT_HAS_{isa.upper()}" for isa in self.isas]
        # Only the glue (csrc/ops*.cpp) includes torch, but one set of include paths is simpler than two.
        torch_include = [
            f"-isystem {shell(self.torch_dir / 'include')}",
            f"-D_GLIBCXX_USE_CXX11_ABI={self.abi}",
        ]
        cxx = [*CXX_FLAGS, *self.openmp, f"-I{shell(CSRC)}", *torch_include, *has_isa]
        link = [
            "-shared",
            *(["-Wl,-z,defs"] if sys.platform == "linux" else []),
            *self.openmp,
            f"-L{shell(self.torch_dir / 'lib')}",
            "-lc10",
            "-ltorch_cpu",
            *(SHARED_STDLIB if compiles(self.compiler, SHARED_STDLIB, into="-shared") else []),
        ]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        nvcc = ""
        if self.cuda_home:
            # The shared runtime: torch has loaded it before us, and it needs no driver to load.
            link += [
                *(f"-L{shell(i)}" for i in self._cuda_folders("lib64", "lib")),
                "-lc10_cuda",
                "-ltorch_cuda",
                "-lcudart",
            ]
            nvcc = [
                shell(self.cuda_home / "bin/nvcc"),
                "-ccbin",
                shell(self.compiler.split()[0]),
                *NVCC_FLAGS,
            ]
            nvcc = " ".join([*nvcc, f"-I{shell(CSRC)}", *gencode(self.archs)])
        objects = {part: " ".join(names) for part, names in self.objects.items()}
        parts = [
            "ninja_required_version = 1.5",
            f"cxx = {' '.join([self.compiler, *cxx])}",
            f"nvcc = {nvcc}",
            *(
                f"rule {rule}\n  command = ${rule} -MMD -MF $out.d $extra -c $in -o $out\n"
                "  depfile = $out.d\n  deps = gcc\n  description = $out"
                for rule in ("cxx", "nvcc")
            ),
            f"rule link\n  command = {self.compiler} $in -o $out {' '.join(link)}\n  description = $out",
            *sorted(self.edges, key=lambda edge: "/kernels" not in edge),  # what takes longest begins first
            f"build {LIBRARY}: link {objects['cpu']} {objects['cuda']}",
            f"build cpu: phony {objects['cpu']}",
            f"build cuda: phony {objects['cuda']}",
            f"default {LIBRARY}",
        ]
        return "\n".join(parts) + "\n"

    def _cuda_folders(self, *names: str) -> list[Path]:
        if not self.cuda_home:
            return []
        folders = [self.cuda_home / n for n in names] + [
            p for n in names for p in self.cuda_home.glob(f"targets/*/{n}")
        ]
        return [f for f in folders if f.is_dir()]


def write_if_changed(path: Path, text: str) -> None:
    """Leave an unchanged file alone, so that nothing looks newer than it is."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ---- the setuptools commands ---------------------------------------------------------------------


class NinjaBuild(build_ext):
    """Compile with ninja in build/<torch version>/, then put the library beside the Python files."""

    def run(self):
        check_sources()
        torch = find_torch()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-torch{torch.__version__}".replace("+", "-")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            ninja_file = NinjaFile(torch, folder)
            write_if_changed(folder / "build.ninja", ninja_file.text())
            command = [find_ninja(), "-C", str(folder)]
            if jobs := os.environ.get("MAX_JOBS"):
                command += ["-j", jobs]
            if subprocess.run(command).returncode != 0:
                fail("compilation failed: the compiler's own message is above.")
            self._install(folder, ninja_file, torch)

    def _install(self, folder: Path, ninja_file: NinjaFile, torch) -> None:
        compiler = [*ninja_file.compiler.split(), "--version"]
        info = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "compiler": subprocess.run(compiler, capture_output=True, text=True).stdout.splitlines()[0],
            "isas": list(ninja_file.isas),
            "openmp": bool(ninja_file.openmp),
            "cuda": nvcc_version(ninja_file.cuda_home) if ninja_file.cuda_home else None,
            "cuda_archs": ninja_file.archs,
        }
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        built, library = folder / LIBRARY, target / LIBRARY
        # A new file under the old name: a process that has the old library loaded keeps it.
        if not library.exists() or library.read_bytes() != built.read_bytes():
            shutil.copy2(built, target / (LIBRARY + ".new"))
            os.replace(target / (LIBRARY + ".new"), library)
        write_if_changed(target / "build_info.json", json.dumps(info, indent=1) + "\n")

    def get_ext_filename(self, fullname):
        return f"{PACKAGE}/{LIBRARY}"

    def get_outputs(self):
        return [str(Path(self.build_lib) / PACKAGE / name) for name in (LIBRARY, "build_info.json")]

    def get_output_mapping(self):
        return {}

    def copy_extensions_to_source(self):
        pass  # run() has put it there


class locked:
    """Two builds of one folder wait for each other."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        import fcntl

        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


class AnyPythonWheel(bdist_wheel):  # pyright: ignore[reportGeneralTypeIssues]
    """The library holds no Python, so the wheel is py3-none-<platform>. Its build tag names the torch that it
    was built for and the CUDA, as in 1torch2.11cu130 or 1torch2.11cpu."""

    def run(self):
        torch = find_torch()
        cuda = f"cu{torch.version.cuda}".replace(".", "") if want_cuda(torch) else "cpu"
        self.build_number = f"1torch{'.'.join(torch.__version__.split('.')[:2])}{cuda}"
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        packages=[PACKAGE, f"{PACKAGE}.flavours", "simple_knn", "fused_ssim"],
        package_data={"": ["py.typed"]},
        install_requires=[torch_required(), "numpy"],
        ext_modules=[Extension(f"{PACKAGE}.libtilesplat", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
    )
