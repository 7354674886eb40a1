"""PLY: point clouds to start from, and trained Gaussians as the original and every viewer store them.

Read by property name, so order, extra properties, types, ascii and both byte orders do not matter. Written in
the original's exact layout, because SIBR's reader counts on it.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyParseError

from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from scene.points import PointCloud
from utils.files import DataError, atomic_write, refuse_pointer

POINT = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")] + [
    (c, "u1") for c in ("red", "green", "blue")
]
ROWS_AT_ONCE = 4096  # rows are 248 bytes: this many stay in the cache while their columns are picked out
LONGEST_HEADER = 1 << 16
ANTIALIASED = "SplatRenderMode: mip"
SIZES: dict[bytes, int] = dict.fromkeys((b"short", b"ushort", b"int16", b"uint16"), 2)
SIZES |= dict.fromkeys((b"int", b"uint", b"float", b"int32", b"uint32", b"float32"), 4)
SIZES |= dict.fromkeys((b"double", b"float64"), 8)
KNOWN = ("means", "sh_dc", "sh_rest", "opacity_logits", "log_scales", "raw_quats")
STORED = ("f_dc", "f_rest", "scale", "rot")  # what the file calls some of them
REST_COUNTS = {0: 0, 9: 1, 24: 2, 45: 3}  # number of f_rest properties -> SH degree


def save_ply(
    gaussians: GaussianModel, path: Path, antialiasing: bool = False, frame: Similarity = OF_DATA
) -> None:
    """Write a trained model: float32 position, normal (zero), f_dc, f_rest, opacity, scale, rot; then the
    attributes of one's own, as name_0, name_1, ...

    Of a model that is in another frame, positions and sizes are written in the data set's coordinates; as
    float64, where float32 is too coarse for these positions.
    """
    p = {name: value.detach().float() for name, value in gaussians.params.items()}
    if not frame.trivial:
        p["means"] = torch.from_numpy(frame.leave(p["means"].cpu().numpy()))
        p["log_scales"] = (p["log_scales"].double() + frame.log_unit).float()
    count, rest = p["sh_rest"].shape[:2]
    rests = _numbered("f_rest_", 3 * rest)  # all of red, then green, then blue
    parts = [
        (["x", "y", "z"], p["means"]),
        (["nx", "ny", "nz"], torch.zeros(1, 3)),
        (_numbered("f_dc_", 3), p["sh_dc"][:, 0]),
        *((rests[rest * c : rest * (c + 1)], p["sh_rest"][:, :, c]) for c in range(3)),
        (["opacity"], p["opacity_logits"]),
        (_numbered("scale_", 3), p["log_scales"]),
        (_numbered("rot_", 4), p["raw_quats"]),
    ]
    for name in [name for name in p if name not in KNOWN]:
        parts.append((_numbered(f"{name}_", p[name].shape[1:].numel()), p[name].flatten(1)))
    names = [name for part, _ in parts for name in part]
    # Which filter it was trained with, for viewers that know the convention. plyfile puts an element's
    # comments below its header line: SIBR wants `element vertex` on the third line of the file.
    comments = [ANTIALIASED] if antialiasing else []
    table, start = np.empty((count, len(names)), "<f4"), 0
    for part, values in parts:
        table[:, start : start + len(part)] = values.cpu().numpy()
        start += len(part)
    table = table.view([(name, "<f4") for name in names]).reshape(count)
    if frame.needs_doubles:
        table = table.astype([(name, "<f8" if name in "xyz" else "<f4") for name in names])
        for i, name in enumerate("xyz"):
            table[name] = p["means"][:, i].numpy()
    _write(path, table, comments)


def load_ply(
    path: Path,
    device: torch.device | str = "cpu",
    frame: Similarity = OF_DATA,
    say: Callable[[str], None] = print,
) -> GaussianModel:
    """A trained model, in this frame, with all properties name_0, name_1, ... as an attribute [N, ...]. All
    its SH degrees are active. Its scene extent is unknown, and 1.

    Gaussians with numbers that are not finite are left out, and told.
    """
    vertices = _Vertices(path)
    if "f_dc_0" not in vertices.names and {"x", "y", "z"} <= set(vertices.names):
        raise DataError(f"{path}: must be Gaussians (with f_dc_0, opacity and so on), but is a point cloud")
    rest = len([name for name in vertices.names if name.startswith("f_rest_")])
    if rest not in REST_COUNTS:
        raise DataError(f"{path}: must have 0, 9, 24 or 45 f_rest properties (SH degree 0 to 3), got {rest}")
    sh_rest = (
        vertices.columns(_numbered("f_rest_", rest)).reshape(len(vertices), 3, rest // 3).transpose(0, 2, 1)
    )
    arrays = {
        "means": frame.enter(vertices.columns(["x", "y", "z"], np.float64)).astype(np.float32),
        "sh_dc": vertices.columns(_numbered("f_dc_", 3))[:, None, :],
        "sh_rest": sh_rest,
        "opacity_logits": vertices.columns(["opacity"]),
        "log_scales": vertices.columns(_numbered("scale_", 3)),
        "raw_quats": vertices.columns(_numbered("rot_", 4)),
    }
    for name, count in _own_attributes(vertices.names).items():
        arrays[name] = vertices.columns(_numbered(f"{name}_", count))
    if not frame.trivial:
        arrays["log_scales"] = (arrays["log_scales"].astype(np.float64) - frame.log_unit).astype(np.float32)
    finite = np.all([np.isfinite(a).reshape(len(a), -1).all(axis=1) for a in arrays.values()], axis=0)
    if len(finite) and not finite.any():
        raise DataError(f"{path}: has no Gaussian whose numbers are all finite")
    if not finite.all():
        arrays = {name: a[finite] for name, a in arrays.items()}
        say(f"{path}: {(~finite).sum():,} of {len(finite):,} Gaussians are left out, as they are not finite")
    params = {name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in arrays.items()}
    model = GaussianModel(params, sh_degree=REST_COUNTS[rest], active_sh_degree=REST_COUNTS[rest])
    model.antialiased = vertices.antialiased
    return model


def count_in(path: Path) -> int | None:
    """The number of Gaussians, by the header. None if there is no such file, or it is not a PLY."""
    try:
        found = re.search(rb"^element vertex (\d+)", _header(path), re.M)
    except OSError:
        return None
    return int(found[1]) if found else None


def _own_attributes(names: Iterable[str]) -> dict[str, int]:
    """Name -> how many numbers a Gaussian has of it, where they are numbered from 0."""
    counts: dict[str, int] = {}
    for name in names:
        stem, _, number = name.rpartition("_")
        if stem and number == str(counts.get(stem, 0)):
            counts[stem] = int(number) + 1
    return {stem: count for stem, count in counts.items() if stem not in (*KNOWN, *STORED)}


def read_points(path: Path) -> PointCloud:
    """Positions and colors; mid-gray where there are no colors."""
    vertices = _Vertices(path)
    xyz = vertices.columns(["x", "y", "z"], np.float64)
    colors = ["red", "green", "blue"]
    if not set(colors) <= set(vertices.names):
        return PointCloud(xyz, np.full(xyz.shape, 0.5))
    return PointCloud(xyz, vertices.columns(colors) / np.float32(255))


def write_points(path: Path, points: PointCloud) -> None:
    """As the original writes input.ply: x y z and zero normals as float32, colors as uint8.

    Positions that were given as float64 are written as such.
    """
    kind = points.xyz.dtype.newbyteorder("<")
    table = np.zeros(len(points), [(name, kind if name in "xyz" else of) for name, of in POINT])
    for i, name in enumerate(("x", "y", "z")):
        table[name] = points.xyz[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        table[name] = np.rint(points.rgb[:, i] * 255)
    _write(path, table)


def read_elements(path: Path) -> PlyData:
    try:
        _check_counts(path)
        return PlyData.read(str(path))
    except (OSError, PlyParseError, ValueError, UnicodeError, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as PLY ({error})") from None


def antialiased(ply: PlyData) -> bool:
    """Do the comments say so? Brush and Postshot each have their words for it."""
    comments = {text.strip() for part in (ply, *ply.elements) for text in part.comments}
    return not comments.isdisjoint((ANTIALIASED, "antialiased 1"))


class _Vertices:
    """The vertex element of a PLY file."""

    def __init__(self, path: Path):
        self.path = path
        refuse_pointer(path)
        ply = read_elements(path)
        if "vertex" not in ply:
            raise DataError(f"{path}: has no element named vertex")
        self._data = ply["vertex"].data
        self.names = self._data.dtype.names or ()
        self.antialiased = antialiased(ply)

    def __len__(self) -> int:
        return len(self._data)

    def columns(self, names: list[str], kind: type = np.float32) -> np.ndarray:
        """These properties, side by side, as `kind` [N, len(names)]."""
        missing = [name for name in names if name not in self.names]
        if missing and "packed_position" in self.names:
            raise DataError(f"{self.path}: is a compressed PLY of Gaussians, which cannot be read here")
        if missing:
            raise DataError(f"{self.path}: lacks the vertex property {missing[0]}")
        if any(self._data.dtype[name].hasobject for name in names):
            raise DataError(f"{self.path}: one of {', '.join(names)} is a list property, must be a number")
        table = np.empty((len(self), len(names)), kind)
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self._data[start : start + ROWS_AT_ONCE]
            for i, name in enumerate(names):
                table[start : start + len(rows), i] = rows[name]
        return table


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(LONGEST_HEADER).partition(b"end_header")[0]


def _check_counts(path: Path) -> None:
    """plyfile believes what a header says, and makes room for it. The file must be large enough for that."""
    header, size = _header(path), os.stat(path).st_size
    text, least, rows, row = b"format ascii" in header, 0, 0, 0
    for words in [line.split() for line in header.splitlines()] + [[b"element", b"", b"0"]]:
        if len(words) == 3 and words[0] == b"element":
            least, rows, row = least + rows * max(row, 1), int(words[2]), 0
        elif len(words) > 2 and words[0] == b"property":
            kind = words[2] if words[1] == b"list" else words[1]
            row += 2 if text else SIZES.get(kind, 1)  # a digit and what parts it from the next
    if least > size + 1:
        raise ValueError(f"its header promises {least:,} bytes or more, there are {size:,}")


def _write(path: Path, table: np.ndarray, comments: list[str] | None = None) -> None:
    with atomic_write(path, table.nbytes) as file:
        PlyData([PlyElement.describe(table, "vertex", comments=comments or [])], byte_order="<").write(file)


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]
