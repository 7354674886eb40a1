"""Hostile inputs: a finite image or a clear error, never a crash. Wrong ones: an error that names the
argument."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import (
    knn_mean_dist2,
    mark_visible,
    photometric_loss,
    rasterize,
    reference,
    ssim,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.native.scenes import DEVICES, make_scene, to_raw, with_colors, with_covariances

INF, NAN = float("inf"), float("nan")
STRANGE = {
    "means": [NAN, INF, -INF, 1e30, -1e30, 0.0, 1e-30],
    "quats": [NAN, INF, 0.0, 1e20, 1e-25],
    "scales": [NAN, INF, 0.0, 1e20, 1e-25, -1.0],
    "opacities": [NAN, INF, 0.0, 1.0, -1.0, 2.0],
    "sh_dc": [NAN, INF, -INF, 1e30],
    "sh_rest": [NAN, INF, -INF, 1e30],
    "colors": [NAN, INF, -INF, 1e30],
    "cov3d": [NAN, INF, -INF, 0.0, -1.0, 1e30],
}
FORMS = {"plain": lambda s: s, "raw": to_raw, "colors": with_colors, "covariances": with_covariances}


@st.composite
def hostile_scenes(draw):
    """A scene in which some numbers are replaced by strange ones; sometimes all of a tensor's."""
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    scene = make_scene(
        draw(st.integers(0, 20)), size, seed=draw(st.integers(0, 1000)), degree=draw(st.integers(0, 3))
    )
    scene = FORMS[draw(st.sampled_from(list(FORMS)))](scene)
    scene = scene.but(
        antialiasing=draw(st.booleans()), scale_modifier=draw(st.sampled_from([1.0, 0.0, 1e-6, 1e6]))
    )
    for name, values in STRANGE.items():
        tensor = getattr(scene, name)
        if tensor is None or tensor.numel() == 0:
            continue
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.sampled_from(values))
            if draw(st.integers(0, 5)) == 0:
                tensor[:] = value
            else:
                tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
    if draw(st.integers(0, 5)) == 0:  # all behind the camera
        scene.world_to_camera[2] *= -1
    return scene


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scene=hostile_scenes())
def test_hostile_scenes_give_finite_images(device, scene):
    scene = scene.to(torch.float32).to(device)
    leaves = scene.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = rasterize(**scene.arguments())
    for name in ("image", "alpha", "inv_depth"):
        assert getattr(out, name).isfinite().all(), name
    assert (out.alpha >= -1e-6).all() and (out.alpha <= 1 + 1e-6).all()
    assert (out.radii >= 0).all()
    (out.image.sum() + out.alpha.sum() + out.inv_depth.sum()).backward()
    # What is not drawn has no gradient, whatever strange numbers it holds.
    for name, leaf in leaves.items():
        if name not in ("world_to_camera", "background"):
            assert (leaf.grad[out.radii == 0] == 0).all(), name


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scene=hostile_scenes())
def test_hostile_scenes_in_double(scene):
    truth = reference.rasterize(**scene.arguments())
    out = rasterize(**scene.arguments())
    assert truth.image.isfinite().all() and out.image.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, value", [("means", NAN), ("scales", INF), ("opacities", NAN), ("sh_dc", NAN), ("quats", NAN)]
)
def test_one_bad_splat_harms_no_others(name, value, device):
    scene = make_scene(50, seed=6)
    good = scene.but(
        **{k: v[1:] for k, v in scene.leaves().items() if k not in ("world_to_camera", "background")}
    )
    getattr(scene, name)[0] = value
    a = rasterize(**scene.to(torch.float32).to(device).arguments())
    b = rasterize(**good.to(torch.float32).to(device).arguments())
    assert b.image.std() > 0.05
    assert torch.allclose(a.image, b.image, atol=1e-6)
    assert a.radii[0] == 0 and (a.radii[1:] == b.radii).all()


