"""What the build says when something is missing: one sentence with what to do about it, and no traceback.
What the source archive and the wheel hold, and what loading says about a library that does not fit."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from diff_gaussian_rasterization import _library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "submodules/diff-gaussian-rasterization"
GLUE = ("ops.cpp", "ops_cpu.cpp", "ops_cuda.cpp", "ops_no_cuda.cpp", "ops_stages.cpp", "ops_stages_cpu.cpp",
        "ops_stages_cuda.cpp", "ops_dealt.cpp", "ops_dealt_cuda.cpp")  # fmt: skip
TORCH = ".".join(torch.__version__.split(".")[:2])


def build_fails_with(folder: Path = PACKAGE, **environment: str) -> str:
    """The sentence that `setup.py build_ext` ends with, before anything is compiled."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    run = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    said = run.stdout + run.stderr
    assert run.returncode != 0 and "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("diff-gaussian-rasterization: ")]
    return sentence


def fake_toolkit(folder: Path, release: str) -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that only knows its version."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime_api.h").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)
    return folder


def test_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')\n")
    said = build_fails_with(PYTHONPATH=str(tmp_path))
    assert "PyTorch was not found" in said and "pip install --no-build-isolation" in said


def test_no_compiler():
    said = build_fails_with(CXX="no-such-compiler", TILESPLAT_CUDA="0")
    assert "no C++ compiler was found (tried no-such-compiler)" in said and "install one" in said


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_nvcc_that_does_not_match(tmp_path):
    toolkit = fake_toolkit(tmp_path / "cuda", "10.2")
    said = build_fails_with(CUDA_HOME=str(toolkit), TILESPLAT_CUDA="")
    assert "nvcc is CUDA 10.2" in said and f"built with CUDA {torch.version.cuda}" in said
    assert "set CUDA_HOME" in said and "TILESPLAT_CUDA=0" in said


def test_values_that_mean_nothing():
    assert "TILESPLAT_CUDA must be 0 or 1, got 'yes'" in build_fails_with(TILESPLAT_CUDA="yes")


# --- source archive and wheel ---------------------------------------------------------------------


def sources(folder: Path, leave_out: str = "") -> Path:
    """A copy of the package without what a build leaves."""
    ignore = shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "build_info.json", leave_out)
    return Path(shutil.copytree(PACKAGE, folder, ignore=ignore))


def setup_py(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"TILESPLAT_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=folder, env=environment, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel whose library is empty: it compiles in a second, and has no operators."""
    folder = sources(tmp_path_factory.mktemp("wheel") / "package", leave_out="csrc")
    (folder / "csrc").mkdir()
    for name in GLUE:
        (folder / "csrc" / name).touch()
    setup_py(folder, "bdist_wheel", "-d", "dist")
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture
def installed(wheel, tmp_path) -> Path:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def import_error(site: Path) -> str:
    """What importing the package from this folder ends with."""
    command = [sys.executable, "-c", "import diff_gaussian_rasterization"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_source_archive_holds_all_that_a_build_needs(tmp_path):
    folder = sources(tmp_path / "package")
    setup_py(folder, "sdist", "-d", "dist")
    (archive,) = (folder / "dist").iterdir()
    tarfile.open(archive).extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("diff_gaussian_rasterization-*")
    before, after = (
        {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()}
        for top in (sources(tmp_path / "fresh"), unpacked)
    )
    assert len(before) > 50 and not before - after - {".gitignore"}
    assert (unpacked / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "\nRequires-Dist: torch\n" in (unpacked / "PKG-INFO").read_text(), "sources go with any torch"


def test_sources_that_are_missing_end_the_build(tmp_path):
    said = build_fails_with(sources(tmp_path / "none", leave_out="csrc"))
    assert f"{', '.join(GLUE)} are missing in {tmp_path / 'none' / 'csrc'}" in said
    assert "ops_cpu.cpp is missing" in build_fails_with(sources(tmp_path / "some", leave_out="ops_cpu.cpp"))


def test_wheel_says_which_torch_it_was_built_for(wheel):
    assert re.search(rf"-1torch{TORCH}cpu-py3-none-\w+\.whl$", wheel.name)
    content = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in content.namelist() if ".dist-info/" in name}
    assert f"\nRequires-Dist: torch=={TORCH}.*\n" in content.read(f"{info}/METADATA").decode()
    assert f"\nBuild: 1torch{TORCH}cpu\n" in content.read(f"{info}/WHEEL").decode()
    assert content.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    for package in ("diff_gaussian_rasterization", "simple_knn", "fused_ssim"):
        assert f"{package}/py.typed" in content.namelist()


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory) -> Path:
    """With the parts that are installed here. What a build has left in the sources is not compiled again."""
    folder, built = tmp_path_factory.mktemp("real_wheel"), _library.build_info()
    parts = {"TILESPLAT_CUDA": "1" if built.get("cuda") else "0"}
    if built.get("cuda_archs"):
        parts["TORCH_CUDA_ARCH_LIST"] = ";".join(built["cuda_archs"])
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(PACKAGE)]
    subprocess.run(command, env=os.environ | parts, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="links to packages")
