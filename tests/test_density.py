"""Adaptive density control: which Gaussians are cloned, split, pruned and reset, and when."""

import math

import pytest
import torch
from diff_gaussian_rasterization import ScreenStats, photometric_loss, reference

from arguments import ModelParams, OptimizationParams, Options, PipelineParams, RunParams, parse_train
from distributed import ALONE
from scene import Scene
from scene.gaussian_model import GaussianModel
from strategies import adc
from strategies.adc import AdaptiveDensityControl
from tests import tiny_scenes
from tests.test_gaussians import make_model, moments, some_steps
from training.trainer import Trainer

EXTENT = 10.0  # so that 0.1 separates cloning from splitting, and 1.0 is too large


def model_with(scales: list[float], opacities: list[float]) -> GaussianModel:
    """Row i has its own position and colors, and Adam moments that are not zero."""
    model = make_model(len(scales))
    some_steps(model)
    with torch.no_grad():
        model.log_scales.copy_(torch.tensor(scales).log()[:, None] + torch.tensor([0.0, -0.5, -1.0]))
        model.opacity_logits.copy_(torch.tensor(opacities).logit()[:, None])
    return model


def control(seed: int = 0, white: bool = False, **options) -> AdaptiveDensityControl:
    model = ModelParams(white_background=white)
    options = Options(model, OptimizationParams(**options), PipelineParams(), RunParams())
    density = adc.make(options, EXTENT, print)
    density.generator = torch.Generator().manual_seed(seed)
    return density


def pull(
    density: AdaptiveDensityControl, model: GaussianModel, iteration: int, mean_gradients: list[float]
) -> None:
    """As if each Gaussian had been seen four times."""
    stats = density.stats(model, iteration)
    stats.grad_norm_sum += 4 * torch.tensor(mean_gradients)
    stats.visits += 4


def origins(model: GaussianModel, before: torch.Tensor) -> list[int]:
    """Which row each Gaussian was, told by the view-dependent color, which nothing here changes."""
    return [int((before == row).flatten(1).all(dim=1).nonzero()[0, 0]) for row in model.sh_rest]


def test_clone_split_and_prune():
    #        left alone, cloned, split, faint, faint but wanted, at the threshold
    scales = [0.05, 0.05, 0.5, 0.05, 0.05, 0.1]
    opacity = [0.5, 0.5, 0.5, 0.004, 0.004, 0.5]
    pulls = [1.9e-4, 2.1e-4, 2.1e-4, 0, 1, 2.0001e-4]
    model = model_with(scales, opacity)
    with torch.no_grad():
        model.log_scales[5, 0] = math.log(0.0999)
    old = {name: value.detach().clone() for name, value in model.params.items()}
    density = control()
    pull(density, model, 600, pulls)
    density.after_step(model, 600)

    # By where they came from; a clone, being in the same place, follows what it is a copy of.
    origin = origins(model, old["sh_rest"])
    model.reindex(torch.tensor(sorted(range(len(origin)), key=lambda row: origin[row])))
    assert sorted(origin) == [0, 1, 1, 2, 2, 5, 5]
    same, children, new = [0, 1, 2, 5, 6], [3, 4], [2, 3, 4, 6]
    assert len(model.optimizer.state) == 6 and all(
        state["exp_avg"].shape[0] == 7 for state in moments(model).values()
    )
    for name in ("means", "sh_dc", "opacity_logits", "log_scales", "raw_quats"):
        assert torch.equal(model.params[name][same], old[name][[0, 1, 1, 5, 5]]), name
    for name in ("sh_dc", "opacity_logits", "raw_quats"):
        assert torch.equal(model.params[name][children], old[name][[2, 2]]), name
    torch.testing.assert_close(model.scales[children], old["log_scales"][[2, 2]].exp() / 1.6)
    assert (model.means[3] != old["means"][2]).all() and (model.means[3] != model.means[4]).all()

    for name, state in moments(model).items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert (state[key][new] == 0).all(), "new rows start without moments"
            assert (state[key][[0, 1, 5]].flatten(1).abs().sum(dim=1) > 0).all(), name
    stats = density.stats(model, 601)
    assert stats.visits.shape == (7,) and not stats.visits.any() and not stats.grad_norm_sum.any()


