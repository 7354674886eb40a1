"""Scenes and comparisons that the tests of the native package share.

A scene is the keyword arguments of `rasterize`, as a dataclass that can change dtype and device. The rule of
all comparisons: the float64 reference is the truth, and a float32 result may stray from it a few times as far
as float32 PyTorch does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from diff_gaussian_rasterization import reference
from torch import Tensor

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
FLOOR = 4 * torch.finfo(torch.float32).eps  # a few roundings at the magnitude of the largest value
LEAVES = (
    "means",
    "quats",
    "scales",
    "opacities",
    "sh_dc",
    "sh_rest",
    "colors",
    "cov3d",
    "world_to_camera",
    "background",
)


@dataclass
class Scene:
    means: Tensor  # [N, 3]
    quats: Tensor | None  # [N, 4]
    scales: Tensor | None  # [N, 3]
    opacities: Tensor  # [N, 1]
    sh_dc: Tensor | None  # [N, 1, 3]
    sh_rest: Tensor | None  # [N, K-1, 3]
    world_to_camera: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    background: Tensor  # [3]
    width: int
    height: int
    sh_degree: int
    colors: Tensor | None = None
    cov3d: Tensor | None = None
    scale_modifier: float = 1.0
    antialiasing: bool = False
    raw: bool = False
    camera_center: Tensor | None = field(default=None)
    near: float = 0.2

    def to(self, *args) -> Scene:
        """Like Tensor.to, for every tensor; the copies are leaves."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Scene(
            **{k: v.detach().clone().to(*args) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )

    def but(self, **changes) -> Scene:
        return replace(self, **changes)

    def arguments(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def leaves(self) -> dict[str, Tensor]:
        """What gradients flow to: those of LEAVES that are given."""
        return {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}


def look_at(eye: tuple, target: tuple = (0, 0, 0)) -> Tensor:
    """World to camera, y down: [4, 4] float64"""
    eye, target = torch.tensor(eye, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    z = torch.nn.functional.normalize(target - eye, dim=0)
    x = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), z), dim=0
    )
    R = torch.stack([x, torch.linalg.cross(z, x), z])
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3], view[:3, 3] = R, -R @ eye
    return view


def intrinsics(width: int, height: int, focal: float = 1.0, offset: tuple = (0.0, 0.0)) -> Tensor:
    """focal in image widths, principal point off the center by `offset` half sizes: [3, 3] float64"""
    cx, cy = (1 + offset[0]) * width / 2, (1 + offset[1]) * height / 2
    return torch.tensor([[focal * width, 0, cx], [0, focal * width, cy], [0, 0, 1]], dtype=torch.float64)


def make_scene(
    count: int,
    size: tuple[int, int] = (64, 48),
    seed: int = 0,
    degree: int = 3,
    scale: float = 0.08,
    max_opacity: float = 0.95,
    spread: float = 0.7,
) -> Scene:
    """`count` splats of about `scale` around the origin, seen from a distance of 3; float64 on the CPU."""
    width, height = size
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    quats = normal(count, 4)
    return Scene(
        means=normal(count, 3) * spread * torch.tensor([1.0, height / width, 0.7], dtype=torch.float64),
        quats=quats / quats.norm(dim=1, keepdim=True),
        scales=scale * torch.exp(0.5 * normal(count, 3)),
        opacities=uniform(count, 1, low=0.1, high=max_opacity),
        sh_dc=uniform(count, 1, 3, low=0.0, high=2.0),
        sh_rest=0.15 * normal(count, (degree + 1) ** 2 - 1, 3),
        world_to_camera=look_at((0.9, -0.6, -2.8)),
        K=intrinsics(width, height, offset=(0.06, -0.04)),
        background=torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64),
        width=width,
        height=height,
        sh_degree=degree,
    )


