"""Loads the native library, which registers the operators `torch.ops.tilesplat`, once, on import."""

from __future__ import annotations

import json
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libtilesplat.so"
INSTALL = "`pip install --no-build-isolation ./submodules/diff-gaussian-rasterization`"
# What the Python files of this package call: an older library may lack some.
OPERATORS = (
    "rasterize", "rasterize_backward", "mark_visible", "ssim", "ssim_backward", "photometric_loss",
    "adam_step", "train_step", "settle", "knn_mean_dist2", "cpu_isas", "cpu_isa", "set_cpu_isa",
    "project", "project_backward", "lists", "blend", "blend_backward", "scores",
    "pair_colors", "pair_colors_backward", "dealt_project", "dealt_lists",
    "dealt_blend", "dealt_step", "near_rows", "fetch_rows", "store_rows",
)  # fmt: skip


def build_info() -> dict:
    """What setup.py wrote down about the build: version, torch, compiler, isas, cuda, cuda_archs."""
    path = FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load() -> None:
    """Load the library, or raise ImportError with the one thing to do."""
    if not LIBRARY.exists():
        raise ImportError(
            f"diff_gaussian_rasterization is not built ({LIBRARY.name} is missing): run {INSTALL}"
        )
    built = build_info().get("torch", torch.__version__)
    other = built.split(".")[:2] != torch.__version__.split(".")[:2]  # releases differ in their C++ interface
    advice = f"rebuild it with {INSTALL}"
    if built != torch.__version__:
        advice = f"it was built for torch {built} and this is torch {torch.__version__}: {advice}"
    if other:
        raise ImportError(f"{LIBRARY.name} does not fit; {advice}")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"{LIBRARY.name} does not load; {advice} ({error.__cause__ or error})") from None
    if missing := [name for name in OPERATORS if not hasattr(torch.ops.tilesplat, name)]:
        raise ImportError(f"{LIBRARY.name} lacks {', '.join(missing)}; {advice}")


load()
