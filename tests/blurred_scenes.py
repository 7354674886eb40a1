"""A small data set whose photos are blurred, or taken from elsewhere than it says: and the truth about them.

Balls that are only a pixel or two wide, seen from a ring of cameras. Held-out views are sharp and in place.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diff_gaussian_rasterization import rasterize

from sample_scene import Camera, Points, View, write_colmap
from tests.tiny_scenes import look_at_origin
from utils.rigid import rigid, se3_exp, so3_exp

WIDTH, HEIGHT, FOCAL = 80, 60, 80.0
HOLD = 8
BALLS = 150


class Truth(NamedTuple):
    motions: dict[str, torch.Tensor]  # name -> [n, 4, 4] of the camera's axes during exposure
    cameras: dict[str, Camera]  # where photos were really taken from


def balls() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(BALLS, 3, generator=random), dim=1)
    return {
        "means": directions * (0.4 + 0.8 * torch.rand(BALLS, 1, generator=random)),
        "quats": torch.tensor([1.0, 0, 0, 0]).repeat(BALLS, 1),
        "scales": (0.06 + 0.06 * torch.rand(BALLS, 1, generator=random)).repeat(1, 3),
        "opacities": torch.full((BALLS, 1), 0.95),
        "colors": torch.rand(BALLS, 3, generator=random),
    }


def picture(world_to_camera: torch.Tensor, K: torch.Tensor) -> np.ndarray:
    out = rasterize(
        **balls(), world_to_camera=world_to_camera.float(), K=K.float(), width=WIDTH, height=HEIGHT,
        background=torch.zeros(3),
    )  # fmt: skip
    return out.image.permute(1, 2, 0).clamp(0, 1).numpy()


def make(
    folder: Path, motions_of=None, misplaced: float = 0.0, count: int = 32, exposures: float = 0.0
) -> Truth:
    """motions_of(random): motions [n, 4, 4] for a train photo. `misplaced`: by how much the poses that the
    data set has are wrong, per axis, in radians and in units of the world. `exposures`: how much brighter
    photos are, and their channels, as a factor."""
    random = torch.Generator().manual_seed(1)
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]).double()
    truth, views = Truth({}, {}), []
    for k in range(count):
        name, is_test = f"view_{k:02d}", k % HOLD == 0
        angle = 2 * math.pi * k / count
        center = np.array([4 * math.sin(angle), 1.2 * math.sin(3 * angle), -4 * math.cos(angle)])
        pose = torch.tensor(look_at_origin(center))
        motions = torch.eye(4).double()[None]
        if motions_of and not is_test:
            motions = motions_of(random)
        image = np.mean([picture(motion @ pose, K) for motion in motions], axis=0)
        given = pose if is_test else se3_exp(misplaced * torch.randn(6, generator=random).double()) @ pose
        camera = Camera(name, WIDTH, HEIGHT, K.numpy(), given.numpy())
        truth.motions[name] = motions
        truth.cameras[name] = Camera(name, WIDTH, HEIGHT, K.numpy(), pose.numpy())
        if exposures:
            gains = exposures * (2 * torch.rand(4, generator=random) - 1) * torch.tensor([1, 0.3, 0.3, 0.3])
            image = np.clip(image * (gains[0] + gains[1:]).exp().numpy(), 0, 1)
        image = np.uint8(image * 255 + 0.5)
        blank = np.zeros((HEIGHT, WIDTH))
        views.append(View(camera, image, blank.astype(np.float32), blank == 0, np.eye(3, 4), is_test, {}))
    noise = 0.02 * torch.randn(BALLS, 3, generator=random)
    rgb = np.uint8(255 * balls()["colors"].numpy())
    nothing = [(np.zeros(0, int), np.zeros((0, 2)))] * count
    write_colmap(folder, views, Points((balls()["means"] + noise).double().numpy(), rgb, nothing))
    return truth


def straight(random: torch.Generator) -> torch.Tensor:
    """A path of some five pixels."""
    shift, turn = torch.rand(2, 3, generator=random).double() * 2 - 1
    steps = torch.linspace(-1, 1, 7).double()[:, None]
    rotations = so3_exp(steps * 0.03 * turn)
    return rigid(rotations, -(rotations @ (steps * 0.18 * shift)[..., None])[..., 0])
