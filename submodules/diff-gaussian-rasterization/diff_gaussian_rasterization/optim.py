"""Adam for Gaussians: all parameter tensors in one native call, or only the rows that were visible."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat

ONE = torch.ones(())  # the number 1 takes longer to add


def _unwrapped(method):
    """A method of torch's Optimizer without the wrapper that keeps torch.compile out of it: the first call of
    the wrapper imports the compiler, which takes seconds. Some versions of torch have no wrapper."""
    return getattr(method, "__wrapped__", method)


class _QuickStart:
    """What every training run calls, not waiting for a compiler that it does not use."""

    add_param_group = _unwrapped(torch.optim.Optimizer.add_param_group)
    zero_grad = _unwrapped(torch.optim.Optimizer.zero_grad)


class FusedAdam(_QuickStart, torch.optim.Optimizer):
    """torch.optim.Adam (no weight decay, no AMSGrad) in one call for all groups.

    The state has Adam's keys and meaning (step, exp_avg, exp_avg_sq), so the two read each other's state
    dicts.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parameters move together where all that a call has only one of agrees: usually all of them.
        batches = defaultdict(lambda: ([], [], [], [], []))
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [_state(self.state[param], param) for _, param in moving]  # memory may run out here,
        grads = [param.grad.contiguous() for _, param in moving]  # and here
        for (group, param), state, grad in zip(moving, states, grads):
            state["step"] += 1
            key = (int(state["step"]), tuple(group["betas"]), group["eps"], param.dtype, param.device)
            row = (
                param,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                float(group["lr"]),
            )
            for column, value in zip(batches[key], row):
                column.append(value)
        for (step, betas, eps, _, _), rows in batches.items():
            _step(*rows, betas, eps, step, None)
        return loss

    def begin_step(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], tuple, float, int]:
        """For a native call that moves the parameters itself: counts the step and returns what it needs.

        Of one tensor per group: params, exp_avg, exp_avg_sq, learning rates, betas, eps, the step's number.
        """
        params = [group["params"][0] for group in self.param_groups]
        states = [_state(self.state[param], param) for param in params]
        for state in states:
            state["step"] += ONE
        avgs, avg_sqs = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        lrs = [float(group["lr"]) for group in self.param_groups]
        first = self.param_groups[0]
        return params, avgs, avg_sqs, lrs, first["betas"], first["eps"], int(states[0]["step"])

    def take_step_back(self) -> None:
        """The step that begin_step() counted was not taken."""
        for group in self.param_groups:
            self.state[group["params"][0]]["step"] -= 1


class SparseGaussianAdam(_QuickStart, torch.optim.Adam):
    """Adam that moves only the visible Gaussians, without bias correction. One tensor per group, row i is
    Gaussian i."""

    def __init__(self, params, lr: float, eps: float):
        super().__init__(params=params, lr=lr, eps=eps)

    @torch.no_grad()
    def step(self, visibility: Tensor, N: int) -> None:
        """visibility: bool [N]"""
        if visibility.shape != (N,) or visibility.dtype != torch.bool:
            kind = f"{list(visibility.shape)} {str(visibility.dtype).removeprefix('torch.')}"
            raise ValueError(f"visibility must be [{N}] bool, got {kind}")
        batches = defaultdict(lambda: ([], [], [], [], []))
        for group in self.param_groups:
            if len(group["params"]) != 1:
                raise ValueError(f"a group must have one tensor, got {len(group['params'])}")
            param = group["params"][0]
            if param.grad is None or param.numel() == 0:
                continue
            state = _state(self.state[param], param)
            key = (tuple(group["betas"]), group["eps"])
            row = (param, param.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], float(group["lr"]))
            for column, value in zip(batches[key], row):
                column.append(value)
        for (betas, eps), rows in batches.items():
            _step(*rows, betas, eps, 1, visibility.contiguous())


def _state(state: dict, param: Tensor) -> dict:
    """The moments of one parameter; made at its first step, like torch.optim.Adam's: both or, for want of
    memory, none."""
    if "exp_avg" not in state:
        moments = [torch.zeros_like(param, memory_format=torch.contiguous_format) for _ in range(2)]
        state.update(step=torch.tensor(0.0), exp_avg=moments[0], exp_avg_sq=moments[1])
    return state


def _step(
    params: list[Tensor], grads: list[Tensor], avgs: list[Tensor], avg_sqs: list[Tensor], lrs: list[float],
    betas: tuple[float, float], eps: float, step: int, visible: Tensor | None,
) -> None:  # fmt: skip
    """One native call. What is not contiguous moves as a copy, which is copied back."""
    moving = (params, avgs, avg_sqs)
    dense = [[tensor.contiguous() for tensor in column] for column in moving]
    torch.ops.tilesplat.adam_step(dense[0], grads, *dense[1:], lrs, *betas, eps, step, visible)
    for tensors, copies in zip(moving, dense):
        for tensor, copy in zip(tensors, copies):
            if copy is not tensor:
                tensor.copy_(copy)
