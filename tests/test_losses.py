"""Losses, PSNR, exposure, spherical harmonics and covariances in Python against float64 formulas written
here."""

import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import utils.image
from per_view.exposure import apply_exposure
from training.losses import inverse_depth_loss
from utils.geometry import (
    covariances,
    fov_from_focal,
    intrinsics_from_fov,
    morton_codes,
    rotation_matrices,
)
from utils.image import PngWriter, psnr, psnr_by_channel, to_float, to_uint8
from utils.sh import basis, rgb_to_sh, sh_to_colors, sh_to_rgb


def pictures(height=37, width=52, seed=0):
    """Two pictures that resemble each other, float64 [3, H, W], away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    truth = 0.2 + 0.6 * torch.rand(3, height, width, dtype=torch.float64, generator=generator)
    noise = 0.2 * torch.rand(3, height, width, dtype=torch.float64, generator=generator) - 0.1
    return truth + noise, truth


def ssim_by_definition(a, b):
    """Wang et al. 2004: 11 x 11 Gaussian window of sigma 1.5, zero padding, mean over the picture."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line = line / line.sum()
    window = torch.outer(line, line).expand(a.shape[0], 1, 11, 11)

    def local_mean(x):
        return F.conv2d(x[None], window, padding=5, groups=a.shape[0])[0]

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    cov = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


@pytest.mark.parametrize("mask", [None, "left half"])
@pytest.mark.parametrize("target", ["float", "uint8"])
def test_photometric_loss(target, mask):
    from diff_gaussian_rasterization import photometric_loss

    image, truth = pictures()
    if target == "uint8":
        truth = (truth * 255).round() / 255
    weights = torch.ones(37, 52, dtype=torch.float64)
    if mask:
        weights[:, 26:] = 0
    wanted = image.clone().requires_grad_()
    l1 = (wanted * weights - truth * weights).abs().mean()
    loss = 0.8 * l1 + 0.2 * (1 - ssim_by_definition(wanted * weights, truth * weights))
    loss.backward()
    assert 0.02 < loss < 0.5 and wanted.grad.std() > 1e-5

    ours = image.float().requires_grad_()
    given = (truth * 255).round().to(torch.uint8) if target == "uint8" else truth.float()
    total, ours_l1 = photometric_loss(ours, given, 0.2, weights.float() if mask else None)
    total.backward()
    assert total.item() == pytest.approx(loss.item(), rel=2e-5)
    assert ours_l1.item() == pytest.approx(l1.item(), rel=2e-5)
    torch.testing.assert_close(
        ours.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3 * wanted.grad.abs().max().item()
    )


