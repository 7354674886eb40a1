"""The model at the end as the mean of the last iterations.

Each step follows the photo of its own view, so parameters tremble around what all photos ask for. Their mean
over some time does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arguments import OptimizationParams
from scene.gaussian_model import GaussianModel
from utils.memory import out_of_memory
from utils.schedules import reaches

EVERY = 10  # iterations: those between are alike


class Average:
    def __init__(self, opt: OptimizationParams, say: Callable[[str], None]):
        self.last = opt.iterations
        self.begin = max(self.last - opt.average_last, opt.densify_until_iter)  # rows must be the same
        self.say = say
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def after_step(self, gaussians: GaussianModel, iteration: int, views: int = 1) -> None:
        """Of so many views. At the last iteration the parameters become their mean."""
        due = reaches(EVERY, iteration, views) or iteration == self.last
        if iteration <= self.begin or not due:
            return
        if iteration <= self.begin + max(EVERY, views) or len(self._sums.get("means", ())) != len(gaussians):
            self.forget()
        try:
            self._add(gaussians.params)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.forget()
            self.begin = self.last
            self.say(f"out of memory: iteration {iteration}: there will be no --average_last")
            return
        if iteration == self.last:
            for name, value in gaussians.params.items():
                value.copy_(self._sums[name].div_(self._count))
            self.forget()

    def _add(self, params: dict) -> None:
        self._count += 1
        if not self._sums:
            self._sums = {name: value.detach().clone() for name, value in params.items()}
            return
        for name, value in params.items():
            self._sums[name] = self._sums[name].to(value.device).add_(value)  # of a checkpoint, elsewhere

    def forget(self) -> None:
        self._sums, self._count = {}, 0

    def state_dict(self) -> dict:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._count = dict(state["sums"]), int(state["count"])
