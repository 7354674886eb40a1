"""Where test views are taken from, to score a model whose train poses have moved.

As given; after the similarity that takes the given centers of the train cameras to the refined ones; or
refined themselves, each by its own photo, with the scene as it is. The last is usual for deblurring, and
looks at the photos that are scored: whoever reports it says so.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from per_view.per_photo import PerPhoto, units
from per_view.poses import moved
from per_view.shown import Shown
from scene.cameras import Camera
from utils.rigid import se3_exp, similarity
from utils.schedules import log_linear

STEPS = 300
RATES = 0.5, 0.005  # pixels, at the first and at the last step


def aligned(shown: Shown, train: Sequence[Camera], test: Sequence[Camera]) -> list[Camera]:
    """The test cameras, moved as the train cameras have moved together."""
    with torch.no_grad():
        given = torch.stack([camera.center for camera in train]).double()
        refined = torch.stack([shown.sharp_camera(camera).center for camera in train]).double()
        if len(train) < 3 or torch.equal(given, refined):
            return list(test)
        scale, rotation, shift = similarity(given, refined)
    return [_after(camera, scale, rotation, shift) for camera in test]


def _after(camera: Camera, scale: float, rotation: Tensor, shift: Tensor) -> Camera:
    """After a similarity of the world; its own axes keep their unit."""
    matrix = camera.world_to_camera.double().clone()
    center = scale * rotation @ camera.center.double() + shift
    matrix[:3, :3] = matrix[:3, :3] @ rotation.T
    matrix[:3, 3] = -matrix[:3, :3] @ center
    return replace(camera, world_to_camera=matrix.to(camera.world_to_camera))


def refined(shown: Shown, camera: Camera) -> Camera:
    """From where this photo fits best: Adam on the mean absolute error. The scene stays as it is."""
    truth, counts = camera.image().float() / 255, camera.counts()
    weights = torch.ones_like(truth[0]) if counts is None else counts
    sizes = _sizes(shown, camera)
    twist = PerPhoto(["it"], torch.zeros_like(sizes[None]))
    for step in range(STEPS):
        twist.rate = log_linear(step, *RATES, STEPS)
        seen = moved(camera, se3_exp(twist.values[0] * sizes))
        loss = ((shown.picture(seen).image.clamp(0, 1) - truth).abs() * weights).mean()
        (twist.values.grad,) = torch.autograd.grad(loss, twist.values)
        twist.step()
    with torch.no_grad():
        return moved(camera, se3_exp(twist.values[0] * sizes))


@torch.no_grad()
def _sizes(shown: Shown, camera: Camera) -> Tensor:
    """What moves the picture by about a pixel, [6]."""
    picture = shown.picture(camera)
    depth = picture.inv_depth.sum() / picture.alpha.sum().clamp_min(1e-6)
    return units(camera.K[None], depth.clamp_min(1e-9)[None])[0]
