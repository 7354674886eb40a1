"""Rotations and rigid motions: against PyTorch's matrix exponential, and their derivatives."""

import pytest
import torch

from utils.rigid import cross_matrices, rigid, se3_exp, similarity, so3_exp, so3_log

ANGLES = (0.0, 1e-6, 1e-3, 0.05, 0.3, 0.499, 0.501, 1.5, 3.0)


def twists(angle: float, count: int = 5) -> torch.Tensor:
    random = torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    random[:, 3:] *= angle / random[:, 3:].norm(dim=1, keepdim=True)
    return random


def generator(twist: torch.Tensor) -> torch.Tensor:
    matrix = torch.zeros(4, 4, dtype=twist.dtype)
    matrix[:3, :3], matrix[:3, 3] = cross_matrices(twist[3:]), twist[:3]
    return matrix


@pytest.mark.parametrize("angle", ANGLES)
def test_exp_is_the_matrix_exponential(angle):
    given = twists(angle)
    expected = torch.stack([torch.linalg.matrix_exp(generator(twist)) for twist in given])
    torch.testing.assert_close(se3_exp(given), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(so3_exp(given[:, 3:]), expected[:, :3, :3], atol=1e-13, rtol=0)
    torch.testing.assert_close(se3_exp(given.float()).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", ANGLES)
def test_log_undoes_exp(angle):
    given = twists(angle)[:, 3:]
    torch.testing.assert_close(so3_log(so3_exp(given)), given, atol=1e-11, rtol=0)


@pytest.mark.parametrize("angle", (0.0, 1e-4, 0.3, 0.7))
def test_derivatives(angle):
    given = twists(angle, 2).requires_grad_()
    assert torch.autograd.gradcheck(se3_exp, (given,))
    there = so3_exp(given[:, 3:].detach()).requires_grad_()
    assert torch.autograd.gradcheck(so3_log, (there,))


def test_similarity_finds_what_was_done():
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rotation, shift = so3_exp(torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)), torch.arange(3.0).double()
    found = similarity(points, 1.7 * points @ rotation.T + shift)
    assert found[0] == pytest.approx(1.7)
    torch.testing.assert_close(rigid(*found[1:]), rigid(rotation, shift))
