"""Nearest neighbors against all pairs, with the duplicates and clusters that real point clouds have."""

import pytest
import torch
from diff_gaussian_rasterization import knn_mean_dist2, reference
from simple_knn._C import distCUDA2

from tests.native import golden
from tests.native.scenes import DEVICES


def cloud(kind: str, count: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(count)
    points = torch.randn(count, 3, generator=g)
    if kind == "clusters":  # of very different size, far from the origin
        points *= torch.logspace(-4, 1, 7)[torch.randint(7, (count, 1), generator=g)]
        points += torch.tensor([50.0, -20.0, 3.0])
    if kind == "duplicates":
        points = points[torch.randint(max(count // 3, 1), (count,), generator=g)]
    if kind == "one place":
        points = points[:1].repeat(count, 1)
    if kind == "line":
        points[:, 1:] = 0
    if kind == "plane":
        points[:, 2] = 7
    if kind == "grid":
        points = (4 * points).round()
    if kind == "outlier":
        points[0] = 1e4
    return points


KINDS = ["normal", "clusters", "duplicates", "one place", "line", "plane", "grid", "outlier"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbors_are_those_of_all_pairs(kind, device):
    points = cloud(kind, 3000)
    truth = reference.knn_mean_dist2(points.double())
    assert (truth > 0).any() or kind == "one place"
    ours = knn_mean_dist2(points.to(device)).cpu()
    assert torch.allclose(ours.double(), truth, rtol=2e-5, atol=1e-12), (ours - truth).abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 31, 33, 1025])
def test_any_number_of_points(count, device):
    """With fewer than three others, the mean is over those there are; alone, it is 0."""
    points = cloud("normal", count)
    ours = knn_mean_dist2(points.to(device)).cpu()
    assert ours.shape == (count,) and ours.dtype == torch.float32
    assert torch.allclose(ours.double(), reference.knn_mean_dist2(points.double()), rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_dist_cuda2_is_the_original(device):
    case = golden.load("knn")
    ours = distCUDA2(torch.from_numpy(case["points"]).to(device)).cpu()
    assert torch.allclose(ours, torch.from_numpy(case["dist2"]), rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_points_that_are_no_numbers_harm_no_others(device):
    points = cloud("normal", 500)
    points[::50, 1] = float("nan")
    points[7, 0] = float("inf")
    good = points.isfinite().all(1)
    ours = knn_mean_dist2(points.to(device)).cpu()
    truth = reference.knn_mean_dist2(points[good].double())
    assert torch.allclose(ours[good].double(), truth, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_named(device):
    with pytest.raises(ValueError, match=r"points must be \[N, 3\] float32 on .*, got \[10, 2\] float32"):
        knn_mean_dist2(torch.zeros(10, 2, device=device))
    with pytest.raises(ValueError, match=r"points must be \[N, 3\] float32 on .*, got \[10, 3\] int64"):
        knn_mean_dist2(torch.zeros(10, 3, dtype=torch.int64, device=device))
