"""SSIM and the photometric loss: against PyTorch, against the original's numbers, and at odd sizes."""

import pytest
import torch
from diff_gaussian_rasterization import photometric_loss, reference, ssim
from fused_ssim import fused_ssim

from tests.native import golden
from tests.native.scenes import DEVICES, assert_as_accurate_as, relative_error

GOLDEN_CASES = sorted(k.removesuffix("_ssim") for k in golden.load("ssim") if k.endswith("_ssim"))


def images(*shape, seed=0, dtype=torch.float64):
    """Smooth pictures with some noise, as a render and its target are."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], 4, 5, generator=g, dtype=dtype)
    a = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    noise = 0.1 * torch.randn(*shape, generator=g, dtype=dtype)
    return a, (a + noise).clamp(0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_fused_ssim_is_the_original(case, device):
    numbers = golden.load("ssim")
    a, b, grad = (torch.from_numpy(numbers[f"{case}_{k}"]).to(device) for k in ("a", "b", "grad_a"))
    a.requires_grad_()
    value = fused_ssim(a, b, padding=case.split("_")[0])
    value.backward()
    assert value.item() == pytest.approx(float(numbers[f"{case}_ssim"]), abs=2e-6)
    assert relative_error(a.grad, grad) < 1e-4
    assert fused_ssim(a.detach(), b, case.split("_")[0], False).item() == pytest.approx(
        value.item(), abs=1e-7
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 11, 11), (2, 1, 33, 20), (1, 3, 64, 48), (1, 4, 100, 131), (3, 3, 17, 15)]
)
def test_ssim_is_as_accurate_as_pytorch(shape, padding, device):
    def evaluate(f, dtype, device="cpu"):
        a, b = (t.clone().to(device, dtype) for t in images(*shape))
        a.requires_grad_()
        value = f(a, b, padding)
        value.backward()
        return value.detach().cpu(), a.grad.cpu()

    truth, plain = (evaluate(reference.ssim, dtype) for dtype in (torch.float64, torch.float32))
    ours = evaluate(ssim, torch.float32, device)
    assert 0.1 < truth[0] < 0.95
    assert ours[0].item() == pytest.approx(truth[0].item(), abs=2e-6)
    assert_as_accurate_as(ours[1], plain[1], truth[1], "gradient")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (5, 3), (11, 10)])
def test_ssim_of_images_smaller_than_the_window(size, device):
    a, b = images(1, 3, *size)
    a.requires_grad_()
    ours = a.detach().float().to(device).requires_grad_()
    reference.ssim(a, b).backward()
    value = ssim(ours, b.float().to(device))
    value.backward()
    assert value.item() == pytest.approx(reference.ssim(a, b).item(), abs=1e-5)
    assert relative_error(ours.grad.cpu(), a.grad) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_equal_images_have_ssim_one(device):
    a = images(1, 3, 40, 30)[0].float().to(device)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-6)
    assert ssim(a[0], a[0]).item() == pytest.approx(1, abs=1e-6)  # without a batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float", "uint8", "mask", "uint8 mask"])
@pytest.mark.parametrize("size", [(1, 1), (37, 50), (64, 131)])
def test_photometric_loss_is_the_formula(size, kind, device):
    image, target = (t[0] for t in images(1, 3, *size, seed=3))
    image = 1.4 * image - 0.2  # in places outside [0, 1], where it is clamped
    mask = (
        (torch.rand(*size, generator=torch.Generator().manual_seed(1)) > 0.3).double()
        if "mask" in kind
        else None
    )
    if "uint8" in kind:
        target = (target * 255).round().to(torch.uint8)

    def evaluate(f, dtype, device="cpu"):
        i = image.detach().clone().to(device, dtype).requires_grad_()
        t = target.to(device) if target.dtype == torch.uint8 else target.to(device, dtype)
        m = None if mask is None else mask.to(device, dtype)
        loss, l1 = f(i, t, 0.2, m)
        (3 * loss).backward()
        return loss.detach().cpu(), l1.detach().cpu(), i.grad.cpu()

    truth, plain = (evaluate(reference.photometric_loss, dtype) for dtype in (torch.float64, torch.float32))
    ours = evaluate(photometric_loss, torch.float32, device)
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=1e-5, abs=1e-6)
    assert ours[1].item() == pytest.approx(truth[1].item(), rel=1e-5, abs=1e-7)
    if size != (1, 1):
        assert truth[2].norm() > 0.001
    # A pixel that is equal to its target to the last bit has a gradient of 0 for L1, or not: leave a few out.
    assert_as_accurate_as(ours[2], plain[2], truth[2], "gradient", share=1e-3)


def test_photometric_loss_weighs_its_parts():
    image, target = (t[0].float() for t in images(1, 3, 40, 40))
    l1 = (image - target).abs().mean().item()
    dssim = 1 - ssim(image, target).item()
    for weight in (0.0, 0.2, 1.0):
        loss, value = photometric_loss(image, target, weight)
        assert loss.item() == pytest.approx((1 - weight) * l1 + weight * dssim, rel=1e-5)
        assert value.item() == pytest.approx(l1, rel=1e-5) and not value.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_named(device):
    a = torch.rand(1, 3, 20, 20, device=device)
    with pytest.raises(ValueError, match=r'padding must be "same" or "valid", got \'full\''):
        ssim(a, a, "full")
    with pytest.raises(ValueError, match=r"b must be \[1, 3, 20, 20\] float32 on .*, got \[1, 3, 20, 19\]"):
        ssim(a, a[..., :19].contiguous())
    with pytest.raises(ValueError, match=r"at least 11 x 11"):
        ssim(a[..., :9], a[..., :9], "valid")
    with pytest.raises(ValueError, match=r"a must be .*float32.*, got .* float16"):
        ssim(a.half(), a.half())
    with pytest.raises(ValueError, match=r"image must be \[3, N, N\] float32 .*, got \[1, 20, 20\]"):
        photometric_loss(a[0, :1], a[0])
    with pytest.raises(ValueError, match=r"target must be \[3, 20, 20\] float32"):
        photometric_loss(a[0], a[0, :, :10])
    with pytest.raises(ValueError, match=r"mask must be \[20, 20\] float32"):
        photometric_loss(a[0], a[0], mask=a[0])
    with pytest.raises(RuntimeError, match="train=False"):
        x = a.clone().requires_grad_()
        ssim(x, a, train=False).backward()
