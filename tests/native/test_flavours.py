"""The flavours, each called as its callers do, against the float64 reference."""

import math
import os
import subprocess
import sys

import pytest
import torch
from diff_gaussian_rasterization import flavours, rasterize, reference, stages
from diff_gaussian_rasterization.flavours import (
    abs_grad,
    counters,
    depth,
    depth_alpha,
    features,
    filter,
    median_depth,
    mip,
    pose,
)

from tests.native.scenes import DEVICES, assert_as_accurate_as, make_scene, relative_error, with_covariances
from tests.native.test_drop_in import projection
from tests.native.test_stages import compare, kinds, random, splats_of

SIZE = (64, 48)
COUNT = 150
SCENE = make_scene(COUNT, SIZE, seed=3)
GAUSSIANS = (
    "means3D",
    "means2D",
    "opacities",
    "shs",
    "dc",
    "colors_precomp",
    "scales",
    "rotations",
    "cov3D_precomp",
)


# ---- what callers hand over: float64 on the CPU ------------------------------------------------------------


def settings_of(scene, **changes) -> dict:
    view, K = scene.world_to_camera, scene.K
    return {
        "image_height": scene.height, "image_width": scene.width,
        "tanfovx": scene.width / (2 * K[0, 0].item()), "tanfovy": scene.height / (2 * K[1, 1].item()),
        "bg": scene.background, "scale_modifier": 1.0, "viewmatrix": view.T,
        "projmatrix": (projection(K, scene.width, scene.height) @ view).T, "sh_degree": scene.sh_degree,
        "campos": -view[:3, :3].T @ view[:3, 3], "prefiltered": False, "debug": False, **changes,
    }  # fmt: skip


def inputs_of(scene, **changes) -> dict:
    return {
        "means3D": scene.means, "means2D": torch.zeros_like(scene.means), "opacities": scene.opacities,
        "shs": torch.cat([scene.sh_dc, scene.sh_rest], 1), "colors_precomp": None, "scales": scene.scales,
        "rotations": scene.quats, "cov3D_precomp": None, **changes,
    }  # fmt: skip


def moved(values: dict, dtype, device) -> dict:
    """Copies; those that want a gradient are leaves."""
    return {
        k: v.detach().clone().to(dtype).to(device) if isinstance(v, torch.Tensor) else v
        for k, v in values.items()
    }


# ---- the truth: what a flavour returns, from reference.py --------------------------------------------------


class Truth:
    """The settings and arguments of a call as reference.py takes them."""

    def __init__(self, settings, inputs, w2c=None, blur=0.3, mip=False, offset=None):
        s, i = settings, inputs
        self.width, self.height, self.offset = s["image_width"], s["image_height"], offset
        w2c = s["viewmatrix"].T if w2c is None else w2c
        cov = i["cov3D_precomp"]
        cov = (
            reference.covariance(i["rotations"], i["scales"] * s["scale_modifier"])
            if cov is None
            else reference.unpack_symmetric(cov)
        )
        splats = reference.project(
            i["means3D"], cov, i["opacities"].flatten(), w2c, SCENE.K.to(w2c), self.width, self.height,
            s.get("antialiasing", False), blur=blur, mip=mip,
        )  # fmt: skip
        self.colors = i["colors_precomp"]
        if self.colors is None:
            known = [t for t in (i.get("dc"), i["shs"]) if t is not None]
            center = -w2c[:3, :3].T @ w2c[:3, 3]
            self.colors = reference.sh_colors(s["sh_degree"], torch.cat(known, 1), i["means3D"] - center)
        self.background, carrier = s["bg"], i["means2D"]
        half = carrier.new_tensor([0.5 * self.width, 0.5 * self.height])
        shift = (carrier - carrier.detach())[:, :2] * half
        self.absolute = carrier[:, 2:] * half if carrier.shape[1] == 4 else None
        splats = splats._replace(means2d=splats.means2d + shift)
        self.projected = stages.Projected(*splats[:5], self.width, self.height)
        self.radii, self.depths = splats.radii, splats.depths[:, None]

    def blend(self, *parts):
        """Color, a picture of each part, and alpha."""
        every = torch.cat([self.colors, *parts], dim=1)
        splats = splats_of(self.projected)
        image, left = reference.blend_features(
            splats, every, self.width, self.height, offset=self.offset, carrier=self.absolute
        )
        color, *pictures = image.split([3, *(p.shape[1] for p in parts)])
        return color + left * self.background[:, None, None], *pictures, 1 - left

    def scores(self):
        splats = splats_of(
            stages.Projected(*(t.detach() for t in self.projected[:5]), self.width, self.height)
        )
        nothing = (None,) * 5
        return stages.Scores(*reference.scores(splats, self.width, self.height, *nothing[1:], None))


