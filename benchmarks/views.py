"""Several views in one call, or one by one: time of forward and backward, and the most memory of a GPU.

python benchmarks/views.py                  ten views of 285,000 splats at 400 x 300, for a GPU
python benchmarks/views.py --count 5000     for a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diff_gaussian_rasterization import rasterize, rasterize_views
from features import milliseconds
from torch import Tensor

from arguments import number  # rasterizer.py, by way of features.py, finds the folder

VIEWS, WIDTH, HEIGHT = 10, 400, 300


def scene(count: int, device: str) -> tuple[dict[str, Tensor], dict, Tensor]:
    """What is trained, what is not, and cameras a little apart, as along a blurred photo's path."""
    torch.manual_seed(0)
    normal = lambda *shape: torch.randn(count, *shape, device=device)  # noqa: E731
    trained = {
        "means": normal(3) * torch.tensor([1.0, 0.7, 0.7], device=device), "quats": normal(4),
        "scales": torch.log(0.012 * torch.exp(0.5 * normal(3))), "opacities": normal(1) - 1,
        "sh_dc": torch.rand(count, 1, 3, device=device), "sh_rest": 0.1 * normal(15, 3),
    }  # fmt: skip
    poses = torch.eye(4, device=device).repeat(VIEWS, 1, 1)
    poses[:, 2, 3], poses[:, 0, 3] = 3, torch.linspace(-0.02, 0.02, VIEWS)
    K = torch.tensor([[400.0, 0, WIDTH / 2], [0, 400, HEIGHT / 2], [0, 0, 1]], device=device)
    given = {"K": K, "width": WIDTH, "height": HEIGHT, "sh_degree": 3, "raw": True}
    given["background"] = torch.zeros(3, device=device)
    for value in (*trained.values(), poses):
        value.requires_grad_()
    return trained, given, poses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=number(int, 1, 100_000_000), default=285_000)
    parser.add_argument("--runs", type=number(int, 1, 1000), default=20)
    arguments = parser.parse_args()
    trained, given, poses = scene(arguments.count, arguments.device)
    ways: dict[str, Callable[[], Tensor]] = {
        "together": lambda: rasterize_views(**trained, **given, world_to_camera=poses).image,
        "one by one": lambda: torch.stack(
            [rasterize(**trained, **given, world_to_camera=pose).image for pose in poses]
        ),
        "one view": lambda: rasterize(**trained, **given, world_to_camera=poses[0]).image,
    }
    on_gpu = arguments.device.startswith("cuda")
    for name, draw in ways.items():

        def step(draw=draw):
            draw().square().mean().backward()
            for value in (*trained.values(), poses):
                value.grad = None

        milliseconds(step, 3, on_gpu)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spent = milliseconds(step, arguments.runs, on_gpu)
        peak = f"  {torch.cuda.max_memory_allocated() / 1e6:6.0f} MB" if on_gpu else ""
        print(f"{name:10} {spent:8.2f} ms{peak}", flush=True)


if __name__ == "__main__":
    main()
