"""The original's interface, as callers of 2023, 2024 and of the accelerated version use it."""

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
