"""OpenUSD: a ParticleField3DGaussianSplat. Needs the package usd-core, 26.11 or newer.

y is up in the file, so that the scene is turned by 180 degrees about x. SH is one flat array, all
coefficients of a splat one after the other.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from scene.formats.arrays import REST, Splats
from utils.files import DataError, atomic_write

TURN = (1, -1, -1)
PRIM = "/Splats"
SMALLEST, LARGEST = -87.0, 88.0  # logarithms of scales that a float can hold


def write(splats: Splats, path: Path) -> None:
    usd, vol, vt = _modules(path)
    splats = splats.flipped(TURN)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"splats{path.suffix.lower()}")
        stage = usd.Stage.CreateNew(str(file))
        stage.SetMetadata("upAxis", "Y")
        field = vol.ParticleField3DGaussianSplat.Define(stage, PRIM)
        stage.SetDefaultPrim(field.GetPrim())
        sh = np.concatenate([splats.sh_dc[:, None], splats.sh_rest], axis=1)
        scales = np.exp(np.clip(splats.log_scales, SMALLEST, LARGEST))
        field.CreatePositionsAttr(vt.Vec3fArray.FromNumpy(_plain(splats.means)))
        field.CreateScalesAttr(vt.Vec3fArray.FromNumpy(_plain(scales)))
        field.CreateOpacitiesAttr(vt.FloatArray.FromNumpy(_plain(splats.opacities)))
        field.CreateOrientationsAttr(vt.QuatfArray.FromNumpy(_plain(splats.quats[:, [1, 2, 3, 0]])))
        field.CreateRadianceSphericalHarmonicsDegreeAttr(splats.sh_degree)
        field.CreateRadianceSphericalHarmonicsCoefficientsAttr(
            vt.Vec3fArray.FromNumpy(_plain(sh.reshape(-1, 3)))
        )
        stage.GetRootLayer().Save()
        with atomic_write(path, file.stat().st_size) as target, open(file, "rb") as source:
            shutil.copyfileobj(source, target)


def read(path: Path) -> Splats:
    usd, vol, _ = _modules(path)
    try:
        stage = usd.Stage.Open(str(path))
    except Exception as error:  # pxr's own
        raise DataError(f"{path}: cannot be read as USD ({str(error)[:200]})") from None
    fields = [prim for prim in stage.Traverse() if prim.IsA(vol.ParticleField3DGaussianSplat)]
    if not fields:
        raise DataError(f"{path}: must have a ParticleField3DGaussianSplat")
    field = vol.ParticleField3DGaussianSplat(fields[0])
    means, scales, opacities, turns, sh = (
        np.array(values.Get() if values.Get() is not None else [], np.float32)
        for values in (
            field.GetPositionsAttr(),
            field.GetScalesAttr(),
            field.GetOpacitiesAttr(),
            field.GetOrientationsAttr(),
            field.GetRadianceSphericalHarmonicsCoefficientsAttr(),
        )
    )
    count, degree = len(means), field.GetRadianceSphericalHarmonicsDegreeAttr().Get()
    wanted = [(count, 3), (count, 3), (count,), (count, 4), (count * (1 + REST.get(degree, -1)), 3)]
    if degree not in REST or [values.shape for values in (means, scales, opacities, turns, sh)] != wanted:
        raise DataError(
            f"{path}: its arrays must be as long as its {count:,} positions and SH of degree 0 to 3"
        )
    sh = sh.reshape(count, 1 + REST[degree], 3)
    quats = turns[:, [3, 0, 1, 2]]
    with np.errstate(divide="ignore"):
        log_scales = np.log(np.maximum(scales, np.float32(np.exp(SMALLEST))))
    return Splats(means, sh[:, 0], sh[:, 1:], opacities, log_scales, quats).flipped(TURN)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def _modules(path: Path):
    try:
        from pxr import Usd, UsdVol, Vt  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path}: USD needs the package usd-core: pip install usd-core") from None
    if not hasattr(UsdVol, "ParticleField3DGaussianSplat"):
        raise DataError(f"{path}: USD needs usd-core 26.11 or newer")
    return Usd, UsdVol, Vt
