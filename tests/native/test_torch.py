"""The operators as PyTorch's tools meet them: torch.compile and export, autocast, opcheck, torch.func.

Those of the stages are in test_stages.py.
"""

import pytest
import torch
from diff_gaussian_rasterization import photometric_loss, rasterize, rasterize_views, ssim, stages
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.native.scenes import DEVICES, make_scene
from tests.native.test_train_step import BETAS, EPS, LAMBDA, LRS, camera, fresh, target_like, training_scene

SIZE = (40, 33)
OPERATORS = torch.ops.tilesplat


def scene_of(device="cpu", count=60):
    return make_scene(count, SIZE, degree=1).to(torch.float32).to(device)


def images(device="cpu", channels=3):
    g = torch.Generator().manual_seed(0)
    return [torch.rand(channels, *SIZE[::-1], generator=g).to(device) for _ in range(2)]


def rasterize_call(keep=True):
    s = scene_of()
    gaussians = (s.means, s.quats, s.scales, None, s.opacities, s.sh_dc, s.sh_rest, None)
    return (*gaussians, s.world_to_camera, s.K, None, s.background, *SIZE, 1, 1.0, False, False, keep, 0.2)


def backward_call(forward):
    image, alpha, _, radii, state = OPERATORS.rasterize(*forward)
    sums = [torch.zeros(60) for _ in range(3)]
    return (*forward[:-2], radii, state, image, alpha, None, [True] * 11, *sums)


def views_call():
    """As rasterize_call, of three views."""
    call = list(rasterize_call())
    call[8] = call[8].repeat(3, 1, 1)
    return tuple(call)


def step_call():
    scene = training_scene(50, size=SIZE)
    out, view = fresh(scene, "cpu", torch.float32, False), camera(scene, 0, "cpu", torch.float32)
    target = target_like(scene, torch.uint8)
    return (
        out.params, out.exp_avg, out.exp_avg_sq, list(LRS), *BETAS, EPS, 1, view["world_to_camera"],
        view["K"], view["background"], target, None, 3, False, LAMBDA, None, None, None, torch.zeros(4),
        0, None,
    )  # fmt: skip


def calls():
    a, b = (t[None] for t in images())
    value, state = OPERATORS.ssim(a, b, False, True)
    points, mask = torch.rand(30, 3), torch.rand(*SIZE[::-1])
    rows = [[torch.rand(30, 3) for _ in range(2)] for _ in range(4)]
    return {
        "rasterize": rasterize_call(),
        "rasterize_backward": backward_call(rasterize_call()),
        "rasterize of views": views_call(),
        "rasterize_backward of views": backward_call(views_call()),
        "mark_visible": (points, torch.eye(4)),
        "ssim": (a, b, False, True),
        "ssim_backward": (a, b, False, state, torch.ones(())),
        "photometric_loss": (a[0], b[0], mask, 0.2),
        "knn_mean_dist2": (points,),
        "adam_step": (*rows, [0.1, 0.2], 0.9, 0.99, 1e-8, 1, None),
        "train_step": step_call(),
    }


@pytest.mark.parametrize("name", calls())
def test_operators_pass_opcheck(name):
    torch.library.opcheck(getattr(OPERATORS, name.split()[0]).default, calls()[name])


def loss_of(means, scene, target):
    image = rasterize(**scene.arguments() | {"means": means}).image
    return photometric_loss(image, target)[0] + (1 - ssim(image, target))


def loss_of_views(means, scene, target):
    poses = scene.world_to_camera.repeat(3, 1, 1)
    image = rasterize_views(**scene.arguments() | {"means": means, "world_to_camera": poses}).image.mean(0)
    return photometric_loss(image, target)[0]


@pytest.mark.parametrize("loss_of", [loss_of, loss_of_views])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_compiles_into_one_graph(device, loss_of):
    scene, target = scene_of(device), images(device)[0]
    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for f in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
            means = scene.means.clone().requires_grad_()
            loss = f(means, scene, target)
            loss.backward()
            results.append((loss.detach(), means.grad))
    (loss, grad), (compiled, compiled_grad) = results
    assert grad.abs().max() > 0 and torch.equal(loss, compiled)
    assert (grad - compiled_grad).abs().max() <= (0 if device == "cpu" else 1e-5 * grad.abs().max())


