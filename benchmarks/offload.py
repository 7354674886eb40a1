"""How long a step takes, and how much memory of a GPU, where a view shows a small part of the scene.

Random Gaussians in a plane, seen by cameras above it. With more of them the plane is larger, not denser.

python benchmarks/offload.py 27000000
python benchmarks/offload.py 27000000 --offload
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import number, parse_train
from scene import Scene
from scene.color_table import ON_HOST
from training.trainer import Trainer
from utils.geometry import morton_codes
from utils.memory import grow_in_place

VIEWS, WIDTH, HEIGHT, FIELD, ABOVE, TILT = 24, 1297, 840, 0.9, 12.0, 0.6
GAP = 0.0196  # between Gaussians
FIRST, WARM, TIMED = 20_000, 30, 24  # the first step's number, so that nothing comes or goes; and steps


def photos(folder: Path, half: float) -> None:
    """Noise, seen from places over the middle of the plane."""
    random, frames = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(VIEWS):
        noise = random.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((WIDTH, HEIGHT)).save(folder / "images" / f"{i:03}.jpg")
        angle, pose = random.uniform(0, 2 * math.pi), np.eye(4)
        c, s, ct, st = math.cos(angle), math.sin(angle), math.cos(TILT), math.sin(TILT)
        pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, ct, -st], [0, st, ct]]
        pose[:3, 3] = *random.uniform(-0.6 * half, 0.6 * half, 2), ABOVE
        frames.append({"file_path": f"images/{i:03}.jpg", "transform_matrix": pose.tolist()})
    focal = WIDTH / 2 / math.tan(FIELD / 2)
    lens = {"w": WIDTH, "h": HEIGHT, "fl_x": focal, "fl_y": focal, "cx": WIDTH / 2, "cy": HEIGHT / 2}
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))


def gaussians(count: int, half: float, device: torch.device, offload: bool) -> dict[str, Tensor]:
    """Neighbors in space are neighbors in memory, as training keeps them."""
    random = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(count, *shape, generator=random, device=device)  # noqa: E731
    means = torch.rand(count, 3, generator=random, device=device) - 0.5
    means *= torch.tensor([2 * half, 2 * half, 1.0], device=device)
    host = torch.device("cpu") if offload else device
    return {
        "means": means[morton_codes(means).argsort()],
        "sh_dc": normal(1, 3).to(host),
        "sh_rest": torch.zeros(count, 15, 3, device=host),
        "opacity_logits": normal(1),
        "log_scales": 0.3 * normal(3) + math.log(0.8 * GAP),
        "raw_quats": normal(4),
    }


def prepared(count: int, offload: bool, folder: Path, device: torch.device) -> Trainer:
    half = GAP * math.sqrt(count) / 2
    photos(folder, half)
    flags = ["--random_init", "1000", "--densify_from_iter", str(10**6), "--device", str(device)]
    flags += ["-s", str(folder), "-m", str(folder / "model")] + ["--offload"] * offload
    options = parse_train(flags)
    trainer = Trainer(Scene(options.model, device, quiet=True), options, print)
    apart = offload and trainer.gaussians.on_host == ON_HOST
    state = {"params": gaussians(count, half, device, apart), "moments": {}}
    degrees = {"sh_degree": 3, "active_sh_degree": 3}
    trainer.gaussians.load_state_dict(state | degrees | {"extent": half})
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=number(int, 1, 500_000_000))
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, on_gpu = torch.device(arguments.device), arguments.device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    grow_in_place()
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepared(arguments.count, arguments.offload, Path(folder), device)
        for i in range(FIRST, FIRST + WARM):
            trainer.step(i)
        wait()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for i in range(FIRST + WARM, FIRST + WARM + TIMED):
            trainer.step(i)
        wait()
        spent = 1000 * (time.perf_counter() - begun) / TIMED
        with torch.no_grad():
            cameras = trainer.scene.train_cameras
            shown = [int((trainer.splats.picture(camera).radii > 0).sum()) for camera in cameras]
    peak = f", {torch.cuda.max_memory_allocated() / 1e6:,.0f} MB" if on_gpu else ""
    print(f"{arguments.count:,} Gaussians, {np.mean(shown):,.0f} in view: {spent:.2f} ms a step{peak}")


if __name__ == "__main__":
    main()
