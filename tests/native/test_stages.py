"""The stages of rendering, called one by one: each against the float64 reference, all together against
rasterize."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diff_gaussian_rasterization import ScreenStats, api, rasterize, rasterize_views, reference, stages

from tests.native.scenes import (
    DEVICES,
    Scene,
    assert_as_accurate_as,
    assert_not_blank,
    intrinsics,
    make_scene,
    relative_error,
    to_raw,
    with_colors,
    with_covariances,
)

PROJECTED = ("means", "quats", "scales", "opacities", "cov3d", "world_to_camera", "K", "width", "height",
             "scale_modifier", "raw", "near")  # fmt: skip
LEAVES = ("means", "quats", "scales", "opacities", "cov3d", "world_to_camera")
SIZE = (64, 48)


def outlooks() -> dict[str, tuple[Scene, dict]]:
    """Scenes, each with options of `project`."""
    scene, small = make_scene(200, SIZE), make_scene(200, SIZE, seed=1, scale=0.03)
    flat = make_scene(200, SIZE, seed=2).but(K=intrinsics(*SIZE, focal=0.3, offset=(0.06, -0.04)))
    around = make_scene(400, SIZE, seed=3, spread=2.5).but(
        K=intrinsics(*SIZE, focal=0.35, offset=(0.06, -0.04))
    )
    return {
        "as rasterize": (scene, {}),
        "raw": (to_raw(scene), {}),
        "covariances": (with_covariances(scene), {}),
        "scale modifier": (scene.but(scale_modifier=0.6), {}),
        "inside the cloud": (around, {}),
        "near": (scene.but(near=3.0), {}),
        "no blur": (make_scene(200, SIZE, seed=4, scale=0.15), {"blur": 0.0}),
        "more blur": (scene, {"blur": 1.7}),
        "antialiasing": (small, {"compensation": "antialiasing"}),
        "antialiasing of more blur": (small, {"compensation": "antialiasing", "blur": 1.1}),
        "mip": (small, {"compensation": "mip", "blur": 0.1}),
        "raw mip": (to_raw(small), {"compensation": "mip", "blur": 0.1}),
        "orthographic": (flat, {"camera": "orthographic"}),
        "fisheye": (around, {"camera": "fisheye"}),
        "distorted fisheye": (around, {"camera": "fisheye", "distortion": (0.1, -0.05, 0.02, -0.01)}),
    }


OUTLOOKS = outlooks()


def project(scene, **options):
    return stages.project(**{k: v for k, v in scene.arguments().items() if k in PROJECTED}, **options)


def reference_project(scene, blur=0.3, compensation="none", camera="pinhole", distortion=(0.0,) * 4):
    """As stages.project, from reference.py."""
    s, quats, scales, opacities = scene, scene.quats, scene.scales, scene.opacities
    if s.raw:
        quats = quats / quats.norm(dim=1, keepdim=True)
        scales, opacities = scales.exp(), opacities.sigmoid()
    cov3d = (
        reference.covariance(quats, scales * s.scale_modifier)
        if s.cov3d is None
        else reference.unpack_symmetric(s.cov3d)
    )
    lens = {"pinhole": None, "orthographic": reference.orthographic, "fisheye": reference.Fisheye(distortion)}
    splats = reference.project(
        s.means, cov3d, opacities.flatten(), s.world_to_camera, s.K, s.width, s.height,
        compensation == "antialiasing", s.near, blur, lens[camera], compensation == "mip",
    )  # fmt: skip
    return stages.Projected(*splats[:5], s.width, s.height)


def splats_of(projected):
    tiles = reference._tile_rectangles(projected.means2d.detach(), projected.radii, *projected[5:])
    return reference.Splats(*projected[:5], tiles)


def reference_blend(projected, features, offset=None, absolute=None, background=None):
    """As stages.blend, from reference.py."""
    image, left = reference.blend_features(
        splats_of(projected), features, *projected[5:], offset=offset, carrier=absolute
    )
    if background is not None:
        image = image + left * background[:, None, None]
    return stages.Blended(image, 1 - left)


@pytest.fixture
def fixed_order():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, seed=3, low=0.0):
    g = torch.Generator().manual_seed(seed)
    return low + (1 - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def differentiable(scene, dtype, device):
    scene = scene.to(torch.float32).to(dtype).to(device)
    for name in LEAVES:
        if getattr(scene, name) is not None:
            getattr(scene, name).requires_grad_()
    return scene


def gradients(scene):
    return [getattr(scene, name).grad.cpu() for name in LEAVES if getattr(scene, name) is not None]


def numbers(device):
    """The dtypes of a backend."""
    return [torch.float32] if device == "cuda" else [torch.float32, torch.float64]


KINDS = [(device, dtype) for device in DEVICES for dtype in numbers(device)]
kinds = pytest.mark.parametrize("device, dtype", KINDS)


def compare(ours, plain, truth, dtype, names, outputs, slack=4.0):
    """Outputs, then gradients: float64 equals the truth, float32 is about as accurate as PyTorch's."""
    for name, a, t in zip(names, ours, truth, strict=True):
        assert a.dtype == dtype, name
        if dtype == torch.float64:
            assert relative_error(a, t) < 1e-8, name
    if dtype == torch.float64:
        return
    for part, what in ((slice(outputs), "outputs"), (slice(outputs, None), "gradients")):
        if ours[part]:
            assert_as_accurate_as(ours[part], plain[part], truth[part], what, slack=slack)


# ---- project -------------------------------------------------------------------------------------------


def project_and_back(function, scene, dtype, device, options):
    """The rows that are drawn, and the gradients of a random linear function of them."""
    scene = differentiable(scene, dtype, device)
    out = function(scene, **options)
    drawn = out.radii > 0
    rows = [t[drawn] for t in out[:4]]
    weights = [random(*t.shape, seed=i, low=-1.0).to(t) for i, t in enumerate(out[:4])]
    sum((r * w[drawn]).sum() for r, w in zip(rows, weights)).backward()
    return out.radii.cpu(), [*(r.detach().cpu() for r in rows), *gradients(scene)]


