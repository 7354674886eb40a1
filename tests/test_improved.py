"""--strategy improved: scores of edges, the curve to the budget, splits along the longest axis, recovery."""

import json
import math

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import photometric_loss, reference
from PIL import ImageFilter
from PIL.Image import fromarray

import train
from arguments import OptimizationParams, Options, PipelineParams, RunParams, parse_train
from gaussian_renderer import Splats
from scene import Scene
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from strategies import improved
from strategies.rows import draw_different
from strategies.scores import disagreement, edges, relative_shares, scores
from tests import tiny_scenes
from tests.test_mcmc import model_with, origins
from training import checkpoint
from training.trainer import Trainer

PIPE = PipelineParams()


def control(seed: int = 0, **options) -> improved.Improved:
    opt = parse_train("-s x --strategy improved".split()).opt
    opt = OptimizationParams(**vars(opt) | options)
    return improved.make(Options(None, opt, PIPE, RunParams(seed=seed)), 5.0, print)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


@pytest.fixture(scope="module")
def trainer(folder):
    options = parse_train(["-s", str(folder), "-m", "m", "--device", "cpu", "--strategy", "improved"])
    return Trainer(Scene(options.model, torch.device("cpu"), 0, quiet=True), options, print)


# Scores


def test_shares_are_parts_in_pixels(trainer):
    """Alone in the reference's picture, in float64, each Gaussian is as bright as its part."""
    model, camera = trainer.gaussians, trainer.scene.train_cameras[0]
    weights = torch.rand(camera.height, camera.width, generator=torch.Generator().manual_seed(0))
    ours = scores(model, camera, PIPE, weights=weights).weight_sum
    params = {name: value.detach().double() for name, value in model.params.items()}
    for row in (0, 7, 33):
        colors = torch.zeros(len(model), 3, dtype=torch.float64)
        colors[row] = 1
        image = reference.rasterize(
            params["means"], params["raw_quats"], params["log_scales"], params["opacity_logits"],
            colors=colors, world_to_camera=camera.world_to_camera.double(), K=camera.K.double(),
            width=camera.width, height=camera.height, background=torch.zeros(3).double(), raw=True,
        ).image  # fmt: skip
        expected = (image[0] * weights).sum()
        assert expected > 1e-3
        torch.testing.assert_close(ours[row].double(), expected, rtol=1e-4, atol=0)
    ones = torch.ones(camera.height, camera.width)
    alpha = trainer.shown.picture(camera).alpha.sum()
    shown = scores(model, camera, PIPE, weights=ones).weight_sum.sum()
    torch.testing.assert_close(shown, alpha, rtol=1e-5, atol=0)
    assert all(value.grad is None for value in model.params.values())


def test_edges_are_those_of_pillow(trainer):
    camera = trainer.scene.train_cameras[0]
    gray = fromarray(camera.image().permute(1, 2, 0).numpy()).convert("L")
    theirs = np.float64(gray.filter(ImageFilter.FIND_EDGES))[1:-1, 1:-1]
    ours = edges(camera)
    assert ours.max() == 1 and ours.min() == 0 and not ours[0].any() and not ours[:, -1].any()
    # Pillow rounds gray to integers, which the filter multiplies by up to 16.
    assert np.abs(ours[1:-1, 1:-1].numpy() - theirs / theirs.max()).max() < 16 / theirs.max()


def test_edge_scores_are_relative_to_the_mean_of_a_view(trainer):
    cameras = trainer.scene.train_cameras[:2]
    score = relative_shares(Splats(trainer.gaussians, PIPE, torch.zeros(3)), cameras, edges)
    expected = 0
    for camera in cameras:
        part = scores(trainer.gaussians, camera, PIPE, weights=edges(camera)).weight_sum
        expected = expected + part / part[part > 0].mean() / 2
    torch.testing.assert_close(score, expected)


def test_disagreement_is_the_variance_of_pulls_on_opacity(trainer):
    """By differences, in float64: how each pixel's loss changes with an opacity."""
    model, cameras = trainer.gaussians, trainer.scene.train_cameras[:2]
    ours = disagreement(Splats(model, PIPE, torch.ones(3)), cameras, 0.2)
    params = {name: value.detach().double() for name, value in model.params.items()}
    opacities = params["opacity_logits"].sigmoid()

    def picture(camera, opacities):
        quats = torch.nn.functional.normalize(params["raw_quats"], dim=-1)
        return reference.rasterize(
            params["means"], quats, params["log_scales"].exp(), opacities, sh_dc=params["sh_dc"],
            sh_rest=params["sh_rest"], world_to_camera=camera.world_to_camera.double(), K=camera.K.double(),
            width=camera.width, height=camera.height, background=torch.ones(3).double(),
        ).image  # fmt: skip

    for row in (0, 7, 33):
        step = torch.zeros_like(opacities)
        step[row] = 1e-6
        pulls = []
        for camera in cameras:
            image = picture(camera, opacities).float().requires_grad_()
            photometric_loss(image, camera.image(), 0.2)[0].backward()
            slope = (picture(camera, opacities + step) - picture(camera, opacities - step)) / 2e-6
            pulls.append((slope * image.grad.double()).sum(0)[slope.abs().sum(0) > 0])
        pulls = torch.cat(pulls)
        expected = pulls.var(correction=0) * len(pulls) * opacities[row, 0] ** 2
        assert len(pulls) > 20 and expected > 0
        torch.testing.assert_close(ours[row].double(), expected, rtol=1e-3, atol=0)


