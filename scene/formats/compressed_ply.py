"""Compressed PLY (PlayCanvas): 16 bytes a splat between the bounds of its chunk of 256, SH in a byte each."""

from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from scene.formats.arrays import REST, Splats, drop_largest, with_largest
from scene.formats.ply import ANTIALIASED, antialiased, read_elements
from utils.files import DataError, atomic_write
from utils.geometry import morton_codes
from utils.sh import rgb_to_sh, sh_to_rgb

CHUNK = 256
BOUNDS = [
    f"{end}_{prefix}{axis}"
    for prefix, axes in (("", "xyz"), ("scale_", "xyz"), ("", "rgb"))
    for end in ("min", "max")
    for axis in axes
]
PACKED = [f"packed_{name}" for name in ("position", "rotation", "scale", "color")]
PLACES = (11, 10, 11)  # bits of x, y and z
LARGEST_LOG = 20
SH_RANGE = 8


def write(splats: Splats, path: Path) -> None:
    splats = splats.rows(np.argsort(morton_codes(torch.from_numpy(splats.means)).numpy(), kind="stable"))
    position, position_bounds = _in_chunks(splats.means)
    scale, scale_bounds = _in_chunks(np.clip(splats.log_scales, -LARGEST_LOG, LARGEST_LOG))
    color, color_bounds = _in_chunks(sh_to_rgb(splats.sh_dc))
    vertices = [_pack(position), _rotations(splats.quats), _pack(scale), _colors(color, splats.opacities)]
    bounds = np.concatenate([position_bounds, scale_bounds, color_bounds], axis=1)
    elements = [
        _element("chunk", BOUNDS, "<f4", bounds),
        _element("vertex", PACKED, "<u4", np.stack(vertices, axis=1)),
    ]
    if splats.sh_degree:
        by_channel = splats.sh_rest.transpose(0, 2, 1).reshape(len(splats), 3 * splats.sh_rest.shape[1])
        elements.append(_element("sh", _rest_names(by_channel.shape[1]), "u1", _sh(by_channel)))
    comments = [ANTIALIASED] if splats.antialiased else []
    with atomic_write(path, sum(element.data.nbytes for element in elements)) as file:
        PlyData(elements, byte_order="<", comments=comments).write(file)


def holds(ply: PlyData) -> bool:
    return "vertex" in ply and set(PACKED) <= set(ply["vertex"].data.dtype.names or ())


def read(path: Path) -> Splats:
    return decoded(read_elements(path), path)


def decoded(ply: PlyData, path: Path) -> Splats:
    if not holds(ply) or "chunk" not in ply:
        raise DataError(f"{path}: must have an element chunk and a vertex with {', '.join(PACKED)}")
    words = _columns(ply, "vertex", PACKED, "u4", path).T
    with_colors = BOUNDS[-1] in ply["chunk"].data.dtype.names  # older files have no bounds of colors
    bounds = _columns(ply, "chunk", BOUNDS if with_colors else BOUNDS[:12], "f4", path)
    count = words.shape[1]
    if len(bounds) * CHUNK < count:
        raise DataError(f"{path}: must have a chunk for {CHUNK} vertices, {len(bounds)} are too few")
    rgba = np.stack([words[3] >> shift & 255 for shift in (24, 16, 8, 0)], axis=1) / np.float32(255)
    rgb = _between(bounds[:, 12:], rgba[:, :3]) if with_colors else rgba[:, :3]
    return Splats(
        means=_between(bounds[:, :6], _unpack(words[0])),
        sh_dc=rgb_to_sh(rgb).astype(np.float32),
        sh_rest=_read_sh(ply, count, path),
        opacities=rgba[:, 3],
        log_scales=_between(bounds[:, 6:12], _unpack(words[2])),
        quats=_quats(words[1]),
        antialiased=antialiased(ply),
    )


