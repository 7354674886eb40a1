"""SOG version 2 (PlayCanvas): numbers as pixels of lossless WebP images, SH from a palette, all in one zip.

Or the same files in a folder, named by its meta.json. The palette is found by k-means: on a GPU if there is
one; on a CPU it is kept small enough to take seconds.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scene.formats.arrays import REST, Splats, check_room, drop_largest, with_largest
from utils.files import BAD_IMAGE, DataError, atomic_write
from utils.geometry import morton_codes

ENTRIES = 256  # of a codebook
EFFORT = {"quality": 75, "method": 3}  # of lossless WebP; more takes 30 times as long for the same size
PALETTES_PER_ROW = 64
MOST_PALETTES = 64  # thousands (of 1024)
CPU_PAIRS = 2**28  # splats times palette entries that a CPU compares in one round
PAIRS_AT_ONCE = 2**24
ROUNDS = {"cpu": 4, "cuda": 10}  # of k-means
LARGEST_INDEX = 252  # alpha of quats.webp: this plus which component was dropped
LONGEST_META = 1 << 20
MODES = {"antialiased": True}


def write(splats: Splats, path: Path) -> None:
    splats = splats.rows(np.argsort(morton_codes(torch.from_numpy(splats.means)).numpy(), kind="stable"))
    meta = {"version": 2, "asset": {"generator": "TileSplat"}, "count": len(splats)}
    if splats.antialiased:
        meta["model"] = "antialiased"
    images = {}
    for part in (_means, _scales, _quats, _colors, _palette):
        more, pictures = part(splats)
        meta |= more
        images |= pictures
    files = {"meta.json": json.dumps(meta).encode()} | {name: _webp(a) for name, a in images.items()}
    with atomic_write(path, sum(map(len, files.values()))) as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # no date: the same model, the same bytes


def read(path: Path) -> Splats:
    try:
        source = _Folder(path) if path.name == "meta.json" else _Zip(path)
        return _read(source, path)
    except (KeyError, TypeError, IndexError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as SOG ({type(error).__name__}: {error})") from None
    except (*BAD_IMAGE, RuntimeError, NotImplementedError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as SOG ({error})") from None


def _read(source, path: Path) -> Splats:
    meta = json.loads(source.bytes("meta.json", LONGEST_META))
    count = meta["count"]
    if meta["version"] != 2 or type(count) is not int or count < 0:
        raise DataError(f"{path}: must be SOG of version 2 with a count of splats")
    check_room(path, count, 20, source.size)
    means_l, means_u = (_texels(source, name, count)[:, :3] for name in meta["means"]["files"][:2])
    quats = _texels(source, meta["quats"]["files"][0], count)
    scales = _texels(source, meta["scales"]["files"][0], count)
    colors = _texels(source, meta["sh0"]["files"][0], count)
    if np.any(quats[:, 3] < LARGEST_INDEX):
        raise DataError(f"{path}: the alpha channel of quats must be {LARGEST_INDEX} to 255")
    return Splats(
        means=_unlog(meta["means"], means_l.astype(np.int64) | means_u.astype(np.int64) << 8),
        sh_dc=_codebook(meta["sh0"])[colors[:, :3]],
        sh_rest=_read_sh(source, meta, count),
        opacities=colors[:, 3] / np.float32(255),
        log_scales=_codebook(meta["scales"])[scales[:, :3]],
        quats=with_largest(
            quats[:, 3].astype(np.int64) - LARGEST_INDEX, (quats[:, :3] / 255 - 0.5) * np.sqrt(2)
        ),
        antialiased=MODES.get(str(meta.get("model")), False),
    )


def _read_sh(source, meta: dict, count: int) -> np.ndarray:
    if "shN" not in meta:
        return np.zeros((count, 0, 3), np.float32)
    sh = meta["shN"]
    rest, entries, (centroids, labels) = REST[sh["bands"]], sh["count"], sh["files"]
    rows = -(-entries // PALETTES_PER_ROW)
    table = _texels(source, centroids, rows * PALETTES_PER_ROW * rest)[:, :3]
    table = table.reshape(-1, rest, 3)[:entries]
    label = _texels(source, labels, count).astype(np.int64)
    return _codebook(sh)[table[label[:, 0] | label[:, 1] << 8]]


# The parts: each gives what meta.json says of it, and its images


def _means(splats: Splats) -> tuple[dict, dict]:
    logs = np.sign(splats.means) * np.log1p(np.abs(splats.means.astype(np.float64)))
    low, high = logs.min(0, initial=0 if not len(logs) else np.inf), logs.max(0, initial=-np.inf)
    high = np.maximum(high, low)
    size = np.where(high > low, high - low, 1)
    values = np.rint((logs - low) / size * 65535).astype(np.int64)
    files = ["means_l.webp", "means_u.webp"]
    bounds = {"mins": low.tolist(), "maxs": high.tolist(), "files": files}
    return {"means": bounds}, {files[0]: _opaque(values & 255), files[1]: _opaque(values >> 8)}


def _unlog(bounds: dict, values: np.ndarray) -> np.ndarray:
    low, high = (np.array(bounds[end], np.float64).reshape(3) for end in ("mins", "maxs"))
    logs = low + (high - low) * values / 65535
    with np.errstate(over="ignore"):
        return (np.sign(logs) * np.expm1(np.abs(logs))).astype(np.float32)


def _scales(splats: Splats) -> tuple[dict, dict]:
    codebook = _codebook_for(splats.log_scales)
    part = {"codebook": codebook.tolist(), "files": ["scales.webp"]}
    return {"scales": part}, {"scales.webp": _opaque(_nearest(codebook, splats.log_scales))}


def _quats(splats: Splats) -> tuple[dict, dict]:
    largest, others = drop_largest(splats.quats)
    values = np.rint(255 * (others * np.sqrt(0.5) + 0.5)).clip(0, 255)
    texels = np.concatenate([values, LARGEST_INDEX + largest[:, None]], axis=1)
    return {"quats": {"files": ["quats.webp"]}}, {"quats.webp": _image(texels)}


def _colors(splats: Splats) -> tuple[dict, dict]:
    codebook = _codebook_for(splats.sh_dc)
    alpha = np.rint(255 * splats.opacities)[:, None]
    texels = np.concatenate([_nearest(codebook, splats.sh_dc), alpha], axis=1)
    part = {"codebook": codebook.tolist(), "files": ["sh0.webp"]}
    return {"sh0": part}, {"sh0.webp": _image(texels)}


def _palette(splats: Splats) -> tuple[dict, dict]:
    if not splats.sh_rest.size:
        return {}, {}
    rest = splats.sh_rest.shape[1]
    palette, labels = _cluster(splats.sh_rest.reshape(len(splats), -1))
    codebook = _codebook_for(palette)
    table = _nearest(codebook, palette).reshape(-1, 3)
    row = PALETTES_PER_ROW * rest
    files = ["shN_centroids.webp", "shN_labels.webp"]
    part = {"count": len(palette), "bands": splats.sh_degree, "codebook": codebook.tolist(), "files": files}
    label = np.stack([labels & 255, labels >> 8, np.zeros_like(labels)], axis=1)
    return {"shN": part}, {files[0]: _image(_with_alpha(table), row), files[1]: _opaque(label)}


# Codebooks and palettes


def _codebook_for(values: np.ndarray) -> np.ndarray:
    """256 ascending numbers near which all values are: k-means in one dimension, where clusters are stretches
    of the sorted values."""
    ordered = np.sort(values.reshape(-1).astype(np.float64))
    different = np.unique(ordered)
    if len(different) <= ENTRIES:
        padding = (0, ENTRIES - len(different))
        return np.pad(different, padding, "edge" if len(different) else "constant").astype(np.float32)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    spread = np.linspace(ordered[0], ordered[-1], ENTRIES)
    quantiles = ordered[np.linspace(0, len(ordered) - 1, ENTRIES).astype(int)]
    centers = np.sort((spread + quantiles) / 2)
    for _ in range(20):
        cuts = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(ordered)]])
        counts = ends - starts
        means = (sums[ends] - sums[starts]) / np.maximum(counts, 1)
        centers = np.sort(np.where(counts > 0, means, centers))
    return centers.astype(np.float32)


def _nearest(codebook: np.ndarray, values: np.ndarray) -> np.ndarray:
    middles = (codebook[1:] + codebook[:-1]) / 2
    return np.searchsorted(middles, values.reshape(-1)).reshape(values.shape)


def _codebook(part: dict) -> np.ndarray:
    return np.array(part["codebook"], np.float32).reshape(ENTRIES)


def _cluster(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A palette [K, D] and which entry [N] each row of values [N, D] is closest to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points = torch.from_numpy(np.ascontiguousarray(values)).to(device)
    count = _palette_size(len(points), device.type)
    start = torch.linspace(0, len(points) - 1, count, dtype=torch.float64).long()
    palette = points[start.to(device)].clone()
    for _ in range(ROUNDS[device.type] if count < len(points) else 0):
        labels = _closest(points, palette)
        counts = torch.bincount(labels, minlength=count)
        sums = torch.zeros_like(palette).index_add_(0, labels, points)
        filled = counts > 0
        palette[filled] = sums[filled] / counts[filled, None]
    return palette.cpu().numpy(), _closest(points, palette).cpu().numpy()


def _palette_size(count: int, device: str) -> int:
    """As many as the format's own writer has; a CPU takes fewer, at least 1024."""
    if count < 2048:
        return min(count, 1024)
    size = 1024 * min(MOST_PALETTES, 1 << (count // 1024).bit_length() - 1)
    if device == "cpu":
        size = min(size, max(1024, 1 << (CPU_PAIRS // count).bit_length() - 1))
    return size


def _closest(points: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    lengths = (palette**2).sum(1) / 2
    parts = points.split(max(1, PAIRS_AT_ONCE // len(palette)))
    return torch.cat([torch.addmm(lengths, part, palette.T, alpha=-1).argmin(1) for part in parts])


# Images


def _opaque(values: np.ndarray) -> np.ndarray:
    return _image(_with_alpha(values))


def _with_alpha(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.full((len(values), 1), 255)], axis=1)


def _image(texels: np.ndarray, width: int = 0) -> np.ndarray:
    """[N, 4] as an image of this width, or nearly square, row after row; zeros fill it up."""
    width = width or max(4, 4 * -(-int(np.ceil(np.sqrt(len(texels)))) // 4))
    height = max(1, -(-len(texels) // width))
    image = np.zeros((height * width, 4), np.uint8)
    image[: len(texels)] = texels
    return image.reshape(height, width, 4)


def _webp(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image, "RGBA").save(file, "WEBP", lossless=True, exact=True, **EFFORT)
    return file.getvalue()


def _texels(source, name: str, count: int) -> np.ndarray:
    """The first `count` pixels [count, 4] of an image."""
    with Image.open(io.BytesIO(source.bytes(name)), formats=["WEBP"]) as image:
        pixels = image.width * image.height
        if not count <= pixels <= 4 * count + 2**20:
            raise DataError(f"{source.path}: {name} must have a pixel for each of {count:,}, got {pixels:,}")
        return np.asarray(image.convert("RGBA")).reshape(-1, 4)[:count]


class _Zip:
    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self._archive = zipfile.ZipFile(path)

    def bytes(self, name: str, most: int | None = None) -> bytes:
        """A file of the archive, which is no larger than the archive: images do not get smaller by zip."""
        most = most or 2 * self.size
        with self._archive.open(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise DataError(f"{self.path}: {name} must have at most {most:,} bytes")
        return data


class _Folder:
    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        self.size = sum(file.stat().st_size for file in self.folder.glob("*.webp"))

    def bytes(self, name: str, most: int | None = None) -> bytes:
        if Path(name).name != name:
            raise DataError(f"{self.path}: must name files beside it, got {name}")
        return (self.folder / name).read_bytes()[:most]
