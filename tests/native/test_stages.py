"""The stages of rendering, called one by one: each against the float64 reference, and all against rasterize."""

import pytest
import torch
from diff_gaussian_rasterization import rasterize, stages

from tests.native.scenes import (
    DEVICES,
    assert_not_blank,
    make_scene,
    to_raw,
    with_covariances,
)

PROJECTED = ("means", "quats", "scales", "opacities", "cov3d", "world_to_camera", "K", "width", "height",
             "scale_modifier", "raw", "near")  # fmt: skip
OPTIONS = {
    "as rasterize": ({}, {}),
    "raw": (dict(raw=True), {}),
    "covariances": (dict(cov3d=True), {}),
    "no blur": (dict(scale=0.15), dict(blur=0.0)),
    "more blur": ({}, dict(blur=1.7)),
    "antialiasing": (dict(scale=0.03), dict(compensation="antialiasing")),
    "mip": (dict(scale=0.03), dict(compensation="mip", blur=0.1)),
    "near": ({}, dict(near=3.0)),
    "scale modifier": ({}, dict(scale_modifier=0.6)),
    "orthographic": (dict(focal=0.3), dict(camera="orthographic")),
    "fisheye": ({}, dict(camera="fisheye")),
    "distorted fisheye": ({}, dict(camera="fisheye", distortion=(0.1, -0.05, 0.02, -0.01))),
}


def scene_of(count=200, seed=0, raw=False, cov3d=False, focal=1.0, **kind):
    scene = make_scene(count, seed=seed, **kind)
    scene.K = (
        scene.K * torch.tensor([[focal], [focal], [1.0]], dtype=torch.float64) if focal == 1 else scene.K
    )
    scene.K[0, 0] *= focal
    scene.K[1, 1] *= focal
    scene = to_raw(scene) if raw else scene
    return with_covariances(scene) if cov3d else scene


def project(scene, **options):
    return stages.project(**{**{k: v for k, v in scene.arguments().items() if k in PROJECTED}, **options})


def features_of(count, channels, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_stages_together_are_rasterize(dtype, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("GPUs have float32 only")
    scene = make_scene(300, (75, 53), seed=2).to(dtype).to(device)
    s = scene
    center = -s.world_to_camera[:3, :3].T @ s.world_to_camera[:3, 3]
    projected = project(scene)
    colors = stages.sh_colors(s.means, s.sh_dc, s.sh_rest, center, s.sh_degree)
    tiles = stages.lists(projected)
    picture = stages.blend(projected, colors, tiles, s.background)
    inverse = stages.blend(projected, 1 / projected.depths[:, None], tiles).image
    whole = rasterize(**scene.arguments())
    assert_not_blank(whole.image, 0.05)
    for ours, theirs in (
        (picture.image, whole.image),
        (picture.alpha, whole.alpha),
        (inverse, whole.inv_depth),
    ):
        assert (ours - theirs).abs().max() < (1e-9 if dtype == torch.float64 else 1e-5)
    assert torch.equal(projected.radii, whole.radii)