def test_children_are_drawn_from_their_parent():
    """Their mean and covariance are the parent's: R diag(s²) Rᵀ."""
    count = 20_000
    model = make_model(1)
    with torch.no_grad():
        model.log_scales.copy_(torch.tensor([[0.5, 0.3, 0.2]]).log())
        model.raw_quats.copy_(torch.tensor([[3 * math.cos(0.4), 0, 0, 3 * math.sin(0.4)]]))  # 0.8 rad about z
        model.opacity_logits.fill_(2.0)
        model.means.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    model.reindex(torch.zeros(count, dtype=torch.long))
    density = control()
    pull(density, model, 600, [1.0] * count)
    density.after_step(model, 600)
    assert len(model) == 2 * count
    c, s = math.cos(0.8), math.sin(0.8)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    covariance = turn @ torch.diag(torch.tensor([0.25, 0.09, 0.04])) @ turn.T
    # 40,000 samples: the mean is off by 0.5 / 200 and a variance by 0.25 * sqrt(2) / 200 at one sigma.
    torch.testing.assert_close(model.means.mean(dim=0), torch.tensor([1.0, 2.0, 3.0]), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(model.means.T), covariance, rtol=0, atol=0.007)


def test_large_gaussians_go_after_the_first_opacity_reset():
    scales = [0.99, 1.01, 1.5, 1.7]
    for iteration, left in [(3000, [0, 1, 2, 3]), (3100, [0])]:
        model = model_with(scales, [0.5] * 4)
        old = model.sh_rest.detach().clone()
        density = control(opacity_reset_interval=3000)
        pull(density, model, iteration, [0.0] * 4)
        density.after_step(model, iteration)
        assert sorted(origins(model, old)) == left

    # Split ones are judged by the size of the children: 1.5 / 1.6 stays, 1.7 / 1.6 does not.
    model = model_with(scales, [0.5] * 4)
    old = model.sh_rest.detach().clone()
    density = control()
    pull(density, model, 3100, [0.0, 0.0, 1.0, 1.0])
    density.after_step(model, 3100)
    assert sorted(origins(model, old)) == [0, 2, 2]


def test_mean_is_over_the_views_that_saw_it():
    model = model_with([0.05] * 3, [0.5] * 3)
    density = control()
    stats = density.stats(model, 600)
    stats.grad_norm_sum += torch.tensor([1e-3, 1e-3, 0.0])
    stats.visits += torch.tensor([4.0, 6.0, 0.0])  # means 2.5e-4, 1.7e-4, and one that nobody saw
    density.after_step(model, 600)
    assert len(model) == 4


def test_absgrad():
    """Cloned and split are those whose absolute gradient is above the threshold; the other one has no say."""
    model = model_with([0.05, 0.05, 0.5, 0.5], [0.5] * 4)
    before = model.sh_rest.detach().clone()
    opt = parse_train("-s x --absgrad".split()).opt
    assert opt.densify_grad_threshold == 8e-4
    assert (
        parse_train("-s x --absgrad --densify_grad_threshold 6e-4".split()).opt.densify_grad_threshold == 6e-4
    )
    density = control(**vars(opt))
    pull(density, model, 600, [1.0, 0.0, 1.0, 0.0])
    density.stats(model, 600).abs_grad_norm_sum += 4 * torch.tensor([7.9e-4, 8.1e-4, 7.9e-4, 8.1e-4])
    other = control(**vars(opt))
    other.load_state_dict(density.state_dict())
    other.check(model)
    other.after_step(model, 600)
    assert sorted(origins(model, before)) == [0, 1, 1, 2, 3, 3]