@pytest.mark.parametrize("device", DEVICES)
def test_everything_behind_the_camera(device):
    scene = make_scene(50)
    scene.world_to_camera[2] *= -1
    scene = scene.to(torch.float32).to(device)
    out = rasterize(**scene.arguments())
    assert (out.image == scene.background[:, None, None]).all() and (out.radii == 0).all()
    assert not mark_visible(scene.means, scene.world_to_camera).any()


@pytest.mark.parametrize("device", DEVICES)
def test_zero_scales_are_a_pixel_wide(device):
    """The blur keeps them visible."""
    scene = make_scene(50, seed=2)
    scene.scales[:] = 0
    out = rasterize(**scene.to(torch.float32).to(device).arguments())
    assert out.alpha.max() > 0.1 and (out.radii > 0).sum() > 20 and out.radii.max() <= 3


CPU = r"float32 on (cpu|cuda:0)"
WRONG = [
    ("means", lambda t: t[:, :2], rf"means must be \[N, 3\] {CPU}, got \[6, 2\] float32"),
    ("means", lambda t: t[:5], r"must be \[5, "),
    ("means", lambda t: t.half(), rf"means must be \[N, 3\] {CPU}, got \[6, 3\] float16"),
    ("quats", lambda t: t[:, :3], rf"quats must be \[6, 4\] {CPU}, got \[6, 3\]"),
    (
        "quats",
        lambda t: None,
        r"exactly one of \(quats and scales\) and cov3d.* quats None, scales \[6, 3\] float32",
    ),
    ("scales", lambda t: t.double(), rf"scales must be \[6, 3\] {CPU}, got \[6, 3\] float64"),
    ("opacities", lambda t: t[:5], rf"opacities must be \[6, 1\] {CPU}, got \[5, 1\]"),
    ("opacities", lambda t: t[:5, 0], rf"opacities must be \[6\] {CPU}, got \[5\]"),
    ("sh_dc", lambda t: t[:, 0], rf"sh_dc must be \[6, 1, 3\] {CPU}, got \[6, 3\]"),
    ("sh_dc", lambda t: None, r"exactly one of sh_dc and colors must be given, got sh_dc None, colors None"),
    ("sh_rest", lambda t: t[:, :7], rf"sh_rest must be \[6, 15, 3\] {CPU}, got \[6, 7, 3\]"),
    ("sh_rest", lambda t: None, r"sh_rest must be \[6, 15, 3\] for sh_degree 3, got None"),
    ("colors", lambda t: torch.zeros(6, 3), r"exactly one of sh_dc and colors"),
    ("cov3d", lambda t: torch.zeros(6, 6), r"exactly one of \(quats and scales\) and cov3d"),
    ("world_to_camera", lambda t: t[:3], rf"world_to_camera must be \[4, 4\] {CPU}, got \[3, 4\]"),
    ("K", lambda t: t.double(), rf"K must be \[3, 3\] {CPU}, got \[3, 3\] float64"),
    ("background", lambda t: t[None], rf"background must be \[3\] {CPU}, got \[1, 3\]"),
    ("camera_center", lambda t: torch.zeros(4), rf"camera_center must be \[3\] {CPU}, got \[4\]"),
    ("width", lambda v: 0, r"width must be 1 to 65536, got 0"),
    ("height", lambda v: -3, r"height must be 1 to 65536, got -3"),
    ("sh_degree", lambda v: 4, r"sh_degree must be 0, 1, 2 or 3, got 4"),
    ("near", lambda v: -0.1, r"near must be a finite number, 0 or more, got -0\.1"),
    ("near", lambda v: NAN, r"near must be a finite number, 0 or more, got nan"),
    ("near", lambda v: INF, r"near must be a finite number, 0 or more, got inf"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, change, message", WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_wrong_arguments_are_named(name, change, message, device):
    arguments = make_scene(6).to(torch.float32).to(device).arguments()
    arguments[name] = change(arguments[name])
    if isinstance(arguments[name], torch.Tensor) and arguments[name].device.type == "cpu":
        arguments[name] = arguments[name].to(device)
    with pytest.raises(ValueError, match=message):
        rasterize(**arguments)


def test_wrong_carrier_is_named():
    scene = make_scene(6).to(torch.float32)
    with pytest.raises(ValueError, match=r"means2d must be \[6, 3\], got \[6, 2\]"):
        rasterize(**scene.arguments(), means2d=torch.zeros(6, 2))


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs two devices")
@pytest.mark.gpu
def test_mixed_devices_are_named():
    arguments = make_scene(6).to(torch.float32).to("cuda").arguments()
    with pytest.raises(
        ValueError, match=r"scales must be \[6, 3\] float32 on cuda:0, got \[6, 3\] float32 on cpu"
    ):
        rasterize(**{**arguments, "scales": arguments["scales"].cpu()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about builds and machines without CUDA")
def test_float16_on_the_cpu_says_what_is_wanted():
    scene = make_scene(6).to(torch.float16)
    with pytest.raises(
        ValueError, match=r"means must be \[N, 3\] float32 on cpu, got \[6, 3\] float16 on cpu"
    ):
        rasterize(**scene.arguments())


@pytest.mark.parametrize("kind", [list, np.array])
def test_what_is_no_tensor_is_named(kind):
    scene, rows, picture = make_scene(6).to(torch.float32), kind([[0.0, 0.0, 1.0]]), torch.zeros(3, 20, 20)
    got = f"must be a tensor.*got {'list' if kind is list else 'ndarray'}$"
    for name in ("means", "quats", "scales", "opacities", "sh_dc", "world_to_camera", "K", "background"):
        with pytest.raises(TypeError, match=f"^{name} {got}"):
            rasterize(**{**scene.arguments(), name: rows})
    for name, call in {
        "means": lambda: mark_visible(rows, scene.world_to_camera),
        "points": lambda: knn_mean_dist2(rows),
        "b": lambda: ssim(picture, rows),
        "target": lambda: photometric_loss(picture, rows),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} {got}"):
            call()


# ---- what an operator keeps for its backward comes back through the caller's hands -------------------------


def kept(device):
    """The operator's arguments, what it kept, and a gradient of the image."""
    s = make_scene(60, (40, 33)).to(torch.float32).to(device)
    inputs = (
        s.means, s.quats, s.scales, None, s.opacities, s.sh_dc, s.sh_rest, None, s.world_to_camera, s.K, None,
        s.background, s.width, s.height, s.sh_degree, 1.0, False, False,
    )  # fmt: skip
    image, _, _, radii, state = torch.ops.tilesplat.rasterize(*inputs, True)
    return inputs, radii, state, torch.ones_like(image)


def backward(inputs, radii, state, grad):
    wanted = [True] * 11
    return torch.ops.tilesplat.rasterize_backward(
        *inputs, radii, state, grad, None, None, wanted, None, None, None
    )


def misaligned(tensor):
    flat = torch.cat([tensor.flatten()[:1], tensor.flatten()])
    return flat[1:].view(tensor.shape)


MISFITS = {
    "short": lambda t: t[: len(t) // 2],
    "long": lambda t: torch.cat([t, t]),
    "flat": lambda t: t[None],
    "of another type": lambda t: t.to(torch.float16),
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "misaligned": misaligned,
    "on another device": lambda t: t.to("meta"),
}
STATE_COUNT = {"cpu": 10, "cuda": 7}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("misfit", MISFITS)
def test_kept_tensors_are_checked(misfit, device):
    inputs, radii, state, grad = kept(device)
    assert len(state) == STATE_COUNT[device] and backward(inputs, radii, state, grad)[0].abs().max() > 0
    for i in range(len(state)):
        if misfit == "not contiguous" and state[i].numel() == 1:
            continue  # it always is
        altered = [MISFITS[misfit](t) if k == i else t for k, t in enumerate(state)]
        with pytest.raises((ValueError, NotImplementedError), match=r"state\[\d+\] must be|Meta"):
            backward(inputs, radii, altered, grad)
    with pytest.raises(ValueError, match=f"state must be .* {len(state)} tensors, got {len(state) - 1}"):
        backward(inputs, radii, state[:-1], grad)
    with pytest.raises(ValueError, match=r"radii must be \[60\] int32"):
        backward(inputs, radii[:-1], state, grad)


INDICES = {"visible": 1, "visible_count": 2, "slots": 3, "tile_begin": 4, "tile_order": 5, "entries": 8}
VALUES = {"splats": 0, "transmittance": 6, "last": 7, "touched": 9}


@pytest.mark.parametrize("value", [-1, 2**30])
@pytest.mark.parametrize("name", INDICES)
def test_altered_indices_are_noticed_on_the_cpu(name, value):
    inputs, radii, state, grad = kept("cpu")
    state[INDICES[name]].fill_(value)
    with pytest.raises(ValueError, match="state must be .* its numbers have been altered"):
        backward(inputs, radii, state, grad)


@pytest.mark.parametrize("name", ["entries", "slots"])
def test_one_altered_index_is_noticed_on_the_cpu(name):
    inputs, radii, state, grad = kept("cpu")
    state[INDICES[name]][radii.nonzero()[-1].item(), 1] = 2**30
    with pytest.raises(ValueError, match="state must be .* its numbers have been altered"):
        backward(inputs, radii, state, grad)


@pytest.mark.parametrize("value", [-1, 2**15 - 1])
@pytest.mark.parametrize("name", VALUES)
def test_altered_values_lead_nowhere(name, value):
    """They give other gradients; none of them is an index."""
    inputs, radii, state, grad = kept("cpu")
    state[VALUES[name]].fill_(value)
    assert all(g.shape for g in backward(inputs, radii, state, grad))


# ids, ranges, totals, trace; pairs, offsets and order
GPU_INDICES = [(1, False), (2, False), (5, False), (6, False), (7, True), (8, True), (9, True)]
ALTERED = """
import torch
from tests.native.test_robustness import backward, kept
torch.use_deterministic_algorithms({ordered})
inputs, radii, state, grad = kept("cuda")
backward(inputs, radii, state, grad)
torch.cuda.synchronize()
state[{index}].fill_(-1 if state[{index}].is_signed() else 255)
backward(inputs, radii, state, grad)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
@pytest.mark.parametrize("index, ordered", GPU_INDICES)
def test_altered_indices_stop_the_gpu(index, ordered):
    """As with PyTorch's own indexing: an assertion, which ends the process's use of the GPU."""
    code = ALTERED.format(index=index, ordered=ordered)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0 and "device-side assert" in out.stderr, out.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("misfit", [name for name in MISFITS if name != "on another device"])
def test_what_ssim_kept_is_checked(misfit, device):
    a, b = torch.rand(2, 1, 3, 20, 20, device=device)
    value, (state,) = torch.ops.tilesplat.ssim(a, b, False, True)
    grad = torch.ones_like(value)
    assert torch.ops.tilesplat.ssim_backward(a, b, False, [state], grad).abs().max() > 0
    with pytest.raises(ValueError, match=r"state\[0\] must be"):
        torch.ops.tilesplat.ssim_backward(a, b, False, [MISFITS[misfit](state)], grad)
    with pytest.raises(ValueError, match=r"state must be .* 1 tensors, got 0"):
        torch.ops.tilesplat.ssim_backward(a, b, False, [], grad)
    with pytest.raises(ValueError, match=r"grad must be \[\] float32 on \S+, got \[2\] float32"):
        torch.ops.tilesplat.ssim_backward(a, b, False, [state], torch.ones(2, device=device))
