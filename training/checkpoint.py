"""Checkpoints: all that training goes on from, in one file.

A dictionary of plain values and tensors, so that it loads safely (weights_only) and any tool can look into
it. A run that is continued from a checkpoint ends with the same result as one that was never interrupted.
"""

import math
import os
import random
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from scene.fingerprint import Fingerprint
from scene.formats.ply import OTHER_FORMATS, load_ply
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import MOMENTS, GaussianModel
from scene.torch_file import read_torch_file
from strategies.adc import AdaptiveDensityControl
from training.queue import ViewQueue
from training.report import Scores, Told
from utils.files import DataError, atomic_write

FORMAT = "TileSplat checkpoint"
VERSION = 1
LONGEST = 200  # characters of another library's message
MOST = 2**31 - 1  # iterations, steps
SCORES = {field.name: None for field in fields(Scores)}.keys()


def save(
    path: str | os.PathLike,
    iteration: int,
    gaussians: GaussianModel,
    density: AdaptiveDensityControl,
    queue: ViewQueue,
    told: Told | None = None,
    data: Fingerprint | None = None,
) -> None:
    """Write the state after this iteration, and of which data set it is."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "gaussians": gaussians.state_dict(),
        "density": density.state_dict(),
        "queue": queue.state_dict(),
        "random": _random_states(gaussians.device),
        "told": (told or Told()).state_dict(),
    } | ({"data": data.state_dict()} if data else {})
    with atomic_write(path, _size(state)) as file:
        torch.save(state, file)


def _size(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_size, inner))


def load(
    path: str | os.PathLike,
    gaussians: GaussianModel,
    density: AdaptiveDensityControl,
    queue: ViewQueue,
    told: Told | None = None,
    data: Fingerprint | None = None,
    same_run: bool = True,
) -> int:
    """Put everything back as it was; returns the iteration it was after.

    A file of the original has no exposures, view queue and random states, a PLY has no moments either: what a
    file does not have stays as it is. So do view queue and scores if it is of another run, with other views.
    A checkpoint of another data set is refused, unless it is of another run.
    """
    state = read(path, data.frame if data else OF_DATA)
    try:
        other = data.difference(state.get("data")) if data and Path(path).suffix != ".ply" else ""
        if other and same_run:
            raise ValueError(other)
        _check(state, gaussians)
        gaussians.load_state_dict(state["gaussians"])
        density.load_state_dict(state["density"], gaussians.device)
        same_views = same_run or (state.get("queue", {}).get("count") == queue.count and not other)
        if "queue" in state and same_views:
            queue.load_state_dict(state["queue"])
        if told and "told" in state and same_views:
            told.load_state_dict(state["told"], gaussians.device)
        if "random" in state:
            _set_random_states(state["random"], gaussians.device)
        return state["iteration"]
    except ValueError as error:
        raise DataError(f"{path}: does not fit this run: {str(error)[:LONGEST]}") from None
    except (LookupError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        reason = repr(error).partition("\\n")[0][:LONGEST]
        raise DataError(f"{path}: does not fit this run ({reason})") from None


def read(path: str | os.PathLike, frame: Similarity = OF_DATA) -> dict[str, Any]:
    """The dictionary in the file, on the CPU; of the original's chkpntN.pth or a PLY, what that has of it. A
    PLY is put into the frame."""
    if Path(path).suffix in (".ply", *OTHER_FORMATS):
        return _from_ply(Path(path), frame)
    try:
        state = read_torch_file(path)
    except Exception as error:  # torn files and other files raise a dozen kinds
        reason = str(error).partition("\n")[0][:LONGEST]
        raise DataError(f"{path}: cannot be read as a checkpoint ({reason})") from None
    if isinstance(state, tuple):
        return _from_original(state, path)
    if not isinstance(state, dict) or _brief(state.get("format")) != repr(FORMAT):
        raise DataError(f"{path}: is not a checkpoint of TileSplat or of the original")
    if (version := _brief(state.get("version"))) != repr(VERSION):
        raise DataError(f"{path}: has version {version}, must have {VERSION}")
    return state


def _brief(value: Any) -> str:
    """For a message."""
    plain = value is None or type(value) in (bool, int, float, str)
    return repr(value)[:LONGEST] if plain else f"a {type(value).__name__}"


def _check(state: dict[str, Any], gaussians: GaussianModel) -> None:
    """Everything that a native call or a later iteration relies on. Parameters must be those of the model."""
    model, stats = state["gaussians"], state["density"]["stats"]
    params, degree, active = model["params"], model["sh_degree"], model["active_sh_degree"]
    extent, names = model["extent"], model["exposure_names"]
    if (
        type(degree) is not int
        or not 0 <= degree <= 3
        or type(active) is not int
        or not 0 <= active <= degree
    ):
        raise ValueError(f"its SH degrees must be 0 to 3, got {_brief(active)} of {_brief(degree)}")
    if extent is not None and not (type(extent) is float and 0 <= extent < math.inf):
        raise ValueError(f"its extent must be a finite number, got {_brief(extent)}")
    _check_number("iteration", state["iteration"])
    _check_number("fits", state["density"].get("fits", 0))

    count = len(params["xyz"])
    shapes: dict[str, tuple[int, ...]] = {name: value.shape[1:] for name, value in gaussians.params.items()}
    shapes["f_rest"] = ((degree + 1) ** 2 - 1, 3)  # the model's degree will be the file's
    if params.keys() != shapes.keys():
        got = ", ".join(repr(str(name))[1:-1] for name in params)
        raise ValueError(f"its parameters must be {', '.join(shapes)}, got {got}")
    for name, shape in shapes.items():
        _check_tensor(name, params[name], (count, *shape))
        _check_moments(name, model["moments"].get(name, {}), (count, *shape))
    for value in stats or []:
        _check_tensor("density", value, (count,))
    if names:
        if len(set(names)) != len(names) or not all(type(name) is str for name in names):
            raise ValueError("its exposures must have different names")
        _check_tensor("exposures", model["exposures"], (len(names), 3, 4))
        _check_moments("exposures", model["exposure_moments"], (len(names), 3, 4))
    if "random" in state:
        _check_random(state["random"])
    if "told" in state:
        _check_told(state["told"])


def _check_moments(name: str, state: dict, shape: tuple[int, ...]) -> None:
    if state:
        if isinstance(state["step"], torch.Tensor):
            _check_tensor(f"step of {name}", state["step"], ())
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


def _check_random(states: dict) -> None:
    """NumPy takes any position, and reads beyond the end of its numbers then. Others look for themselves."""
    name, words, position, has_gauss, gauss = states["numpy"]
    if name != "MT19937" or words.dtype != torch.int64 or words.shape != (624,):
        raise ValueError("the state of NumPy's generator must be 624 integers of MT19937")
    if position not in range(625) or has_gauss not in (0, 1) or type(gauss) is not float:
        raise ValueError(f"the state of NumPy's generator must be at 0 to 624, got {_brief(position)}")


def _check_told(told: dict) -> None:
    for views, rows in told["scores"].items():
        if not rows:
            raise ValueError(f"its scores of {_brief(views)} must not be empty")
        for iteration, scores in rows.items():
            _check_number("iteration of scores", iteration)
            if scores.keys() != SCORES or not all(type(value) in (int, float) for value in scores.values()):
                raise ValueError(f"scores must be numbers named {', '.join(SCORES)}")
            _check_number("views of scores", scores["views"])
    for name in ("seconds", "left_out"):
        if type(told[name]) not in (int, float) or not 0 <= told[name] < math.inf:
            raise ValueError(f"{name} must be a number of seconds, got {_brief(told[name])}")


# The original's file: ((12 things), iteration)

ORIGINAL_PARAMS = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")  # in the tuple's order


def _from_original(state: tuple, path: str | os.PathLike) -> dict[str, Any]:
    try:
        (active_sh_degree, *tensors, _max_radii, grad_sum, visits, optimizer, extent), iteration = state
        params = {name: tensor.detach() for name, tensor in zip(ORIGINAL_PARAMS, tensors, strict=True)}
        moments = {
            group["name"]: optimizer["state"].get(group["params"][0], {})
            for group in optimizer["param_groups"]
        }
        gaussians = {
            "params": params,
            "moments": moments,
            "sh_degree": round((params["f_rest"].shape[1] + 1) ** 0.5) - 1,
            "active_sh_degree": int(active_sh_degree),
            "extent": float(extent),
            "exposure_names": [],
            "exposures": None,
            "exposure_moments": {},
        }
        density = {"stats": [grad_sum.detach().flatten(), visits.detach().flatten()], "generator": None}
        return {"iteration": int(iteration), "gaussians": gaussians, "density": density}
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: is not a checkpoint of the original ({error!r})") from None


def _from_ply(path: Path, frame: Similarity) -> dict[str, Any]:
    """A saved model; the iteration is in its folder's name."""
    model = load_ply(path, frame=frame)
    number = path.parent.name.removeprefix("iteration_")
    gaussians = {
        "params": {name: value.detach() for name, value in model.params.items()},
        "moments": {},
        "sh_degree": model.sh_degree,
        "active_sh_degree": model.active_sh_degree,
        "extent": None,
        "exposure_names": [],
        "exposures": None,
        "exposure_moments": {},
    }
    iteration = int(number) if number.isdecimal() else 0
    return {"iteration": iteration, "gaussians": gaussians, "density": {"stats": None, "generator": None}}


# Random numbers: Python's, numpy's and PyTorch's generators


def _random_states(device: torch.device) -> dict[str, Any]:
    name, words, *rest = cast("tuple[Any, ...]", np.random.get_state())
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