def test_draws_of_different_rows():
    """The first of several is drawn in proportion, and nobody twice."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 3.0])
    first = torch.stack([draw_different(weights, 3, generator) for _ in range(4000)])
    assert (first.sort(dim=1).values == torch.arange(3)).all() and (first[:, 2] == 0).all()
    assert abs((first[:, 0] == 2).float().mean() - 0.75) < 0.03  # 4 sigma
    assert len(draw_different(weights, 9, generator)) == 3


# Refinement


def pull(strategy, model, iteration, gradients) -> None:
    stats = strategy.stats(model, iteration)
    stats.abs_grad_norm_sum += 4 * torch.tensor(gradients)
    stats.visits += 4


def test_splits_along_the_longest_axis():
    model = model_with([0.5, 0.8, 0.004])
    with torch.no_grad():
        model.log_scales[1] = torch.tensor([0.1, 0.4, 0.2]).log()
        model.raw_quats[1] = 2 * torch.tensor([math.cos(0.3), 0, 0, math.sin(0.3)])  # 0.6 rad about z
    before = {name: value.detach().clone() for name, value in model.params.items()}
    strategy = control(cap_max=10_000)
    pull(strategy, model, 600, [2.9e-4, 3.1e-4, 1.0])
    strategy.after_step(model, 600)
    origin = origins(model, before["sh_rest"])
    assert sorted(origin.tolist()) == [0, 1, 1], "one is left alone, one split, one faint"
    for name in model.params:
        assert torch.equal(model.params[name][origin == 0], before[name][:1]), name
    for name in ("sh_dc", "raw_quats"):
        assert torch.equal(model.params[name][origin == 1], before[name][[1, 1]]), name
    across = math.sqrt(1 - 0.45**2)
    expected = torch.tensor([0.1 * across, 0.4 * 0.55, 0.2 * across])
    torch.testing.assert_close(model.scales[origin == 1], expected.expand(2, 3))
    torch.testing.assert_close(model.opacities[origin == 1], torch.full((2, 1), 0.48))
    moved = model.means[origin == 1] - before["means"][1]
    axis = torch.tensor([-math.sin(0.6), math.cos(0.6), 0.0])
    torch.testing.assert_close(moved @ axis, (moved @ axis).sign() * 1.35 * 0.4)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((2,), 1.35 * 0.4))
    assert moved.sum(0).abs().max() < 1e-6
    state = model.optimizer.state[model.means]["exp_avg"]
    assert not state[origin == 1].any() and state[origin == 0].any()


@pytest.mark.parametrize("budget, iteration", [(36, 4000), (60, 4000), (60, 14_600), (2000, 9000), (50, 600)])
def test_the_count_is_the_budget_or_all_candidates(trainer, budget, iteration):
    model = model_with([0.5] * 40)
    with torch.no_grad():
        model.params["means"].mul_(0.5)
    strategy = control(cap_max=budget)
    strategy.see(trainer.scene.train_cameras, PIPE, torch.zeros(3))
    pull(strategy, model, iteration, [0.0] * 10 + [1e-3] * 30)
    part = min((iteration - 500) / 14_000, 1)
    assert strategy.allowed(iteration) == int(budget * math.sqrt(part))
    strategy.after_step(model, iteration)
    assert len(model) == max(40, min(strategy.allowed(iteration), 70))


def test_late_candidates_are_those_that_are_pulled_hardest():
    model = model_with([0.5] * 5)
    before = model.sh_rest.detach().clone()
    strategy = control(cap_max=6)
    pull(strategy, model, 14_600, [2.1e-4, 1.9e-4, 1e-9, 0, 0])
    strategy.after_step(model, 14_600)
    assert sorted(origins(model, before).tolist()) == [0, 0, 1, 2, 3, 4]


def test_when():
    """Cleaned at 300; reset at 3, 6, 9 and 12 thousand; a fifth goes 300 after the first two resets."""
    happened = {"reset": [], "refined": [], "fifth": [], "cleaned": []}
    strategy, model = control(), model_with([0.5] * 3)
    model.reset_opacity = lambda most: happened["reset"].append((at, most))
    strategy.refine = lambda gaussians, iteration: happened["refined"].append(iteration)
    strategy._drop_faintest = lambda gaussians: happened["fifth"].append(at)
    strategy._keep_above = lambda gaussians, opacity: happened["cleaned"].append((at, opacity))
    watched = []
    for at in range(1, 15_200):
        watched += [at] if strategy.stats(model, at) is not None else []
        strategy.after_step(model, at)
    assert happened["reset"] == [(at, 0.05) for at in (3000, 6000, 9000, 12_000)]
    assert happened["refined"] == list(range(600, 15_000, 100))
    assert happened["fifth"] == [3300, 6300] and happened["cleaned"] == [(300, 0.02)]
    assert watched == list(range(501, 15_000)) and strategy._stats is None


def test_what_does_not_recover_goes():
    opacities = [0.3, 0.01, 0.5, 0.02, 0.4, 0.6, 0.7, 0.8, 0.9, 0.35]
    model = model_with(opacities)
    before = model.sh_rest.detach().clone()
    control().after_step(model, 3300)
    assert sorted(origins(model, before).tolist()) == [0, 2, 4, 5, 6, 7, 8, 9]
    model = model_with([0.019, 0.021])
    control().after_step(model, 300)
    assert len(model) == 1


def test_views_of_a_refinement(trainer):
    strategy = control()
    strategy.see(trainer.scene.train_cameras * 3, PIPE, torch.zeros(3))
    assert len(strategy._views(3300)) == 10 and len(strategy._views(3400)) == 24 == len(strategy._views(6400))
    assert len(strategy._views(9400)) == 10


def test_out_of_memory_leaves_all_as_it_was():
    model, strategy = model_with([0.5] * 4), control()
    pull(strategy, model, 600, [1.0] * 4)
    before = model.means.detach().clone()

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError

    model.reindex, strategy.say = fails, lambda text: None
    strategy.after_step(model, 600)
    assert torch.equal(model.means, before) and strategy.allowed(14_000) == 4 and strategy._stats is None


def test_the_least_visible_go_until_final_count(trainer):
    """By the same part in each of 16 rounds, 468 iterations apart. What no view shows goes first."""
    model = trainer.gaussians
    counts, strategy = [], control(cap_max=100, final_count=11)
    strategy.see(trainer.scene.train_cameras, PIPE, torch.zeros(3))
    with torch.no_grad():
        model.means[3:6] += 1e4
    hidden = model.sh_dc[3:6].detach().clone()
    for iteration in range(14_999, 30_001):
        strategy.after_step(model, iteration)
        counts.append(len(model))
        if len(model) < 37:
            assert not (model.sh_dc[:, None] == hidden).flatten(2).all(2).any()
    changes = [i for i, (a, b) in enumerate(zip(counts, counts[1:]), start=15_000) if a != b]
    assert changes == list(range(15_000, 15_000 + 16 * 468, 468)) and counts[-1] == 11
    assert counts[1] == round(40 * (11 / 40) ** (1 / 16))


# Runs

LINE = [
    "--strategy", "improved", "--iterations", "400", "--densify_from_iter", "20", "--densification_interval",
    "20", "--densify_until_iter", "380", "--opacity_reset_interval", "150", "--position_lr_init", "1.6e-3",
    "--position_lr_max_steps", "400", "--device", "cpu", "--disable_viewer", "--quiet",
    "--feature_lr", "0.01", "--opacity_lr", "0.1", "--scaling_lr", "0.02", "--test_iterations", "1",
    "--cap_max", "90", "--densify_grad_threshold", "1e-5",
]  # fmt: skip


def run(folder, out, *options) -> dict:
    arguments = [*LINE, "-s", str(folder), "-m", str(out), *options, "--checkpoint_iterations", "95", "400"]
    assert train.main(arguments) == 0
    return checkpoint.read(ModelFolder(out).checkpoint(400))["parts"]["gaussians"]["params"]


def same(ours: dict, theirs: dict) -> bool:
    return all(ours[n].shape == v.shape and torch.equal(ours[n], v) for n, v in theirs.items())


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_a_run_raises_psnr_within_the_budget_and_resumes(folder, tmp_path, way):
    whole = run(folder, tmp_path / "whole", way)
    scores = json.loads((tmp_path / "whole" / "summary.json").read_text())["scores"]["train"]
    assert scores["400"]["psnr"] > scores["1"]["psnr"] + 8, scores
    assert 60 < len(load_ply(ModelFolder(tmp_path / "whole").ply(400))) <= 90
    start = str(ModelFolder(tmp_path / "whole").checkpoint(95))
    assert same(run(folder, tmp_path / "on", way, "--start_checkpoint", start), whole)
    assert not same(run(folder, tmp_path / "other", way, "--seed", "1"), whole)


def test_final_count_of_a_run(folder, tmp_path, capsys):
    run(folder, tmp_path / "m", "--final_count", "31", "--densify_until_iter", "300")
    assert len(load_ply(ModelFolder(tmp_path / "m").ply(400))) == 31
    line = ["-s", str(folder), "-m", str(tmp_path / "n"), "--final_count", "31", "--iterations", "380"]
    assert train.main([*LINE, *line]) == 1
    assert "final_count is reached after densification" in capsys.readouterr().err


def test_a_budget_is_asked_for(folder, tmp_path, capsys):
    assert train.main([*LINE, "-s", str(folder), "-m", str(tmp_path / "m"), "--cap_max", "0"]) == 1
    assert "cap_max must be at least 1 with --strategy improved" in capsys.readouterr().err
