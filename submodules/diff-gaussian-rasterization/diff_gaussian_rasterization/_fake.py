"""Shapes without numbers, for torch.compile, torch.export and fake tensors: what each operator returns, by
backend. The layouts are those of csrc/ops_cpu.cpp, ops_cuda.cpp and ops_stages_*.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat

Layout = list[tuple[tuple, torch.dtype | None]]  # None: the dtype of the Gaussians


def fake(name: str) -> Callable[[Callable], Callable]:
    """Registers a function for shapes.

    It is called for tensors of device meta, too: these may not be mixed with tensors that have numbers.
    """
    names = [argument.name for argument in getattr(torch.ops.tilesplat, name).default._schema.arguments]

    def register(function: Callable) -> Callable:
        @wraps(function)
        def checked(*arguments):
            expect_all_or_none_meta(names, arguments)
            return function(*arguments)

        return torch.library.register_fake(f"tilesplat::{name}", checked)

    return register


def expect_all_or_none_meta(names: list[str], arguments: tuple) -> None:
    devices = {}
    for name, value in zip(names, arguments):
        labels = (
            {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        )
        devices |= {label: v.device for label, v in labels.items() if isinstance(v, Tensor)}
    first = next(iter(devices.values()))
    for label, device in devices.items():
        if (device.type == "meta") != (first.type == "meta"):
            raise ValueError(f"{label} must be on {first}, got {device}")


def unknown():
    """A size that is known at run time only: entries of the lists, bytes of a trace."""
    return torch.library.get_ctx().new_dynamic_size()


def allocate(like: Tensor, layout: Layout) -> list[Tensor]:
    return [like.new_empty(shape, dtype=dtype or like.dtype) for shape, dtype in layout]


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def tiles_of(width: int, height: int) -> int:
    return -(-width // 16) * -(-height // 16)


def lists_on_cpu(count: int, tiles: int, entries: int) -> Layout:
    return [
        ((count,), torch.int32), ((-(-count // 1024),), torch.int32), ((count, 2), torch.int32),
        ((tiles + 1,), torch.int64), ((tiles,), torch.int32), ((entries, 2), torch.int32),
    ]  # fmt: skip


def state_on_cpu(count: int, tiles: int) -> Layout:
    entries = unknown()
    visible, chunks, slots, tile_begin, tile_order, entry = lists_on_cpu(count, tiles, entries)
    return [
        ((count, 16), None), visible, chunks, slots, tile_begin, tile_order, ((tiles, 256), None),
        ((tiles, 256), torch.int32), entry, ((entries,), torch.int16),
    ]  # fmt: skip


def order_on_gpu(count: int, entries: int) -> Layout:
    """What sums in a fixed order want besides."""
    if not torch.are_deterministic_algorithms_enabled():
        return []
    return [((entries,), torch.int32), ((count,), torch.int32), ((count,), torch.int32)]


# ---- the operators of ops.cpp -----------------------------------------------------------------------------


@fake("rasterize")
def _(
    means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K, camera_center,
    background, width, height, sh_degree, scale_modifier, antialiasing, raw, keep, near=0.2,
):  # fmt: skip
    count, tiles = means.shape[0], tiles_of(width, height)
    views = tuple(world_to_camera.shape[:-2])  # none, or [C]
    rows, all_tiles = (math.prod((number, *views)) for number in (count, tiles))
    planes = [means.new_empty(*views, channels, height, width) for channels in (3, 1, 1)]
    if on_cpu(means):
        state = [tensor for _ in range(math.prod(views)) for tensor in state_on_cpu(count, tiles)]
    elif keep:  # a size that no output has cannot be exported
        entries = unknown()
        state = [
            ((rows, 12), None), ((entries,), torch.int32), ((all_tiles, 2), torch.int32),
            ((*views, 3, height, width), None), ((*views, 1, height, width), None),
            ((4,), torch.int64), ((unknown(),), torch.uint8),
            *order_on_gpu(rows, entries),
        ]  # fmt: skip
    else:
        state = []
    return *planes, means.new_empty(*views, count, dtype=torch.int32), allocate(means, state)


@fake("rasterize_backward")
def _(
    means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K, camera_center,
    background, *rest,
):  # fmt: skip
    wanted = rest[11]  # behind settings, radii, state and the images' gradients
    shape = (means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors)
    inputs = (*shape, world_to_camera, background, means)
    if on_cpu(means):  # which gives the first eight of what it has, asked for or not
        wanted = [True] * 8 + list(wanted[8:])
    return tuple(means.new_empty(t.shape if want and t is not None else 0) for t, want in zip(inputs, wanted))


@fake("mark_visible")
def _(means, world_to_camera, near=0.2):
    return means.new_empty(means.shape[0], dtype=torch.bool)


@fake("ssim")
def _(a, b, valid, train):
    kept = a.shape if on_cpu(a) else (3, *a.shape)
    return a.new_empty(()), [a.new_empty(kept)] if train else []


@fake("ssim_backward")
def _(a, b, valid, state, grad):
    return torch.empty_like(a)


@fake("photometric_loss")
def _(image, target, mask, lambda_dssim):
    return image.new_empty(()), image.new_empty(()), torch.empty_like(image)


@fake("knn_mean_dist2")
def _(points):
    return points.new_empty(points.shape[0])


for name in ("adam_step", "train_step", "settle"):
    fake(name)(lambda *arguments: None)


# ---- the stages: ops_stages.cpp ---------------------------------------------------------------------------


@fake("project")
def _(means, quats, scales, cov3d, opacities, world_to_camera, K, width, height, *_):
    count = means.shape[0]
    return *allocate(means, [((count, 2), None), ((count, 3), None), ((count,), None), ((count,), None)]), (
        means.new_empty(count, dtype=torch.int32)
    )


@fake("project_backward")
def _(means, quats, scales, cov3d, opacities, world_to_camera, *rest):
    wanted, inputs = rest[-1], (means, quats, scales, cov3d, opacities, world_to_camera)
    return [means.new_empty(t.shape if want and t is not None else 0) for t, want in zip(inputs, wanted)]


@fake("lists")
def _(means2d, conics, opacities, depths, radii, width, height, margin, capacity=0):
    count, tiles, entries = means2d.shape[0], tiles_of(width, height), unknown()
    if on_cpu(means2d):
        layout = [*lists_on_cpu(count, tiles, entries), ((1,), None)]
    else:
        layout = [((entries,), torch.int32), ((tiles, 2), torch.int32), ((4,), torch.int64)]
        layout += order_on_gpu(count, entries)
    return allocate(means2d, layout)


@fake("blend")
def _(means2d, conics, opacities, features, absolute, lists, offset, width, height, keep):
    count, tiles = features.shape[0], tiles_of(width, height)
    if on_cpu(features):
        kept = [
            ((count, 16), None), ((tiles, 256), None), ((tiles, 256), torch.int32),
            ((lists[5].shape[0],), torch.int16),
        ]  # fmt: skip
    else:
        kept = [((count, 12), None), ((unknown(),), torch.uint8), ((4,), torch.int64)] if keep else []
    image, left = features.new_empty(features.shape[1], height, width), features.new_empty(1, height, width)
    return image, left, allocate(features, kept)


@fake("blend_backward")
def _(means2d, conics, opacities, features, *rest):
    grads = [torch.empty_like(t) for t in (means2d, conics, opacities, features)]
    return [*grads, means2d.new_empty(means2d.shape if rest[-1] else 0)]


@fake("scores")
def _(means2d, conics, opacities, lists, offset, width, height, *_):
    pictures = (opacities.new_empty(height, width, dtype=torch.int32) for _ in range(2))
    return opacities.new_empty(opacities.shape[0], 8), *pictures