@kinds
@pytest.mark.parametrize("outlook", OUTLOOKS)
def test_project(outlook, device, dtype):
    scene, options = OUTLOOKS[outlook]
    radii, ours = project_and_back(project, scene, dtype, device, options)
    true_radii, truth = project_and_back(reference_project, scene, torch.float64, "cpu", options)
    plain_radii, plain = project_and_back(reference_project, scene, torch.float32, "cpu", options)
    assert torch.equal(radii, true_radii) and torch.equal(plain_radii, true_radii)
    assert 50 < (radii > 0).sum(), "few are drawn"
    names = ["means2d", "conics", "opacities", "depths", *LEAVES]
    names = [n for n in names if n not in LEAVES or getattr(scene, n) is not None]
    compare(ours, plain, truth, dtype, names, outputs=4)


@pytest.mark.parametrize("outlook", ["raw mip", "distorted fisheye", "orthographic", "covariances"])
def test_project_passes_gradcheck(outlook):
    scene, options = OUTLOOKS[outlook]
    rows = {n: getattr(scene, n) for n in LEAVES if getattr(scene, n) is not None}
    few = {n: v[:40] if n != "world_to_camera" else v for n, v in rows.items()}
    drawn = project(scene.but(**few), **options).radii > 0
    if outlook.endswith("fisheye"):  # splats beside the axis have steep derivatives
        drawn &= project(scene.but(**few), **options).depths > 1
    assert drawn.sum() > 10

    def f(*values):
        out = project(scene.but(**dict(zip(few, values))), **options)
        return tuple(t[drawn] for t in out[:4])

    values = [v.clone().requires_grad_() for v in few.values()]
    assert torch.autograd.gradcheck(f, values, eps=1e-6, atol=1e-5, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_fisheye_sees_what_a_pinhole_cannot(device):
    """Beside the camera and behind it; and a point on the axis, whose derivatives are limits."""
    angles = torch.tensor([0.0, 0.3, 1.2, 1.7, 2.5])
    means = torch.stack([angles.sin(), 0 * angles, angles.cos()], dim=1).to(device) * 2
    scene = make_scene(5, (200, 200), degree=0).to(torch.float32).to(device)
    scene = scene.but(means=means, world_to_camera=torch.eye(4, device=device))
    scene.K = torch.tensor([[30.0, 0, 100], [0, 30, 100], [0, 0, 1]], device=device)
    scene.means.requires_grad_()
    out = project(scene, camera="fisheye")
    assert (out.radii > 0).all()
    assert torch.allclose(out.means2d[:, 0].cpu(), 100 + 30 * angles, atol=1e-3)
    assert torch.allclose(out.depths.cpu(), torch.full((5,), 2.0), atol=1e-5)
    sum(t.sum() for t in out[:4]).backward()
    assert scene.means.grad.isfinite().all() and scene.means.grad.abs().amin(0).max() > 0
    assert (project(scene).radii > 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_drawn_do_no_harm(device):
    scene = make_scene(50, SIZE).to(torch.float32).to(device)
    scene.means[:10, 2] = -100
    scene.means[10] = float("nan")
    scene.scales[11] = float("inf")
    out = project(scene)
    assert (out.radii[:12] == 0).all() and (out.radii > 0).any()
    for values in out[:4]:
        assert values.isfinite().all()
    assert (out.opacities[:12] == 0).all() and (out.depths[:12] == 1).all()


# ---- blend ---------------------------------------------------------------------------------------------

CHANNELS = [1, 2, 3, 4, 5, 16, 17, 41]


def splats(count=200, size=SIZE, seed=0, **kind):
    """A projection in float64, from float32 numbers."""
    scene = make_scene(count, size, seed, **kind).to(torch.float32).to(torch.float64)
    return project(scene)


def blend_and_back(function, projected, features, dtype, device, background=None, **options):
    """Picture and gradients of a random linear function of it."""
    tensors = [t.detach().to(torch.float32).to(dtype).to(device) for t in (*projected[:4], features)]
    leaves = [t.requires_grad_() for t in (*tensors[:3], tensors[4])]
    names = ["means2d", "conics", "opacities", "features"]
    if background is not None:
        leaves.append(background.clone().to(dtype).to(device).requires_grad_())
        names.append("background")
    own = stages.Projected(*tensors[:4], projected.radii.to(device), *projected[5:])
    if options.get("offset") is not None:
        options["offset"] = options["offset"].to(dtype).to(device)
    if options.pop("absolute", False):
        leaves.append(torch.full((len(features), 2), 7.0, dtype=dtype, device=device).requires_grad_())
        names.append("absolute")
        options["absolute"] = leaves[-1]
    out = function(own, tensors[4], background=None if background is None else leaves[4], **options)
    weights = [random(*t.shape, seed=i, low=-0.5).to(t) for i, t in enumerate(out)]
    sum((o * w).sum() for o, w in zip(out, weights)).backward()
    values = [o.detach().cpu() for o in out], [t.grad.cpu() for t in leaves]
    return [*values[0], *values[1]], ["image", "alpha", *names]


def blend(projected, features, offset=None, **options):
    return stages.blend(projected, features, stages.lists(projected, offset), **options)


def check_blend(projected, features, dtype, device, **options):
    ours, names = blend_and_back(blend, projected, features, dtype, device, **options)
    truth, _ = blend_and_back(reference_blend, projected, features, torch.float64, "cpu", **options)
    plain, _ = blend_and_back(reference_blend, projected, features, torch.float32, "cpu", **options)
    assert_not_blank(truth[0], 0.05)
    compare(ours, plain, truth, dtype, names, outputs=2)


@kinds
@pytest.mark.parametrize("channels", CHANNELS)
def test_blend(channels, device, dtype):
    projected = splats(seed=channels)
    check_blend(projected, random(200, channels), dtype, device, background=random(channels))


@kinds
def test_blend_of_many_channels(device, dtype):
    check_blend(splats(80, (33, 20)), random(80, 512), dtype, device)


@kinds
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 15), (130, 7)])
def test_blend_of_odd_sizes(size, device, dtype):
    check_blend(splats(60, size, seed=5, scale=0.3), random(60, 6), dtype, device)


