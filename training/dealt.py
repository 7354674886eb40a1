"""Checkpoints of several processes: in the file rows are whole, so that any number of processes goes on."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distributed.rows import on_first
from scene.gaussian_model import GaussianModel
from training.checkpoint import Part

ROWS = ("params", "moments", "gradients", "smallest", "stats", "sums")  # what has a row for each Gaussian


class Dealt:
    """A part of which each process holds the rows of its Gaussians."""

    def __init__(self, part: Part, gaussians: GaussianModel):
        self._part, self._gaussians = part, gaussians

    def state_dict(self) -> dict:
        """Whole in the first process, which writes it; all must call this."""
        ranks, total = self._gaussians.ranks, self._gaussians.total
        return _for_rows(self._part.state_dict(), lambda value: on_first(ranks, value, total))

    def own(self, state: dict) -> dict:
        """What load_state_dict() takes, of a whole state."""
        total = {"total": len(state["params"]["means"])} if "params" in state else {}
        return _for_rows(state, self._gaussians.own) | total

    def load_state_dict(self, state: dict) -> None:
        self._part.load_state_dict(state)


def _for_rows(state: dict, change: Callable[[Tensor], Tensor]) -> dict:
    return {key: _mapped(value, change) if key in ROWS else value for key, value in state.items()}


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value