def _read_sh(ply: PlyData, count: int, path: Path) -> np.ndarray:
    if "sh" not in ply:
        return np.zeros((count, 0, 3), np.float32)
    rest = len(ply["sh"].data.dtype.names or ())
    if rest not in [3 * n for n in REST.values()] or len(ply["sh"].data) != count:
        raise DataError(f"{path}: the element sh must have 9, 24 or 45 numbers for each vertex")
    data = _columns(ply, "sh", _rest_names(rest), "u1", path)
    values = ((data + np.float32(0.5)) / 256 - np.float32(0.5)) * SH_RANGE
    values = np.where(data == 0, -SH_RANGE / 2, np.where(data == 255, SH_RANGE / 2, values))
    return values.astype(np.float32).reshape(count, 3, rest // 3).transpose(0, 2, 1)


def _columns(ply: PlyData, element: str, names: list[str], kind: str, path: Path) -> np.ndarray:
    data = ply[element].data
    for name in names:
        if name not in (data.dtype.names or ()) or data.dtype[name].newbyteorder("=") != np.dtype(kind):
            raise DataError(f"{path}: the element {element} must have the property {name} of type {kind}")
    return np.stack([data[name] for name in names], axis=1)


def _element(name: str, names: list[str], kind: str, table: np.ndarray) -> PlyElement:
    rows = np.ascontiguousarray(table.astype(kind)).view([(n, kind) for n in names]).reshape(len(table))
    return PlyElement.describe(rows, name)


def _rest_names(count: int) -> list[str]:
    return [f"f_rest_{i}" for i in range(count)]


# Numbers


def _in_chunks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in their chunk's bounds the values are, [N, 3] in 0..1, and those bounds [C, 6]. The last splat
    fills the last chunk up."""
    count = len(values)
    filled = np.concatenate([values, np.repeat(values[-1:], -count % CHUNK, axis=0)]).reshape(-1, CHUNK, 3)
    low, high = filled.min(1, initial=np.inf), filled.max(1, initial=-np.inf)
    size = (high - low).astype(np.float64)
    size[size == 0] = 1
    inside = (filled - low[:, None]) / size[:, None]
    return inside.reshape(-1, 3)[:count], np.concatenate([low, high], axis=1)


def _between(bounds: np.ndarray, inside: np.ndarray) -> np.ndarray:
    chunk = np.arange(len(inside)) // CHUNK
    low, high = bounds[chunk, :3], bounds[chunk, 3:6]
    return (low * (1 - inside) + high * inside).astype(np.float32)


def _pack(inside: np.ndarray) -> np.ndarray:
    x, y, z = (np.rint(inside[:, i] * (2**bits - 1)).astype(np.uint32) for i, bits in enumerate(PLACES))
    return x << 21 | y << 11 | z


def _unpack(word: np.ndarray) -> np.ndarray:
    parts = (word >> 21, word >> 11 & 1023, word & 2047)
    return np.stack([part / np.float32(2**bits - 1) for part, bits in zip(parts, PLACES)], axis=1)


def _rotations(quats: np.ndarray) -> np.ndarray:
    largest, others = drop_largest(quats)
    a, b, c = np.rint((others * np.sqrt(0.5) + 0.5).clip(0, 1) * 1023).astype(np.uint32).T
    return largest.astype(np.uint32) << 30 | a << 20 | b << 10 | c


def _quats(word: np.ndarray) -> np.ndarray:
    parts = np.stack([word >> 20, word >> 10, word], axis=1) & 1023
    return with_largest((word >> 30).astype(np.int64), (parts / 1023 - 0.5) * np.sqrt(2))


def _colors(inside: np.ndarray, opacities: np.ndarray) -> np.ndarray:
    r, g, b, a = np.rint(np.concatenate([inside, opacities[:, None]], axis=1) * 255).astype(np.uint32).T
    return r << 24 | g << 16 | b << 8 | a


def _sh(values: np.ndarray) -> np.ndarray:
    return np.clip(np.trunc((values / SH_RANGE + 0.5) * 256), 0, 255)
