"""Gradients in double precision against finite differences, on small scenes that stay clear of every
threshold."""

import pytest
import torch
from diff_gaussian_rasterization import knn_mean_dist2, photometric_loss, rasterize, reference, ssim

from tests.native.scenes import (
    assert_not_blank,
    cotangents,
    make_scene,
    relative_error,
    run,
    threshold_margin,
    to_raw,
    with_colors,
    with_covariances,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small calls: waking other threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clear_scene(degree=1, antialiasing=False):
    """Five splats on 20 x 17 pixels whose image is smooth around them."""
    for seed in range(200):
        scene = make_scene(5, (20, 17), seed, degree, scale=0.25, max_opacity=0.75, spread=0.3)
        scene = scene.but(antialiasing=antialiasing)
        if threshold_margin(scene) > 2e-4:
            assert_not_blank(reference.rasterize(**scene.arguments()).image, 0.05)
            return scene
    raise AssertionError("no seed gives a scene clear of all thresholds")


SCENES = {
    "sh": lambda: clear_scene(),
    "degree 3": lambda: clear_scene(degree=3),
    "antialiasing": lambda: clear_scene(antialiasing=True),
    "raw": lambda: to_raw(clear_scene()),
    "raw antialiasing": lambda: to_raw(clear_scene(antialiasing=True)),
    "scale modifier": lambda: clear_scene().but(scale_modifier=1.01),
    "covariances": lambda: with_covariances(clear_scene()),
    "colors": lambda: with_colors(clear_scene()),
}


@pytest.mark.parametrize("kind", SCENES)
def test_rasterize_passes_gradcheck(kind):
    scene = SCENES[kind]()
    leaves = scene.leaves()

    def f(*values):
        """Five random sums over each output: few enough for all of their derivatives."""
        out = rasterize(**{**scene.arguments(), **dict(zip(leaves, values))})
        weights = [cotangents(scene, seed) for seed in range(5)]
        return tuple(torch.stack([(o * w[i]).sum() for w in weights]) for i, o in enumerate(out[:3]))

    values = tuple(v.clone().requires_grad_() for v in leaves.values())
    assert torch.autograd.gradcheck(f, values, eps=1e-6, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


@pytest.mark.parametrize("kind", SCENES)
def test_double_backend_is_the_reference(kind):
    scene = SCENES[kind]()
    truth, true_grads = run(reference.rasterize, scene, torch.float64)
    out, grads = run(rasterize, scene, torch.float64)
    for name in truth._fields[:3]:
        assert (getattr(out, name) - getattr(truth, name)).abs().max() < 1e-9, name
    assert (out.radii == truth.radii).all()
    for name, true in true_grads.items():
        assert relative_error(grads[name], true) < 1e-8, name


@pytest.mark.parametrize("antialiasing", [False, True])
def test_double_backend_is_the_reference_on_a_busy_scene(antialiasing):
    """All habits included: clamped projections, capped alpha, clamped colors, pixels that stop."""
    scene = make_scene(700, (75, 53), seed=3, scale=0.15, max_opacity=1.0, spread=1.2).but(
        antialiasing=antialiasing
    )
    truth, true_grads = run(reference.rasterize, scene, torch.float64)
    assert_not_blank(truth.image, 0.05)
    out, grads = run(rasterize, scene, torch.float64)
    assert (out.image - truth.image).abs().max() < 1e-9
    assert (out.alpha - truth.alpha).abs().max() < 1e-9
    for name, true in true_grads.items():
        assert relative_error(grads[name], true) < 1e-7, name


def test_pose_gradient_is_free_when_not_asked_for():
    scene = make_scene(20, (32, 32))
    scene.means.requires_grad_()
    out = rasterize(**scene.arguments())
    out.image.sum().backward()
    assert scene.world_to_camera.grad is None and scene.means.grad is not None


def test_outputs_without_gradient_need_none():
    """A loss of alpha alone, or of inverse depth alone."""
    for output in ("alpha", "inv_depth"):
        grads = []
        for f in (rasterize, reference.rasterize):
            scene = make_scene(20, (32, 32)).to(torch.float64)
            scene.means.requires_grad_()
            getattr(f(**scene.arguments()), output).square().sum().backward()
            grads.append(scene.means.grad)
        assert grads[1].norm() > 0.1
        assert relative_error(grads[0], grads[1]) < 1e-8, output


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_ssim_passes_gradcheck(padding):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 13, 12, generator=g, dtype=torch.float64) for _ in range(2))
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, padding), (a, b), atol=1e-7)


def test_photometric_loss_passes_gradcheck():
    g = torch.Generator().manual_seed(0)
    image, target = (torch.rand(3, 7, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(7, 6, generator=g, dtype=torch.float64)
    assert (image - target).abs().min() > 1e-4  # |x| has a kink at 0
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda i: photometric_loss(i, target, 0.2)[0], (image,), atol=1e-7)
    assert torch.autograd.gradcheck(lambda i: photometric_loss(i, target, 0.7, mask)[0], (image,), atol=1e-7)


def test_double_neighbors():
    points = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(knn_mean_dist2(points), reference.knn_mean_dist2(points), rtol=1e-12)
