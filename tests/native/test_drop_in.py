"""The original's interface, as callers of 2023, 2024 and of the accelerated version use it."""

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import GaussianRasterizationSettings, GaussianRasterizer, rasterize

from tests.native.scenes import DEVICES, intrinsics, make_scene


def projection(K, width, height, near=0.01, far=100.0):
    """The original's projection matrix (acting on column vectors), with an off-center principal point."""
    P = torch.zeros(4, 4, dtype=torch.float64)
    P[0, 0], P[1, 1] = 2 * K[0, 0] / width, 2 * K[1, 1] / height
    P[0, 2], P[1, 2] = 2 * K[0, 2] / width - 1, 2 * K[1, 2] / height - 1
    P[2, 2], P[2, 3], P[3, 2] = far / (far - near), -far * near / (far - near), 1
    return P


def original_call(scene, device, **changes):
    """Settings and arguments as the original's renderer makes them."""
    view, K = scene.world_to_camera, scene.K
    settings = {
        "image_height": scene.height, "image_width": scene.width,
        "tanfovx": scene.width / (2 * K[0, 0].item()), "tanfovy": scene.height / (2 * K[1, 1].item()),
        "bg": scene.background, "scale_modifier": 1.0, "viewmatrix": view.T,
        "projmatrix": (projection(K, scene.width, scene.height) @ view).T, "sh_degree": scene.sh_degree,
        "campos": -view[:3, :3].T @ view[:3, 3], "prefiltered": False, "debug": False, **changes,
    }  # fmt: skip
    move = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    s = scene.to(torch.float32).to(device)
    inputs = {
        "means3D": s.means, "means2D": torch.zeros_like(s.means), "opacities": s.opacities,
        "shs": torch.cat([s.sh_dc, s.sh_rest], 1), "scales": s.scales, "rotations": s.quats,
    }  # fmt: skip
    return GaussianRasterizationSettings(**move), inputs


def expected(scene, device, **changes):
    return rasterize(**{**scene.to(torch.float32).to(device).arguments(), **changes})


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


SCENE = make_scene(100, (75, 53), seed=3)


def test_2023_returns_two(device):
    settings, inputs = original_call(SCENE, device)
    color, radii = GaussianRasterizer(raster_settings=settings)(
        **inputs, colors_precomp=None, cov3D_precomp=None
    )
    out = expected(SCENE, device)
    assert color.shape == (3, 53, 75) and radii.shape == (100,) and radii.dtype == torch.int32
    assert color.std() > 0.05
    assert (color - out.image).abs().max() < 1e-4 and (color - out.image).abs().mean() < 1e-6
    assert (radii != out.radii).sum() <= 1


def test_2024_returns_three(device):
    for antialiasing in (False, True):
        settings, inputs = original_call(SCENE, device, antialiasing=antialiasing)
        color, radii, inv_depth = GaussianRasterizer(settings)(**inputs)
        out = expected(SCENE, device, antialiasing=antialiasing)
        assert inv_depth.shape == (1, 53, 75)
        assert (color - out.image).abs().mean() < 1e-6 and (inv_depth - out.inv_depth).abs().mean() < 1e-6


def test_settings_by_position(device):
    settings, inputs = original_call(SCENE, device, antialiasing=False)
    again = GaussianRasterizationSettings(*settings)
    assert again._fields[-1] == "antialiasing" and again._fields[0] == "image_height"
    assert torch.equal(GaussianRasterizer(again)(**inputs)[0], GaussianRasterizer(settings)(**inputs)[0])


def test_separate_dc_is_the_same(device):
    settings, inputs = original_call(SCENE, device, antialiasing=False)
    full = inputs["shs"].requires_grad_()
    a = GaussianRasterizer(settings)(**inputs)[0]
    a.square().sum().backward()
    shs, rest = full.detach(), {k: v for k, v in inputs.items() if k != "shs"}
    dc, others = shs[:, :1].clone().requires_grad_(), shs[:, 1:].clone().requires_grad_()
    b = GaussianRasterizer(settings)(**rest, dc=dc, shs=others)[0]
    b.square().sum().backward()
    assert torch.equal(a, b)
    separate = torch.cat([dc.grad, others.grad], 1)
    assert full.grad.abs().max() > 0
    if device == "cpu":
        assert torch.equal(full.grad, separate)
    else:  # the order of sums on a GPU changes from run to run
        assert (full.grad - separate).norm() < 1e-5 * full.grad.norm()


