"""Tiny data sets, made on the fly: colored blobs seen from a ring of cameras, as COLMAP or Blender folders.

The pictures are rendered by our own rasterizer from Gaussians that are known, so that training can find them
again.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diff_gaussian_rasterization import rasterize
from PIL import Image

WIDTH, HEIGHT, FOCAL = 56, 40, 60.0
BLOBS = 40


@dataclass
class Shot:
    name: str  # without ending
    world_to_camera: np.ndarray  # [4, 4]
    image: np.ndarray  # [H, W, 3] float, premultiplied over black
    alpha: np.ndarray  # [H, W]
    inv_depth: np.ndarray  # [H, W]


def look_at_origin(center: np.ndarray) -> np.ndarray:
    """World to camera, x right, y down, z forward; the world's up is -y."""
    forward = -center / np.linalg.norm(center)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, -rotation @ center
    return matrix


def blobs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(BLOBS, 3, generator=generator) * 2 - 1
    return {
        "means": means,
        "quats": torch.tensor([1.0, 0, 0, 0]).repeat(BLOBS, 1),
        "scales": torch.full((BLOBS, 3), 0.18),
        "opacities": torch.full((BLOBS, 1), 0.9),
        "colors": torch.rand(BLOBS, 3, generator=generator),
    }


def shots(count: int = 8) -> list[Shot]:
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    taken = []
    for i in range(count):
        angle = 2 * math.pi * i / count
        center = np.array([4 * math.sin(angle), 0.8 * math.sin(3 * angle), -4 * math.cos(angle)])
        matrix = look_at_origin(center)
        out = rasterize(
            **blobs(), world_to_camera=torch.tensor(matrix).float(), K=K, width=WIDTH, height=HEIGHT,
            background=torch.zeros(3),
        )  # fmt: skip
        assert out.image.std() > 0.05, "a blank scene would teach nothing"
        image = out.image.permute(1, 2, 0).clamp(0, 1).numpy()
        taken.append(Shot(f"shot {i:02d}", matrix, image, out.alpha[0].numpy(), out.inv_depth[0].numpy()))
    return taken


def colmap_scene(folder: Path, count: int = 8, scale: float = 1.0, shift=(0.0, 0.0, 0.0)) -> Path:
    """sparse/0 as text, images/*.png. Every blob is a point, tracked in every view that has it in the
    frame. The world can be scaled, then shifted."""
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    model, taken, points = folder / "sparse" / "0", shots(count), blobs()
    camera = f"1 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n"
    (model / "cameras.txt").write_text("# id model size parameters\n" + camera)
    lines = []
    for number, shot in enumerate(taken, start=1):
        Image.fromarray(np.uint8(shot.image * 255 + 0.5)).save(folder / "images" / f"{shot.name}.png")
        rotation, translation = shot.world_to_camera[:3, :3], shot.world_to_camera[:3, 3]
        pose = [*_quaternion(rotation), *(scale * translation - rotation @ shift)]
        lines.append(f"{number} {' '.join(map(repr, map(float, pose)))} 1 {shot.name}.png")
        lines.append(" ".join(_features(shot, points["means"].double().numpy())))
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    means = (scale * points["means"].double().numpy() + shift).tolist()
    rows = [
        " ".join(map(str, [number, *xyz, *(int(255 * c) for c in rgb), 0.5, 1, 0]))
        for number, (xyz, rgb) in enumerate(zip(means, points["colors"].tolist()), start=1)
    ]
    (model / "points3D.txt").write_text("\n".join(rows) + "\n")
    return folder


def blender_scene(folder: Path, count: int = 6) -> Path:
    """transforms_{train,test}.json and RGBA pictures; no points."""
    every = shots(count + 2)
    for split, taken in {"train": every[:count], "test": every[count:]}.items():
        (folder / split).mkdir(parents=True)
        frames = []
        for shot in taken:
            alpha = np.maximum(shot.alpha, 1e-6)[..., None]
            straight = np.concatenate([np.clip(shot.image / alpha, 0, 1), shot.alpha[..., None]], -1)
            Image.fromarray(np.uint8(straight * 255 + 0.5)).save(folder / split / f"{shot.name}.png")
            opengl = np.linalg.inv(shot.world_to_camera) @ np.diag([1.0, -1.0, -1.0, 1.0])
            frames.append({"file_path": f"./{split}/{shot.name}", "transform_matrix": opengl.tolist()})
        transforms = {"camera_angle_x": 2 * math.atan(WIDTH / (2 * FOCAL)), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(transforms))
    return folder


def add_depth_maps(folder: Path, scale: float = 0.5, offset: float = 0.1) -> None:
    """16-bit maps of a COLMAP scene that are right up to a scale and an offset: inverse depth = map * scale +
    offset.

    Where nothing is seen, the map has an inverse depth of 1/8. Pixels are solid here: blended inverse depth /
    alpha.
    """
    (folder / "depths").mkdir()
    for shot in shots():
        inverse = np.where(shot.alpha > 0.5, shot.inv_depth / np.maximum(shot.alpha, 0.5), 0.125)
        levels = np.clip((inverse - offset) / scale * 65536, 0, 65535)
        Image.fromarray(np.uint16(levels + 0.5)).save(folder / "depths" / f"{shot.name}.png")


def _features(shot: Shot, points: np.ndarray) -> list[str]:
    """x y id of each point in the frame, and one feature that became no point."""
    camera = points @ shot.world_to_camera[:3, :3].T + shot.world_to_camera[:3, 3]
    x, y = (FOCAL * camera[:, axis] / camera[:, 2] + size / 2 for axis, size in ((0, WIDTH), (1, HEIGHT)))
    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
    words = [f"{x[i]:.6f} {y[i]:.6f} {i + 1}" for i in np.flatnonzero(inside)]
    return [*words, "1.5 2.5 -1"]


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation matrix, through the largest of the four so that nothing is divided by
    zero."""
    r = rotation
    squares = np.array(
        [
            1 + r[0, 0] + r[1, 1] + r[2, 2],
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
        ]
    )
    products = np.array(
        [
            [squares[0], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], squares[1], r[1, 0] + r[0, 1], r[0, 2] + r[2, 0]],
            [r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], squares[2], r[2, 1] + r[1, 2]],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], squares[3]],
        ]
    )
    best = int(squares.argmax())
    return products[best] / (2 * math.sqrt(squares[best]))