def test_wheel_works_where_there_is_nothing_but_torch(real_wheel, tmp_path):
    assert real_wheel.stat().st_size <= 40 << 20
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    ours = ("diff_gaussian_rasterization", "simple_knn", "fused_ssim", "__pycache__")
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.startswith(ours):
            (site / package.name).symlink_to(package)
    zipfile.ZipFile(real_wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [tmp_path / "env/bin/python", "-m", "diff_gaussian_rasterization"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "self-check   cpu scalar: ok" in done.stdout, done.stdout + done.stderr
    look = "import diff_gaussian_rasterization as d, simple_knn, fused_ssim; print(d.__file__)"
    found = subprocess.check_output([command[0], "-c", look], cwd=tmp_path, env=environment, text=True)
    assert found.startswith(str(site))


# --- linking --------------------------------------------------------------------------------------

DIGITS = """
#include <sstream>
extern "C" __attribute__((visibility("default"))) int digits(long number) {
    std::ostringstream text;
    text << number;
    return int(text.str().size());
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_options_in_cxx_change_neither_the_optimization_nor_the_cpp_library(tmp_path, monkeypatch):
    """With a second C++ library inside ours, a stream finds nothing to write numbers with, or crashes, once
    torch has loaded the other. Why -O3 stays is in setup.py."""
    folder = sources(tmp_path / "package", leave_out="csrc")
    (folder / "csrc").mkdir()
    for name in GLUE:
        (folder / "csrc" / name).write_text(DIGITS if name == "ops.cpp" else "")
    monkeypatch.setenv("CXX", "g++ -O1 -static-libstdc++")
    setup_py(folder, "build_ext", "--inplace")
    (ninja,) = folder.glob("build/*/build.ninja")
    assert re.findall(r"^cxx = .* (-O\S*)", ninja.read_text(), re.MULTILINE) == ["-O3"]
    library = folder / "diff_gaussian_rasterization/libtilesplat.so"
    assert b"libstdc++.so.6" in library.read_bytes()
    assert ctypes.CDLL(str(library)).digits(1234) == 4


# --- loading --------------------------------------------------------------------------------------


def test_library_without_operators_is_refused(installed):
    said = import_error(installed)
    assert "ImportError: libtilesplat.so lacks rasterize, rasterize_backward," in said
    assert "rebuild it with `pip install" in said


def test_library_for_another_torch_is_refused(installed):
    info = installed / "diff_gaussian_rasterization/build_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"torch": "1.13.1"}))
    said = import_error(installed)
    assert f"was built for torch 1.13.1 and this is torch {torch.__version__}: rebuild it" in said


def test_library_that_is_missing_or_damaged_is_named(installed):
    library = installed / "diff_gaussian_rasterization/libtilesplat.so"
    library.write_bytes(b"no library")
    assert "libtilesplat.so does not load; rebuild it with" in import_error(installed)
    library.unlink()
    assert "not built (libtilesplat.so is missing): run `pip install" in import_error(installed)


def test_operators_that_python_calls_are_looked_for_when_it_loads():
    text = "".join(path.read_text() for path in (PACKAGE / "diff_gaussian_rasterization").glob("*.py"))
    called = set(re.findall(r"torch\.ops\.tilesplat\.(\w+)", text))
    assert len(called) > 8 and not called - set(_library.OPERATORS)


# --- types ----------------------------------------------------------------------------------------

CALLER = """
import torch
from diff_gaussian_rasterization import GaussianRasterizationSettings, GaussianRasterizer, SparseGaussianAdam
from fused_ssim import fused_ssim
from simple_knn._C import distCUDA2
from torch import Tensor


def loss(settings: GaussianRasterizationSettings, points: Tensor, target: Tensor) -> Tensor:
    scales = distCUDA2(points).sqrt()[:, None].expand(-1, 3)
    rasterizer = GaussianRasterizer(settings)
    color, radii = rasterizer(points, torch.zeros_like(points), scales[:, :1], colors_precomp=points)
    optimizer = SparseGaussianAdam([{"params": [points], "lr": 0.1}], lr=0.0, eps=1e-15)
    optimizer.step(rasterizer.markVisible(points) & (radii > 0), len(points))
    reveal_type(distCUDA2(points))
    reveal_type(color)
    reveal_type(fused_ssim(color[None], target[None]))
    return fused_ssim(color[None], target[None])
"""


def test_mypy_knows_what_a_caller_gets(tmp_path):
    """Of the installed packages; without py.typed mypy ends with `import-untyped`."""
    pytest.importorskip("mypy")
    (tmp_path / "caller.py").write_text(CALLER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "caller.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout
    assert done.stdout.count('Revealed type is "torch._tensor.Tensor"') == 3