def test_arguments_by_position(device):
    settings, i = original_call(SCENE, device, antialiasing=False)
    named = GaussianRasterizer(settings)(**i)[0]
    r = GaussianRasterizer(settings)
    first = (i["means3D"], i["means2D"], i["opacities"])
    assert torch.equal(r(*first, i["shs"], None, i["scales"], i["rotations"], None)[0], named)
    assert torch.equal(
        r(*first, i["shs"][:, :1], i["shs"][:, 1:], None, i["scales"], i["rotations"], None)[0], named
    )


def test_constant_harmonics_alone(device):
    scene = make_scene(100, degree=0, seed=1)
    settings, inputs = original_call(scene, device)
    inputs["shs"] = inputs["shs"].requires_grad_()
    color, _ = GaussianRasterizer(settings)(**inputs)
    color.sum().backward()
    assert inputs["shs"].grad.shape == (100, 1, 3) and inputs["shs"].grad.abs().max() > 0


def test_precomputed_colors(device):
    settings, inputs = original_call(SCENE, device)
    del inputs["shs"]
    colors = SCENE.sh_dc[:, 0].float().to(device)
    color, _ = GaussianRasterizer(settings)(**inputs, colors_precomp=colors)
    out = expected(SCENE, device, sh_dc=None, sh_rest=None, colors=colors, sh_degree=0)
    assert (color - out.image).abs().mean() < 1e-6


def test_screen_gradient_is_in_ndc(device):
    """A mean moved sideways in space moves on the screen: the two gradients agree by the chain rule."""
    scene = make_scene(1, (64, 48), degree=0, scale=0.2)
    scene.world_to_camera = torch.eye(4, dtype=torch.float64)
    scene.means[:] = torch.tensor([0.0, 0.0, 2.0])
    scene.scales[:] = 0.2  # round, on the axis: there its projected shape does not change
    settings, inputs = original_call(scene, device)
    for key in ("means3D", "means2D"):
        inputs[key].requires_grad_()
    color, _ = GaussianRasterizer(settings)(**inputs)
    weight = torch.linspace(0, 1, 64, device=device) + torch.linspace(0, 2, 48, device=device)[:, None]
    (color * weight).sum().backward()
    screen, space = inputs["means2D"].grad[0].cpu(), inputs["means3D"].grad[0].cpu()
    assert inputs["means2D"].grad.shape == (1, 3) and screen[2] == 0
    # d(pixel x)/d(X) = f / z; an NDC unit is half the width: screen_x = space_x * z / f * W / 2 = space_x * 2
    # / 64 * 32.
    assert screen[0].item() == pytest.approx(space[0].item() * 2.0 / 64 * 32, rel=0.01)
    assert screen[1].item() == pytest.approx(space[1].item() * 2.0 / 64 * 24, rel=0.01)
    assert screen[0].abs() > 1


def test_principal_point_from_the_projection_matrix(device):
    scene = SCENE.but(K=intrinsics(75, 53, offset=(0.3, -0.2)))
    settings, inputs = original_call(scene, device)
    color, _ = GaussianRasterizer(settings)(**inputs)
    assert (color - expected(scene, device).image).abs().mean() < 1e-6
    centered = SCENE.but(K=intrinsics(75, 53))
    assert (color - expected(centered, device).image).abs().mean() > 0.01


def test_mark_visible(device):
    settings, inputs = original_call(SCENE, device)
    camera_z = (SCENE.means @ SCENE.world_to_camera[2, :3] + SCENE.world_to_camera[2, 3]).float()
    points = torch.cat([inputs["means3D"], inputs["means3D"] - 4])
    visible = GaussianRasterizer(settings).markVisible(points)
    assert visible.shape == (200,) and visible.dtype == torch.bool
    assert (visible[:100].cpu() == (camera_z > 0.2)).all()
    assert 0 < visible.sum() < 200


