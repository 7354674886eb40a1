"""Steps of several views (--views_per_step): the mean of their gradients, rates by the square-root rule, and
everything that is counted is counted in views."""

import pytest
import torch

from arguments import ConfigError, OptimizationParams, parse_train
from per_view import Exposure
from scene import Scene
from scene.folder import ModelFolder
from tests import tiny_scenes
from tests.test_gaussians import make_model
from tests.test_step_options import LINE, run, trainer
from training import checkpoint, method
from training.trainer import Trainer
from utils.schedules import log_linear, reaches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


def in_double(one: Trainer) -> Trainer:
    """The same trainer, whose pictures and gradients are float64."""
    gaussians = one.gaussians
    gaussians.params = {k: torch.nn.Parameter(v.detach().double()) for k, v in gaussians.params.items()}
    gaussians.setup_optimizer(one.opt)
    for camera in one.scene.train_cameras:
        camera.world_to_camera, camera.K = camera.world_to_camera.double(), camera.K.double()
    one.scene.background = one.scene.background.double()
    return one


@pytest.mark.parametrize("views", [1, 2, 5])
def test_a_step_has_the_mean_gradient_of_its_views(scene, views):
    """Adam's first step has it as first moment, times 1 - beta^views."""
    one = in_double(trainer(scene, "--views_per_step", str(views), "--no-fused"))
    queue, total = trainer(scene).queue, {}
    for _ in range(views):
        loss = one.loss(1, one.scene.train_cameras[queue.next()], one.scene.background)[0]
        grads = torch.autograd.grad(loss, list(one.gaussians.params.values()))
        for name, grad in zip(one.gaussians.params, grads):
            total[name] = total.get(name, 0) + grad
    one.step(views)
    assert total["means"].abs().max() > 1e-6
    for name, value in one.gaussians.params.items():
        state = one.gaussians.optimizer.state[value]
        expected = (1 - 0.9**views) * total[name] / views
        assert state["step"] == 1 and state["exp_avg"].dtype == torch.float64
        assert (state["exp_avg"] - expected).abs().max() <= 1e-12 * expected.abs().max(), name


def test_rates_follow_the_square_root_rule():
    model = make_model(3)
    model.setup_optimizer(OptimizationParams())
    groups = lambda: {g["name"]: (g["lr"], *g["betas"], g["eps"]) for g in model.optimizer.param_groups}  # noqa: E731
    model.schedule(100)
    one = groups()
    model.rates_for = 4
    model.schedule(100)
    for name, (lr, beta1, beta2, eps) in groups().items():
        rate = one[name][0]
        assert (lr, beta1, beta2, eps) == pytest.approx((2 * rate, 0.9**4, 0.999**4, 0.5e-15)), name
    model.rates_for = 1
    model.schedule(100)
    assert groups() == one and one["sh_dc"] == (0.0025, 0.9, 0.999, 1e-15)


def test_presets_that_share_steps_themselves_are_not_scaled_twice(scene):
    """20 views make a step there anyway: 4 of them at a time go at the same rates."""
    one = trainer(scene, "--views_per_step", "4", "--update_every", "1", "8")
    one.step(4)
    assert one.gaussians.rates_for == 4 and one.gaussians.collected == 0
    one.step(44)
    assert one.gaussians.rates_for == 1 and one.gaussians.collected == 4
    one.step(48)
    assert one.gaussians.collected == 0


class Told:
    """What a strategy was told."""

    def __init__(self, inner):
        self.inner, self.stats_of, self.after = inner, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def stats(self, gaussians, iteration):
        self.stats_of.append(iteration)
        return self.inner.stats(gaussians, iteration)

    def after_step(self, gaussians, iteration):
        self.after.append(iteration)
        self.inner.after_step(gaussians, iteration)


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_everything_counts_views(scene, tmp_path, monkeypatch, way):
    """60 views in steps of 7, the last of 4: the strategy hears of each once, in order, after its step; what
    is asked for at 20 and 30 comes with the steps that show these."""
    told, steps, make = [], [], Trainer.__init__

    def watched(self, *args):
        make(self, *args)
        self.strategy = Told(self.strategy)
        told.append(self.strategy)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "__init__", watched)
    monkeypatch.setattr(Trainer, "step", lambda self, i: (steps.append((i, self.views)), step(self, i))[1])
    model = run(scene, tmp_path / "m", "--views_per_step", "7", way, "--save_iterations", "20", "30")
    assert steps == [(i, 7) for i in range(7, 60, 7)] + [(60, 4)]
    (strategy,) = told
    assert strategy.after == list(range(1, 61)) and strategy.stats_of == list(range(1, 61, 7))
    folder = ModelFolder(tmp_path / "m")
    assert folder.saved_iterations() == [21, 35, 60] and set(folder.checkpoints()) == {49, 60}
    assert model["moments"]["means"]["step"] == 9


