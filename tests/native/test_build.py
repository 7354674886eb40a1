"""What the build says when something is missing: one sentence with what to do about it, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[2] / "submodules/diff-gaussian-rasterization"


def build_fails_with(**environment: str) -> str:
    """The sentence that `setup.py build_ext` ends with, before anything is compiled."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    run = subprocess.run(command, cwd=PACKAGE, env=os.environ | environment, capture_output=True, text=True)
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
