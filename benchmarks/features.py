"""What pictures of other attributes cost beside the picture of colors: forward and backward, by channels.

    python benchmarks/features.py                              on a GPU, if there is one, else on the CPU
    python benchmarks/features.py --device cpu --channels 3 16

300,000 splats at 800 x 800 on a GPU, 50,000 at 400 x 300 on the CPU. RGB is one call of rasterize with colors
that are given, and its backward. The others are project, lists and blend, and their backward; `blend` alone
takes projection and lists as they are. Medians; RGB and the others take turns, so that a machine that slows
down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diff_gaussian_rasterization import rasterize, stages
from rasterizer import Scene, Statistics, synthetic

from arguments import number  # rasterizer.py finds the folder

SCENES = {
    "cuda": Statistics(300_000, 800, 800, pixels=2.5, visible=1.0, spread=0.6, opacity_spread=1.5),
    "cpu": Statistics(50_000, 400, 300, pixels=2.13, visible=1.0, opacity=-2.2, opacity_spread=1.0),
}


class Calls:
    """Forward and backward of the same scene, by one way or another."""

    def __init__(self, scene: Scene):
        self.scene = scene
        names = ("means", "quats", "scales", "opacities")
        self.shape = {name: getattr(scene, name).clone().requires_grad_() for name in names}
        self.camera = {
            "world_to_camera": scene.world_to_camera, "K": scene.K, "width": scene.width,
            "height": scene.height, "raw": True,
        }  # fmt: skip

    def random(self, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features that want a gradient, and the gradient of their picture."""
        s, device = self.scene, self.scene.means.device
        features = torch.rand(len(s.means), channels, device=device, requires_grad=True)
        return features, torch.randn(channels, s.height, s.width, device=device)

    def rgb(self) -> Callable[[], None]:
        colors, grad = self.random(3)
        background = torch.zeros(3, device=colors.device)

        def call():
            out = rasterize(**self.shape, **self.camera, colors=colors, background=background)
            torch.autograd.backward(out.image, grad)

        return call

    def features(self, channels: int) -> Callable[[], None]:
        features, grad = self.random(channels)

        def call():
            projected = stages.project(**self.shape, **self.camera)
            image = stages.blend(projected, features, stages.lists(projected)).image
            torch.autograd.backward(image, grad)

        return call

    def blend_alone(self, channels: int) -> Callable[[], None]:
        features, grad = self.random(channels)
        with torch.no_grad():
            projected = stages.project(**self.shape, **self.camera)
        means2d = projected.means2d.clone().requires_grad_()
        projected = projected._replace(means2d=means2d)
        tiles = stages.lists(projected)
        return lambda: torch.autograd.backward(stages.blend(projected, features, tiles).image, grad)

    def scores(self) -> Callable[[], None]:
        colors, grad = self.random(3)
        with torch.no_grad():
            projected = stages.project(**self.shape, **self.camera)
        tiles = stages.lists(projected)
        return lambda: stages.scores(projected, tiles, colors=colors.detach(), gradient=grad)


def milliseconds(call: Callable[[], None], runs: int, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(runs):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SCENES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels", type=number(int, 1, 512), nargs="+", default=[3, 8, 16, 32, 64])
    parser.add_argument("--runs", type=number(int, 1, 1000), default=10, help="calls per turn")
    parser.add_argument("--turns", type=number(int, 1, 1000), default=7)
    arguments = parser.parse_args()

    on_gpu = arguments.device == "cuda"
    size = SCENES[arguments.device]
    calls = Calls(synthetic(size, arguments.device))
    named = {"RGB by rasterize": calls.rgb()}
    for channels in arguments.channels:
        named[f"{channels} channels"] = calls.features(channels)
        named[f"{channels} channels, blend alone"] = calls.blend_alone(channels)
    named["scores with moments"] = calls.scores()
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(arguments.turns + 1):  # the first is for warming up
        for name, call in named.items():
            times[name].append(milliseconds(call, arguments.runs, on_gpu))
    print(f"{size.count:,} splats at {size.width} x {size.height} on {arguments.device}")
    first = statistics.median(times["RGB by rasterize"][1:])
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"{name:28} {median:8.2f} ms   {median / first:5.2f} times RGB")


if __name__ == "__main__":
    main()
