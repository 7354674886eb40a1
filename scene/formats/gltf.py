"""GLB with the glTF extension KHR_gaussian_splatting: plain floats. Axes: left, up, front."""

import json
import struct
from pathlib import Path

import numpy as np

from scene.formats.arrays import FLOAT32_TINY, REST, Splats
from utils.files import DataError, atomic_write
from utils.sh import sh_to_rgb

EXTENSION = "KHR_gaussian_splatting"
KERNEL = {
    "kernel": "ellipse",
    "colorSpace": "srgb_rec709_display",
    "projection": "perspective",
    "sortingMethod": "cameraDistance",
}
MAGIC, VERSION, JSON_CHUNK, BIN_CHUNK = 0x46546C67, 2, 0x4E4F534A, 0x004E4942
AXES = (-1, -1, 1)
KINDS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5126: "<f4"}  # component types
FLOAT, UBYTE = 5126, 5121
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
LONGEST_LOG = np.log(np.finfo(np.float32).max) - 1
POINTS = 0
BROKEN = (struct.error, KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError)


def write(splats: Splats, path: Path) -> None:
    if not len(splats):
        raise DataError(f"{path}: a GLB file must hold at least one splat, the model has none")
    splats = splats.flipped(AXES)
    attributes = {
        "POSITION": splats.means,
        f"{EXTENSION}:ROTATION": splats.quats[:, [1, 2, 3, 0]],
        f"{EXTENSION}:SCALE": np.exp(np.minimum(splats.log_scales, LONGEST_LOG)),
        f"{EXTENSION}:OPACITY": splats.opacities[:, None],
        **dict(zip(_sh_names(splats.sh_degree), [splats.sh_dc, *splats.sh_rest.transpose(1, 0, 2)])),
        "COLOR_0": _fallback_colors(splats),
    }
    blocks = [np.ascontiguousarray(values).tobytes() for values in attributes.values()]
    scene = _scene(attributes, blocks, splats)
    text = json.dumps(scene, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    size = sum(map(len, blocks))
    with atomic_write(path, size + len(text)) as file:
        file.write(struct.pack("<III", MAGIC, VERSION, 28 + len(text) + size))
        file.write(struct.pack("<II", len(text), JSON_CHUNK) + text)
        file.write(struct.pack("<II", size, BIN_CHUNK))
        file.writelines(blocks)


def _scene(attributes: dict[str, np.ndarray], blocks: list[bytes], splats: Splats) -> dict:
    ends = np.cumsum([len(block) for block in blocks]).tolist()
    views = [{"buffer": 0, "byteOffset": end - len(b), "byteLength": len(b)} for end, b in zip(ends, blocks)]
    accessors = [_accessor(i, values) for i, values in enumerate(attributes.values())]
    means = splats.means
    accessors[0] |= {"min": means.min(0).tolist(), "max": means.max(0).tolist()}
    primitive = {
        "mode": POINTS,
        "attributes": {name: i for i, name in enumerate(attributes)},
        "extensions": {EXTENSION: KERNEL},
    }
    asset: dict[str, object] = {"version": "2.0", "generator": "TileSplat"}
    if splats.antialiased:
        asset["extras"] = {"antialiased": True}
    return {
        "asset": asset,
        "extensionsUsed": [EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": ends[-1]}],
    }


def _accessor(view: int, values: np.ndarray) -> dict:
    kind = {"bufferView": view, "componentType": FLOAT, "count": len(values)}
    if values.dtype == np.uint8:
        kind |= {"componentType": UBYTE, "normalized": True}
    return kind | {"type": next(name for name, width in WIDTHS.items() if width == values.shape[1])}


def _sh_names(degree: int) -> list[str]:
    return [f"{EXTENSION}:SH_DEGREE_{l}_COEF_{n}" for l in range(degree + 1) for n in range(2 * l + 1)]


def _fallback_colors(splats: Splats) -> np.ndarray:
    """Linear light, for programs that draw points."""
    srgb = np.clip(sh_to_rgb(splats.sh_dc), 0, 1)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.rint(255 * np.concatenate([linear, splats.opacities[:, None]], axis=1)).astype(np.uint8)


def read(path: Path) -> Splats:
    data = path.read_bytes()
    try:
        scene, binary = _chunks(data)
        primitives = [p for mesh in scene["meshes"] for p in mesh["primitives"]]
        splats = [p for p in primitives if EXTENSION in p.get("extensions", {})]
        if len(splats) != 1:
            raise DataError(f"{path}: must have one primitive with {EXTENSION}, got {len(splats)}")
        return _read(scene, binary, splats[0]["attributes"], path).flipped(AXES)
    except BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as GLB ({type(error).__name__}: {error})") from None


def _read(scene: dict, binary: memoryview, attributes: dict, path: Path) -> Splats:
    def column(name: str, width: int) -> np.ndarray:
        return _values(scene, binary, attributes[name], width)

    degree = max(d for d in REST if _sh_names(d)[-1] in attributes)
    means = column("POSITION", 3)
    sh = np.stack([column(name, 3) for name in _sh_names(degree)], axis=1)
    scales = column(f"{EXTENSION}:SCALE", 3)
    if np.any(scales < 0):
        raise DataError(f"{path}: splat {np.flatnonzero((scales < 0).any(1))[0]} has a negative scale")
    splats = Splats(
        means=means,
        sh_dc=sh[:, 0],
        sh_rest=sh[:, 1:],
        opacities=column(f"{EXTENSION}:OPACITY", 1)[:, 0],
        log_scales=np.log(np.maximum(scales, FLOAT32_TINY)),
        quats=column(f"{EXTENSION}:ROTATION", 4)[:, [3, 0, 1, 2]],
        antialiased=scene["asset"].get("extras", {}).get("antialiased") is True,
    )
    if {len(sh), len(scales), len(splats.opacities), len(splats.quats)} != {len(means)}:
        raise DataError(f"{path}: all attributes must have as many rows as POSITION, {len(means):,}")
    return splats


def _chunks(data: bytes) -> tuple[dict, memoryview]:
    magic, version, _, size, kind = struct.unpack_from("<IIIII", data)
    if (magic, version, kind) != (MAGIC, VERSION, JSON_CHUNK):
        raise ValueError("its header is not that of glTF 2")
    (more, kind) = struct.unpack_from("<II", data, 20 + size)
    if kind != BIN_CHUNK or 28 + size + more > len(data):
        raise ValueError("its binary part is cut off or missing")
    return json.loads(data[20 : 20 + size]), memoryview(data)[28 + size : 28 + size + more]


def _values(scene: dict, binary: memoryview, number: int, width: int) -> np.ndarray:
    """An accessor as float32 [N, width]."""
    accessor = scene["accessors"][number]
    view = scene["bufferViews"][accessor["bufferView"]]
    if WIDTHS[accessor["type"]] != width or view["buffer"] != 0 or "sparse" in accessor:
        raise ValueError(f"accessor {number} must be plain, of {width} numbers, in the file's own buffer")
    kind, count = np.dtype(KINDS[accessor["componentType"]]), accessor["count"]
    row = kind.itemsize * width
    stride = view.get("byteStride", row)
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    if count < 0 or start < 0 or stride < row or start + (count - 1) * stride + row > len(binary):
        raise ValueError(f"accessor {number} reaches beyond the file")
    values = np.ndarray((count, width), kind, binary, start, (stride, kind.itemsize)).astype(np.float32)
    if kind.kind == "f":
        return values
    return np.maximum(values / np.iinfo(kind).max, -1)
