"""Compressed PLY (PlayCanvas): 16 bytes a splat between the bounds of its chunk of 256, SH in a byte each."""

from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement

from scene.formats.arrays import REST, Splats, drop_largest, with_largest
from scene.formats.ply import ANTIALIASED, antialiased, read_elements
from utils.files import DataError, atomic_write
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
LEAST_PART = 16  # of the chunks, at least, are on either side of a cut, so that cuts are few


def write(splats: Splats, path: Path) -> None:
    splats = splats.rows(_in_small_boxes(splats.means))
    position, position_bounds = _in_chunks(splats.means)
    scale, scale_bounds = _in_chunks(np.clip(splats.log_scales, -LARGEST_LOG, LARGEST_LOG))
    color, color_bounds = _in_chunks(sh_to_rgb(splats.sh_dc))
    vertices = [_pack(position), _rotations(splats.quats), _pack(scale), _colors(color, splats.opacities)]
    bounds = np.concatenate([position_bounds, scale_bounds, color_bounds], axis=1)
    elements = [
        _element("chunk", BOUNDS, "<f4", bounds),
        _element("vertex", PACKED, "<u4", np.stack(vertices, axis=1)),
    ]
    if rest := _coefficients_worth_a_byte(splats.sh_rest):
        by_channel = splats.sh_rest[:, :rest].transpose(0, 2, 1).reshape(len(splats), 3 * rest)
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
    return _sh_values(data).reshape(count, 3, rest // 3).transpose(0, 2, 1)


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


def _in_small_boxes(points: np.ndarray) -> np.ndarray:
    """An order [N] in which each chunk is a small box, as steps are a share of its sides: cut in two where
    that makes the boxes smallest, again and again. (On a Morton curve, chunks jump between near and far.)"""
    waiting, done = [np.arange(len(points))], []
    while waiting:
        part = waiting.pop()
        if len(part) <= CHUNK:
            done.append(part)
            continue
        cost, cut, order = min(
            (_best_cut(points[part], axis) for axis in range(3)), key=lambda found: found[0]
        )
        waiting += [part[order[cut:]], part[order[:cut]]]
    return np.concatenate(done)


def _best_cut(points: np.ndarray, axis: int) -> tuple[float, int, np.ndarray]:
    """Along an axis, after whole chunks: the sides of both boxes, times the splats in each; how many are
    before the cut; and the order along the axis."""
    order = np.argsort(points[:, axis])
    chunks = -(-len(points) // CHUNK)
    cuts = CHUNK * np.arange(max(chunks // LEAST_PART, 1), chunks - chunks // LEAST_PART)
    before, after = _sides(points[order])[cuts - 1], _sides(points[order][::-1])[len(points) - cuts - 1]
    costs = cuts * before + (len(points) - cuts) * after
    best = costs.argmin()
    return costs[best], cuts[best], order


def _sides(points: np.ndarray) -> np.ndarray:
    """Of the box of the first one, two, ... points: the sum of its three sides."""
    return (np.maximum.accumulate(points) - np.minimum.accumulate(points)).sum(1)


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


def _sh_values(data: np.ndarray) -> np.ndarray:
    """No byte means 0: the nearest are 1/64 away from it."""
    values = ((data + np.float32(0.5)) / 256 - np.float32(0.5)) * SH_RANGE
    values = np.where(data == 0, -SH_RANGE / 2, np.where(data == 255, SH_RANGE / 2, values))
    return values.astype(np.float32)


def _coefficients_worth_a_byte(rest: np.ndarray) -> int:
    """How many of the SH coefficients [N, K-1, 3] the file gets: the last degrees are left out if they are
    nearer to nothing than to what their bytes say, as in a model that was hardly trained."""
    counts = sorted(count for count in REST.values() if count <= rest.shape[1])
    while counts[-1]:
        band = rest[:, counts[-2] :]
        if np.square(_sh_values(_sh(band)) - band).sum() <= np.square(band).sum():
            break
        rest = rest[:, : counts[-2]]
        counts.pop()
    return counts[-1]