class Picture(torch.nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, means):
        return self.draw(means)


@pytest.mark.parametrize("way", ["rasterize", "stages"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_is_exported(device, way):
    scene, colors = scene_of(device), torch.rand(60, 5, device=device)
    camera = {"world_to_camera": scene.world_to_camera, "K": scene.K, "width": SIZE[0], "height": SIZE[1]}

    def draw(means):
        if way == "rasterize":
            return rasterize(**scene.arguments() | {"means": means}).image
        projected = stages.project(means, scene.quats, scene.scales, scene.opacities, **camera)
        return stages.blend(projected, colors, stages.lists(projected)).image

    program = torch.export.export(Picture(draw), (scene.means,))
    for means in (scene.means, scene.means * 0.9):
        image = draw(means)
        assert image.std() > 0.05 and torch.equal(program.module()(means), image)


@pytest.mark.parametrize("draw, shape", [(rasterize, (3, 33, 40)), (rasterize_views, (5, 3, 33, 40))])
def test_a_picture_of_a_gpu_is_traced_without_one(draw, shape):
    given = scene_of().arguments()
    if draw is rasterize_views:
        given["world_to_camera"] = given["world_to_camera"].repeat(5, 1, 1)
    with FakeTensorMode(shape_env=ShapeEnv()):
        scene = {
            name: torch.empty(value.shape, device="cuda") if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        picture = lambda means: draw(**scene | {"means": means})  # noqa: E731
        out = picture(scene["means"])
        assert out.image.shape == shape and out.radii.shape == (*shape[:-3], 60)
        graph = make_fx(lambda means: picture(means).image)(scene["means"]).graph
    assert str(graph).count("tilesplat.rasterize") == 1


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    """Colors from a network in 16 bits are taken in 32, and get their gradient in 16."""
    scene = scene_of(device)
    colors = torch.rand(60, 3, device=device).to(torch.bfloat16).requires_grad_()
    arguments = scene.arguments() | {"sh_dc": None, "sh_rest": None, "sh_degree": 0}
    with torch.autocast(device, torch.bfloat16):
        image = rasterize(**arguments | {"colors": colors}).image
        photometric_loss(image.to(torch.bfloat16), images(device)[0])[0].backward()
    assert image.dtype == torch.float32 and torch.equal(
        image, rasterize(**arguments | {"colors": colors.float()}).image
    )
    assert colors.grad.dtype == torch.bfloat16 and colors.grad.abs().max() > 0
    with pytest.raises(ValueError, match="colors must be .* float32"):
        rasterize(**arguments | {"colors": colors})


@pytest.mark.parametrize("operator", ["rasterize", "photometric_loss", "ssim"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_second_derivative_is_refused(operator, device):
    scene, (a, b) = scene_of(device), images(device)
    values = {
        "rasterize": lambda x: rasterize(**scene.arguments() | {"means": x}).image.square().sum(),
        "photometric_loss": lambda x: photometric_loss(x, b)[0].square(),
        "ssim": lambda x: ssim(x, b).square(),
    }
    x = (scene.means if operator == "rasterize" else a).clone().requires_grad_()
    (grad,) = torch.autograd.grad(values[operator](x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        grad.square().sum().backward()


def test_functional_transforms():
    """torch.func.grad gives the gradient; what there is no formula for is refused in a sentence."""
    scene, target = scene_of(), images()[0]
    means = scene.means.clone().requires_grad_()
    loss_of(means, scene, target).backward()
    f = lambda x: loss_of(x, scene, target)  # noqa: E731
    assert torch.equal(torch.func.grad(f)(scene.means), means.grad)
    with pytest.raises(NotImplementedError, match="implement the jvp function"):
        torch.func.jvp(f, (scene.means,), (scene.means,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="implement the jvp function"):
        f(forward_ad.make_dual(scene.means, scene.means))
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.func.vmap(f)(torch.stack([scene.means] * 2))