def true_depth_alpha(settings, inputs):
    view = Truth(settings, inputs)
    color, depth, alpha = view.blend(view.depths)
    return color, view.radii, depth, alpha


def true_depth(settings, inputs):
    return true_depth_alpha(settings, inputs)[:3]


def true_median(settings, inputs):
    view = Truth(settings, inputs)
    index = view.scores().median_index.long()
    median = torch.where(index >= 0, view.depths[:, 0].detach()[index.clamp_min(0)], 15.0)[None]
    return view.blend()[0], view.radii, median


def twist(rho, theta):
    """The 4 x 4 matrix whose exponential is the motion."""
    x, y, z = theta.unbind()
    zero = torch.zeros_like(x)
    rows = [zero, -z, y, rho[0], z, zero, -x, rho[1], -y, x, zero, rho[2], *[zero] * 4]
    return torch.stack(rows).reshape(4, 4)


def true_pose(settings, inputs, theta, rho):
    motion = torch.linalg.matrix_exp(twist(rho.flatten(), theta.flatten()))
    view = Truth(settings, inputs, w2c=motion @ settings["viewmatrix"].T)
    color, depth, alpha = view.blend(view.depths)
    return color, view.radii, depth, alpha.detach(), view.scores().bright


def true_mip(settings, inputs, return_accumulation=False):
    s = settings
    view = Truth(s, inputs, blur=s["kernel_size"], mip=True, offset=s["subpixel_offset"])
    color, alpha = view.blend()
    accumulation = return_accumulation or s.get("return_accumulation", False)
    return (color, view.radii, alpha) if accumulation else (color, view.radii)


def true_language(settings, inputs, language_feature_precomp):
    view = Truth(settings, inputs)
    color, feature, _ = view.blend(language_feature_precomp)
    return color, feature, view.radii


def true_objects(settings, inputs, sh_objs):
    view = Truth(settings, inputs)
    color, objects, _ = view.blend(sh_objs[:, 0])
    return color, view.radii, objects


def true_semantic(settings, inputs, semantic_feature):
    view = Truth(settings, inputs)
    color, feature, depth, _ = view.blend(semantic_feature[:, 0], view.depths)
    return color, feature, view.radii, depth


def true_street(settings, inputs, semantics):
    view = Truth(settings, inputs)
    color, depth, semantic, alpha = view.blend(view.depths, semantics)
    return color, view.radii, depth, alpha, semantic


def true_counts(settings, inputs):
    view = Truth(settings, inputs)
    scores = view.scores()
    return view.blend()[0], view.radii, scores.weight_sum, scores.pixels, scores.largest


def true_absgs(settings, inputs):
    return true_counts(settings, inputs)[:3]


def true_color(settings, inputs):
    return true_counts(settings, inputs)[:2]


# ---- the calls ---------------------------------------------------------------------------------------------

COLORS = {"colors_precomp": random(COUNT, 3, seed=11), "shs": None}
FOUR = {"means2D": torch.zeros(COUNT, 4, dtype=torch.float64)}
RAW = projection(SCENE.K, *SIZE).T
ZERO, SOME = (
    torch.zeros(SIZE[1], SIZE[0], 2, dtype=torch.float64),
    0.8 * random(SIZE[1], SIZE[0], 2, low=-1.0),
)
MOTION = {"theta": torch.zeros(1, 3, dtype=torch.float64), "rho": torch.zeros(1, 3, dtype=torch.float64)}
LIKE_SPLATAM = {"shs", "cov3D_precomp"}  # what it does not mention

