"""gradcheck that is known to be sharp enough."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class _Larger(torch.autograd.Function):
    """Nothing, with a derivative that is wrong by a tenth."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def assert_derivatives(function: Callable, inputs: Sequence[Tensor], **how) -> None:
    """By each input, in doubles; an error of a tenth in any of them would be seen."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(function, inputs, **how)
    for k in range(len(inputs)):

        def wrong(*given, k=k):
            return function(*given[:k], _Larger.apply(given[k]), *given[k + 1 :])

        assert not torch.autograd.gradcheck(wrong, inputs, raise_exception=False, **how), f"input {k}"
