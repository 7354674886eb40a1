""".splat (antimatter15): 32 bytes a splat, no header, no SH, the most visible splats first."""

from pathlib import Path

import numpy as np

from scene.formats.arrays import FLOAT32_TINY, Splats
from utils.files import DataError, atomic_write
from utils.sh import rgb_to_sh, sh_to_rgb

ROW = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])
LONGEST = np.log(np.finfo(np.float32).max) - 1  # logarithm of a scale that a float can hold


def write(splats: Splats, path: Path) -> None:
    splats = splats.rows(np.argsort(-_visibility(splats), kind="stable"))
    table = np.empty(len(splats), ROW)
    table["means"] = splats.means
    table["scales"] = np.exp(np.minimum(splats.log_scales, LONGEST))
    rgba = np.concatenate([sh_to_rgb(splats.sh_dc), splats.opacities[:, None]], axis=1)
    table["rgba"] = np.clip(np.rint(rgba * 255), 0, 255)
    table["quats"] = np.clip(np.rint(splats.quats * 128 + 128), 0, 255)
    with atomic_write(path, table.nbytes) as file:
        file.write(table.tobytes())


def read(path: Path) -> Splats:
    data = path.read_bytes()
    if len(data) % ROW.itemsize:
        raise DataError(f"{path}: must have 32 bytes a splat, {len(data):,} is no multiple of that")
    table = np.frombuffer(data, ROW)
    bad = np.flatnonzero((table["scales"] < 0).any(1))
    if len(bad):
        raise DataError(f"{path}: splat {bad[0]} has a negative scale")
    return Splats(
        means=table["means"],
        sh_dc=rgb_to_sh(table["rgba"][:, :3] / np.float32(255)).astype(np.float32),
        sh_rest=np.zeros((len(table), 0, 3), np.float32),
        opacities=table["rgba"][:, 3] / np.float32(255),
        log_scales=np.log(np.maximum(table["scales"], FLOAT32_TINY)),
        quats=(table["quats"] - np.float32(128)) / np.float32(128),
    )


def _visibility(splats: Splats) -> np.ndarray:
    """Volume times opacity. Its logarithm is sorted by: volumes of large splats are infinite."""
    return splats.log_scales.sum(1) + np.log(np.maximum(splats.opacities, FLOAT32_TINY))