@kinds
def test_blend_of_long_lists(device, dtype):
    """Hundreds of splats behind each other: a GPU's backward then begins in the middle of a tile's list."""
    check_blend(splats(2000, (33, 20), seed=1, scale=0.15, max_opacity=0.15), random(2000, 6), dtype, device)


@kinds
def test_blend_where_pixels_are_done(device, dtype):
    check_blend(splats(300, SIZE, seed=6, scale=0.3, max_opacity=1.0), random(300, 5), dtype, device)


@kinds
@pytest.mark.parametrize("channels", [3, 5])
def test_blend_with_offsets(channels, device, dtype):
    offset = random(SIZE[1], SIZE[0], 2, low=-1.0) * 0.9
    offset = offset.to(torch.float32).to(torch.float64)
    check_blend(splats(seed=7, scale=0.02), random(200, channels), dtype, device, offset=offset)
    moved = blend(splats(), random(200, 5), torch.full((*SIZE[::-1], 2), 0.5, dtype=torch.float64)).image
    assert (moved - blend(splats(), random(200, 5)).image).abs().max() > 0.02


@kinds
@pytest.mark.parametrize("channels", [3, 16])
def test_absolute_gradients(channels, device, dtype):
    check_blend(splats(seed=8), random(200, channels), dtype, device, absolute=True)


def test_absolute_gradients_of_many_channels_are_refused():
    carrier = torch.zeros(200, 2, dtype=torch.float64, requires_grad=True)
    image = blend(splats(), random(200, 17), absolute=carrier).image
    with pytest.raises(ValueError, match="at most 16 channels for absolute gradients, got 17"):
        image.sum().backward()


def clear_splats():
    """Five splats whose picture is smooth around them."""
    for seed in range(100):
        projected = splats(5, (20, 17), seed, scale=0.25, max_opacity=0.75, spread=0.3)
        if clear_of_thresholds(projected):
            return projected
    raise AssertionError("no seed gives splats clear of all thresholds")


def test_blend_passes_gradcheck():
    projected = clear_splats()
    tiles = stages.lists(projected)
    leaves = [t.clone().requires_grad_() for t in (*projected[:3], random(5, 3))]

    def f(means2d, conics, opacities, features):
        own = projected._replace(means2d=means2d, conics=conics, opacities=opacities)
        return tuple(stages.blend(own, features, tiles))

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


def clear_of_thresholds(projected):
    """No pixel's alpha is close to 1/255."""
    pixels = reference._pixel_centers(0, 0, 20, 17, projected.means2d)
    s = splats_of(projected)
    offsets = pixels[:, None, :] - s.means2d
    alpha = s.opacities * torch.exp(-reference.falloff_exponents(offsets, s.conics))
    return (alpha * 255).log().abs().min() > 2e-3


