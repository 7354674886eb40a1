"""The same bits every time: on a CPU always, on a GPU after torch.use_deterministic_algorithms(True)."""

import pytest
import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, TrainStep, photometric_loss, rasterize

from tests.native.scenes import DEVICES, make_scene, relative_error
from tests.native.test_train_step import (
    BETAS,
    EPS,
    LAMBDA,
    LRS,
    NAMES,
    camera,
    fresh,
    target_like,
    training_scene,
)


@pytest.fixture
def fixed_order():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(device: str) -> list[torch.Tensor]:
    """All that one backward can give, of splats that overlap a lot."""
    scene = make_scene(5000, (150, 110), seed=3, degree=3).to(torch.float32).to(device)
    scene.scales[:3] = 1.0  # in many tiles
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(c, 110, 150, generator=g).to(device) for c in (3, 1, 1)]
    stats = ScreenStats.zeros(5000, device, absolute=True)
    names = ("means", "quats", "scales", "opacities", "sh_dc", "sh_rest", "world_to_camera", "background")
    leaves = {name: getattr(scene, name).requires_grad_() for name in names}
    out = rasterize(**scene.arguments() | leaves, stats=stats)
    outputs = (out.image, out.alpha, out.inv_depth)
    sum((o * u).sum() for o, u in zip(outputs, upstream)).backward()
    grads = [leaf.grad for leaf in leaves.values()]
    return [*grads, stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum]


@pytest.mark.parametrize("device", DEVICES)
def test_backward(device, request):
    usual = gradients(device)
    request.getfixturevalue("fixed_order")
    first = gradients(device)
    for ours, theirs in zip(first, usual):
        assert theirs.abs().max() > 0 and relative_error(ours, theirs) < 1e-4
    for _ in range(5):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(device), first))


def steps(device: str, native: bool, count: int = 40) -> list[torch.Tensor]:
    """All that some training steps change, in one native call each or through autograd."""
    scene = training_scene(3000, size=(120, 90), seed=5)
    target = target_like(scene, torch.uint8).to(device)
    out, step = fresh(scene, device, torch.float32, True), TrainStep(2, device)
    optimizer = FusedAdam([{"params": [p], "lr": lr} for p, lr in zip(out.params, LRS)], betas=BETAS, eps=EPS)
    size = {"width": scene.width, "height": scene.height, "sh_degree": 3}
    for i in range(1, count + 1):
        view = camera(scene, i % 2, device, torch.float32)
        if native:
            view |= {"sh_degree": 3, "antialiasing": False, "mask": None, "target": target}
            moments = (out.exp_avg, out.exp_avg_sq)
            options = {"view": i % 2, "lambda_dssim": LAMBDA, "stats": out.stats}
            out.losses += step(out.params, *moments, list(LRS), BETAS, EPS, i, **view, **options)
            continue
        leaves = {name: p.requires_grad_() for name, p in zip(NAMES, out.params)}
        image = rasterize(**leaves, **view, **size, raw=True, stats=out.stats).image
        loss, l1 = photometric_loss(image, target, LAMBDA, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out.losses[:2] += torch.stack([loss.detach(), l1])
    step.settle()
    stats = [out.stats.grad_norm_sum, out.stats.visits, out.stats.abs_grad_norm_sum]
    return [*(p.detach() for p in out.params), *out.exp_avg, *out.exp_avg_sq, *stats, out.losses]


@pytest.mark.parametrize("native", [True, False], ids=["one native call", "autograd"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_steps(device, native, request):
    usual = steps(device, native)
    request.getfixturevalue("fixed_order")
    first, second = steps(device, native), steps(device, native)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second))
    for ours, theirs in zip(first[:6], usual):
        assert relative_error(ours, theirs) < 1e-2  # 40 steps on, roundings have grown
    assert relative_error(first[-1], usual[-1]) < 1e-4
