"""Checkpoints: all that training goes on from, in one file.

A dictionary of plain values and tensors, so that it loads safely (weights_only) and any tool can look into
it: one entry for each part of what is trained, by the part's name. A run that is continued from a checkpoint
ends with the same result as one that was never interrupted.
"""

import math
import os
import pickle
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from scene.formats.ply import load_ply
from scene.gaussian_model import MOMENTS
from utils.files import DataError, atomic_write

FORMAT = "TileSplat checkpoint"
VERSION = 2
LONGEST = 200  # characters of another library's message
MOST = 2**31 - 1  # iterations, steps
SHAPES = {"means": (3,), "sh_dc": (1, 3), "opacity_logits": (1,), "log_scales": (3,), "raw_quats": (4,)}
OF_THE_VIEWS = ("queue", "history")  # parts that mean nothing to a run with other views


class Part(Protocol):
    """Whatever has a state. The tensors that it is given are on the device of the run."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def save(path: str | os.PathLike, iteration: int, parts: dict[str, Part], device: torch.device) -> None:
    """Write the state after this iteration."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": _random_states(device),
    }
    with atomic_write(path, _size(state)) as file:
        torch.save(state, file)


def _size(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size, _values(value)))


def _values(value: Any) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def load(path: str | os.PathLike, parts: dict[str, Part], device: torch.device, same_run: bool = True) -> int:
    """Put every part back as it was; returns the iteration it was after.

    A file of the original has no queue and random states, a PLY has no moments either: what a file does not
    have stays as it is. So do the parts that belong to the views, if it is of a run with other views.
    """
    state = read(path)
    try:
        _check(state)
        found = state["parts"]
        same_views = same_run or found.get("queue", {}).get("count") == getattr(
            parts.get("queue"), "count", None
        )
        for name, part in parts.items():
            if name in found and (same_views or name not in OF_THE_VIEWS):
                part.load_state_dict(_moved(found[name], device))
        if "random" in state:
            _set_random_states(state["random"], device)
        return state["iteration"]
    except ValueError as error:
        raise DataError(f"{path}: does not fit this run: {str(error)[:LONGEST]}") from None
    except (LookupError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        reason = repr(error).partition("\\n")[0][:LONGEST]
        raise DataError(f"{path}: does not fit this run ({reason})") from None


def _moved(value: Any, device: torch.device) -> Any:
    """The same on the device. Single numbers, such as counts of steps, and states of generators stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.dim() and value.dtype != torch.uint8 else value
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(inner, device) for inner in value)
    return value


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The dictionary in the file, on the CPU; of the original's chkpntN.pth or a PLY, what that has of it."""
    if Path(path).suffix == ".ply":
        return _from_ply(Path(path))
    try:
        _check_whole(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path}: cannot be read as a checkpoint (has more in it than tensors and plain values)"
        ) from None
    except Exception as error:  # torn files and other files raise a dozen kinds
        reason = str(error).partition("\n")[0][:LONGEST]
        raise DataError(f"{path}: cannot be read as a checkpoint ({reason})") from None
    if isinstance(state, tuple):
        return _from_original(state, path)
    if not isinstance(state, dict) or _brief(state.get("format")) != repr(FORMAT):
        raise DataError(f"{path}: is not a checkpoint of TileSplat or of the original")
    if (version := _brief(state.get("version"))) not in ("1", repr(VERSION)):
        raise DataError(f"{path}: has version {version}, must have {VERSION}")
    return _from_version_1(state, path) if version == "1" else state


def _brief(value: Any) -> str:
    """For a message."""
    plain = value is None or type(value) in (bool, int, float, str)
    return repr(value)[:LONGEST] if plain else f"a {type(value).__name__}"


def _check(state: dict[str, Any]) -> None:
    """What no part can check for itself."""
    _check_bytes(state)
    _check_number("iteration", state["iteration"])
    if "gaussians" in state["parts"]:
        _check_gaussians(state["parts"]["gaussians"])


def _check_gaussians(model: dict[str, Any]) -> None:
    """Everything that a native call or a later iteration relies on."""
    params, degree, active, extent = (
        model[key] for key in ("params", "sh_degree", "active_sh_degree", "extent")
    )
    if (
        type(degree) is not int
        or not 0 <= degree <= 3
        or type(active) is not int
        or not 0 <= active <= degree
    ):
        raise ValueError(f"its SH degrees must be 0 to 3, got {_brief(active)} of {_brief(degree)}")
    if extent is not None and not (type(extent) is float and 0 <= extent < math.inf):
        raise ValueError(f"its extent must be a finite number, got {_brief(extent)}")
    count = len(params["means"])
    shapes = {name: value.shape[1:] for name, value in params.items()} | SHAPES
    shapes["sh_rest"] = ((degree + 1) ** 2 - 1, 3)
    for name, shape in shapes.items():
        _check_tensor(name, params[name], (count, *shape))
        _check_moments(name, model["moments"].get(name, {}), (count, *shape))