# flavour, truth, settings beside the original's, arguments that differ, keywords of the flavour
CALLS = {
    "LGM": (depth_alpha, true_depth_alpha, {}, COLORS, {}),
    "DreamGaussian": (depth_alpha, true_depth_alpha, {"scale_modifier": 0.8}, {}, {}),
    "GaussianEditor": (depth, true_depth, {}, {}, {}),
    "4DGaussians": (depth, true_depth, {"bg": torch.zeros(3, dtype=torch.float64)}, {}, {}),
    "SplaTAM": (median_depth, true_median, {}, COLORS, {}),
    "MonoGS": (pose, true_pose, {"projmatrix_raw": RAW}, {}, MOTION),
    "MonoGS with colors": (pose, true_pose, {"projmatrix_raw": RAW}, COLORS, MOTION),
    "Mip-Splatting": (mip, true_mip, {"kernel_size": 0.1, "subpixel_offset": ZERO}, {}, {}),
    "Mip-Splatting, offsets": (mip, true_mip, {"kernel_size": 0.7, "subpixel_offset": SOME}, {}, {}),
    "WildGaussians": (
        mip, true_mip, {"kernel_size": 0.1, "subpixel_offset": ZERO, "return_accumulation": True}, COLORS, {}
    ),
    "accumulation by keyword": (
        mip, true_mip, {"kernel_size": 0.1, "subpixel_offset": ZERO}, {}, {"return_accumulation": True}
    ),
    "LangSplat": (
        features, true_language, {"include_feature": True}, {},
        {"language_feature_precomp": random(COUNT, 3, seed=12, low=-1.0)},
    ),
    "gaussian-grouping": (features, true_objects, {}, {}, {"sh_objs": random(COUNT, 1, 16, seed=13)}),
    "feature-3dgs": (
        features, true_semantic, {}, {}, {"semantic_feature": random(COUNT, 1, 10, seed=14, low=-1.0)}
    ),
    "Street Gaussians": (features, true_street, {}, {}, {"semantics": random(COUNT, 5, seed=15)}),
    "Mini-Splatting": (counters, true_counts, {}, {}, {}),
    "AbsGS": (counters, true_absgs, {}, FOUR, {}),
    "absolute gradients": (abs_grad, true_color, {}, FOUR, {}),
    "no absolute gradients": (abs_grad, true_color, {}, {}, {}),
    "antialiasing": (depth_alpha, true_depth_alpha, {"antialiasing": True}, {}, {}),
}  # fmt: skip
calls = pytest.mark.parametrize("name", CALLS)


def ours(name):
    """A function of settings, arguments and keywords, as the callers write it."""
    module = CALLS[name][0]

    def call(settings, inputs, **more):
        if name == "SplaTAM":  # matrices in batches of one, no `debug`, no arguments that are None
            settings = {
                k: v[None] if k.endswith("matrix") else v for k, v in settings.items() if k != "debug"
            }
            inputs = {k: v for k, v in inputs.items() if k not in LIKE_SPLATAM}
        made = module.GaussianRasterizationSettings(**settings)
        return module.GaussianRasterizer(raster_settings=made)(**inputs, **more)

    return call


def outputs_and_gradients(function, name, dtype, device, scene=SCENE):
    """What the call returns, and gradients of a random linear function of what has one, by name."""
    _, _, changes, arguments, keywords = CALLS[name]
    settings = moved(settings_of(scene, **changes), dtype, device)
    inputs, more = moved(inputs_of(scene, **arguments), dtype, device), moved(keywords, dtype, device)
    leaves = {k: v.requires_grad_() for k, v in {**inputs, **more}.items() if isinstance(v, torch.Tensor)}
    out = function(settings, inputs, **more)
    loss = 0
    for i, picture in enumerate(out):
        if picture.requires_grad:
            loss = loss + (picture * random(*picture.shape, seed=20 + i, low=-0.5).to(picture)).sum()
    loss.backward()
    return out, {k: v.grad.cpu() for k, v in leaves.items()}


