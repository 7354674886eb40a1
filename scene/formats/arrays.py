"""What files of splats hold, between a model and the bytes: NumPy arrays in the model's own axes."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from scene.gaussian_model import GaussianModel
from utils.files import DataError
from utils.sh import MAX_DEGREE, basis

REST = {0: 0, 1: 3, 2: 8, 3: 15}  # SH degree -> coefficients beside the constant one
FAINTEST = 1e-6  # opacities keep this distance from 0 and 1, where logits are infinite
FLOAT32_TINY = np.finfo(np.float32).tiny
MOST_TIMES = 64  # no real model shrinks so far; a file that claims it is made to fill the memory
SMALL = 1 << 20  # bytes of which nobody asks where they come from


@dataclass
class Splats:
    """Row i of every array is splat i. float32."""

    means: np.ndarray  # [N, 3]
    sh_dc: np.ndarray  # [N, 3]
    sh_rest: np.ndarray  # [N, K-1, 3]
    opacities: np.ndarray  # [N] in [0, 1]
    log_scales: np.ndarray  # [N, 3]
    quats: np.ndarray  # [N, 4] as (w, x, y, z), of length 1
    antialiased: bool = False  # trained with the 3D/2D filter of Mip-Splatting's kind

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        return next(degree for degree, count in REST.items() if count == self.sh_rest.shape[1])

    def rows(self, index: np.ndarray) -> "Splats":
        return self._each(lambda values: values[index])

    def flipped(self, axes: tuple[int, int, int]) -> "Splats":
        """Turned by 180 degrees about the one axis whose sign is +1."""
        signs = np.array(axes, np.float32)
        return replace(
            self,
            means=self.means * signs,
            quats=self.quats * np.concatenate([[1], signs]).astype(np.float32),
            sh_rest=self.sh_rest * flip_signs(signs)[: self.sh_rest.shape[1], None],
        )

    def _each(self, change) -> "Splats":
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return Splats(**{name: change(v) if name != "antialiased" else v for name, v in arrays.items()})


def flip_signs(signs: np.ndarray) -> np.ndarray:
    """What happens to SH coefficients 1 to 15 when the scene is turned so: +1 or -1 each. Every basis
    function is even or odd in each axis."""
    direction = torch.tensor([[0.36, 0.48, 0.8]], dtype=torch.float64)  # no function is 0 there
    turned = direction * torch.from_numpy(np.asarray(signs, np.float64))
    ratio = basis(MAX_DEGREE, turned) / basis(MAX_DEGREE, direction)
    return ratio[0, 1:].round().numpy().astype(np.float32)


def from_model(gaussians: GaussianModel, path: Path) -> Splats:
    """The model as arrays. `path` is where it is to go, for the message if that cannot be."""
    bad = (~gaussians.finite()).nonzero()
    if len(bad):
        raise DataError(f"{path}: splat {bad[0].item()} has a number that is infinite or not a number")
    p = {name: value.detach().float().cpu() for name, value in gaussians.params.items()}
    return Splats(
        means=p["means"].numpy(),
        sh_dc=p["sh_dc"][:, 0].numpy(),
        sh_rest=p["sh_rest"].numpy(),
        opacities=p["opacity_logits"][:, 0].sigmoid().numpy(),
        log_scales=p["log_scales"].numpy(),
        quats=_unit(p["raw_quats"].numpy()),
        antialiased=gaussians.antialiased,
    )


def to_model(splats: Splats, path: Path, device: torch.device | str) -> GaussianModel:
    """The arrays that were read from `path` as a model. All its SH degrees are active."""
    opacities = np.clip(splats.opacities.astype(np.float64), FAINTEST, 1 - FAINTEST)
    arrays = {
        "means": splats.means,
        "sh_dc": splats.sh_dc[:, None, :],
        "sh_rest": splats.sh_rest,
        "opacity_logits": np.log(opacities / (1 - opacities))[:, None],
        "log_scales": splats.log_scales,
        "raw_quats": _unit(splats.quats),
    }
    for values in arrays.values():
        bad = np.flatnonzero(~np.isfinite(values.sum(tuple(range(1, values.ndim)), dtype=np.float64)))
        if len(bad):
            raise DataError(f"{path}: splat {bad[0]} has a number that is infinite or not a number")
    params = {
        name: torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(device) for name, a in arrays.items()
    }
    model = GaussianModel(params, splats.sh_degree, active_sh_degree=splats.sh_degree)
    model.antialiased = splats.antialiased
    return model


def check_room(path: Path, count: int, row_bytes: int, file_bytes: int) -> None:
    """Refuse a file that promises far more splats than compression explains, before room is made for them."""
    if count * row_bytes > MOST_TIMES * file_bytes + SMALL:
        raise DataError(f"{path}: must hold {count:,} splats by its header, but has {file_bytes:,} bytes")


def _unit(quats: np.ndarray) -> np.ndarray:
    """Of length 1; what has no direction does not turn."""
    length = np.linalg.norm(quats.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = quats / length
    return np.where(length > 0, unit, [1.0, 0.0, 0.0, 0.0]).astype(np.float32)


def drop_largest(quats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index [N] of the largest component, and the other three [N, 3] in their order, with the sign that makes
    the largest positive."""
    largest = np.abs(quats).argmax(1)
    rows = np.arange(len(quats))
    signed = quats * np.where(quats[rows, largest] < 0, -1, 1)[:, None].astype(np.float32)
    others = np.arange(4)[None] != largest[:, None]
    return largest, signed[others].reshape(-1, 3)


def with_largest(largest: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The inverse of drop_largest."""
    quats = np.empty((len(others), 4), np.float32)
    quats[np.arange(4)[None] != largest[:, None]] = others.reshape(-1)
    quats[np.arange(len(others)), largest] = np.sqrt(
        np.clip(1 - (others.astype(np.float64) ** 2).sum(1), 0, 1)
    )
    return quats