def test_absgrad_goes_on_from_statistics_without_it():
    model = model_with([0.05] * 2, [0.5] * 2)
    for absolute in (False, True):
        density, other = control(absgrad=absolute), control(absgrad=not absolute)
        pull(density, model, 550, [1.0, 1.0])
        other.load_state_dict(density.state_dict())
        assert other._stats is None
        other.stats(model, 560)
        other.after_step(model, 600)
        assert len(model) == 2


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_absgrad_in_a_run(way, tmp_path):
    """The statistics of a step are those of the reference, in one native call and apart."""
    scene = tiny_scenes.colmap_scene(tmp_path / "scene")
    options = parse_train(["-s", str(scene), "-m", "m", "--absgrad", "--device", "cpu", way])
    trainer = Trainer(Scene(options.model, torch.device("cpu"), 0, quiet=True), options, print)
    before = {name: value.detach().double() for name, value in trainer.gaussians.params.items()}
    background = torch.zeros(3)
    trainer.step(1)
    stats = trainer.strategy.stats(trainer.gaussians, 1)
    camera = next(c for c in trainer.scene.train_cameras if c.name == trainer.last_view)

    truth = ScreenStats.zeros(len(trainer), "cpu", absolute=True)
    inputs = {name: value.requires_grad_() for name, value in before.items()}
    out = reference.rasterize(
        inputs["means"], inputs["raw_quats"], inputs["log_scales"].exp(), inputs["opacity_logits"].sigmoid(),
        sh_dc=inputs["sh_dc"], sh_rest=inputs["sh_rest"], sh_degree=0, background=background.double(),
        world_to_camera=camera.world_to_camera.double(), K=camera.K.double(), width=camera.width,
        height=camera.height, stats=truth,
    )  # fmt: skip
    photometric_loss(out.image.float(), camera.image(), 0.2)[0].backward()
    assert truth.abs_grad_norm_sum.max() > 2 * truth.grad_norm_sum.max() > 0
    assert torch.equal(stats.visits, truth.visits.float())
    for name in ("grad_norm_sum", "abs_grad_norm_sum"):
        theirs = getattr(truth, name).float()
        torch.testing.assert_close(getattr(stats, name), theirs, rtol=2e-3, atol=1e-4 * theirs.max().item())


def test_when():
    """With default flags: refined every 100 steps from 600 to 14,900; reset at 3, 6, 9 and 12 thousand."""
    for white, resets in [(False, [3000, 6000, 9000, 12_000]), (True, [500, 3000, 6000, 9000, 12_000])]:
        model, density = Recorder(), control(white=white)
        density.refine = lambda gaussians, prune_large: gaussians.refined.append((gaussians.at, prune_large))
        watched = []
        for iteration in range(1, 15_200):
            model.at = iteration
            if density.stats(model, iteration) is not None:
                watched.append(iteration)
            density.after_step(model, iteration)
        assert model.reset == resets
        assert model.refined == [(i, i > 3000) for i in range(600, 15_000, 100)]
        assert watched == list(range(1, 15_000))
        assert density._stats is None


class Recorder:
    """Stands where a model would, and notes what is asked of it."""

    device, ranks = torch.device("cpu"), ALONE

    def __init__(self):
        self.at, self.refined, self.reset = 0, [], []

    def __len__(self):
        return 1

    def reset_opacity(self):
        self.reset.append(self.at)


def test_same_generator_same_result():
    results = []
    for seed in (0, 0, 1):
        model = model_with([0.5] * 4, [0.5] * 4)
        density = control(seed)
        pull(density, model, 600, [1.0] * 4)
        torch.manual_seed(len(results))  # PyTorch's own generator has no say
        density.after_step(model, 600)
        results.append(model.means.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_nothing_left_and_nothing_to_do():
    model = model_with([0.05] * 3, [0.001] * 3)
    density = control()
    pull(density, model, 600, [0.0] * 3)
    density.after_step(model, 600)
    assert len(model) == 0
    density.stats(model, 601)
    density.after_step(model, 700)
    assert len(model) == 0


def test_state_goes_through_a_dictionary():
    model = model_with([0.5] * 4, [0.5] * 4)
    density = control(seed=5)
    pull(density, model, 550, [1.0, 0, 1.0, 0])
    other = control(seed=6)
    other.load_state_dict(density.state_dict())
    assert isinstance(other._stats, ScreenStats) and torch.equal(other._stats.visits, torch.full((4,), 4.0))
    twin = model_with([0.5] * 4, [0.5] * 4)
    density.after_step(model, 600)
    other.after_step(twin, 600)
    assert len(model) == 6 and torch.equal(model.means, twin.means)
    other.load_state_dict(density.state_dict())
    assert other._stats is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_for_the_gpu_only_to_learn_sizes():
    """A refinement of a million Gaussians is a few dozen kernels, nothing per row."""
    import time

    model = make_model(1_000_000)
    model.params = {name: torch.nn.Parameter(value.detach().cuda()) for name, value in model.params.items()}
    model.setup_optimizer(OptimizationParams())
    density = control()
    density.generator = torch.Generator("cuda").manual_seed(0)
    stats = density.stats(model, 600)
    stats.grad_norm_sum += torch.rand(len(model), device="cuda") * 2.2e-4
    stats.visits += 1
    torch.cuda.synchronize()
    start = time.perf_counter()
    density.after_step(model, 600)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert 900_000 < len(model) != 1_000_000
    assert seconds < 2, seconds  # 6 ms on an H100, and 0.4 s once for the loading of kernels