def same_counts(a, b, dtype):
    """A pixel on a threshold may fall to one side or the other in float32."""
    a, b = a.cpu().long(), b.cpu().long()
    few = 0 if dtype == torch.float64 else 1e-3 * b.sum()
    return (a - b).abs().sum() <= few


@kinds
@calls
def test_calls(name, device, dtype):
    out, grads = outputs_and_gradients(ours(name), name, dtype, device)
    truth, true_grads = outputs_and_gradients(CALLS[name][1], name, torch.float64, "cpu")
    plain, plain_grads = outputs_and_gradients(CALLS[name][1], name, torch.float32, "cpu")
    assert len(out) == len(truth) and grads.keys() == true_grads.keys()
    rows = [("means2D", grads["means2D"], plain_grads["means2D"], true_grads["means2D"])]
    for i, (a, b, t) in enumerate(zip(out, plain, truth)):
        assert a.shape == t.shape and a.requires_grad == t.requires_grad and a.device.type == device, i
        if t.is_floating_point():
            assert t.std() > 0.02, f"output {i} is blank"
            rows.append((f"output {i}", a.detach().cpu(), b.detach(), t.detach()))
        else:
            assert a.dtype == torch.int32 and t.sum() > 100 and same_counts(a, t, dtype), i
    rows += [(k, grads[k], plain_grads[k], true_grads[k]) for k in grads if k != "means2D"]
    for what, a, b, t in rows:
        assert t.abs().max() > 0, what
        if dtype == torch.float64:
            assert relative_error(a, t) < 1e-8, what
        else:
            assert_as_accurate_as(a, b, t, what)


SHAPES = {
    "covariances": (with_covariances(SCENE), {}),
    "one degree": (make_scene(COUNT, SIZE, seed=4, degree=1), {}),
    "constant colors": (make_scene(COUNT, SIZE, seed=5, degree=0), {}),
    "more coefficients than the degree": (SCENE.but(sh_degree=2), {}),
    "separate constant": (SCENE, {"dc": SCENE.sh_dc, "shs": SCENE.sh_rest}),
}


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_gaussians_of_every_form(shape, device, dtype):
    scene, changes = SHAPES[shape]
    changes = {"cov3D_precomp": scene.cov3d, **changes}

    def run(function, dtype, device):
        settings = moved(settings_of(scene), dtype, device)
        inputs = moved(inputs_of(scene, **changes), dtype, device)
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        color, _, depth, alpha = function(settings, inputs)
        (color.square().sum() + depth.square().sum() + alpha.square().sum()).backward()
        return [color.detach().cpu(), *(t.grad.cpu() for t in leaves.values())], ["color", *leaves]

    (a, names), (t, _) = (
        run(ours("DreamGaussian"), dtype, device),
        run(true_depth_alpha, torch.float64, "cpu"),
    )
    b, _ = run(true_depth_alpha, torch.float32, "cpu")
    compare(a, b, t, dtype, names, outputs=1)


@kinds
def test_confidence_multiplies_the_gradients(device, dtype):
    """FSGS, DNGaussian: the picture is as without."""
    confidence = (0.2 + 2 * random(COUNT, 1, seed=30)).to(dtype).to(device)

    def run(**changes):
        settings = {**moved(settings_of(SCENE), dtype, device), **changes}
        inputs = moved(inputs_of(SCENE), dtype, device)
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        out = ours("DreamGaussian")(settings, inputs)
        (out[0].square().sum() + (out[2] * out[3]).sum()).backward()
        return out, {k: t.grad for k, t in leaves.items()}

    plain, grads = run()
    out, weighed = run(confidence=confidence)
    assert all(torch.equal(a, b) for a, b in zip(out, plain)) and plain[0].std() > 0.05
    for name, grad in grads.items():
        factor = confidence.reshape(-1, *[1] * (grad.dim() - 1))
        assert grad.abs().max() > 0 and relative_error(weighed[name], grad * factor) < 1e-4, name


def rigid(tau):
    """exp of (rho, theta)."""
    return torch.linalg.matrix_exp(twist(tau[:3], tau[3:]))


