"""What a step may be besides the published one: regularized, of several views, of smaller photos, with rates
that fall. The native call and separate steps agree, and a continued run ends with the same bits."""

import pytest
import torch

import train
from arguments import OptimizationParams, PipelineParams, parse_train
from gaussian_renderer import render
from scene import Scene
from scene.cameras import smaller
from scene.folder import ModelFolder
from tests import tiny_scenes
from tests.native.scenes import DEVICES, relative_error
from tests.test_gaussians import make_model
from training import checkpoint
from training.trainer import Trainer
from utils.files import DataError

LINE = [
    "--iterations", "60", "--densify_from_iter", "10", "--densification_interval", "10",
    "--densify_until_iter", "40", "--test_iterations", "60", "--device", "cpu", "--disable_viewer", "--quiet",
    "--densify_grad_threshold", "1e-4", "--cap_max", "60",
]  # fmt: skip
OPTIONS = {
    "regularized": ["--opacity_reg", "0.3", "--scale_reg", "0.2"],
    "views": ["--update_every", "1", "4", "5"],
    "both": ["--update_every", "2", "5", "--opacity_reg", "0.3", "--scale_reg", "0.2"],
    "coarse": ["--coarse_until", "30"],
    "rates": ["--rates_final", "0.1"],
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(scene, out, *options) -> dict:
    line = [*LINE, "-s", str(scene), "-m", str(out), *options, "--checkpoint_iterations", "47", "60"]
    assert train.main(line) == 0
    assert "separate" not in ModelFolder(out).log.read_text()
    return checkpoint.read(ModelFolder(out).checkpoint(60))["parts"]["gaussians"]


def trainer(scene, *options) -> Trainer:
    options = parse_train(["-s", str(scene), "-m", "m", *LINE, *options])
    return Trainer(Scene(options.model, torch.device(options.run.device), 0, quiet=True), options, print)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_native_steps_are_those_taken_apart(scene, name, device):
    """Moves and moments, up to rounding, for as long as rounding has not grown. Sums are made in another
    order on a GPU, as in tests/native/test_train_step.py."""
    tolerance = {"cpu": 1e-4, "cuda": 1e-3}[device]
    words = [*OPTIONS[name], "--device", device]
    native, apart = (trainer(scene, *words, way) for way in ("--fused", "--no-fused"))
    assert native.native is not None and apart.native is None
    for one in (native, apart):  # quaternions of balls have no gradient but rounding
        with torch.no_grad():
            one.gaussians.log_scales[:, 0] += 0.5
            one.gaussians.raw_quats[:, 1:] += 0.3
    before = {key: value.detach().clone() for key, value in apart.gaussians.params.items()}
    for iteration in (1, 2, 3, 4, 5, 44, 45, 50, 60) if name != "coarse" else (1, 10, 11, 30, 31, 32):
        for one in (native, apart):
            one.step(iteration)
    for key, expected in apart.gaussians.params.items():
        state, ours = apart.gaussians.optimizer.state[expected], native.gaussians.params[key]
        own = native.gaussians.optimizer.state[ours]
        pairs = {"moves": (ours - before[key], expected - before[key])}
        pairs |= {moment: (own[moment], state[moment]) for moment in ("exp_avg", "exp_avg_sq")}
        for what, (a, b) in pairs.items():
            assert relative_error(a, b) <= tolerance, f"{what} of {key}: {relative_error(a, b):.1e}"
        assert state["step"] == own["step"] and (key == "sh_rest" or (expected != before[key]).any())


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_continued_run_ends_with_the_same_bits(scene, tmp_path, name, way):
    """From within a step of several views, too."""
    whole = run(scene, tmp_path / "whole", *OPTIONS[name], way)
    start = str(ModelFolder(tmp_path / "whole").checkpoint(47))
    ours = run(scene, tmp_path / "on", *OPTIONS[name], way, "--start_checkpoint", start)
    for key, value in whole["params"].items():
        assert torch.equal(ours["params"][key], value), key


def test_a_step_of_several_views_is_that_of_their_mean(scene):
    """Adam's first step has the mean gradient as first moment, times 0.1, after the fourth view."""
    one = trainer(scene, "--update_every", "4")
    start = {name: value.detach().clone() for name, value in one.gaussians.params.items()}
    queue = trainer(scene).queue
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for iteration in range(1, 5):
        camera = one.scene.train_cameras[queue.next()]
        assert all(torch.equal(one.gaussians.params[name], value) for name, value in start.items())
        loss = one.loss(iteration, camera, one.scene.background)[0]
        for name, grad in zip(total, torch.autograd.grad(loss, list(one.gaussians.params.values()))):
            total[name] += grad / 4
        one.step(iteration)
    for name, value in one.gaussians.params.items():
        state = one.gaussians.optimizer.state[value]
        assert state["step"] == 1 and (name == "sh_rest" or not torch.equal(value, start[name]))
        torch.testing.assert_close(state["exp_avg"], 0.1 * total[name], rtol=1e-4, atol=1e-8, msg=name)
    assert one.gaussians.collected == 0


def test_when_a_step_is_of_how_many_views(scene):
    one = trainer(scene, "--update_every", "1", "5", "20", "--iterations", "80")
    assert [one._shared_by(i) for i in (1, 40, 41, 60, 61, 80)] == [1, 1, 5, 5, 20, 20]
    assert trainer(scene)._shared_by(50) == 1


def test_rates_fall_in_the_second_half():
    model = make_model(3)
    model.setup_optimizer(OptimizationParams(iterations=100, rates_final=0.01))
    rates = {}
    for iteration in (1, 50, 75, 100):
        model.schedule(iteration)
        rates[iteration] = {group["name"]: group["lr"] for group in model.optimizer.param_groups}
    for name, rate in {"sh_dc": 0.0025, "opacity_logits": 0.025, "raw_quats": 0.001}.items():
        expected = [rate, rate, 0.1 * rate, 0.01 * rate]
        assert [rates[i][name] for i in rates] == pytest.approx(expected), name


def test_a_smaller_view_shows_the_same(scene):
    """Its photo is the mean of pixels, and what is rendered for it looks like that."""
    one = trainer(scene)
    camera = one.scene.train_cameras[0]
    small = smaller(camera, 2)
    assert small.image().shape == (3, 20, 28) and small.coarseness == 2
    means = torch.nn.functional.avg_pool2d(camera.image().float(), 2)
    assert (small.image().float() - means).abs().mean() < 3
    whole = render(camera, one.gaussians, PipelineParams(), torch.zeros(3)).image
    picture = render(small, one.gaussians, PipelineParams(), torch.zeros(3)).image
    assert (picture - torch.nn.functional.avg_pool2d(whole, 2)).abs().mean() < 0.02


def test_photos_grow(scene):
    one = trainer(scene, "--coarse_until", "30")
    widths = [one._camera(0, iteration).width for iteration in (1, 10, 11, 30, 31)]
    assert widths == [14, 14, 28, 28, 56] and not one._coarse


def test_gradients_of_rows_that_move_are_dropped(scene):
    one = trainer(scene, "--update_every", "4")
    one.step(1)
    assert one.gaussians.collected == 1
    one.gaussians.reindex(torch.arange(5))
    one.strategy.forget()
    assert one.gaussians.collected == 0
    one.step(2)
    assert one.gaussians.collected == 1 and len(one.gaussians) == 5


class Strict:
    """A native step that minds on any device what it minds on a GPU: rows wait for steps that are counted
    without a gap, or are settled before."""

    def __init__(self, step):
        self.step, self.last, self.waiting = step, 0, False
        self.forgotten, self.fails = [], False

    def __call__(self, *counted, **rest):
        assert not self.waiting or counted[-1] == self.last + 1, "settle() must be called before"
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError
        self.last, self.waiting = counted[-1], True
        return self.step(*counted, **rest)

    def settle(self):
        self.waiting = False

    def forget(self, view):
        self.forgotten.append(view)


def test_steps_are_counted_without_a_gap_or_settled(scene):
    """From single views to groups and back, over a view that does not fit and rows that move."""
    one = trainer(scene, "--update_every", "1", "4", "--opacity_reg", "0.1")
    strict = one.native._step = Strict(one.native._step)
    for iteration in (1, 2, 3, 41, 42):
        one.step(iteration)
    assert one.gaussians.collected == 2 and strict.waiting
    strict.fails = True
    one.step(43)  # taken again, as the first of its group
    assert one.gaussians.collected == 1 and len(strict.forgotten) == 1
    one.gaussians.forget_gradients()
    one.step(44)  # the last of a group that has lost the others
    assert one.gaussians.collected == 0
    for iteration in (45, 46, 47, 48):
        one.step(iteration)
    assert one.gaussians.collected == 0
    one.gaussians.reindex(torch.arange(9))
    one.strategy.forget()
    for iteration in (49, 5, 6, 50):
        one.step(iteration)


def test_a_checkpoint_whose_gradients_do_not_fit_is_refused(scene, tmp_path):
    run(scene, tmp_path / "m", "--update_every", "2", "5")
    path = ModelFolder(tmp_path / "m").checkpoint(47)
    state = torch.load(path, weights_only=True)
    model = state["parts"]["gaussians"]
    assert model["collected"] == 2 and model["gradients"]["means"].shape == model["params"]["means"].shape
    model["gradients"]["means"] = model["gradients"]["means"][1:]
    torch.save(state, path)
    parts = trainer(scene, "--update_every", "2", "5").parts()
    with pytest.raises(DataError, match="gradient of means must be"):
        checkpoint.load(path, parts, torch.device("cpu"))
