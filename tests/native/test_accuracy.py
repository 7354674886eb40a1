"""float32 backends are about as accurate as float32 PyTorch: for all options, sizes and numbers of splats."""

import pytest
import torch
from diff_gaussian_rasterization import ScreenStats, mark_visible, rasterize, reference

from tests.native.scenes import (
    DEVICES,
    assert_as_accurate_as,
    assert_not_blank,
    make_scene,
    run,
    to_raw,
    with_colors,
    with_covariances,
)

OPTIONS = {
    "degree 0": lambda: make_scene(200, degree=0),
    "degree 1": lambda: make_scene(200, degree=1, seed=1),
    "degree 2": lambda: make_scene(200, degree=2, seed=2),
    "degree 3": lambda: make_scene(200, degree=3, seed=3),
    "lower active degree": lambda: make_scene(200, seed=4).but(sh_degree=1),
    "antialiasing": lambda: make_scene(200, seed=5, scale=0.03).but(antialiasing=True),
    "raw": lambda: to_raw(make_scene(200, seed=6)),
    "raw antialiasing": lambda: to_raw(make_scene(200, seed=6)).but(antialiasing=True),
    "scale modifier": lambda: make_scene(200, seed=7).but(scale_modifier=0.6),
    "covariances": lambda: with_covariances(make_scene(200, seed=8)),
    "colors": lambda: with_colors(make_scene(200, seed=9)),
    "camera center": lambda: make_scene(200, seed=10).but(camera_center=torch.tensor([1.0, -0.5, -2.5])),
    "inside the cloud": lambda: make_scene(400, seed=11, spread=2.5),
    "opaque": lambda: make_scene(200, seed=12, max_opacity=1.0),
    "far near plane": lambda: make_scene(200, seed=13).but(near=3.0),
    "near plane at the camera": lambda: make_scene(400, seed=14, spread=2.5).but(near=0.05),
}
PER_SPLAT = ("means", "quats", "scales", "opacities", "sh_dc", "sh_rest")


def compare(scenes, device, share=0.0):
    """Images and gradients of the float32 backend against truth, with float32 PyTorch as the measure."""
    scenes = [scene.to(torch.float32) for scene in (scenes if isinstance(scenes, list) else [scenes])]
    truth = [run(reference.rasterize, scene, torch.float64) for scene in scenes]  # from the same numbers
    plain = [run(reference.rasterize, scene, torch.float32) for scene in scenes]
    ours = [run(rasterize, scene, torch.float32, device) for scene in scenes]
    for name in ("image", "alpha", "inv_depth"):
        assert_as_accurate_as(
            *([getattr(out, name) for out, _ in x] for x in (ours, plain, truth)), name, share=share
        )
    for name in truth[0][1]:
        grads = ([grads[name] for _, grads in x] for x in (ours, plain, truth))
        assert_as_accurate_as(*grads, f"gradient of {name}", share=share)
    for (out, _), (true, _) in zip(ours, truth):
        assert (out.radii != true.radii).sum() <= max(1, 2e-4 * len(true.radii))
    return truth[0][0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, device):
    truth = compare(OPTIONS[option](), device)
    assert_not_blank(truth.image, 0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_near_plane(device):
    """Nothing up to it is drawn, all beyond it is; the published distance is the default."""
    scene = make_scene(200, seed=13).to(torch.float32)
    z = scene.means @ scene.world_to_camera[2, :3] + scene.world_to_camera[2, 3]
    assert 20 < (z > 3).sum() < 180 and (z > 0.2).all()
    on_device = scene.to(device)
    everything = rasterize(**on_device.arguments())
    cut = rasterize(**on_device.but(near=3.0).arguments())
    assert torch.equal(cut.radii.cpu(), torch.where(z > 3, everything.radii.cpu(), 0))
    default = {k: v for k, v in on_device.arguments().items() if k != "near"}
    assert torch.equal(rasterize(**default).image, everything.image)
    for near in (3.0, 0.2):
        visible = mark_visible(on_device.means, on_device.world_to_camera, near)
        assert torch.equal(visible.cpu(), z > near)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tiny_scene_with_a_tiny_near_plane(device):
    """A scene 4096 times smaller looks the same if the near plane moves along."""
    scene, by = make_scene(200, seed=15).to(torch.float32).to(device), 2.0**-12
    pose = scene.world_to_camera.clone()
    pose[:3, 3] *= by
    tiny = scene.but(means=scene.means * by, scales=scene.scales * by, world_to_camera=pose)
    truth, out = rasterize(**scene.arguments()), rasterize(**tiny.but(near=0.2 * by).arguments())
    assert_not_blank(truth.image, 0.05)
    assert torch.allclose(out.image, truth.image, atol=1e-5) and torch.equal(out.radii, truth.radii)
    assert (rasterize(**tiny.arguments()).radii == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (17, 15), (33, 20), (130, 7), (64, 64)])