def test_pose_gradients_are_differences_of_pictures():
    """The camera is really moved: every matrix that describes it, forth and back."""
    scene = make_scene(40, SIZE, seed=8, scale=0.3, max_opacity=0.6)
    weights = [random(n, SIZE[1], SIZE[0], seed=40 + n, low=-1.0) for n in (3, 1)]
    zero = torch.zeros(2, 1, 3, dtype=torch.float64)

    def loss(tau, motion=zero):
        at = scene.but(world_to_camera=rigid(tau) @ scene.world_to_camera)
        settings = pose.GaussianRasterizationSettings(**settings_of(at, projmatrix_raw=RAW))
        out = pose.GaussianRasterizer(settings)(**inputs_of(at), rho=motion[0], theta=motion[1])
        return sum((a * w).sum() for a, w in zip((out[0], out[2]), weights))

    motion = zero.clone().requires_grad_()
    loss(torch.zeros(6, dtype=torch.float64), motion).backward()
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    differences = torch.stack([(loss(s) - loss(-s)) / 2e-6 for s in step])
    assert differences.abs().min() > 1
    assert relative_error(motion.grad.flatten(), differences) < 1e-3  # a few pixels cross a threshold
    # Values of the carriers are not read: MonoGS moves the camera itself.
    with torch.no_grad():
        assert loss(torch.zeros(6, dtype=torch.float64), zero + 5.0) == loss(
            torch.zeros(6, dtype=torch.float64)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_absolute_gradients_do_not_cancel(device):
    """A wide splat that should move apart: the plain gradient is small, the absolute one is not."""
    scene = make_scene(1, SIZE, degree=0).but(world_to_camera=torch.eye(4, dtype=torch.float64))
    scene.means[0], scene.scales[:] = torch.tensor([0.0, 0, 2]), 0.2
    scene.K[:2, 2] = torch.tensor(SIZE) / 2
    means2d = torch.zeros(1, 4, device=device, requires_grad=True)
    settings = counters.GaussianRasterizationSettings(**moved(settings_of(scene), torch.float32, device))
    inputs = {**moved(inputs_of(scene), torch.float32, device), "means2D": means2d}
    color, radii, weight_sum = counters.GaussianRasterizer(settings)(**inputs)
    color.sum().backward()
    signed, absolute = means2d.grad[0, :2].abs(), means2d.grad[0, 2:]
    assert (absolute > 1).all() and (signed < 1e-2 * absolute).all()
    assert color.shape == (3, *SIZE[::-1]) and radii.item() > 10 and weight_sum.item() > 10


# ---- filter ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", ["scales", "covariances"])
def test_visible_filter(shape, device, dtype):
    """Scaffold-GS: six columns of scaling, of which the first three are these."""
    scene = make_scene(300, SIZE, seed=6, spread=2.5)
    settings = filter.GaussianRasterizationSettings(**moved(settings_of(scene), dtype, device))
    scene = scene.to(dtype).to(device)
    rasterizer = filter.GaussianRasterizer(raster_settings=settings)
    if shape == "scales":
        wide = torch.cat([scene.scales, scene.scales], 1).requires_grad_()
        given = {"scales": wide[:, :3], "rotations": scene.quats, "cov3D_precomp": None}
    else:
        given = {"scales": None, "rotations": None, "cov3D_precomp": with_covariances(scene).cov3d}
    radii = rasterizer.visible_filter(means3D=scene.means, **given)
    expected = rasterize(**scene.arguments()).radii
    assert radii.dtype == torch.int32 and not radii.requires_grad
    assert 50 < (radii > 0).sum() < 290 and ((radii - expected).abs() <= 1).all()
    assert ((radii > 0) == (expected > 0)).all() and (radii != expected).sum() <= 1
    color, radii = rasterizer(**inputs_of(scene))
    assert color.std() > 0.02 and torch.equal(radii, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compute_relocation(device):
    """The table of numbers is worked out from the formula with 60 digits."""
    table = [(0.5, 2, 0.292893, 0.952152), (0.9, 2, 0.683772, 0.867938), (0.9, 5, 0.369043, 0.797124),
             (0.1, 3, 0.034511, 0.989814), (0.999, 50, 0.129036, 0.584918), (0.7, 1, 0.7, 1.0)]  # fmt: skip
    opacity, ratio, share, factor = (torch.tensor(column, device=device) for column in zip(*table))
    scale = 0.1 + torch.rand(6, 3, device=device)
    n_max = 51
    binoms = torch.tensor([[math.comb(n, k) for k in range(n_max)] for n in range(n_max)]).float().to(device)
    new_opacity, new_scale = filter.compute_relocation(opacity, scale, ratio, binoms, n_max)
    assert new_opacity.shape == (6,) and new_scale.shape == (6, 3) and new_scale.dtype == torch.float32
    assert (new_opacity - share).abs().max() < 1e-6
    assert (new_scale / scale - factor[:, None]).abs().max() < 2e-6
    none = filter.compute_relocation(opacity[:0], scale[:0], ratio[:0], binoms, n_max)
    assert none[0].shape == (0,) and none[1].shape == (0, 3)


# ---- what every flavour bears ------------------------------------------------------------------------------


def call_of(name, device, changes=None, **arguments):
    """A flavour's call in float32; settings and arguments that differ from its own."""
    _, _, own, own_arguments, keywords = CALLS[name]
    settings = moved({**settings_of(SCENE, **own), **(changes or {})}, torch.float32, device)
    given = moved({**inputs_of(SCENE, **own_arguments), **keywords}, torch.float32, device)
    given = {**given, **arguments}
    return ours(name)(settings, {k: given.pop(k) for k in GAUSSIANS if k in given}, **given)


@pytest.mark.parametrize("device", DEVICES)
@calls
def test_without_gradients_and_without_gaussians(name, device):
    with torch.no_grad():
        out = call_of(name, device)
        assert not any(t.requires_grad for t in out) and out[0].std() > 0.05
        _, _, _, arguments, keywords = CALLS[name]
        rows = {**inputs_of(SCENE, **arguments), **keywords}
        few = {
            k: v[:0].float().to(device)
            for k, v in rows.items()
            if isinstance(v, torch.Tensor) and len(v) == COUNT
        }
        empty = call_of(name, device, **few)
    background = CALLS[name][2].get("bg", SCENE.background).float().to(device)
    assert (empty[0] == background[:, None, None]).all() and [t.dim() for t in empty] == [
        t.dim() for t in out
    ]
    if name == "SplaTAM":
        assert (empty[2] == 15.0).all()


@pytest.mark.parametrize("device", DEVICES)
@calls
def test_a_gaussian_that_cannot_be_drawn_harms_no_other(name, device):
    with torch.no_grad():
        given = inputs_of(SCENE, **CALLS[name][3])
    bad = {k: v.float().to(device).clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    bad["means3D"][0], bad["means3D"][1, 2], bad["scales"][2] = float("nan"), -50, float("inf")
    colors = bad["colors_precomp"] if "colors_precomp" in bad else bad["shs"]
    colors[3] = float("nan")
    few = {k: v[4:].clone() for k, v in bad.items()}
    keywords = {k: v[4:].float().to(device) for k, v in CALLS[name][4].items()
                if isinstance(v, torch.Tensor) and len(v) == COUNT}  # fmt: skip
    leaves = {k: v.requires_grad_() for k, v in bad.items()}
    out, expected = call_of(name, device, **bad), call_of(name, device, **few, **keywords)
    assert (out[0] - expected[0]).abs().max() < 1e-5 and out[0].std() > 0.05
    sum(t.square().sum() for t in out if t.requires_grad).backward()
    for what, leaf in leaves.items():
        assert leaf.grad.isfinite().all() and (leaf.grad[:4] == 0).all(), what


@pytest.mark.parametrize("device", DEVICES)
@calls
def test_pictures_may_be_changed_before_the_backward(name, device):
    means = SCENE.means.float().to(device).requires_grad_()
    out = call_of(name, device, means3D=means)
    before = [t.detach().clone() for t in out]
    pictures = [t for t in out if t.requires_grad]
    for picture in pictures:
        picture.mul_(2.0)
    sum(t.sum() for t in pictures).backward()
    twice, means.grad = means.grad, None
    sum(2 * t.sum() for t in call_of(name, device, means3D=means) if t.requires_grad).backward()
    assert relative_error(twice, means.grad) < 1e-4 and twice.abs().max() > 0
    assert all(torch.equal(t.detach(), b * 2) for t, b in zip(out, before) if t.requires_grad)


@pytest.mark.parametrize("device", DEVICES)
@calls
def test_autocast_changes_nothing(name, device):
    expected = call_of(name, device)
    with torch.autocast(device, torch.bfloat16):
        out = call_of(name, device)
    for a, b in zip(out, expected):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_features_of_more_channels_than_a_blend_takes():
    """feature-3dgs with LSeg's 512: they come in two parts."""
    feature = random(COUNT, 1, 512, seed=16, low=-1.0).requires_grad_()
    inputs = moved(inputs_of(SCENE), torch.float64, "cpu")
    inputs["opacities"].requires_grad_()
    settings = settings_of(SCENE)
    color, picture, _, depth = ours("feature-3dgs")(settings, inputs, semantic_feature=feature)
    true_color_, true_picture, _, true_depth_ = true_semantic(settings, inputs, feature)
    weights = random(512, *SIZE[::-1], low=-1.0)
    grads, truth = (
        torch.autograd.grad((p * weights).sum() + d.sum(), [feature, inputs["opacities"]])
        for p, d in ((picture, depth), (true_picture, true_depth_))
    )
    pairs = [(color, true_color_), (picture, true_picture), (depth, true_depth_), *zip(grads, truth)]
    assert all(relative_error(a, t) < 1e-8 and t.abs().max() > 0 for a, t in pairs)


def test_langsplat_without_its_feature():
    call = ours("LangSplat")
    with torch.no_grad():
        color, feature, radii = call(
            settings_of(SCENE, include_feature=False), inputs_of(SCENE), language_feature_precomp=None
        )
    assert color.std() > 0.05 and feature.shape == color.shape and (feature == 0).all() and (radii > 0).any()


def test_street_gaussians_without_classes():
    none = torch.zeros(COUNT, 0, dtype=torch.float64)
    out = ours("Street Gaussians")(settings_of(SCENE), inputs_of(SCENE), semantics=none)
    assert out[4].shape == (0, *SIZE[::-1]) and out[2].std() > 0.05


# ---- settings, names, errors -------------------------------------------------------------------------------


def test_new_settings_stand_where_the_forks_have_them():
    begin = ("image_height", "image_width", "tanfovx", "tanfovy")
    end = ("sh_degree", "campos", "prefiltered", "debug")
    middle = ("bg", "scale_modifier", "viewmatrix", "projmatrix")
    places = {
        depth: (*begin, *middle, *end),
        depth_alpha: (*begin, *middle, *end, "confidence"),
        pose: (*begin, *middle, "projmatrix_raw", *end),
        mip: (*begin, "kernel_size", "subpixel_offset", *middle, *end, "return_accumulation"),
        features: (*begin, *middle, *end, "include_feature"),
    }
    for module, names in places.items():
        assert module.GaussianRasterizationSettings._fields == (*names, "antialiasing"), module


CODE = """
import diff_gaussian_rasterization as d
from diff_gaussian_rasterization import GaussianRasterizer, rasterize, SparseGaussianAdam
names = d.GaussianRasterizationSettings._fields
print(GaussianRasterizer.__module__, names[-1], hasattr(d, "compute_relocation"))
"""


@pytest.mark.parametrize("flavour", ["", "mip", "filter", "nonsense"])
def test_the_environment_chooses(flavour):
    environment = {**os.environ, "TILESPLAT_FLAVOUR": flavour}
    out = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    if flavour == "nonsense":
        assert "TILESPLAT_FLAVOUR must be one of abs_grad, counters" in out.stderr and out.returncode != 0
        return
    module = f"flavours.{flavour}" if flavour else "compatibility"
    expected = f"diff_gaussian_rasterization.{module} antialiasing {flavour == 'filter'}"
    assert out.stdout.strip() == expected, out.stderr


def test_every_flavour_has_its_names():
    folder = os.path.dirname(flavours.__file__)
    files = {f.removesuffix(".py") for f in os.listdir(folder) if f.endswith(".py") and not f.startswith("_")}
    assert files == set(flavours.FLAVOURS)
    for flavour in files:
        assert {"GaussianRasterizationSettings", "GaussianRasterizer"} <= flavours.names_of(flavour).keys()


WRONG = [
    ("LGM", {}, {"colors_precomp": (COUNT, 4)}, r"colors_precomp must be \[150, 3\] float32"),
    ("LGM", {}, {"means2D": (COUNT, 4)}, r"means2D must be \[150, 3\], got \[150, 4\]"),
    (
        "LGM",
        {"confidence": (COUNT - 1, 1)},
        {},
        r"confidence must be \[150, 1\] .*, got \[149, 1\]",
    ),
    ("AbsGS", {}, {"means2D": (COUNT, 5)}, r"means2D must be \[150, 3\], got \[150, 5\]"),
    ("MonoGS", {}, {"theta": (1, 4)}, r"theta must be \[3\] float32 on \S+, got \[1, 4\]"),
    ("MonoGS", {}, {"rho": (6,)}, r"rho must be \[3\] float32 on \S+, got \[6\]"),
    ("Mip-Splatting", {"kernel_size": -0.1}, {}, r"kernel_size must be a finite number, 0 or more, got -0.1"),
    (
        "Mip-Splatting",
        {"kernel_size": float("nan")},
        {},
        "kernel_size must be a finite number, .*, got nan",
    ),
    ("Mip-Splatting", {"subpixel_offset": (64, 47, 2)}, {}, r"subpixel_offset must be \[48, 64, 2\] float32"),
    (
        "LangSplat",
        {},
        {"language_feature_precomp": (COUNT, 4)},
        r"language_feature_\w+ must be \[150, 3\]",
    ),
    ("gaussian-grouping", {}, {"sh_objs": (COUNT, 1, 15)}, r"sh_objs must be \[150, 1, 16\] float32"),
    (
        "feature-3dgs",
        {},
        {"semantic_feature": (COUNT - 1, 1, 8)},
        r"semantic_feature must be \[150, 1, 8\]",
    ),
    ("Street Gaussians", {}, {"semantics": ()}, r"semantics must be \[150, 1\] float32"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, settings, arguments, message", WRONG)
def test_wrong_arguments_have_the_names_of_the_caller(name, settings, arguments, message, device):
    made = {k: torch.zeros(v, device=device) if isinstance(v, tuple) else v for k, v in settings.items()}
    given = {k: torch.zeros(v, device=device) for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        call_of(name, device, made, **given)


def test_wrong_calls_are_named():
    with pytest.raises(TypeError, match="^forward needs one of language_feature_precomp, sh_objs, .*, got 0"):
        ours("LangSplat")(settings_of(SCENE), inputs_of(SCENE))
    with pytest.raises(TypeError, match="^forward got an unexpected argument 'theta'"):
        ours("DreamGaussian")(settings_of(SCENE), inputs_of(SCENE), theta=None)
    with pytest.raises(TypeError, match="^semantics must be a tensor.*got list"):
        ours("Street Gaussians")(settings_of(SCENE), inputs_of(SCENE), semantics=[[1.0]])
    with pytest.raises(Exception, match="exactly one of either SHs or precomputed colors"):
        ours("DreamGaussian")(settings_of(SCENE), inputs_of(SCENE, shs=None))
    with pytest.raises(ValueError, match=r"^scale must be \[2, 3\] float32 on cpu, got \[3, 2\]"):
        filter.compute_relocation(torch.rand(2), torch.rand(3, 2), torch.ones(2).long(), None, 51)


def test_debug_leaves_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = inputs_of(SCENE, scales=SCENE.scales[:, :2])
    with pytest.raises(ValueError, match="scales must be"):
        ours("DreamGaussian")(settings_of(SCENE, debug=True), inputs)
    assert (tmp_path / "snapshot_fw.dump").exists()