def test_exactly_one_of(device):
    settings, inputs = original_call(SCENE, device)
    r = GaussianRasterizer(settings)
    colors, cov = torch.rand(100, 3, device=device), torch.rand(100, 6, device=device)
    with pytest.raises(Exception, match="exactly one of either SHs or precomputed colors"):
        r(**inputs, colors_precomp=colors)
    with pytest.raises(Exception, match="exactly one of either SHs or precomputed colors"):
        r(**{**inputs, "shs": None})
    with pytest.raises(
        Exception, match="exactly one of either scale/rotation pair or precomputed 3D covariance"
    ):
        r(**inputs, cov3D_precomp=cov)
    with pytest.raises(
        Exception, match="exactly one of either scale/rotation pair or precomputed 3D covariance"
    ):
        r(**{**inputs, "scales": None})
    with pytest.raises(TypeError, match="unexpected argument 'color'"):
        r(**inputs, color=colors)


def test_debug_leaves_a_snapshot(device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, inputs = original_call(SCENE, device, debug=True)
    with pytest.raises(ValueError, match="scales must be"):
        GaussianRasterizer(settings)(**{**inputs, "scales": inputs["scales"][:, :2]})
    assert (tmp_path / "snapshot_fw.dump").exists()


def test_pose_gradient_through_the_view_matrix(device):
    settings, inputs = original_call(SCENE, device)
    view = settings.viewmatrix.clone().requires_grad_()
    color, _ = GaussianRasterizer(settings._replace(viewmatrix=view))(**inputs)
    color.square().sum().backward()
    pose = SCENE.to(torch.float32).to(device)
    pose.world_to_camera.requires_grad_()
    rasterize(**pose.arguments()).image.square().sum().backward()
    assert torch.allclose(
        view.grad, pose.world_to_camera.grad.T, rtol=2e-3, atol=1e-2 * view.grad.abs().max().item()
    )


# ---- what callers hand in: shapes, kinds of numbers, orders of settings ------------------------------------

IN_ORDER = (
    "image_height", "image_width", "tanfovx", "tanfovy", "bg", "scale_modifier", "viewmatrix", "projmatrix",
    "sh_degree", "campos", "prefiltered", "debug", "antialiasing",
)  # fmt: skip


@pytest.mark.parametrize("count, results", [(11, 2), (12, 2), (13, 3)])
def test_settings_of_every_release(device, count, results):
    """The first release has no `debug`; the second ends with it; that of 2024 ends with `antialiasing`."""
    settings, inputs = original_call(SCENE, device, antialiasing=False)
    values = {name: getattr(settings, name) for name in IN_ORDER[:count]}
    expected = GaussianRasterizer(settings)(**inputs)[0]
    for made in (GaussianRasterizationSettings(**values), GaussianRasterizationSettings(*values.values())):
        out = GaussianRasterizer(made)(**inputs)
        assert len(out) == results and torch.equal(out[0], expected)
        assert made.debug is False and made.prefiltered is False


FORMS = {
    "viewmatrix": [lambda t: t[None], lambda t: t.reshape(16)],
    "projmatrix": [lambda t: t[None]],
    "campos": [lambda t: t[None], lambda t: t[:, None]],
    "bg": [lambda t: t[None], lambda t: t[:, None, None]],
    "tanfovx": [torch.tensor, lambda v: torch.tensor([v]), np.float32, lambda v: np.array([v])],
    "tanfovy": [lambda v: torch.tensor([[v]])],
    "scale_modifier": [torch.tensor, lambda v: torch.tensor([v], requires_grad=True), int],
    "image_height": [np.int64, float, torch.tensor],
    "image_width": [np.int32, np.float64],
    "sh_degree": [np.int64, torch.tensor, float],
    "prefiltered": [lambda v: True, lambda v: None],
    "antialiasing": [np.bool_, int],
    "opacities": [lambda t: t[None], lambda t: t[:, 0], lambda t: t[:, :, None]],
    "scales": [lambda t: t[None]],
    "rotations": [lambda t: t[None]],
    "means2D": [lambda t: None],
}  # fmt: skip
FORM_CASES = [(name, i) for name, forms in FORMS.items() for i in range(len(forms))]


@pytest.mark.parametrize("name, form", FORM_CASES, ids=[f"{name}-{i}" for name, i in FORM_CASES])
def test_arguments_of_any_form(device, name, form):
    """The original counts elements: shapes that it never checked are in use."""
    settings, inputs = original_call(SCENE, device, antialiasing=False)
    expected = GaussianRasterizer(settings)(**inputs)[0]
    change = FORMS[name][form]
    if name in inputs:
        inputs[name] = change(inputs[name])
    else:
        value = change(getattr(settings, name))
        settings = settings._replace(**{name: value.to(device) if isinstance(value, torch.Tensor) else value})
    color = GaussianRasterizer(settings)(**inputs)[0]
    assert torch.allclose(color, expected, atol=1e-5) and expected.std() > 0.05


def test_gradients_come_back_in_the_shape_that_was_given(device):
    settings, inputs = original_call(SCENE, device)
    grads = []
    for form in (lambda t: t, lambda t: t[None], lambda t: t[:, 0]):
        opacities = form(inputs["opacities"]).clone().requires_grad_()
        background = settings.bg[None].clone().requires_grad_()
        color, _ = GaussianRasterizer(settings._replace(bg=background))(**{**inputs, "opacities": opacities})
        color.square().sum().backward()
        assert opacities.grad.shape == opacities.shape and background.grad.shape == (1, 3)
        grads.append(opacities.grad.flatten())
    assert torch.allclose(grads[0], grads[1], rtol=1e-3) and torch.allclose(grads[0], grads[2], rtol=1e-3)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("separate_dc", [False, True])
def test_more_coefficients_than_are_evaluated(device, separate_dc):
    """Models of degree 4 exist. The original evaluates degrees up to 3, and gives the others no gradient."""
    settings, inputs = original_call(SCENE, device)
    shs, rest = inputs["shs"], {k: v for k, v in inputs.items() if k != "shs"}
    expected, _ = GaussianRasterizer(settings)(**inputs)
    many = torch.cat([shs, torch.full((100, 9, 3), 7.0, device=device)], 1).requires_grad_()
    split = {"dc": many[:, :1], "shs": many[:, 1:]} if separate_dc else {"shs": many}
    color, _ = GaussianRasterizer(settings._replace(sh_degree=4))(**rest, **split)
    assert torch.equal(color, expected)
    color.square().sum().backward()
    assert many.grad[:, 1:16].abs().max() > 0 and (many.grad[:, 16:] == 0).all()


BAD = [
    ("bg", lambda t: t[:2], r"bg must be \[3\] float32 on \S+, got \[2\] float32 on"),
    ("bg", lambda t: t.long(), r"bg must be \[3\] float32 on \S+, got \[3\] int64 on"),
    ("campos", lambda t: t.double(), r"campos must be \[3\] float32 on \S+, got \[3\] float64 on"),
    ("viewmatrix", lambda t: t[:3], r"viewmatrix must be \[4, 4\] float32 on \S+, got \[3, 4\]"),
    ("projmatrix", lambda t: t.double(), r"projmatrix must be \[4, 4\] float32 on \S+, got \[4, 4\] float64"),
    ("tanfovx", lambda v: 0.0, "tanfovx must not be 0"),
    ("image_height", lambda v: 0, "image_height must be a whole number, 1 to 65536, got 0"),
    ("image_width", lambda v: 75.5, r"image_width must be a whole number, 1 to 65536, got 75\.5"),
    ("image_width", lambda v: float("nan"), "image_width must be a whole number, 1 to 65536, got nan"),
    ("image_width", lambda v: 10**6, "image_width must be a whole number, 1 to 65536, got 1000000"),
    ("sh_degree", lambda v: -1, "sh_degree must be a whole number, 0 or more, got -1"),
    ("means3D", lambda t: t[:, :2], r"means3D must be \[N, 3\] float32 on \S+, got \[100, 2\]"),
    ("means3D", lambda t: t.half(), r"means3D must be \[N, 3\] float32 on \S+, got \[100, 3\] float16"),
    ("means2D", lambda t: t[:, :2], r"means2D must be \[100, 3\], got \[100, 2\]"),
    ("opacities", lambda t: t[:99], r"opacities must be \[100, 1\] float32 on \S+, got \[99, 1\]"),
    ("scales", lambda t: t.T, r"scales must be \[100, 3\] float32 on \S+, got \[3, 100\]"),
    ("rotations", lambda t: t[:, :3], r"rotations must be \[100, 4\] float32 on \S+, got \[100, 3\]"),
    ("shs", lambda t: t[:, :9], r"shs must be \[100, 16, 3\] float32 on \S+, got \[100, 9, 3\]"),
    ("shs", lambda t: t.flatten(1), r"shs must be \[100, 16, 3\] float32 on \S+, got \[100, 48\]"),
    ("shs", lambda t: t.half(), r"shs must be \[100, 16, 3\] float32 on \S+, got \[100, 16, 3\] float16"),
]
NOT_TENSORS = [
    (name, kind)
    for name in ("bg", "campos", "viewmatrix", "means3D", "means2D", "opacities", "scales", "shs")
    for kind in (list, np.array)
]


def call_with(device, name, change):
    settings, inputs = original_call(SCENE, device)
    if name in inputs:
        inputs[name] = change(inputs[name])
    else:
        settings = settings._replace(**{name: change(getattr(settings, name))})
    return GaussianRasterizer(settings)(**inputs)


@pytest.mark.parametrize("name, change, message", BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_wrong_arguments_have_the_names_of_the_caller(device, name, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call_with(device, name, change)


@pytest.mark.parametrize("name, kind", NOT_TENSORS)
def test_what_is_no_tensor_is_named(device, name, kind):
    kind_name = "list" if kind is list else "ndarray"
    with pytest.raises(TypeError, match=f"^{name} must be a tensor.*got {kind_name}$"):
        call_with(device, name, lambda t: kind(t.cpu().tolist()))


def test_what_is_no_number_is_named(device):
    for name, value in (("tanfovx", [0.5]), ("scale_modifier", None), ("image_height", torch.ones(2))):
        with pytest.raises(TypeError, match=f"^{name} must be a number, got"):
            call_with(device, name, lambda _, value=value: value)


def test_other_colors_and_shapes_are_named(device):
    settings, inputs = original_call(SCENE, device)
    r = GaussianRasterizer(settings)
    plain = {k: v for k, v in inputs.items() if k not in ("shs", "scales", "rotations")}
    shapes = {k: inputs[k] for k in ("scales", "rotations")}
    with pytest.raises(
        ValueError, match=r"^colors_precomp must be \[100, 3\] float32 on \S+, got \[100, 4\]"
    ):
        r(**plain, **shapes, colors_precomp=torch.rand(100, 4, device=device))
    with pytest.raises(
        ValueError, match=r"^cov3D_precomp must be \[100, 6\] float32 on \S+, got \[100, 3, 3\]"
    ):
        r(**plain, shs=inputs["shs"], cov3D_precomp=torch.rand(100, 3, 3, device=device))
    with pytest.raises(ValueError, match=r"^dc must be \[100, 1, 3\] float32 on \S+, got \[100, 3, 1\]"):
        r(**plain, **shapes, dc=torch.rand(100, 3, 1, device=device), shs=inputs["shs"][:, 1:])
    with pytest.raises(TypeError, match="^shs must be a tensor, got NoneType"):
        r(**plain, **shapes, dc=torch.rand(100, 1, 3, device=device))


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs two devices")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bg", "campos", "viewmatrix", "projmatrix", "scales"])
def test_another_device_is_named(name):
    with pytest.raises(
        ValueError, match=rf"^{name} must be \[.*\] float32 on cuda:0, got \[.*\] float32 on cpu"
    ):
        call_with("cuda", name, torch.Tensor.cpu)


def test_mark_visible_of_any_form(device):
    settings, inputs = original_call(SCENE, device)
    batched = GaussianRasterizer(settings._replace(viewmatrix=settings.viewmatrix[None]))
    expected = GaussianRasterizer(settings).markVisible(inputs["means3D"])
    assert torch.equal(batched.markVisible(inputs["means3D"]), expected)
    with pytest.raises(TypeError, match="^positions must be a tensor.*got list"):
        batched.markVisible([[0.0, 0.0, 1.0]])


def test_a_snapshot_that_cannot_be_written_hides_nothing(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot_fw.dump").mkdir()
    settings, inputs = original_call(SCENE, device, debug=True)
    with pytest.raises(ValueError, match="scales must be"):
        GaussianRasterizer(settings)(**{**inputs, "scales": inputs["scales"][:, :2]})
    assert "cannot be written" in capsys.readouterr().out


def test_autocast_changes_nothing(device):
    """A matrix product in 16 bits would move the principal point."""
    settings, inputs = original_call(SCENE, device)
    expected, _ = GaussianRasterizer(settings)(**inputs)
    with torch.autocast(device, torch.bfloat16):
        color, _ = GaussianRasterizer(settings)(**inputs)
    assert torch.equal(color, expected) and color.std() > 0.05