def test_sizes(size, device):
    compare([make_scene(60, size, seed) for seed in range(8)], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_counts(count, device):
    few = count < 10
    scenes = [
        make_scene(count, (64, 64), seed, scale=0.25 if few else 0.03) for seed in range(64 if few else 1)
    ]
    truth = compare(scenes, device, share=0.0 if few else 2e-4)
    if count:
        assert_not_blank(truth.image, 0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_two_hundred_thousand_splats(device):
    scene = make_scene(200_000, (40, 30), seed=5, degree=1, scale=0.004, spread=1.5, max_opacity=0.3)
    scene = scene.to(torch.float32)
    with torch.no_grad():
        truth = reference.rasterize(**scene.to(torch.float64).arguments())
        plain = reference.rasterize(**scene.arguments())
    assert_not_blank(truth.image, 0.02)
    out, grads = run(rasterize, scene, torch.float32, device)
    for name in ("image", "alpha", "inv_depth"):
        assert_as_accurate_as(
            getattr(out, name), getattr(plain, name), getattr(truth, name), name, share=1e-3
        )
    assert (out.radii > 0).sum() > 30_000
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("device", DEVICES)
def test_large_splats_have_no_holes(device):
    """Needles and discs across the image, at all angles: each pixel that one reaches belongs to its tiles."""
    size, count, large = (320, 200), 48, 0
    scene = make_scene(count, size, seed=3, degree=0).to(torch.float32)
    random = torch.rand(count, 3, generator=torch.Generator().manual_seed(3))
    scene.scales = 10 ** (3.5 * random - 3)  # 0.001 to 3: from the blur alone to beyond the image
    for n in range(count):
        alone = scene.but(**{k: getattr(scene, k)[n : n + 1] for k in PER_SPLAT})
        truth = reference.rasterize(**alone.to(torch.float64).arguments()).alpha
        alpha = rasterize(**alone.to(device).arguments()).alpha.cpu()
        plain = reference.rasterize(**alone.arguments()).alpha  # misses what is on the edge of a needle
        reached = (truth > 1.01 / 255) & (plain > 0)
        assert (alpha[reached] > 0).all(), f"splat {n}: {(alpha[reached] == 0).sum()} of {reached.sum()}"
        large += int(reached.sum() > 32 * 256)
    assert large > count // 4, "few are large"
    compare(scene, device, share=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_wide_and_tall_images(device):
    """More than 65,535 tiles, and 16k pixels in a row: the splat lands where it should, and nowhere else."""
    for width, height in [(16_384, 32), (32, 16_384), (4_112, 4_128)]:
        scene = make_scene(1, (width, height), degree=0).to(torch.float32)
        scene.means[:] = 0
        scene.scales[:] = 0.2 / min(width, height)
        focal = float(min(width, height))
        scene.K = torch.tensor([[focal, 0, width - 9.5], [0, focal, height - 9.5], [0, 0, 1]])
        scene.world_to_camera = torch.eye(4)
        scene.world_to_camera[2, 3] = 1
        scene.opacities[:] = 0.9
        scene = scene.to(device)
        out = rasterize(**scene.arguments())
        j, i = divmod(out.alpha.argmax().item(), width)
        assert (i, j) == (width - 10, height - 10)
        assert 0.89 < out.alpha.max() < 0.901
        assert out.alpha.sum() < 50


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_for_densification(device):
    scene = make_scene(300, (75, 53), seed=2, spread=1.2).to(torch.float32)
    truth = ScreenStats.zeros(300, "cpu", absolute=True)
    ours = ScreenStats.zeros(300, device, absolute=True)
    for seen_from in range(2):  # statistics of two views add up
        scene.world_to_camera[0, 3] += 0.4 * seen_from
        out, true_grads = run(reference.rasterize, scene, torch.float64, stats=truth)
        _, grads = run(rasterize, scene, torch.float32, device, stats=ours)
        assert (grads["means2d"][:, 2] == 0).all()
        assert (out.radii == 0).any()
    assert truth.visits.max() == 2 and truth.visits.min() == 0
    assert (ours.visits.cpu() == truth.visits).all()
    for name in ("grad_norm_sum", "abs_grad_norm_sum"):
        a, t = getattr(ours, name).cpu(), getattr(truth, name)
        assert torch.allclose(a, t, rtol=2e-3, atol=1e-4 * t.max().item()), name
    assert (truth.abs_grad_norm_sum >= truth.grad_norm_sum * 0.999).all()
    # Without the absolute ones, the rest is the same.
    less = ScreenStats.zeros(300, device)
    run(rasterize, scene, torch.float32, device, stats=less)
    one_more = ours.grad_norm_sum.clone()
    run(rasterize, scene, torch.float32, device, stats=ours)
    assert torch.allclose(ours.grad_norm_sum - one_more, less.grad_norm_sum, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_inputs_are_taken(device):
    scene = make_scene(50).to(torch.float32).to(device)
    strided = scene.but(
        means=scene.means.T.contiguous().T,
        sh_rest=scene.sh_rest.transpose(1, 2).contiguous().transpose(1, 2),
        world_to_camera=scene.world_to_camera.T.contiguous().T,
    )
    a, b = rasterize(**scene.arguments()), rasterize(**strided.arguments())
    assert (a.image == b.image).all()


@pytest.mark.parametrize("device", DEVICES)
def test_opacities_may_be_flat(device):
    scene = make_scene(50).to(torch.float32).to(device)
    a = rasterize(**scene.arguments()).image
    flat = scene.opacities.flatten().clone().requires_grad_()
    b = rasterize(**scene.but(opacities=flat).arguments()).image
    assert (a == b).all()
    b.sum().backward()
    assert flat.grad.shape == flat.shape and flat.grad.abs().max() > 0