def test_inverse_depth_loss_and_its_gradient():
    rendered = torch.tensor([[[0.5, 1.0], [2.0, 0.25]]], requires_grad=True)
    target, mask = torch.tensor([[0.75, 1.0], [1.0, 5.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss = inverse_depth_loss(rendered, target, mask)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 0 + 1) / 4)  # over all pixels, masked ones too
    assert rendered.grad.tolist() == [[[-0.25, 0.0], [0.25, 0.0]]]
    assert inverse_depth_loss(rendered, target).item() == pytest.approx((0.25 + 0 + 1 + 4.75) / 4)


def test_exposure_is_row_times_matrix_plus_shift():
    image, _ = pictures(4, 5)
    exposure = torch.tensor(
        [[1.0, 0.1, 0.2, 0.01], [0.3, 0.9, 0.4, 0.02], [0.5, 0.6, 1.1, 0.03]], dtype=torch.float64
    )
    pixel = image[:, 2, 3]
    expected = [sum(pixel[i] * exposure[i, j] for i in range(3)) + exposure[j, 3] for j in range(3)]
    torch.testing.assert_close(apply_exposure(image, exposure)[:, 2, 3], torch.stack(expected))
    torch.testing.assert_close(apply_exposure(image, torch.eye(3, 4, dtype=torch.float64)), image)


def test_psnr():
    truth = torch.full((3, 10, 10), 0.5)
    image = truth.clone()
    image[0] += 0.1  # mse 0.01 in one channel of three
    assert psnr(image, truth).item() == pytest.approx(10 * math.log10(300), abs=1e-3)
    image[1] += 0.01
    image[2] += 0.001
    assert psnr_by_channel(image, truth).item() == pytest.approx((20 + 40 + 60) / 3, abs=0.02)


def test_number_ranges():
    image = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 3.0])
    assert to_uint8(image).tolist() == [0, 0, 0, 1, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_basis_is_orthonormal(degree):
    # Gauss-Legendre in cos(theta) and equal steps in phi integrate polynomials of this degree exactly.
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * (2 * np.pi / 16)
    z, p = np.meshgrid(nodes, phi, indexing="ij")
    r = np.sqrt(1 - z**2)
    directions = torch.tensor(np.stack([r * np.cos(p), r * np.sin(p), z], -1).reshape(-1, 3))
    area = torch.tensor(np.repeat(weights * (2 * np.pi / 16), 16))
    values = basis(degree, directions)
    gram = values.T @ (values * area[:, None])
    torch.testing.assert_close(gram, torch.eye((degree + 1) ** 2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_sh_colors():
    means, center = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([0.0, 0.0, 1.0])  # seen along +z
    coefficients = torch.zeros(1, 16, 3)
    coefficients[0, 0] = torch.tensor([1.0, 0.0, -3.0])
    coefficients[0, 2] = torch.tensor([0.1, 0.2, 0.0])  # the z function of degree 1
    colors = sh_to_colors(1, coefficients, means, center)
    # 0.5 + 0.28209479 + 0.048860251; 0.5 + 0.0977205; 0.5 - 0.846 < 0
    torch.testing.assert_close(colors, torch.tensor([[0.83095504, 0.5977205, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sh_to_rgb(rgb_to_sh(torch.tensor([0.1, 0.9]))), torch.tensor([0.1, 0.9]))


def test_covariance():
    quarter = math.sqrt(0.5)
    quats = torch.tensor([[2.0, 0.0, 0.0, 0.0], [quarter, 0.0, 0.0, quarter]])  # identity; 90 degrees about z
    scales = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    expected = torch.tensor([[1.0, 0, 0, 4, 0, 9], [4.0, 0, 0, 1, 0, 9]])
    torch.testing.assert_close(covariances(scales, quats), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(covariances(scales, quats, 0.5), 0.25 * expected, atol=1e-5, rtol=0)
    random = torch.randn(20, 4, dtype=torch.float64)
    rotations = rotation_matrices(random)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3, dtype=torch.float64).expand(20, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(20, dtype=torch.float64))


def test_field_of_view():
    K = intrinsics_from_fov(math.pi / 2, fov_from_focal(30.0, 40), 100, 40)
    torch.testing.assert_close(K, torch.tensor([[50.0, 0, 50], [0, 30, 20], [0, 0, 1]]))


def test_morton_codes_take_a_bit_of_each_axis_in_turn():
    points = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) * 4 - 1
    points[0] = torch.tensor([1e6, -1e6, 0.0])  # far out, it must not push all others into one cell
    codes = morton_codes(points)
    assert codes.min() >= 0 and codes.max() < 2**30 and len(codes.unique()) > 4000

    # Of each axis: its bits in order are a number that grows with the coordinate.
    for axis in range(3):
        cell = sum(((codes >> (3 * bit + axis)) & 1) << bit for bit in range(10))
        steps = cell[points[:, axis].argsort(stable=True)].diff()
        assert (steps >= 0).all() and steps.sum() > 100

    def apart(order: torch.Tensor) -> float:
        return (points[order][1:] - points[order][:-1]).norm(dim=1).median().item()

    assert apart(codes.argsort()) < 0.2 * apart(torch.arange(len(points)))
    assert len(morton_codes(points[:0])) == 0


def test_png_files_are_written_on_other_threads(tmp_path, monkeypatch):
    photos = [torch.randint(256, (3, 5, 7), dtype=torch.uint8) for _ in range(9)]
    paths, let_go, most = [tmp_path / f"{n}.png" for n in range(9)], threading.Event(), 0
    write_png = utils.image.write_png
    monkeypatch.setattr(utils.image, "write_png", lambda *picture: (let_go.wait(), write_png(*picture)))
    with PngWriter(threads=2, waiting=4) as files:
        for photo, path in zip(photos[:4], paths):
            files.write(photo, path)
        assert not list(tmp_path.iterdir()), "the caller goes on meanwhile"
        threading.Timer(0.1, let_go.set).start()
        for n in range(4, 9):
            files.write(photos[n], paths[n])
            most = max(most, sum(not path.exists() for path in paths[: n + 1]))
    assert most <= 4, f"{most} were held, at most 4 may be"
    for photo, path in zip(photos, paths):
        assert (np.asarray(Image.open(path)) == photo.permute(1, 2, 0).numpy()).all()
    with pytest.raises(FileNotFoundError), PngWriter() as files:
        files.write(photos[0] / 255, tmp_path / "missing" / "a.png")
