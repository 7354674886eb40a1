"""Loads the native library, which registers the operators `torch.ops.tilesplat`, once, on import."""

from __future__ import annotations

import json
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libtilesplat.so"


def build_info() -> dict:
    """What setup.py wrote down about the build: version, torch, compiler, isas, cuda, cuda_archs."""
    path = FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load() -> None:
    """Load the library, or raise ImportError with the one thing to do."""
    install = "`pip install --no-build-isolation ./submodules/diff-gaussian-rasterization`"
    if not LIBRARY.exists():
        raise ImportError(
            f"diff_gaussian_rasterization is not built ({LIBRARY.name} is missing): run {install}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        built = build_info().get("torch", "an unknown version")
        advice = (
            f"it was built for torch {built} and this is torch {torch.__version__}: rebuild it with {install}"
        )
        if built == torch.__version__:
            advice = f"rebuild it with {install}"
        raise ImportError(f"{LIBRARY.name} does not load; {advice} ({error.__cause__ or error})") from None


load()
