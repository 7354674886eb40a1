"""Reads the golden numbers (tests/goldens/README.md) and calls our interfaces with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from diff_gaussian_rasterization import GaussianRasterizationSettings

FOLDER = Path(os.environ.get("TILESPLAT_GOLDENS", Path(__file__).parents[1] / "goldens"))
RASTERIZER_CASES = sorted(
    p.stem for p in FOLDER.glob("*.npz") if p.stem not in ("knn", "ssim", "sparse_adam")
)


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


def settings_of(case: dict, dtype: torch.dtype, device: str) -> GaussianRasterizationSettings:
    s = json.loads(str(case["settings"]))

    def tensor(values):
        return torch.as_tensor(values).to(device, dtype)

    return GaussianRasterizationSettings(
        image_height=s["H"], image_width=s["W"], tanfovx=s["tanfovx"], tanfovy=s["tanfovy"],
        bg=tensor(s["bg"]), scale_modifier=s["smod"], viewmatrix=tensor(case["viewmatrix"]),
        projmatrix=tensor(case["projmatrix"]), sh_degree=s["deg"], campos=tensor(case["campos"]),
        prefiltered=False, debug=False, antialiasing=s["aa"],
    )  # fmt: skip


def inputs_of(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """The inputs by the drop-in interface's names, requiring gradients."""
    inputs = {k[3:]: torch.from_numpy(v).to(device, dtype) for k, v in case.items() if k.startswith("in_")}
    inputs["means2D"] = torch.zeros_like(inputs["means3D"])
    return {name: value.requires_grad_() for name, value in inputs.items()}


def gradients_of(case: dict) -> dict[str, torch.Tensor]:
    """The gradients to expect. The original's gradient of `scales` lacks the factor scale_modifier."""
    grads = {k[5:]: torch.from_numpy(v) for k, v in case.items() if k.startswith("grad_")}
    if "scales" in grads:
        grads["scales"] = grads["scales"] * json.loads(str(case["settings"]))["smod"]
    return grads
