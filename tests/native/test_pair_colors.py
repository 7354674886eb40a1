"""Colors of pairs of a camera and a Gaussian, and their gradients, against PyTorch's own."""

import pytest
import torch
from diff_gaussian_rasterization import reference
from diff_gaussian_rasterization.pair_colors import pair_colors

from tests.native.scenes import DEVICES, relative_error

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(
    count: int, cameras: int, rest: int, dtype=torch.float64, device="cpu"
) -> tuple[Tensors, torch.Tensor]:
    generator = torch.Generator().manual_seed(count + cameras)
    shapes = [(count, 3), (count, 1, 3), (count, rest, 3), (cameras, 3)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[3] *= 5
    seen = torch.rand(cameras * count, generator=generator) < 0.6
    means, sh_dc, sh_rest, centers = (value.to(device, dtype).requires_grad_() for value in values)
    return (means, sh_dc, sh_rest, centers), seen.nonzero()[:, 0].to(device)


def plain(tensors, pairs, degree):
    means, sh_dc, sh_rest, centers = tensors
    rows, which = pairs % max(len(means), 1), pairs // max(len(means), 1)
    coefficients = torch.cat([sh_dc, sh_rest], 1)[rows]
    return reference.sh_colors(degree, coefficients, means[rows] - centers[which])


@pytest.mark.parametrize("degree, rest", [(0, 0), (1, 3), (2, 8), (3, 15), (1, 15), (0, 15)])
@pytest.mark.parametrize("count, cameras", [(50, 1), (1100, 3), (1, 2), (0, 2)])
def test_double_is_the_reference(degree, rest, count, cameras):
    tensors, pairs = make(count, cameras, rest)
    colors, expected = pair_colors(*tensors, pairs, degree), plain(tensors, pairs, degree)
    weights = torch.linspace(-1, 1, colors.numel(), dtype=torch.float64).view_as(colors)
    found = torch.autograd.grad((colors * weights).sum(), tensors, allow_unused=True)
    truth = torch.autograd.grad((expected * weights).sum(), tensors, allow_unused=True)
    torch.testing.assert_close(colors, expected, rtol=1e-13, atol=1e-14)
    for ours, theirs in zip(found, truth):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
    (means,) = torch.autograd.grad((pair_colors(*tensors, pairs, degree) * weights).sum(), tensors[:1])
    torch.testing.assert_close(means, found[0])


@pytest.mark.parametrize("device", DEVICES)
def test_single_precision(device):
    tensors, pairs = make(3000, 4, 15, torch.float32, device)
    exact = tuple(value.detach().double().cpu().requires_grad_() for value in tensors)
    colors, expected = pair_colors(*tensors, pairs, 3), plain(exact, pairs.cpu(), 3)
    assert relative_error(colors.detach().cpu().double(), expected.detach()) < 1e-6
    found = torch.autograd.grad(colors.square().sum(), tensors)
    for ours, truth in zip(found, torch.autograd.grad(expected.square().sum(), exact)):
        assert relative_error(ours.cpu().double(), truth) < 1e-5


def test_without_higher_harmonics():
    (means, sh_dc, _, centers), pairs = make(20, 2, 0)
    colors = pair_colors(means, sh_dc, None, centers, pairs)
    torch.testing.assert_close(colors, plain((means, sh_dc, sh_dc[:, :0], centers), pairs, 0))
    assert torch.autograd.grad(colors.sum(), sh_dc)[0].abs().sum() > 0


def test_what_does_not_fit_is_refused():
    tensors, pairs = make(20, 2, 3)
    with pytest.raises(ValueError, match="sh_rest must have at least 8 rows for degree 2, got 3"):
        pair_colors(*tensors, pairs, 2)
    with pytest.raises((ValueError, RuntimeError), match=r"pairs must be \[N\] int64"):
        pair_colors(*tensors, pairs.int(), 1)