def _check_bytes(value: Any) -> None:
    """No tensor is larger than what the file has of it."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {list(value.shape)} must have all of its bytes in the file")
    for inner in _values(value):
        _check_bytes(inner)


def _check_moments(name: str, state: dict, shape: tuple[int, ...]) -> None:
    if state:
        _check_number(f"step of {name}", float(state["step"]))
        for key in MOMENTS:
            _check_tensor(f"{key} of {name}", state[key], shape)


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.dtype != torch.float32:
        raise ValueError(f"{name} must be a tensor of 32-bit floats")
    if value.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= MOST or value != int(value):
        raise ValueError(f"{name} must be an integer from 0 to {MOST}, got {_brief(value)}")


def _check_whole(path: str | os.PathLike) -> None:
    """A ZIP file, as torch.save writes since 1.6, with all sums right, of parts that are not compressed: none
    asks for more memory than the file has bytes."""
    with zipfile.ZipFile(path) as file:
        if sum(part.file_size for part in file.infolist()) > os.path.getsize(path):
            raise ValueError("it has compressed parts")
        if (part := file.testzip()) is not None:
            raise ValueError(f"its part {part} is damaged")


# The original's file: ((12 things), iteration). Some of its numbers are numpy's, which the safe loader must
# be told of.

_numpy_scalar = np.float64(0).__reduce__()[0]  # what rebuilds one; numpy 2 moved it to another module
_NUMPY_SCALARS = [
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]

# The original's names, in the order of its tuple -> ours
RENAMED = {
    "xyz": "means", "f_dc": "sh_dc", "f_rest": "sh_rest", "scaling": "log_scales", "rotation": "raw_quats",
    "opacity": "opacity_logits",
}  # fmt: skip


def _from_original(state: tuple, path: str | os.PathLike) -> dict[str, Any]:
    try:
        (active_sh_degree, *tensors, _max_radii, grad_sum, visits, optimizer, extent), iteration = state
        params = {name: tensor.detach() for name, tensor in zip(RENAMED.values(), tensors, strict=True)}
        moments = {
            RENAMED[group["name"]]: optimizer["state"].get(group["params"][0], {})
            for group in optimizer["param_groups"]
        }
        gaussians = {
            "params": params,
            "moments": moments,
            "sh_degree": round((params["sh_rest"].shape[1] + 1) ** 0.5) - 1,
            "active_sh_degree": int(active_sh_degree),
            "extent": float(extent),
        }
        adc = {"stats": [grad_sum.detach().flatten(), visits.detach().flatten()], "generator": None}
        return {"iteration": int(iteration), "parts": {"gaussians": gaussians, "adc": adc}}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is not a checkpoint of the original ({error!r})") from None


def _from_ply(path: Path) -> dict[str, Any]:
    """A saved model; the iteration is in its folder's name."""
    model = load_ply(path)
    number = path.parent.name.removeprefix("iteration_")
    gaussians = {
        "params": {name: value.detach() for name, value in model.params.items()},
        "moments": {},
        "sh_degree": model.sh_degree,
        "active_sh_degree": model.active_sh_degree,
        "extent": None,
    }
    return {"iteration": int(number) if number.isdecimal() else 0, "parts": {"gaussians": gaussians}}


def _from_version_1(state: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Parts had fixed places, and parameters the original's names."""
    try:
        model, told = dict(state["gaussians"]), dict(state.get("told", {}))
        for key in ("params", "moments"):
            model[key] = {RENAMED.get(name, name): value for name, value in model[key].items()}
        exposure = {"names": model["exposure_names"], "values": model["exposures"]}
        exposure["moments"] = model["exposure_moments"]
        losses = ("loss", "l1", "depth")
        told["smooth"] = dict(zip(losses, told.get("smooth") or ()))
        told["waiting"] = [[i, dict(zip(losses, row))] for i, row in told.get("waiting", [])]
        parts = {"gaussians": model, "adc": state["density"], "exposure": exposure}
        parts |= {"queue": state["queue"]} if "queue" in state else {}
        parts |= {"history": told} if "told" in state else {}
        rest = {key: state[key] for key in ("iteration", "random") if key in state}
        return {**rest, "parts": parts}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a checkpoint of version 1 ({error!r})") from None


# Random numbers: Python's, numpy's and PyTorch's generators


def _random_states(device: torch.device) -> dict[str, Any]:
    name, words, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    name, words, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
