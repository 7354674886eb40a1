"""Gradients in double precision against finite differences, on small scenes that stay clear of every
threshold."""

import pytest
import torch
from diff_gaussian_rasterization import knn_mean_dist2, photometric_loss, rasterize, reference, ssim

from tests.native.scenes import (
    DEVICES,
    Scene,
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


def many_faint(device) -> Scene:
    """Hundreds of splats behind each other: a GPU's backward then begins in the middle of a tile's list."""
    scene = make_scene(2000, (33, 20), seed=1, degree=0, scale=0.15, max_opacity=0.15).to(torch.float32)
    scene = scene.to(device)
    for leaf in scene.leaves().values():
        leaf.requires_grad_()
    return scene


def wiped(picture, mask):
    result = picture * mask
    picture.data.zero_()  # behind autograd's back
    return result


IN_PLACE = {
    "clamp_": (lambda p, mask: p.clamp_(0.2, 0.6).mul_(mask), lambda p, mask: p.clamp(0.2, 0.6) * mask),
    "zero_": (wiped, lambda p, mask: p * mask),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output", ["image", "alpha", "inv_depth"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_pictures_may_be_changed_before_the_backward(change, output, device):
    """The original's may: image.clamp_(), image *= mask."""
    mask = torch.linspace(0, 1, 33, device=device)
    grads = []
    for function in IN_PLACE[change]:
        scene = many_faint(device)
        picture = getattr(rasterize(**scene.arguments()), output)
        assert_not_blank(picture.detach(), 0.01)
        function(picture, mask).square().sum().backward()
        grads.append([leaf.grad for leaf in scene.leaves().values() if leaf.numel()])
    assert grads[0][0].abs().max() > 0
    for a, b in zip(*grads):  # the order of sums on a GPU changes from run to run
        assert torch.equal(a, b) if device == "cpu" else relative_error(a, b) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["radii", "means", "opacities", "background"])
def test_what_the_backward_reads_again_may_not_be_changed(name, device):
    scene = many_faint(device)
    out = rasterize(**scene.arguments())
    with torch.no_grad():
        (out.radii if name == "radii" else getattr(scene, name)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.image.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_of_a_loss_may_be_changed_before_the_backward(device):
    image = torch.rand(3, 20, 33, device=device, requires_grad=True)
    grads = []
    for wipe in (False, True):
        picture = image * 1.0
        loss, _ = photometric_loss(picture, torch.zeros_like(image))
        if wipe:
            picture.zero_()
        grads.append(torch.autograd.grad(loss, image)[0])
    assert torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_for_the_backward_may_travel(device):
    """As with torch.autograd.graph.save_on_cpu: other tensors come back, with the same numbers."""
    grads = []
    for pack in (lambda t: t, torch.clone):
        scene = many_faint(device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            rasterize(**scene.arguments()).image.square().sum().backward()
        grads.append(scene.means.grad)
    assert relative_error(*grads) < 1e-4
