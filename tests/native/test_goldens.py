"""All implementations against what the original returned: images, radii, inverse depth, gradients."""

import pytest
import torch
from diff_gaussian_rasterization import GaussianRasterizer, compatibility, reference

from tests.native import golden
from tests.native.scenes import DEVICES, assert_not_blank, relative_error

SUBJECTS = [("reference", "cpu", torch.float64), ("native", "cpu", torch.float64)]
SUBJECTS += [("native", device, torch.float32) for device in DEVICES]
FEW_PIXELS = 2e-4  # the share that may sit on a threshold
GRADIENT_TOLERANCE = 1e-3  # relative norm


def render(case, subject, device, dtype):
    inputs, settings = golden.inputs_of(case, dtype, device), golden.settings_of(case, dtype, device)
    rasterizer = GaussianRasterizer(settings)
    if subject == "reference":
        original, compatibility.rasterize = compatibility.rasterize, reference.rasterize
        try:
            return inputs, rasterizer(**inputs), rasterizer
        finally:
            compatibility.rasterize = original
    return inputs, rasterizer(**inputs), rasterizer


@pytest.mark.parametrize("name", golden.RASTERIZER_CASES)
@pytest.mark.parametrize("subject, device, dtype", SUBJECTS, ids=lambda v: str(v).removeprefix("torch."))
def test_rasterizer_returns_what_the_original_did(name, subject, device, dtype):
    case = golden.load(name)
    inputs, (image, radii, inv_depth), rasterizer = render(case, subject, device, dtype)
    expected = torch.from_numpy(case["image"])
    assert_not_blank(expected, 0.005)

    few = FEW_PIXELS * image[0].numel()
    error = (image.detach().cpu() - expected).abs().amax(0)
    assert (error > 2e-5).sum() <= few, f"image: {error.max():.2e}, {(error > 2e-5).sum()} pixels"
    assert error.max() < 0.02
    expected = torch.from_numpy(case["invdepth"])
    error = (inv_depth.detach().cpu() - expected).abs() / expected.max().clamp_min(1)
    assert (error > 2e-5).sum() <= few, f"inverse depth: {error.max():.2e}"
    differing = (radii.cpu() != torch.from_numpy(case["radii"])).sum()
    assert differing <= FEW_PIXELS * len(radii), f"{differing} radii differ"
    assert radii.dtype == torch.int32
    if subject == "native":
        visible = rasterizer.markVisible(inputs["means3D"]).cpu()
        assert visible.dtype == torch.bool and (visible == torch.from_numpy(case["visible"])).all()

    (image * torch.from_numpy(case["cotangent_image"]).to(image)).sum().backward()
    for key, truth in golden.gradients_of(case).items():
        grad = inputs[key].grad
        assert grad.shape == truth.shape
        if truth.numel():
            error = relative_error(grad.cpu(), truth)
            assert error < GRADIENT_TOLERANCE, f"gradient of {key}: {error:.2e}"
