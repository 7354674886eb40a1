"""Training in several processes: what each of them adds up, checks and saves beside its own part.

One process is what all of these functions leave alone.
"""

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from arguments import ConfigError, Options
from distributed import Ranks
from distributed.rows import on_first
from per_view import PerView
from scene.gaussian_model import GaussianModel
from strategies import Strategy
from training.checkpoint import Part
from training.queue import ViewQueue

ROWS = ("params", "moments", "gradients", "smallest", "stats", "sums")  # what has a row for each Gaussian


def expect_possible(ranks: Ranks, options: Options, strategy: Strategy) -> None:
    """Several processes cannot do everything yet."""
    _, opt, pipe, run, *_ = options
    wrong = {
        "strategy": "" if strategy.for_many else opt.strategy,
        "optimizer_type": "" if opt.optimizer_type == "default" else opt.optimizer_type,
        "debug": pipe.debug or run.debug_from >= 0,
        "convert_SHs_python": pipe.convert_SHs_python,
        "view": run.view,
    }
    for name, value in wrong.items():
        if value and not ranks.alone:
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise ConfigError(f"{given} trains in one process: start it without torchrun")


def expect_same(ranks: Ranks, modules: Sequence[PerView], queue: ViewQueue) -> None:
    """Sums over processes might differ in their last bits; then what each goes on with would, too."""
    if ranks.alone:
        return
    learned = [value.detach().contiguous() for module in modules for value in module.parameters()]
    bits = [int(value.view(torch.int32).sum(dtype=torch.int64)) for value in learned]
    ranks.expect_same("what is learned of photos", sum(bits))
    ranks.expect_same("random numbers", crc32(torch.get_rng_state().numpy().tobytes()))
    views = [queue.peek(ahead) for ahead in range(ranks.count)]
    ranks.expect_same("the order of views", crc32(repr(views).encode()))


def add_up_gradients(ranks: Ranks, modules: Sequence[PerView]) -> None:
    """What all processes have found out of their photos, in one sum."""
    values = [value for module in modules for value in module.parameters()]
    if ranks.alone or not values:
        return
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
    total = torch.cat([grad.flatten() for grad in grads])
    learned = [any(v.grad is not None for v in module.parameters()) for module in modules]
    found = ranks.meet("gradients of modules", sum(has << i for i, has in enumerate(learned)))
    parts = ranks.add_up(total).split([value.numel() for value in values])
    for value, part in zip(values, parts):
        value.grad = part.view_as(value)
    for i, module in enumerate(modules):
        if not any(bits >> i & 1 for (bits,) in found):
            module.forget_gradients()  # none has any, so that Adam rests as in one process


def mean_of(
    ranks: Ranks, losses: Sequence[dict[str, Tensor]], views: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Over the views; of several processes, of which all know these names, each one's share: the mean of
    these shares is that over the views. A part that a view does not have counts as 0."""
    if views == 1:
        return losses[0]
    if ranks.alone:
        names = list(dict.fromkeys(name for row in losses for name in row))
    rows = [[row[name].detach() for row in losses if name in row] for name in names]
    sums = [sum(values[1:], values[0]) if values else torch.zeros_like(losses[0]["loss"]) for values in rows]
    share = views / ranks.count
    return dict(zip(names, sums if share == 1 else [value / share for value in sums]))


def parts(rows: dict[str, Part], gaussians: GaussianModel) -> dict[str, Part]:
    """Parts of a checkpoint with rows, of which each process holds those of its Gaussians."""
    return rows if gaussians.ranks.alone else {name: Dealt(part, gaussians) for name, part in rows.items()}


class Dealt:
    """In the file rows are whole, so that any number of processes goes on."""

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
