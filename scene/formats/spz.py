"""SPZ (Niantic): a splat in 20 bytes and its SH in 9 to 45, then compressed. Axes: right, up, back.

Versions 1 to 3 are one gzip stream; version 4 is a header and a zstd frame for each kind of number. Version 3
is written, which most viewers read, or 2 or 4 on request.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from scene.formats.arrays import REST, Splats, check_room, drop_largest, with_largest
from utils.files import DataError, atomic_write

MAGIC = 0x5053474E  # "NGSP"
HEADER = struct.Struct("<IIIBBBB")  # magic, version, count, SH degree, fractional bits, flags, streams or 0
TABLE_AT = 32  # version 4 without extensions
ANTIALIASED = 1
WIDEST = 23  # bits of a coordinate beside its sign
SH_BITS = {"small": (5, 4), "good": (6, 5), "best": (8, 8)}  # of degree 1, and of the others
AXES = (1, -1, -1)
COLOR_SCALE = 0.15
ZSTD_LEVEL = 12


def write(splats: Splats, path: Path, quality: str = "best", version: int = 3) -> None:
    data = packed(splats, path, quality, version)
    with atomic_write(path, len(data)) as file:
        file.write(data)


def packed(splats: Splats, path: Path, quality: str = "best", version: int = 3) -> bytes:
    """The bytes of the file. `path`, for the message if that cannot be."""
    splats = splats.flipped(AXES)
    bits = _fractional_bits(splats, path)
    parts = [
        _as_24_bits(splats.means, bits),
        _bytes(255 * splats.opacities),
        _bytes(splats.sh_dc * np.float32(COLOR_SCALE * 255) + np.float32(127.5)),
        _bytes((splats.log_scales + 10) * 16),
        _rotations_3(splats.quats) if version >= 3 else _rotations_2(splats.quats),
        _sh(splats.sh_rest, *SH_BITS[quality]),
    ]
    streams = [part.tobytes() for part in parts if part.size]
    flags = ANTIALIASED * splats.antialiased
    count = len(streams) if version == 4 else 0
    header = HEADER.pack(MAGIC, version, len(splats), splats.sh_degree, bits, flags, count)
    if version == 4:
        return _packed_4(header, streams)
    return gzip.compress(b"".join([header, *streams]), mtime=0)


def read(path: Path) -> Splats:
    data = path.read_bytes()
    try:
        return _read(data, path).flipped(AXES)
    except (zlib.error, EOFError, OSError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as SPZ ({error})") from None


def _read(data: bytes, path: Path) -> Splats:
    zipped = data[:2] == b"\x1f\x8b"
    header = _gunzip(data, HEADER.size) if zipped else data[: HEADER.size]
    magic, version, count, degree, bits, flags, streams = HEADER.unpack(header)
    if magic != MAGIC or not 1 <= version <= 4 or zipped != (version < 4):
        raise DataError(f"{path}: must be SPZ of version 1 to 4, but its header is not")
    if degree > 4 or bits > 31:
        raise DataError(f"{path}: SH degree must be 0 to 4 and fractional bits 0 to 31, got {degree}, {bits}")
    rest = (degree + 1) ** 2 - 1
    rows = [6 if version == 1 else 9, 1, 3, 3, 4 if version >= 3 else 3, 3 * rest]
    check_room(path, count, sum(rows), len(data))
    sizes = [count * row for row in rows]
    parts = _unpacked_4(data, streams, sizes, path) if version == 4 else _unpacked_3(data, sizes, path)
    columns = [np.frombuffer(part, np.uint8).reshape(count, row) for part, row in zip(parts, rows)]
    return _decoded(columns, version, degree, bits, bool(flags & ANTIALIASED))


def _decoded(columns: list[np.ndarray], version: int, degree: int, bits: int, antialiased: bool) -> Splats:
    positions, alphas, colors, scales, rotations, sh = columns
    kept = REST[min(degree, 3)]  # the fourth degree of those who have one is left out
    means = positions.view("<f2") if version == 1 else _from_24_bits(positions) * 2.0**-bits
    return Splats(
        means=means.astype(np.float32),
        sh_dc=(colors / np.float32(255) - np.float32(0.5)) / np.float32(COLOR_SCALE),
        sh_rest=(sh.reshape(len(sh), (degree + 1) ** 2 - 1, 3)[:, :kept] - np.float32(128)) / np.float32(128),
        opacities=alphas[:, 0] / np.float32(255),
        log_scales=scales / np.float32(16) - np.float32(10),
        quats=_quats_3(rotations) if version >= 3 else _quats_2(rotations),
        antialiased=antialiased,
    )


# Compression


def _gunzip(data: bytes, size: int) -> bytes:
    """So many bytes and no more, whatever the stream would become."""
    out = zlib.decompressobj(wbits=31).decompress(data, size)
    if len(out) < size:
        raise EOFError(f"it ends after {len(out):,} of {size:,} bytes")
    return out


def _unpacked_3(data: bytes, sizes: list[int], path: Path) -> list[memoryview]:
    out = memoryview(_gunzip(data, HEADER.size + sum(sizes)))[HEADER.size :]
    ends = np.cumsum(sizes).tolist()
    return [out[end - size : end] for end, size in zip(ends, sizes)]


def _unpacked_4(data: bytes, streams: int, sizes: list[int], path: Path) -> list[bytes]:
    zstd = _zstandard(path)
    (table,) = struct.unpack_from("<I", data, HEADER.size)
    at = table + 16 * streams
    entries = iter([struct.unpack_from("<QQ", data, table + 16 * i) for i in range(streams)])
    parts = []
    for size in sizes:
        packed, raw = next(entries, (0, 0)) if size else (0, 0)
        if raw != size or at + packed > len(data):
            raise DataError(f"{path}: a stream must unpack to {size:,} bytes, its table says {raw:,}")
        parts.append(_unzstd(zstd, data[at : at + packed], size, path) if size else b"")
        at += packed
    return parts


def _unzstd(zstd, packed: bytes, size: int, path: Path) -> bytes:
    try:
        raw = zstd.ZstdDecompressor().stream_reader(packed).read(size)
    except zstd.ZstdError as error:
        raise DataError(f"{path}: cannot be read as SPZ ({error})") from None
    if len(raw) != size:
        raise EOFError(f"a stream ends after {len(raw):,} of {size:,} bytes")
    return raw


def _packed_4(header: bytes, streams: list[bytes]) -> bytes:
    zstd = _zstandard(Path("version 4"))
    frames = [zstd.ZstdCompressor(level=ZSTD_LEVEL).compress(stream) for stream in streams]
    table = [struct.pack("<QQ", len(frame), len(stream)) for frame, stream in zip(frames, streams)]
    return b"".join([header, struct.pack("<I", TABLE_AT), bytes(12), *table, *frames])


def _zstandard(what: Path):
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{what}: SPZ of version 4 needs a package: pip install zstandard") from None
    return zstandard


# Numbers


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _fractional_bits(splats: Splats, path: Path) -> int:
    """As fine a grid as 24 bits allow."""
    farthest = float(np.abs(splats.means).max(initial=0))
    for bits in range(WIDEST, -1, -1):
        if round(farthest * 2**bits) < 2**WIDEST:
            return bits
    raise DataError(f"{path}: coordinates must be below {2**WIDEST:,} in SPZ, got {farthest:,.0f}")


def _as_24_bits(means: np.ndarray, bits: int) -> np.ndarray:
    grid = np.rint(means.astype(np.float64) * 2.0**bits).astype("<i4")
    return grid.reshape(-1, 1).view(np.uint8).reshape(-1, 4)[:, :3].copy()


def _from_24_bits(data: np.ndarray) -> np.ndarray:
    parts = data.reshape(-1, 3, 3).astype(np.int32)
    grid = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    return (grid - ((grid & 0x800000) << 1)).astype(np.float64)


def _rotations_3(quats: np.ndarray) -> np.ndarray:
    """The largest of (x, y, z, w) by its number, the others as sign and 9 bits."""
    largest, others = drop_largest(quats[:, [1, 2, 3, 0]])
    sizes = np.floor(511 * np.sqrt(2) * np.abs(others) + 0.5).clip(0, 511).astype(np.uint32)
    fields = sizes | (others < 0).astype(np.uint32) << 9
    word = largest.astype(np.uint32) << 30 | fields[:, 0] << 20 | fields[:, 1] << 10 | fields[:, 2]
    return word.astype("<u4")


def _quats_3(data: np.ndarray) -> np.ndarray:
    word = np.ascontiguousarray(data).view("<u4")[:, 0]
    fields = np.stack([word >> 20, word >> 10, word], axis=1) & 1023
    sizes = (fields & 511) * (np.sqrt(0.5) / 511)
    xyzw = with_largest((word >> 30).astype(np.int64), np.where(fields & 512, -sizes, sizes))
    return xyzw[:, [3, 0, 1, 2]]


def _rotations_2(quats: np.ndarray) -> np.ndarray:
    signs = np.where(quats[:, :1] < 0, -1, 1)
    return _bytes(quats[:, 1:] * signs * 127.5 + 127.5)


def _quats_2(data: np.ndarray) -> np.ndarray:
    xyz = data / 127.5 - 1
    w = np.sqrt(np.clip(1 - (xyz**2).sum(1, keepdims=True), 0, 1))
    return np.concatenate([w, xyz], axis=1).astype(np.float32)


def _sh(rest: np.ndarray, bits_1: int, bits: int) -> np.ndarray:
    """[N, 3 * (K-1)]: to the centers of buckets 2^(8-bits) wide."""
    values = np.rint(128 * rest) + 128
    bucket = np.full((1, rest.shape[1], 1), 2 ** (8 - bits))
    bucket[:, :3] = 2 ** (8 - bits_1)
    return _bytes(np.floor((values + bucket // 2) / bucket) * bucket).reshape(len(rest), 3 * rest.shape[1])
