"""The reference itself, against closed forms worked by hand. Everything else is tested against the
reference."""

import math

import pytest
import torch
from diff_gaussian_rasterization import reference

from tests.native.scenes import cotangents, intrinsics, look_at, make_scene, run


def one_splat(
    depth=2.0, sigma=0.05, opacity=0.8, color=(0.9, 0.5, 0.2), background=(0.0, 0.0, 0.0), **changes
):
    """A round splat in the middle of a 33 x 33 image, focal length 40: it is centered on pixel (16, 16)."""
    d = torch.float64
    arguments = {
        "means": torch.tensor([[0, 0, depth]], dtype=d), "quats": torch.tensor([[1, 0, 0, 0]], dtype=d),
        "scales": torch.full((1, 3), sigma, dtype=d), "opacities": torch.tensor([[opacity]], dtype=d),
        "colors": torch.tensor([color], dtype=d), "world_to_camera": torch.eye(4, dtype=d),
        "K": intrinsics(33, 33, 40 / 33), "width": 33, "height": 33,
        "background": torch.tensor(background, dtype=d),
    }  # fmt: skip
    return {**arguments, **changes}


def test_one_gaussian_is_the_closed_form():
    out = reference.rasterize(**one_splat(background=(0.1, 0.2, 0.3)))
    # Variance on the screen: (40 / 2 * 0.05)^2 + 0.3 = 1.3 px^2. Radius: mid 1.3, spread sqrt(0.1): ceil(3
    # sqrt(1.616)) = 4.
    assert out.radii.tolist() == [4]
    for dx, dy in [(0, 0), (1, 0), (0, -2), (2, 2)]:
        alpha = 0.8 * math.exp(-(dx * dx + dy * dy) / (2 * 1.3))
        pixel = out.image[:, 16 + dy, 16 + dx]
        expected = torch.tensor([0.9, 0.5, 0.2]) * alpha + torch.tensor([0.1, 0.2, 0.3]) * (1 - alpha)
        assert pixel.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        assert out.alpha[0, 16 + dy, 16 + dx].item() == pytest.approx(alpha, rel=1e-12)
        assert out.inv_depth[0, 16 + dy, 16 + dx].item() == pytest.approx(alpha / 2, rel=1e-12)


def test_far_pixels_are_background():
    out = reference.rasterize(**one_splat(background=(0.1, 0.2, 0.3)))
    # alpha falls under 1/255 at d^2 = 2 * 1.3 * ln(0.8 * 255) = 13.8
    assert out.alpha[0, 16, 19].item() > 0  # d = 3
    assert out.alpha[0, 16, 20].item() == 0  # d = 4
    assert out.image[:, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_two_gaussians_blend_front_to_back():
    a, b = one_splat(depth=2.0), one_splat(depth=4.0, opacity=0.6, color=(0.1, 0.9, 0.3))
    both = {k: torch.cat([b[k], a[k]]) for k in ("means", "quats", "scales", "opacities", "colors")}
    out = reference.rasterize(**{**a, **both})
    center = out.image[:, 16, 16]
    expected = [0.8 * ca + 0.2 * 0.6 * cb for ca, cb in zip((0.9, 0.5, 0.2), (0.1, 0.9, 0.3))]
    assert center.tolist() == pytest.approx(expected, rel=1e-12)
    assert out.inv_depth[0, 16, 16].item() == pytest.approx(0.8 / 2 + 0.2 * 0.6 / 4, rel=1e-12)


def test_alpha_is_capped_and_light_stops():
    one = one_splat(opacity=1.0)
    assert reference.rasterize(**one).alpha[0, 16, 16].item() == pytest.approx(0.99)
    many = {
        k: one[k].repeat(5, *[1] * (one[k].dim() - 1))
        for k in ("means", "quats", "scales", "opacities", "colors")
    }
    many["means"][:, 2] += torch.arange(5) * 1e-3
    # T after one: 0.01; after two it would be 1e-4, which is not less than 1e-4 but for rounding: use three
    # splats of 0.97.
    many["opacities"][:] = 0.97
    out = reference.rasterize(**{**one, **many})
    # 0.03^2 = 9e-4 stays; 0.03^3 = 2.7e-5 would be under 1e-4, so the third is not blended.
    assert out.alpha[0, 16, 16].item() == pytest.approx(1 - 0.03**2, rel=1e-9)


def test_behind_and_near_are_culled():
    for depth, seen in [(-2.0, False), (0.2, False), (0.2001, True)]:
        out = reference.rasterize(**one_splat(depth=depth, sigma=0.001))
        assert (out.radii > 0).tolist() == [seen]
        assert (out.alpha.max() > 0).item() == seen


def test_antialiasing_keeps_the_energy_of_thin_splats():
    # 2D variance v = (40 / 2 * 0.01)^2 = 0.04; opacity is multiplied by sqrt(v^2 / (v + 0.3)^2) = 0.04 /
    # 0.34.
    out = reference.rasterize(**one_splat(sigma=0.01, antialiasing=True))
    assert out.alpha[0, 16, 16].item() == pytest.approx(0.8 * 0.04 / 0.34, rel=1e-9)


def test_scale_modifier_is_a_factor_of_scales():
    a = reference.rasterize(**one_splat(sigma=0.05, scale_modifier=1.7))
    b = reference.rasterize(**one_splat(sigma=0.085))
    assert torch.allclose(a.image, b.image, atol=1e-12)


def test_harmonics_are_orthonormal():
    n = 200_000
    d = torch.nn.functional.normalize(
        torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    basis = reference.sh_basis(3, d)
    gram = 4 * math.pi * basis.T @ basis / n
    assert torch.allclose(gram, torch.eye(16, dtype=torch.float64), atol=0.03)


def test_rotation_of_a_quarter_turn():
    q = torch.tensor([[math.sqrt(0.5), 0, 0, math.sqrt(0.5)]], dtype=torch.float64)  # 90 degrees about z
    R = reference.rotation_matrix(q)[0]
    assert torch.allclose(
        R, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64), atol=1e-12
    )


def test_empty_scene_is_background():
    scene = make_scene(0)
    out, grads = run(reference.rasterize, scene, torch.float64)
    assert (out.image == scene.background[:, None, None]).all()
    assert torch.allclose(grads["background"], cotangents(scene)[0].sum((1, 2)))


def test_moving_the_camera_is_moving_the_world():
    scene = make_scene(30, degree=0)
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    moved = scene.but(means=scene.means + shift, world_to_camera=scene.world_to_camera.clone())
    moved.world_to_camera[:3, 3] -= scene.world_to_camera[:3, :3] @ shift
    a, b = reference.rasterize(**scene.arguments()), reference.rasterize(**moved.arguments())
    assert torch.allclose(a.image, b.image, atol=1e-10)


def test_look_at_faces_its_target():
    p = look_at((1.0, 2.0, -3.0), (0.5, 0.0, 1.0)) @ torch.tensor([0.5, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert p[:2].abs().max() < 1e-12 and p[2] > 0