def test_a_continued_run_ends_with_the_same_bits(scene, tmp_path):
    whole = run(scene, tmp_path / "whole", "--views_per_step", "4")
    start = str(ModelFolder(tmp_path / "whole").checkpoint(48))
    ours = run(scene, tmp_path / "on", "--views_per_step", "4", "--start_checkpoint", start)
    for key, value in whole["params"].items():
        assert torch.equal(ours["params"][key], value), key


def test_a_run_goes_on_with_steps_of_another_size(scene, tmp_path, monkeypatch):
    run(scene, tmp_path / "m", "--views_per_step", "4")
    numbers, refine = [], Trainer.refine
    monkeypatch.setattr(
        Trainer, "refine", lambda self, i: (numbers.extend(self._numbers(i)), refine(self, i))
    )
    start = str(ModelFolder(tmp_path / "m").checkpoint(48))
    run(scene, tmp_path / "on", "--views_per_step", "5", "--start_checkpoint", start)
    assert numbers == list(range(49, 61))


def test_memory_that_runs_out_within_a_step(scene, monkeypatch):
    """The step is taken again whole: the gradients of its first views do not count twice."""
    one, other = (trainer(scene, "--views_per_step", "3", "--no-fused", "--train_test_exp") for _ in range(2))
    collect, calls = one.gaussians.collect, []

    def fails_once(loss, views):
        calls.append(1)
        if len(calls) == 2:
            loss.backward()
            raise torch.OutOfMemoryError
        collect(loss, views)

    one.gaussians.collect = fails_once
    one.step(3)
    other.step(3)
    assert len(calls) == 5
    for name, value in other.gaussians.params.items():
        assert torch.equal(one.gaussians.params[name], value), name
    assert torch.equal(one.modules[0].parameters()[0], other.modules[0].parameters()[0])


def test_exposures_take_one_step_for_all_views(scene):
    """Of each photo, its gradient over the number of views, at a rate of the root."""
    one = trainer(scene, "--views_per_step", "4", "--train_test_exp")
    (exposure,) = one.modules
    assert isinstance(exposure, Exposure)
    before = exposure.values.detach().clone()
    one.step(4)
    moved = (exposure.values.detach() - before).abs().flatten(1).amax(1)
    assert exposure.optimizer.state[exposure.values]["step"] == 1 and (moved > 0).sum() == 4
    assert moved[moved > 0].mean().item() == pytest.approx(2 * log_linear(4, 0.01, 0.001, 60), rel=1e-3)


def test_noise_comes_for_each_view_at_its_own_rate(scene):
    words = ["--strategy", "mcmc", "--noise_lr", "5e5", "--iterations", "80"]
    moves = []
    for views in (1, 4):
        one = trainer(scene, *words, "--views_per_step", str(views))
        one.gaussians.rates_for = views
        one.gaussians.schedule(4)
        before = one.gaussians.means.detach().clone()
        one.views = 4  # of which numbers are asked for
        for number in one._numbers(4):
            one.strategy.after_step(one.gaussians, number)
        moves.append(one.gaussians.means.detach() - before)
    assert moves[0].abs().max() > 0
    torch.testing.assert_close(moves[0], moves[1])


@pytest.mark.parametrize(
    "every, iteration, views, expected",
    [(10, 10, 1, True), (10, 11, 1, False), (10, 12, 3, True), (10, 13, 3, False), (10, 9, 9, False),
     (3, 40, 20, True), (10, 20, 10, True)],
)  # fmt: skip
def test_reaches(every, iteration, views, expected):
    assert reaches(every, iteration, views) == expected
    assert expected == any(number % every == 0 for number in range(iteration - views + 1, iteration + 1))


def test_what_cannot_take_several_views_says_so(scene, capsys):
    with pytest.raises(SystemExit):
        parse_train(["-s", "x", "--views_per_step", "2", "--optimizer_type", "sparse_adam"])
    assert "views_per_step must be 1 with --optimizer_type sparse_adam, got 2" in capsys.readouterr().err
    options = parse_train(["-s", str(scene), *LINE, "--views_per_step", "2", "--method", "nerf"])
    data = Scene(options.model, torch.device("cpu"), 0, quiet=True)
    with pytest.raises(ConfigError, match="views_per_step must be 1 with --method nerf, got 2"):
        method.trainer(data, options, print)


def test_a_checkpoint_within_no_step(scene, tmp_path):
    """With several views a step is whole when anything is saved: no gradients are in the file."""
    run(scene, tmp_path / "m", "--views_per_step", "4")
    state = checkpoint.read(ModelFolder(tmp_path / "m").checkpoint(48))["parts"]["gaussians"]
    assert "gradients" not in state
