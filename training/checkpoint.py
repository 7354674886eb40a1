"""Checkpoints: all that training goes on from, in one file.

A dictionary of plain values and tensors, so that it loads safely (weights_only) and any tool can look into
it: one entry for each part of what is trained, by the part's name. A run that is continued from a checkpoint
ends with the same result as one that was never interrupted.
"""

import math
import os
import random
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

import distributed
from scene import formats
from scene.color_table import up_to_date
from scene.fingerprint import Fingerprint
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import MOMENTS
from scene.torch_file import read_torch_file
from training.report import Scores
from utils.files import DataError, atomic_write

FORMAT = "TileSplat checkpoint"
VERSION = 2
LONGEST = 200  # characters of another library's message
MOST = 2**31 - 1  # iterations, steps
SCORES = {field.name: None for field in fields(Scores)}.keys()
SHAPES = {"means": (3,), "sh_dc": (1, 3), "opacity_logits": (1,), "log_scales": (3,), "raw_quats": (4,)}
OF_THE_VIEWS = ("queue", "history")  # parts that mean nothing to a run with other views


class Part(Protocol):
    """Whatever has a state. The tensors that it is given are on the device of the run."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def save(
    path: str | os.PathLike,
    iteration: int,
    parts: dict[str, Part],
    device: torch.device,
    data: Fingerprint | None = None,
) -> None:
    """Write the state after this iteration, and of which data set it is."""
    with distributed.current().together():
        states = {name: part.state_dict() for name, part in parts.items()}
    if not distributed.current().first:
        return
    state = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "parts": states,
        "random": _random_states(device),
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
    parts: dict[str, Part],
    device: torch.device,
    data: Fingerprint | None = None,
    same_run: bool = True,
) -> int:
    """Put every part back as it was; returns the iteration it was after.

    A file of the original has no queue and random states, a PLY has no moments either: what a file does not
    have stays as it is. So do the parts that belong to the views, if it is of a run with other views. A
    checkpoint of another data set is refused, unless it is of another run.
    """
    state = read(path, data.frame if data else OF_DATA)
    try:
        other = data.difference(state.get("data")) if data and not formats.is_one(path) else ""
        if other and same_run:
            raise ValueError(other)
        _check(state)
        found, queue = state["parts"], parts.get("queue")
        same_count = found.get("queue", {}).get("count") == getattr(queue, "count", None)
        for name, part in parts.items():
            if name in found and (same_run or (same_count and not other) or name not in OF_THE_VIEWS):
                on_host = bool(getattr(part, "on_host", ()))  # there it takes what it needs
                own = getattr(part, "own", dict)  # of several processes, each has some of the rows
                state_here = found[name] if on_host else moved(own(up_to_date(found[name])), device)
                part.load_state_dict(state_here)
        if "random" in state:
            _set_random_states(state["random"], device)
        return state["iteration"]
    except ValueError as error:
        raise DataError(f"{path}: does not fit this run: {str(error)[:LONGEST]}") from None
    except (LookupError, TypeError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        reason = repr(error).partition("\\n")[0][:LONGEST]
        raise DataError(f"{path}: does not fit this run ({reason})") from None


def moved(value: Any, device: torch.device) -> Any:
    """The same on the device. Single numbers, such as counts of steps, and states of generators stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.dim() and value.dtype != torch.uint8 else value
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(inner, device) for inner in value)
    return value


def read(path: str | os.PathLike, frame: Similarity = OF_DATA) -> dict[str, Any]:
    """The dictionary in the file, on the CPU; of the original's chkpntN.pth or a file of
    splats, what that has of it. Splats are put into the frame."""
    if formats.is_one(path):
        return _from_model(Path(path), frame)
    try:
        state = read_torch_file(path)
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
    """Everything that a native call or a later iteration relies on."""
    _check_number("iteration", state["iteration"])
    parts = state["parts"]
    if "gaussians" in parts:
        _check_gaussians(parts["gaussians"])
    if "history" in parts:
        _check_history(parts["history"])
    if "random" in state:
        _check_random(state["random"])


def _check_gaussians(model: dict[str, Any]) -> None:
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
        if name in (gradients := model.get("gradients", {})):
            _check_tensor(f"gradient of {name}", gradients[name], (count, *shape))
    _check_number("number of views of its gradients", model.get("collected", 0))
    if "behind" in model:
        _check_waiting(model["behind"], count)
    if "smallest" in model:
        _check_tensor("smallest", model["smallest"], (count,))


def _check_moments(name: str, state: dict, shape: tuple[int, ...]) -> None:
    if state:
        if isinstance(state["step"], torch.Tensor):
            _check_tensor(f"step of {name}", state["step"], ())
        _check_number(f"step of {name}", float(state["step"]))
        for key in MOMENTS:
            _check_tensor(f"{key} of {name}", state[key], shape)


def _check_waiting(waiting: dict[str, Any], count: int) -> None:
    moved_at, sums, decays, first = (waiting[key] for key in ("moved_at", "sums", "decays", "first"))
    _check_number("first step of waiting rows", first)
    if moved_at.dtype != torch.int32 or moved_at.shape != (count,):
        raise ValueError(f"the steps of waiting rows must be {count} 32-bit integers")
    for values in (sums, decays):
        if values.dtype != torch.float64 or not len(sums) or values.shape != (len(sums), 2):
            raise ValueError("what waiting rows have missed must be pairs of 64-bit floats")
    last = first + len(sums) - 1
    if count and not (first <= int(moved_at.min()) and int(moved_at.max()) <= last):
        raise ValueError(f"the steps of waiting rows must be {first} to {last}")


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


def _check_history(history: dict) -> None:
    for views, rows in history["scores"].items():
        if not rows:
            raise ValueError(f"its scores of {_brief(views)} must not be empty")
        for iteration, scores in rows.items():
            _check_number("iteration of scores", iteration)
            if scores.keys() != SCORES or not all(type(value) in (int, float) for value in scores.values()):
                raise ValueError(f"scores must be numbers named {', '.join(SCORES)}")
            _check_number("views of scores", scores["views"])
    for name in ("seconds", "left_out"):
        if type(history[name]) not in (int, float) or not 0 <= history[name] < math.inf:
            raise ValueError(f"{name} must be a number of seconds, got {_brief(history[name])}")


# The original's file: ((12 things), iteration)

# Its names, in the order of its tuple -> ours
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
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: is not a checkpoint of the original ({error!r})") from None


def _from_model(path: Path, frame: Similarity) -> dict[str, Any]:
    """A saved model; the iteration is in its folder's name."""
    model = formats.read(path, frame=frame)
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
        rest = {key: state[key] for key in ("iteration", "random", "data") if key in state}
        return {**rest, "parts": parts}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a checkpoint of version 1 ({error!r})") from None


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
