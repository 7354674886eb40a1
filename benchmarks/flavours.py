"""What each flavour costs beside the original's call: forward and backward, with spherical harmonics of
degree 3, and with colors that are given.

    python benchmarks/flavours.py                  on a GPU, if there is one, else on the CPU
    python benchmarks/flavours.py --device cpu

300,000 splats at 800 x 800 on a GPU, 50,000 at 400 x 300 on the CPU. Medians; all take turns, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from diff_gaussian_rasterization import compatibility
from diff_gaussian_rasterization.flavours import (
    abs_grad,
    counters,
    depth,
    depth_alpha,
    features,
    filter,
    median_depth,
    mip,
    pose,
)
from features import SCENES, milliseconds
from rasterizer import Scene, synthetic

from arguments import number  # rasterizer.py finds the folder


class Calls:
    """The same Gaussians and camera, given to one flavour or another."""

    def __init__(self, scene: Scene):
        self.width, self.height, self.count = scene.width, scene.height, len(scene.means)
        device = self.device = scene.means.device
        self.gaussians = {
            "means3D": scene.means, "opacities": scene.opacities.sigmoid(), "scales": scene.scales.exp(),
            "rotations": torch.nn.functional.normalize(scene.quats, dim=1),
        }  # fmt: skip
        self.shs = torch.cat([scene.sh_dc, scene.sh_rest], dim=1)
        view, K = scene.world_to_camera, scene.K
        tangents = scene.width / (2 * K[0, 0].item()), scene.height / (2 * K[1, 1].item())
        clip = torch.zeros(4, 4, device=device)  # the principal point is in the center
        clip[0, 0], clip[1, 1], clip[2, 2], clip[3, 2], clip[2, 3] = *(1 / t for t in tangents), 1, 1, -0.01
        self.settings = {
            "image_height": scene.height, "image_width": scene.width, "tanfovx": tangents[0],
            "tanfovy": tangents[1], "bg": torch.zeros(3, device=device), "scale_modifier": 1.0,
            "viewmatrix": view.T, "projmatrix": (clip @ view).T, "sh_degree": 3,
            "campos": -view[:3, :3].T @ view[:3, 3], "prefiltered": False, "debug": False,
        }  # fmt: skip

    def random(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=self.device, requires_grad=True)

    def leaves(self, columns: int, colors: bool) -> dict:
        made = {k: v.detach().clone().requires_grad_() for k, v in self.gaussians.items()}
        made["means2D"] = torch.zeros(self.count, columns, device=self.device, requires_grad=True)
        if colors:
            return made | {"colors_precomp": self.random(self.count, 3)}
        return made | {"shs": self.shs.clone().requires_grad_()}

    def __call__(
        self, module: Any, more: dict | None = None, columns: int = 3, colors: bool = False, **settings: Any
    ) -> Callable[[], None]:
        """Forward, and backward through all that is differentiable. `more` are keywords of the flavour."""
        rasterizer = module.GaussianRasterizer(
            module.GaussianRasterizationSettings(**self.settings, **settings)
        )
        inputs = self.leaves(columns, colors) | (more or {})
        grads: list[torch.Tensor] = []

        def call():
            pictures = [t for t in rasterizer(**inputs) if t.requires_grad]
            grads.extend(torch.randn_like(t) for t in pictures[len(grads) :])
            torch.autograd.backward(pictures, grads)

        return call

    def all(self) -> dict[str, Callable[[], None]]:
        motion = {"theta": self.random(1, 3), "rho": self.random(1, 3)}
        offset = torch.zeros(self.height, self.width, 2, device=self.device)
        seen = filter.GaussianRasterizer(filter.GaussianRasterizationSettings(**self.settings))
        g = self.gaussians
        return {
            "the original's call": self(compatibility),
            "depth_alpha": self(depth_alpha),
            "depth": self(depth),
            "median_depth": self(median_depth),
            "pose": self(pose, motion, projmatrix_raw=self.settings["projmatrix"]),
            "mip": self(mip, kernel_size=0.1, subpixel_offset=offset),
            "features of LangSplat": self(features, {"language_feature_precomp": self.random(self.count, 3)}),
            "features, 16": self(features, {"sh_objs": self.random(self.count, 1, 16)}),
            "features, 128": self(features, {"semantic_feature": self.random(self.count, 1, 128)}),
            "counters": self(counters),
            "abs_grad": self(abs_grad, columns=4),
            "filter, visible_filter": lambda: seen.visible_filter(g["means3D"], g["scales"], g["rotations"]),
            "the original's, colors given": self(compatibility, colors=True),
            "depth_alpha, colors given": self(depth_alpha, colors=True),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SCENES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=number(int, 1, 1000), default=10, help="calls per turn")
    parser.add_argument("--turns", type=number(int, 1, 1000), default=5)
    arguments = parser.parse_args()

    size = SCENES[arguments.device]
    named = Calls(synthetic(size, arguments.device)).all()
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(arguments.turns + 1):  # the first is for warming up
        for name, call in named.items():
            times[name].append(milliseconds(call, arguments.runs, arguments.device == "cuda"))
    print(f"{size.count:,} splats at {size.width} x {size.height} on {arguments.device}")
    first = statistics.median(times["the original's call"][1:])
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"{name:30} {median:8.2f} ms   {median / first:5.2f} times the original's")


if __name__ == "__main__":
    main()
