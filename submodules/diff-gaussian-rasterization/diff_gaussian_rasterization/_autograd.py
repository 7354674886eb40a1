"""How the operators meet autograd: inputs as they take them, and derivatives that are first ones only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad


def taken(tensor: Tensor | None) -> Tensor | None:
    """As the operators take it. Under autocast, what a network hands over in 16 bits is taken in 32."""
    if tensor is None:
        return None
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    if half and torch.is_autocast_enabled(tensor.device.type):
        tensor = tensor.float()
    return tensor.contiguous()


def transformed() -> bool:
    """Under torch.func, or with tangents: autograd has a say even where nothing requires a gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Refuse(torch.autograd.Function):
    """A gradient as it is, but one that cannot be differentiated for what it was computed from."""

    @staticmethod
    def forward(grad, *origins):
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the operators of diff_gaussian_rasterization have no second derivative")


def once(backward: Callable) -> Callable:
    """As torch's once_differentiable, but under torch.func, too."""

    @wraps(backward)
    def run(ctx, *grads):
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return out
        origins = [t for t in (*ctx.saved_tensors, *grads) if isinstance(t, Tensor) and t.is_floating_point()]
        if not any(t.requires_grad for t in origins):
            return out
        refused = lambda g: _Refuse.apply(g, *origins) if isinstance(g, Tensor) else g  # noqa: E731
        return tuple(map(refused, out)) if isinstance(out, tuple) else refused(out)

    return run