def to_raw(scene: Scene) -> Scene:
    """The same scene before its activations; quaternions of odd lengths."""
    lengths = 0.5 + torch.rand(
        len(scene.means), 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    return scene.but(
        quats=scene.quats * lengths,
        scales=scene.scales.log(),
        opacities=torch.logit(scene.opacities),
        raw=True,
    )


def with_covariances(scene: Scene) -> Scene:
    cov = reference.covariance(scene.quats, scene.scales)
    index = torch.triu_indices(3, 3)
    return scene.but(quats=None, scales=None, cov3d=cov[:, index[0], index[1]].contiguous())


def with_colors(scene: Scene) -> Scene:
    return scene.but(sh_dc=None, sh_rest=None, colors=scene.sh_dc[:, 0].clone(), sh_degree=0)


def cotangents(scene: Scene, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random gradients of image, alpha and inverse depth, float64."""
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(n, scene.height, scene.width, generator=g, dtype=torch.float64) for n in (3, 1, 1)
    )


def run(rasterize, scene: Scene, dtype: torch.dtype, device: str = "cpu", **extra):
    """Render and differentiate a copy of the scene. Returns (rendered, gradients by name), both on the CPU.

    The gradients are those of a random linear function of image, alpha and inverse depth; `means2d` is among
    them.
    """
    scene = scene.to(dtype).to(device)
    leaves = scene.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    means2d = torch.zeros_like(scene.means, requires_grad=True)
    out = rasterize(**scene.arguments(), means2d=means2d, **extra)
    loss = sum((o * c.to(o)).sum() for o, c in zip((out.image, out.alpha, out.inv_depth), cotangents(scene)))
    loss.backward()
    grads = {name: leaf.grad.cpu() for name, leaf in {**leaves, "means2d": means2d}.items()}
    return type(out)(*(t.detach().cpu() for t in out)), grads


def assert_as_accurate_as(
    actual, baseline, truth, name: str, slack: float = 4.0, share: float = 0.0, floor: float = FLOOR
):
    """`actual` may stray from the float64 `truth` a few times as far as plain float32 PyTorch does.

    Each argument is a tensor or a list of them: then the worst of all counts, relative to each one's
    magnitude, since on a small scene PyTorch may be exact by luck. The worst `share` of entries are left out
    on both sides: they may sit on a threshold.
    """
    if isinstance(truth, torch.Tensor):
        actual, baseline, truth = [actual], [baseline], [truth]
    for a, t in zip(actual, truth):
        assert a.shape == t.shape, f"{name}: shape {list(a.shape)}, must be {list(t.shape)}"
    error = max(_worst(a, t, share) for a, t in zip(actual, truth))
    allowed = slack * max(_worst(b, t, share) for b, t in zip(baseline, truth)) + floor
    assert error <= allowed, f"{name}: error {error:.2e}, {slack:g} times float32 PyTorch's {allowed:.2e}"


def _worst(values: Tensor, truth: Tensor, share: float) -> float:
    """The largest error, relative to the largest value."""
    if truth.numel() == 0:
        return 0.0
    truth = truth.double()
    error = (values.double() - truth).abs().flatten()
    error = torch.where(error.isfinite(), error, torch.full_like(error, math.inf))
    left_out = int(share * error.numel())
    return (error.sort().values[-1 - left_out] / truth.abs().max().clamp_min(1e-30)).item()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth|, Euclidean."""
    actual, truth = actual.double(), truth.double()
    return ((actual - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_not_blank(image: Tensor, least: float = 0.01):
    assert image.std() > least, f"standard deviation {image.std():.4f}: a blank image would pass any test"


def threshold_margin(scene: Scene) -> float:
    """How far, relatively, the scene stays from where its image jumps: alpha 1/255 and 0.99, stopping,
    clamped colors.

    Tile rectangles too: the least distance, in pixels, of a 3-sigma edge from where the tile set changes.
    """
    s = scene
    cov = reference.covariance(s.quats, s.scales)
    center = -s.world_to_camera[:3, :3].T @ s.world_to_camera[:3, 3]
    opacities = s.opacities.flatten()
    p = reference.project(s.means, cov, opacities, s.world_to_camera, s.K, s.width, s.height, s.antialiasing)
    basis = reference.sh_basis(s.sh_degree, torch.nn.functional.normalize(s.means - center, dim=1))
    colors = (basis[:, :, None] * torch.cat([s.sh_dc, s.sh_rest], dim=1)).sum(1) + 0.5
    pixels = reference._pixel_centers(0, 0, s.width, s.height, s.means)
    dx, dy = (pixels[:, None] - p.means2d).unbind(-1)
    xx, xy, yy = p.conics.unbind(-1)
    alpha = p.opacities * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
    margins = [(alpha * 255).log().abs().min(), (alpha / 0.99).log().abs().min(), colors.abs().min()]
    order = p.depths.argsort()
    visible = torch.where(alpha[:, order] >= 1 / 255, alpha[:, order], 0)
    margins.append((torch.cumprod(1 - visible, dim=1) / 1e-4).log().abs().min())
    margins.append((p.depths[order].diff()).abs().min())
    # Radii are rounded up: how far from a whole number? Edges of tiles are whole numbers, means are not.
    xx, yy, xy = yy / (xx * yy - xy * xy), xx / (xx * yy - xy * xy), 0
    edge = (p.means2d[:, :, None] - 0.5 + p.radii[:, None, None] * torch.tensor([-1.0, 1.0])) % 1
    margins.append(torch.minimum(edge, 1 - edge).min())
    return min(m.item() for m in margins)