@kinds
def test_the_stages_together_are_rasterize(device, dtype):
    s = scene = make_scene(300, (75, 53), seed=2).to(dtype).to(device)
    center = -s.world_to_camera[:3, :3].T @ s.world_to_camera[:3, 3]
    projected = project(scene)
    colors = stages.sh_colors(s.means, s.sh_dc, s.sh_rest, center, s.sh_degree)
    tiles = stages.lists(projected)
    picture = stages.blend(projected, colors, tiles, s.background)
    inverse = stages.blend(projected, 1 / projected.depths[:, None], tiles).image
    whole = rasterize(**scene.arguments())
    assert_not_blank(whole.image, 0.05)
    pairs = (picture.image, whole.image), (picture.alpha, whole.alpha), (inverse, whole.inv_depth)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < (1e-9 if dtype == torch.float64 else 1e-5)
    # Three channels are one way, more are another: of the same splats they make the same picture.
    more = stages.blend(projected, torch.cat([colors, colors[:, :1]], dim=1), tiles).image
    alone = stages.blend(projected, colors, tiles).image
    assert (more[:3] - alone).abs().max() < (1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(projected.radii, whole.radii)


@kinds
def test_blend_takes_what_it_is_given(device, dtype):
    """Lists say only where to look: opacities that have changed since are seen."""
    projected = stages.Projected(*(t.to(dtype).to(device) if t.is_floating_point() else t.to(device)
                                   for t in splats()[:5]), *SIZE)  # fmt: skip
    tiles, features = stages.lists(projected), random(200, 5).to(dtype).to(device)
    fainter = projected._replace(opacities=projected.opacities * 0.5)
    ours = stages.blend(fainter, features, tiles).image
    again = stages.blend(fainter, features, stages.lists(fainter)).image
    assert (ours - stages.blend(projected, features, tiles).image).abs().max() > 0.05
    assert (ours - again).abs().max() < 1e-6


def test_a_picture_may_not_be_changed_before_the_backward():
    features = random(200, 5).requires_grad_()
    image = blend(splats(), features).image
    with torch.no_grad():
        image.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        image.sum().backward()
    image = blend(splats(), features, background=torch.zeros(5, dtype=torch.float64)).image
    image.clamp_(0.2, 0.6).sum().backward()


@pytest.mark.parametrize("index", range(6))
def test_altered_lists_are_noticed_on_the_cpu(index):
    projected = splats()
    tiles = stages.lists(projected)
    tiles.lists[index].fill_(2**30)
    with pytest.raises(ValueError, match="lists must be .* altered|lists must be"):
        stages.blend(projected, random(200, 3), tiles)


ALTERED = """
import torch
from tests.native.scenes import make_scene
from tests.native.test_stages import project, stages
projected = project(make_scene(60, (40, 33)).to(torch.float32).to("cuda"))
tiles = stages.lists(projected)
stages.blend(projected, torch.ones(60, 3, device="cuda"), tiles)
torch.cuda.synchronize()
tiles.lists[{index}].fill_(-1)
stages.blend(projected, torch.ones(60, 3, device="cuda"), tiles)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
@pytest.mark.parametrize("index", [0, 1])
def test_altered_lists_stop_the_gpu(index):
    """As with PyTorch's own indexing: an assertion, which ends the process's use of the GPU."""
    code = ALTERED.format(index=index)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0 and "device-side assert" in out.stderr, out.stderr


@pytest.mark.gpu
@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_sums_in_no_fixed_order_are_refused_where_a_fixed_one_is_asked_for(fixed_order):
    scene = differentiable(make_scene(60, (40, 33)), torch.float32, "cuda")
    torch.use_deterministic_algorithms(False)
    projected = project(scene)
    tiles = stages.lists(projected)
    image = stages.blend(projected, torch.ones(60, 3, device="cuda"), tiles).image
    torch.use_deterministic_algorithms(True)
    sentence = "with lists that were made without .* does not have a deterministic"
    with pytest.raises(RuntimeError, match="tilesplat::blend_backward " + sentence):
        image.sum().backward()
    with pytest.raises(RuntimeError, match="tilesplat::scores " + sentence):
        stages.scores(projected, tiles)


def sums(channels, device, capacity=0):
    """All that adds up over pixels, of splats that overlap a lot."""
    scene = differentiable(make_scene(3000, (150, 110), seed=3), torch.float32, device)
    projected = project(scene)
    tiles = stages.lists(projected, capacity=capacity)
    features, carrier = random(3000, channels).float().to(device).requires_grad_(), None
    if channels <= 16:
        carrier = torch.zeros(3000, 2, device=device, requires_grad=True)
    image, alpha = stages.blend(projected, features, tiles, absolute=carrier)
    weights = random(*image.shape, seed=1, low=-1.0).to(image)
    ((image * weights).sum() + alpha.square().sum()).backward()
    found = stages.scores(
        projected, tiles, colors=features[:, :1].repeat(1, 3), gradient=weights[:1].expand(3, -1, -1)
    )
    grads = [features.grad, *([carrier.grad] if carrier is not None else []), *gradients(scene)]
    return [*grads, *(t for t in found if t.is_floating_point())]


@pytest.mark.parametrize("channels", [3, 5, 16, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_sums_in_a_fixed_order(device, channels, request):
    usual = sums(channels, device)
    request.getfixturevalue("fixed_order")
    first = sums(channels, device)
    for ours, theirs in zip(first, usual):
        assert theirs.abs().max() > 0 and relative_error(ours.cpu(), theirs.cpu()) < 1e-4
    for capacity in (0, 0, 200_000):
        again = sums(channels, device, capacity)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first))
    assert all(t.isfinite().all() for t in sums(channels, device, capacity=500))


@pytest.mark.parametrize("device", DEVICES)
def test_lists_of_another_picture_are_refused(device):
    a, b = (splats(60, size) for size in ((64, 48), (80, 48)))
    a, b = (stages.Projected(*(t.to(device).float() if t.is_floating_point() else t.to(device)
                               for t in p[:5]), *p[5:]) for p in (a, b))  # fmt: skip
    with pytest.raises(ValueError, match=r"state\[\d\] must be"):
        stages.blend(a, torch.ones(60, 3, device=device), stages.lists(b))


@kinds
@pytest.mark.parametrize("count", [0, 1])
def test_few_splats(count, device, dtype):
    scene = differentiable(make_scene(count, (40, 33), seed=3, scale=0.4), dtype, device)
    projected = project(scene)
    tiles = stages.lists(projected)
    features = torch.ones(count, 6, dtype=dtype, device=device, requires_grad=True)
    background = torch.full((6,), 0.5, dtype=dtype, device=device)
    out = stages.blend(projected, features, tiles, background)
    found = stages.scores(projected, tiles, colors=features[:, :3], gradient=out.image[:3])
    assert found.weight_sum.shape == (count,) and (found.largest_index >= 0).any() == (count > 0)
    (out.image.sum() + stages.depth(projected, tiles, normalized=True).sum()).backward()
    assert features.grad.shape == (count, 6) and scene.means.grad.isfinite().all()
    assert torch.allclose(out.image, (0.5 + 0.5 * out.alpha).expand(6, -1, -1), atol=1e-6)
    assert (stages.median_depth(projected, tiles, empty=7.0) == 7.0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_wrong_is_named(device):
    projected = stages.Projected(*(t.float().to(device) if t.is_floating_point() else t.to(device)
                                   for t in splats()[:5]), *SIZE)  # fmt: skip
    tiles, features = stages.lists(projected), torch.ones(200, 3, device=device)
    scene = make_scene(5).to(torch.float32).to(device)
    wrong = {
        r"features must be \[200, 1 to 512\], got \[199, 3\]": lambda: stages.blend(
            projected, features[1:], tiles
        ),
        r"features must be \[200, 1 to 512\], got \[200, 513\]": lambda: stages.blend(
            projected, features[:, :1].expand(200, 513), tiles
        ),
        r"background must be \[3\], got \[4\]": lambda: stages.blend(
            projected, features, tiles, torch.ones(4, device=device)
        ),
        r"features must be \[200, 3\] float32": lambda: stages.blend(projected, features.double(), tiles),
        r"subpixel_offset must be \[48, 64, 2\], got \[64, 48, 2\]": lambda: stages.lists(
            projected, torch.zeros(64, 48, 2, device=device)
        ),
        "camera must be one of pinhole, fisheye, orthographic, got 'lens'": lambda: project(
            scene, camera="lens"
        ),
        "compensation must be one of none, antialiasing, mip, got 'x'": lambda: project(
            scene, compensation="x"
        ),
        "blur must be a finite number, 0 or more, got -1": lambda: project(scene, blur=-1),
        "distortion must be four numbers, got 2": lambda: project(scene, distortion=(0.0, 0.0)),
        "gradient must come with the colors": lambda: stages.scores(
            projected, tiles, gradient=torch.ones(3, 48, 64, device=device)
        ),
        r"weights must be \[48, 64\] float32": lambda: stages.scores(
            projected, tiles, weights=torch.ones(3, device=device)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="features must be a tensor.*got list"):
        stages.blend(projected, [[1.0]], tiles)


def test_the_number_of_threads_does_not_matter():
    def everything():
        s = splats()
        return blend_and_back(blend, s, random(200, 17), torch.float32, "cpu", background=random(17))[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(3)
    three = everything()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three))


@pytest.mark.parametrize("isa", torch.ops.tilesplat.cpu_isas())
def test_every_instruction_set(isa):
    torch.ops.tilesplat.set_cpu_isa(isa)
    try:
        for outlook in ("raw mip", "distorted fisheye", "covariances"):
            test_project(outlook, "cpu", torch.float32)
        test_blend(17, "cpu", torch.float32)
        test_absolute_gradients(3, "cpu", torch.float32)
        test_scores("offsets", "cpu", torch.float32)
    finally:
        torch.ops.tilesplat.set_cpu_isa("")


# ---- scores --------------------------------------------------------------------------------------------


def scored(kind):
    """A projection, and the arguments of `scores`."""
    width, height = SIZE
    picture = {"weights": random(height, width)} if kind != "plain" else {}
    if kind in ("colors", "loss", "offsets"):
        picture |= {"colors": random(200, 3, seed=5), "background": random(3, seed=6)}
    if kind in ("loss", "offsets"):
        picture |= {"gradient": random(3, height, width, seed=7, low=-1.0)}
    offset = random(height, width, 2, low=-1.0) if kind == "offsets" else None
    return splats(seed=9, max_opacity=1.0, scale=0.12), picture, offset


def reference_scores(projected, offset, weights=None, colors=None, background=None, gradient=None):
    """As stages.scores, from reference.py."""
    return stages.Scores(*reference.scores(
        splats_of(projected), *projected[5:], offset, weights, colors, background, gradient
    ))  # fmt: skip


@kinds
@pytest.mark.parametrize("kind", ["plain", "weights", "colors", "loss", "offsets"])
def test_scores(kind, device, dtype):
    def in_dtype(values, dtype, device):
        move = lambda t: t.float().to(dtype).to(device) if t.is_floating_point() else t.to(device)  # noqa: E731
        return [move(v) if isinstance(v, torch.Tensor) else v for v in values]

    def run(function, dtype, device):
        projected, picture, offset = scored(kind)
        own = stages.Projected(*in_dtype(projected, dtype, device))
        picture = dict(zip(picture, in_dtype(picture.values(), dtype, device)))
        offset = None if offset is None else in_dtype([offset], dtype, device)[0]
        return function(own, offset, **picture)

    ours = run(lambda p, offset, **k: stages.scores(p, stages.lists(p, offset), **k), dtype, device)
    truth = run(reference_scores, torch.float64, "cpu")
    plain = run(reference_scores, torch.float32, "cpu")
    exact = dtype == torch.float64
    for name, a, b, t in zip(truth._fields, ours, plain, truth):
        assert (a is None) == (t is None), name
        if t is None:
            continue
        assert t.abs().max() > 0, name
        if t.is_floating_point():
            compare([a.cpu()], [b], [t], dtype, [name], outputs=1, slack=8.0)
        elif exact:
            assert torch.equal(a.cpu(), t), name
        else:  # a pixel on a threshold
            assert (a.cpu() != t).float().mean() < 0.02, name


def test_the_moments_of_a_loss_are_those_of_its_gradient():
    """The first moment is the gradient itself; and a picture of one splat is known by heart."""
    projected, picture, _ = scored("loss")
    tiles = stages.lists(projected)
    opacities = projected.opacities.clone().requires_grad_()
    own = projected._replace(opacities=opacities)
    image = stages.blend(own, picture["colors"], tiles, picture["background"]).image
    (image * picture["gradient"]).sum().backward()
    found = stages.scores(projected, tiles, **picture)
    assert relative_error(found.opacity_grad, opacities.grad) < 1e-8
    one = splats(1, (20, 17), seed=3, scale=0.4)
    colors, light = torch.tensor([[0.2, 0.3, 0.9]]).double(), torch.full((3,), 0.1).double()
    found = stages.scores(one, stages.lists(one), colors=colors, background=light)
    alpha = stages.blend(one, colors, stages.lists(one)).alpha
    assert torch.allclose(found.weight_sum, alpha.sum())
    assert found.pixels == found.largest == found.bright == (alpha > 0).sum()
    # dC/dalpha = color - background, so dC/dG = opacity times their difference.
    slope = one.opacities * (colors - light).sum()
    assert torch.allclose(found.hessian, slope**2 * (alpha > 0).sum())


# ---- depths --------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("normalized", [False, True])
def test_depth(normalized, device, dtype):
    """And its gradient, through the weights and through the depths themselves."""

    def depth(project, blend, scene, dtype, device):
        scene = differentiable(scene, dtype, device)
        p = project(scene)
        if blend is None:
            image = stages.depth(p, stages.lists(p), normalized)
        else:
            image, alpha = blend(p, p.depths[:, None])
            image = torch.where(alpha > 0, image / alpha.clamp_min(1e-9), 0) if normalized else image
        (image * random(1, *SIZE[::-1], seed=2, low=-0.5).to(image)).sum().backward()
        return [image.detach().cpu(), *gradients(scene)]

    scene = make_scene(200, SIZE, seed=12, scale=0.15)
    ours = depth(project, None, scene, dtype, device)
    truth = depth(reference_project, reference_blend, scene, torch.float64, "cpu")
    plain = depth(reference_project, reference_blend, scene, torch.float32, "cpu")
    names = ["depth", "means", "quats", "scales", "opacities", "world_to_camera"]
    compare(ours, plain, truth, dtype, names, outputs=1)


@pytest.mark.parametrize("device", DEVICES)
def test_median_depth(device):
    """The depth of the splat at which half of the light is gone; its gradient goes to that splat alone."""
    scene = differentiable(make_scene(200, SIZE, seed=13, scale=0.15), torch.float32, device)
    p = project(scene)
    tiles = stages.lists(p)
    found = stages.median_depth(p, tiles, empty=15.0)
    alpha = stages.blend(p, torch.ones(200, 1, device=device), tiles).alpha
    index = stages.scores(p, tiles).median_index
    assert torch.equal(index >= 0, alpha[0] >= 0.5) and 100 < (index >= 0).sum() < index.numel()
    assert (found[0][index < 0] == 15.0).all()
    assert torch.equal(found[0][index >= 0], p.depths[index[index >= 0].long()])
    p.depths.retain_grad()
    found.sum().backward()
    counts = torch.bincount(index[index >= 0].long(), minlength=200)
    assert torch.equal(p.depths.grad, counts.to(p.depths.grad)) and scene.means.grad.abs().max() > 0


def test_normals_of_a_plane():
    K = intrinsics(40, 30, focal=0.9, offset=(0.06, -0.04))
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.4, -0.8], dtype=torch.float64), dim=0)
    pixels = reference._pixel_centers(0, 0, 40, 30, K).reshape(30, 40, 2)
    rays = torch.cat([(pixels - K[:2, 2]) / K[0, 0], torch.ones(30, 40, 1, dtype=torch.float64)], dim=-1)
    depth = (-2.0 / (rays @ normal))[None]  # the plane normal . p = -2
    assert (depth > 0).all()
    found = stages.normals(depth, K)
    assert (found.permute(1, 2, 0) @ normal).min() > 1 - 1e-12
    assert (stages.normals(torch.zeros_like(depth), K) == 0).all()


# ---- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_those_of_single_calls(device):
    scene = make_scene(200, SIZE, seed=14).to(torch.float32).to(device)
    poses = torch.stack([scene.world_to_camera] * 3)
    poses[:, 0, 3] += torch.tensor([0.0, 0.2, -0.3], device=device)
    backgrounds = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    shared = {
        k: v for k, v in scene.arguments().items() if k not in ("world_to_camera", "background", "means")
    }
    single, summed = (scene.means.clone().requires_grad_() for _ in range(2))
    alone = [
        rasterize(means=single, world_to_camera=w, background=b, **shared) for w, b in zip(poses, backgrounds)
    ]
    cameras = {"world_to_camera": poses, "background": backgrounds}
    together = rasterize_views(means=summed, **cameras, **shared)
    carrier = torch.zeros(3, 200, 3, device=device, requires_grad=True)
    per_view = scene.means.expand(3, -1, -1).clone().requires_grad_()
    each = rasterize_views(means=per_view, means2d=carrier, **cameras, **shared)
    for i, out in enumerate(alone):
        for a, b, c in zip(out, together, each):
            assert torch.equal(a, b[i]) and torch.equal(a, c[i])
    weights = random(3, 3, *SIZE[::-1]).to(poses)
    for images in (torch.stack([out.image for out in alone]), together.image, each.image):
        (images * weights).sum().backward()
    tolerance = 0 if device == "cpu" else 1e-5
    assert relative_error(summed.grad, single.grad) <= tolerance
    assert relative_error(per_view.grad.sum(0), single.grad) <= 1e-5
    assert (carrier.grad.abs().amax((1, 2)) > 0).all()
    assert not torch.equal(per_view.grad[0], per_view.grad[1])


KINDS = {
    "degree 3": lambda: make_scene(300, SIZE, seed=15),
    "raw, antialiasing": lambda: to_raw(make_scene(300, SIZE, seed=16, scale=0.04)).but(antialiasing=True),
    "degree 1 of 3": lambda: make_scene(300, SIZE, seed=17).but(sh_degree=1),
    "covariances, degree 0": lambda: with_covariances(make_scene(300, SIZE, seed=18, degree=0)),
    "colors": lambda: with_colors(make_scene(300, SIZE, seed=19)),
    "ragged": lambda: make_scene(131, (70, 41), seed=20, degree=2),
    "one": lambda: make_scene(1, SIZE, seed=21, scale=0.3, spread=0.05),
}


def poses_of(scene):
    """The second sees much more than the first, the third nothing."""
    poses = scene.world_to_camera.repeat(5, 1, 1)
    poses[:, 2, 3] += torch.tensor([2.0, -1.5, -50.0, 0.3, 0.0]).to(poses)
    poses[:, 0, 3] += torch.tensor([0.0, 0.1, 0.0, 0.2, -0.3]).to(poses)
    return poses


def seen_from(scene, poses, draw, stats=None):
    """What draw(scene, poses) makes of them, and gradients, and statistics."""
    scene = scene.but(world_to_camera=poses).to(poses)
    leaves = scene.leaves() | {"means2d": torch.zeros_like(scene.means)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = draw(**scene.arguments() | leaves, stats=stats)
    upstream = (random(*o.shape, seed=i, low=-1.0).to(o) for i, o in enumerate(out[:3]))
    sum((o * u).sum() for o, u in zip(out[:3], upstream)).backward()
    return [o.detach().cpu() for o in out], {name: leaf.grad.cpu() for name, leaf in leaves.items()}


def one_by_one(draw):
    def drawn(world_to_camera, stats, **arguments):
        more = {} if stats is None else {"stats": stats}
        views = [draw(**arguments, world_to_camera=w, **more) for w in world_to_camera]
        return [torch.stack(parts) for parts in zip(*views)]

    return drawn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_views_drawn_as_one(kind, device):
    scene = KINDS[kind]().to(torch.float32).to(device)
    poses, count = poses_of(scene), len(scene.means)
    stats, alone_stats = (ScreenStats.zeros(count, device, absolute=True) for _ in range(2))
    images, grads = seen_from(scene, poses, rasterize_views, stats)
    alone_images, alone = seen_from(scene, poses, one_by_one(rasterize), alone_stats)
    for ours, theirs in zip(images, alone_images):
        assert torch.equal(ours, theirs)
    seen = (images[3] > 0).sum(1)
    assert seen[2] == 0 and seen[0] > 0 and (images[1][1] > 0).sum() > 1.5 * (images[1][0] > 0).sum()
    assert torch.equal(stats.visits, alone_stats.visits) and stats.visits.max() == 4
    (_, truth), (_, plain) = (
        seen_from(scene.to("cpu"), poses.cpu().to(dtype), one_by_one(reference.rasterize))
        for dtype in (torch.float64, torch.float32)
    )
    for name, grad in grads.items():
        assert truth[name].numel() == 0 or truth[name].abs().max() > 0
        assert_as_accurate_as(grad, plain[name], truth[name], name)
        if device == "cpu":
            assert torch.equal(grad, alone[name]), name
    for ours, theirs in zip(vars(stats).values(), vars(alone_stats).values()):
        assert relative_error(ours, theirs) <= (0 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_many_tiles(device):
    """Together as many as a large picture has: that is when a GPU gives a thread two pixels."""
    scene = make_scene(2000, (400, 300), seed=23).to(torch.float32).to(device)
    scene.scales[:3] = 1.0  # in many tiles
    poses = scene.world_to_camera.repeat(8, 1, 1)
    poses[:, 0, 3] += torch.linspace(-0.5, 0.5, 8, device=device)
    (images, grads), (alone_images, alone) = (
        seen_from(scene, poses, draw) for draw in (rasterize_views, one_by_one(rasterize))
    )
    for ours, theirs in zip(images, alone_images):
        assert torch.equal(ours, theirs)
    for name, grad in grads.items():
        assert relative_error(grad, alone[name]) <= (0 if device == "cpu" else 1e-5), name


@pytest.mark.gpu
@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_views_add_up_from_the_last_to_the_first(kind, fixed_order):
    """To the last bit what autograd makes of single calls."""
    scene = KINDS[kind]().to(torch.float32).to("cuda")
    poses = poses_of(scene)
    stats, alone_stats = (ScreenStats.zeros(len(scene.means), "cuda", absolute=True) for _ in range(2))
    _, grads = seen_from(scene, poses, rasterize, stats)  # which makes no groups
    _, alone = seen_from(scene, poses, one_by_one(rasterize), alone_stats)
    for name, grad in grads.items():
        of_blocks = name in ("world_to_camera", "background")  # whose sums PyTorch makes
        assert relative_error(grad, alone[name]) <= (1e-5 if of_blocks else 0), name
    for ours, theirs in zip(vars(stats).values(), vars(alone_stats).values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [1, 2 * 64 * 48, 3 * 64 * 48 + 1])
def test_views_in_groups(together, device, monkeypatch):
    scene = KINDS["degree 3"]().to(torch.float32).to(device)
    poses = poses_of(scene)
    images, grads = seen_from(scene, poses, rasterize_views)
    monkeypatch.setattr(api, "TOGETHER", together)
    grouped, grouped_grads = seen_from(scene, poses, rasterize_views)
    for ours, theirs in zip(grouped, images):
        assert torch.equal(ours, theirs)
    for name, grad in grads.items():
        assert relative_error(grouped_grads[name], grad) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_bad_numbers(device):
    """What is not finite shows nowhere, whichever view meets it; no view, or no Gaussian, shows nothing."""
    scene = make_scene(200, SIZE, seed=22).to(torch.float32).to(device)
    poses = poses_of(scene)
    clean, grads = seen_from(scene.but(means=scene.means[:-2], **others(scene, -2)), poses, rasterize_views)
    scene.means[-1], scene.scales[-2] = torch.nan, torch.inf
    images, all_grads = seen_from(scene, poses, rasterize_views)
    for ours, theirs in zip(images[:3], clean):
        assert torch.equal(ours, theirs)
    assert all(grad.isfinite().all() for grad in all_grads.values())
    assert relative_error(all_grads["means"][:-2], grads["means"]) < 1e-5
    for lost in (scene.but(means=scene.means[:0], **others(scene, 0)), scene):
        away = poses.clone()
        away[:, 2, 3] = -100
        images, grads = seen_from(lost, away, rasterize_views)
        assert (images[0] == scene.background.cpu()[:, None, None]).all() and not images[3].any()
        assert all((g == 0).all() for name, g in grads.items() if name != "background")
        assert grads["background"].abs().max() > 0


def others(scene, end):
    names = ("quats", "scales", "opacities", "sh_dc", "sh_rest")
    return {name: getattr(scene, name)[:end] for name in names}


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_wrong_shapes(device):
    scene = make_scene(20, SIZE).to(torch.float32).to(device)
    with pytest.raises(
        ValueError, match=r"world_to_camera must be \[2, 4, 4\] float32 on \S+, got \[2, 4, 3\]"
    ):
        rasterize(**scene.but(world_to_camera=torch.zeros(2, 4, 3, device=device)).arguments())
    with pytest.raises(ValueError, match="world_to_camera must be of at least one view, got"):
        rasterize(**scene.but(world_to_camera=torch.zeros(0, 4, 4, device=device)).arguments())


def test_views_are_counted():
    scene = make_scene(20, SIZE)
    arguments = scene.but(background=torch.zeros(2, 3).double()).arguments()
    with pytest.raises(ValueError, match="background must have 3 views, got 2"):
        rasterize_views(**arguments | {"world_to_camera": scene.world_to_camera.expand(3, 4, 4)})
    with pytest.raises(ValueError, match=r"world_to_camera must be \[C, 4, 4\], got \[4, 4\]"):
        rasterize_views(**arguments)


# ---- the README ----------------------------------------------------------------------------------------

README = Path(__file__).resolve().parents[2] / "submodules/diff-gaussian-rasterization/README.md"


@pytest.mark.parametrize("device", DEVICES)
def test_the_examples_of_the_readme_run(device):
    """One after the other: they build upon each other."""
    examples = re.findall(r"^```python\n(# .*?)^```", README.read_text(), re.M | re.S)
    assert len(examples) >= 6
    scene = differentiable(make_scene(200, SIZE), torch.float32, device)
    names = {name: getattr(scene, name) for name in (*LEAVES, "K", "width", "height", "background")}
    names |= {"torch": torch, "features": random(200, 7).float().to(device).requires_grad_()}
    pictures = {"colors": (200, 3), "photo": (3, *SIZE[::-1]), "target": (7, *SIZE[::-1])}
    names |= {name: random(*shape).float().to(device) for name, shape in pictures.items()}
    for example in examples:
        exec(example, names)  # noqa: S102
        if "labels" in example:
            assert names["features"].grad.abs().max() > 0 and scene.means.grad.abs().max() > 0
    assert names["labels"].shape == (7, *SIZE[::-1]) and names["surface"].norm(dim=0).max() > 0.99
    assert names["keep"].any() and names["image"].std() > 0.05
    assert (names["strain"] >= names["pull"].abs() - 1e-4).all() and names["strain"].max() > 0
    assert names["images"].shape == (2, 3, *SIZE[::-1])


# ---- torch ---------------------------------------------------------------------------------------------


def stage_calls(dtype=torch.float32):
    """Operators with arguments, for opcheck."""
    scene = make_scene(30, (40, 33)).to(dtype)
    opacities = scene.opacities.flatten()
    tensors = (scene.means, scene.quats, scene.scales, None, opacities, scene.world_to_camera, scene.K)
    settings = (40, 33, 1.0, False, 0.2, 0.3, 0, 0, [0.0] * 4)
    operators = torch.ops.tilesplat
    projected = operators.project(*tensors, *settings)
    lists = operators.lists(*projected, 40, 33, 0.0)
    features, carrier = torch.rand(30, 5, dtype=dtype), torch.zeros(30, 2, dtype=dtype)
    return {
        "project": (*tensors, *settings),
        "lists": (*projected, 40, 33, 0.0),
        "blend": (*projected[:3], features, carrier, lists, None, 40, 33, True),
        "scores": (*projected[:3], lists, None, 40, 33, None, None, None, None, None),
    }


@pytest.mark.parametrize("name", ["project", "lists", "blend", "scores"])
def test_operators_pass_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tilesplat, name).default, stage_calls()[name])


def picture_of(means, scene, features):
    projected = project(scene.but(means=means))
    return stages.blend(projected, features, stages.lists(projected)).image


def test_the_stages_compile_into_one_graph():
    scene, features = make_scene(60, (40, 33)).to(torch.float32), random(60, 5).float()
    grads = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for f in (picture_of, torch.compile(picture_of, fullgraph=True, backend="aot_eager")):
            means = scene.means.clone().requires_grad_()
            image = f(means, scene, features)
            image.square().sum().backward()
            grads.append((image.detach(), means.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@kinds
def test_autocast(device, dtype):
    """Features from a network in 16 bits are taken in 32; numbers in double stay as they are."""
    scene = differentiable(make_scene(60, (40, 33)), dtype, device)
    features = random(60, 5).to(device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        if dtype == torch.float64:
            features = features.double().detach().requires_grad_()
        image = picture_of(scene.means, scene, features)
        image.square().sum().backward()
    assert image.dtype == dtype
    assert features.grad.dtype == features.dtype and features.grad.abs().max() > 0
    truth = picture_of(scene.means, scene, features.to(dtype))
    assert torch.equal(image, truth)


@pytest.mark.gpu
@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_a_picture_is_captured_in_a_graph():
    """With a capacity, nobody waits for the GPU: other numbers in the same memory give another picture."""
    scene, other = (make_scene(200, SIZE, seed).to(torch.float32).to("cuda") for seed in (0, 1))
    features = random(200, 5).float().cuda()

    def picture():
        projected = project(scene)
        tiles = stages.lists(projected, capacity=20_000)
        return stages.blend(projected, features, tiles).image, tiles.entries

    with torch.no_grad():
        truth = [picture_of(s.means, s, features) for s in (scene, scene.but(means=other.means))]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            picture()  # whatever is set up once
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            image, entries = picture()
        for i, means in enumerate((scene.means.clone(), other.means)):
            scene.means.copy_(means)
            graph.replay()
            torch.cuda.synchronize()
            assert 0 < entries.item() < 20_000 and torch.equal(image, truth[i])


@pytest.mark.parametrize("device", DEVICES)
def test_entries_are_counted(device):
    projected = stages.Projected(*(t.float().to(device) if t.is_floating_point() else t.to(device)
                                   for t in splats()[:5]), *SIZE)  # fmt: skip
    tiles = stages.lists(projected)
    assert tiles.entries.item() > 200
    small = stages.lists(projected, capacity=100)
    assert small.entries.item() == tiles.entries.item()
    image = stages.blend(projected, torch.ones(200, 1, device=device), small).image
    assert image.isfinite().all() and image.max() > 0


def test_a_second_derivative_is_refused():
    scene, features = make_scene(60, (40, 33)).to(torch.float32), random(60, 5).float()
    means = scene.means.clone().requires_grad_()
    (grad,) = torch.autograd.grad(picture_of(means, scene, features).square().sum(), means, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        grad.sum().backward()


def test_functional_transforms():
    """torch.func.grad gives the gradient; what there is no formula for is refused in a sentence."""
    scene, features = make_scene(60, (40, 33)).to(torch.float32), random(60, 5).float()

    def loss(means):
        return picture_of(means, scene, features).square().sum()

    means = scene.means.clone().requires_grad_()
    loss(means).backward()
    assert torch.equal(torch.func.grad(loss)(scene.means), means.grad)
    with pytest.raises(NotImplementedError, match="implement the jvp function"):
        torch.func.jvp(loss, (scene.means,), (scene.means,))
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.func.vmap(loss)(torch.stack([scene.means] * 2))
