"""Pictures per second, and memory of a GPU, of a model that does not grow: in one process or in several.

    python benchmarks/processes.py -s data/bonsai --gaussians 1000000
    torchrun --nproc_per_node 4 benchmarks/processes.py -s data/bonsai --gaussians 1000000

The model is made of the data set's points, each as often as it takes, as flat and of as many opacities as in
a model that has grown. Each process shows a view in each step.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed  # noqa: E402
from arguments import Options, number, parse_train, pick_device  # noqa: E402
from scene import Scene  # noqa: E402
from scene.points import PointCloud  # noqa: E402
from training.run import device_of_rank, seed_everything  # noqa: E402
from training.trainer import Trainer  # noqa: E402
from utils.memory import grow_in_place  # noqa: E402

TURNS = 4  # of which the fastest counts
SHIFT = 0.004  # of copies of a point, relative to the extent of all


def trainer_of(options: Options, count: int, device: torch.device) -> Trainer:
    scene = Scene(options.model, device, 0, quiet=True)
    random, points = np.random.default_rng(0), scene.points
    index = np.arange(count) % len(points)
    shifts = random.normal(0, SHIFT * np.linalg.norm(points.xyz.std(0)), (count, 3))
    scene.points = PointCloud(points.xyz[index] + shifts, points.rgb[index])
    trainer = Trainer(scene, options, print)
    gaussians = trainer.gaussians
    values = gaussians.own(torch.rand(count, 4, generator=torch.Generator().manual_seed(1)).to(device))
    with torch.no_grad():
        gaussians.opacity_logits.copy_(5 * values[:, :1] - 2.5)
        gaussians.log_scales.add_(0.8 * values[:, 1:] - 0.1)
    gaussians.active_sh_degree = gaussians.sh_degree
    return trainer


def seconds_of(trainer: Trainer, steps: int, first: int) -> float:
    wait = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for k in range(steps):
        trainer.step(first + k * trainer.views)
    wait()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("-s", "--source_path", required=True)
    parser.add_argument("--gaussians", type=number(int, 1, 10**9), default=1_000_000)
    parser.add_argument("--steps", type=number(int, 1, 10**9), default=24, help="of a turn")
    args, flags = parser.parse_known_args()
    grow_in_place()
    with tempfile.TemporaryDirectory() as folder:
        line = [
            "-s",
            args.source_path,
            "-m",
            folder,
            "--densify_until_iter",
            "0",
            "--disable_viewer",
            "--quiet",
        ]
        options = parse_train([*line, *flags])
        device = pick_device(device_of_rank(options.run.device))
        ranks = distributed.join(gpu=device.type == "cuda")
        seed_everything(0)
        trainer = trainer_of(options, args.gaussians, device)
        turn = args.steps * trainer.views
        seconds_of(trainer, args.steps, trainer.views)  # everything is made that is made once
        least = min(seconds_of(trainer, args.steps, turn * k + trainer.views) for k in range(1, TURNS + 1))
        peak = ranks.most(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0
    if ranks.first:
        print(
            f"{ranks.count} processes, {args.gaussians:,} Gaussians: {1e3 * least:.2f} ms a step, "
            f"{trainer.views / least:.1f} pictures a second, at most {peak / 1e6:,.0f} MB of a GPU"
        )


if __name__ == "__main__":
    main()
