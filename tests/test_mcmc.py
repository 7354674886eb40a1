"""--strategy mcmc: relocation, growth to the cap, noise, regularizers, exact resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import train
from arguments import ModelParams, OptimizationParams, Options, PipelineParams, RunParams, parse_train
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from scene.gaussian_model import GaussianModel
from strategies import mcmc
from strategies.rows import draw
from tests import tiny_scenes
from tests.test_gaussians import make_model, moments, some_steps
from training import checkpoint
from training.losses import mean_opacity, mean_scale
from utils.geometry import rotation_matrices

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def chain(seed: int = 0, extent: float = 5.0, device: str = "cpu", **options) -> mcmc.MarkovChain:
    opt = OptimizationParams(strategy="mcmc", **{"cap_max": 1000, **options})
    groups = Options(ModelParams(), opt, PipelineParams(), RunParams(seed=seed, device=device))
    return mcmc.make(groups, extent, print)


def model_with(opacities: list[float], **options) -> GaussianModel:
    """Every row has colors of its own, which nothing here changes, and Adam moments that are not zero."""
    model = make_model(len(opacities), **options)
    some_steps(model)
    with torch.no_grad():
        model.opacity_logits.copy_(torch.tensor(opacities).logit()[:, None])
    return model


def origins(model: GaussianModel, before: torch.Tensor) -> torch.Tensor:
    same = (model.sh_rest[:, None] == before[None]).flatten(2).all(2)
    return same.int().argmax(1)


# Relocation

WORKED = [  # opacity, copies, their opacity, ratio of scales: from the formula, in 50 digits
    (0.5, 2, 0.292893, 0.952152),
    (0.9, 2, 0.683772, 0.867938),
    (0.9, 5, 0.369043, 0.797124),
    (0.1, 3, 0.034511, 0.989814),
    (0.999, 50, 0.129036, 0.584918),
]


@pytest.mark.parametrize("opacity, copies, shared, ratio", WORKED)
def test_shared_opacity_and_scale(opacity, copies, shared, ratio):
    ours = mcmc.shared_opacity(torch.tensor([opacity], dtype=torch.float64), torch.tensor([copies]))
    assert [round(value.item(), 6) for value in ours] == [shared, ratio]


@pytest.mark.parametrize("opacity, copies", [row[:2] for row in WORKED] + [(0.006, 2), (0.02, 51), (1.0, 51)])
def test_a_line_through_the_center_keeps_its_alpha(opacity, copies):
    """The integral of alpha over it, of one Gaussian of scale 1 before and of all copies together after. It
    holds for copies that are held at the opacity of dead ones, too."""
    shared, ratio = mcmc.shared_opacity(torch.tensor([opacity], dtype=torch.float64), torch.tensor([copies]))
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    before = opacity * torch.exp(-(x**2) / 2)
    after = 1 - (1 - shared * torch.exp(-((x / ratio) ** 2) / 2)) ** copies
    assert abs(torch.trapezoid(after, x) / torch.trapezoid(before, x) - 1) < 1e-6


@pytest.mark.parametrize("opacity, copies, change", [(0.5, 2, 0.006), (0.9, 2, 0.041), (0.9, 50, 0.076)])
def test_the_largest_change_of_alpha(opacity, copies, change):
    shared, ratio = mcmc.shared_opacity(torch.tensor([opacity], dtype=torch.float64), torch.tensor([copies]))
    x = torch.linspace(0, 12, 100_001, dtype=torch.float64)
    after = 1 - (1 - shared * torch.exp(-((x / ratio) ** 2) / 2)) ** copies
    assert round((after - opacity * torch.exp(-(x**2) / 2)).abs().max().item(), 3) == change


def test_more_copies_than_the_formula_is_for():
    opacity, ratio = mcmc.shared_opacity(torch.tensor([0.9] * 2), torch.tensor([51, 4000]))
    assert opacity[0] == opacity[1] and ratio[0] == ratio[1]
    assert all(value.isfinite().all() for value in mcmc.shared_opacity(torch.rand(99), torch.arange(1, 100)))


def test_dead_ones_move_onto_living_ones():
    dead, alive = [0.004, 0.001], [0.0051, 0.9, 0.6]
    model = model_with(dead + alive)
    before = {name: value.detach().clone() for name, value in model.params.items()}
    had_moments = {name: state["exp_avg"].clone() for name, state in moments(model).items()}
    strategy = chain(cap_max=5, noise_lr=0.0)
    strategy.after_step(model, 600)

    origin = origins(model, before["sh_rest"])
    count = torch.bincount(origin, minlength=5)
    assert len(model) == 5 and count[:2].sum() == 0 and (count[2:] >= 1).all()
    opacity, ratio = mcmc.shared_opacity(before["opacity_logits"][:, 0].double().sigmoid(), count)
    shared = count[origin] > 1
    assert 2 <= shared.sum() <= 4
    torch.testing.assert_close(model.opacities[shared, 0], opacity[origin][shared].float())
    scales = before["log_scales"].exp() * ratio[:, None].float()
    torch.testing.assert_close(model.scales[shared], scales[origin][shared])
    for name in ("means", "sh_dc", "sh_rest", "raw_quats"):
        assert torch.equal(model.params[name], before[name][origin]), name
    for name in ("opacity_logits", "log_scales"):
        assert torch.equal(model.params[name][~shared], before[name][origin][~shared]), name
    for name, state in moments(model).items():
        assert not state["exp_avg"][shared].any() and not state["exp_avg_sq"][shared].any()
        assert torch.equal(state["exp_avg"][~shared], had_moments[name][origin][~shared])
    strategy = chain(cap_max=5, noise_lr=0.0)
    left = {name: value.detach().clone() for name, value in model.params.items()}
    for iteration in (500, 650, 601, 25_000, 25_100):  # not at these
        strategy.after_step(model, iteration)
        assert all(torch.equal(value, left[name]) for name, value in model.params.items())


@pytest.mark.parametrize("opacities", [[0.001] * 3, [0.5] * 3, [0.001]])
def test_nobody_or_everybody_is_dead(opacities):
    model = model_with(opacities)
    chain(cap_max=len(opacities)).after_step(model, 600)
    assert len(model) == len(opacities) and model.finite().all()


# Growth


def test_grows_by_a_twentieth_up_to_the_cap():
    model = model_with([0.5] * 100)
    strategy, counts = chain(cap_max=118), []
    for iteration in range(600, 1100, 100):
        strategy.after_step(model, iteration)
        counts.append(len(model))
    assert counts == [105, 110, 115, 118, 118]
    few = model_with([0.5])
    for iteration in range(600, 1000, 100):
        chain(seed=iteration).after_step(few, iteration)
    assert len(few) == 5, "a handful grows, too"


def test_what_is_born_shares_with_its_parents():
    model = model_with([0.5] * 40)
    before = model.sh_rest.detach().clone()
    chain(noise_lr=0.0).after_step(model, 600)
    count = torch.bincount(origins(model, before), minlength=40)
    assert count.sum() == 42 and count.min() == 1
    expected = 1 - 0.5 ** (1 / count[origins(model, before)])
    torch.testing.assert_close(model.opacities[:, 0], expected)


def test_memory_bounds_growth():
    model = model_with([0.5] * 100)
    strategy = chain()
    strategy.limit(102)
    other = chain(seed=9)
    other.load_state_dict(strategy.state_dict())
    other.after_step(model, 600)
    assert len(model) == 102

    strategy, said = chain(), []
    strategy.say = said.append

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError

    model.reindex = fails
    before = model.opacity_logits.clone()
    strategy.after_step(model, 700)
    assert torch.equal(model.opacity_logits, before) and strategy.fits == 102
    assert said == ["out of memory: densification at iteration 700 undone; from now on there are at most "
                    "102 Gaussians"]  # fmt: skip


# Draws


@pytest.mark.parametrize("device", DEVICES)
def test_draws_are_in_proportion(device):
    weights = torch.tensor([0.0, 0.5, 0.0, 0.25, 1.0, 0.0], device=device)
    generator = torch.Generator(device).manual_seed(0)
    count = torch.bincount(draw(weights, 70_000, generator), minlength=6)
    assert not count[[0, 2, 5]].any()
    # one sigma of a count is 140 at most
    torch.testing.assert_close(count.double().cpu(), 40_000 * weights.double().cpu(), rtol=0, atol=600)
    assert len(draw(weights * 0, 5, generator)) == len(draw(weights[:0], 5, generator)) == 0


def test_draws_from_more_than_a_multinomial_takes():
    weights = torch.zeros(2**24 + 5)
    weights[[3, 2**24 + 4]] = 1e-3
    assert set(draw(weights, 50, torch.Generator().manual_seed(0)).tolist()) == {3, 2**24 + 4}


# Noise


@pytest.mark.parametrize("device", DEVICES)
def test_noise_goes_through_the_covariance_and_a_gate(device):
    """Against the formula in float64, with the same normal numbers."""
    opacities = [0.001, 0.005, 0.01, 0.05, 0.9]
    model = model_with(opacities, extent=5.0)
    model.params = {n: torch.nn.Parameter(v.detach().to(device)) for n, v in model.params.items()}
    model.setup_optimizer(OptimizationParams())
    model.schedule(10_000)
    before = model.means.detach().double().cpu()
    chain(device=device).explore(model)
    normal = torch.randn(5, 3, generator=torch.Generator(device).manual_seed(0), device=device).double().cpu()

    rate = 5 * math.exp(math.log(1.6e-4) * 2 / 3 + math.log(1.6e-6) / 3)
    turn = rotation_matrices(model.raw_quats.detach().double().cpu())
    covariance = turn @ torch.diag_embed(model.scales.detach().double().cpu() ** 2) @ turn.mT
    gate = 1 / (1 + torch.exp(100 * (torch.tensor(opacities, dtype=torch.float64) - 0.005)))
    assert gate[1] == 0.5 and abs(gate[3] - 0.011) < 1e-4
    expected = (covariance @ normal[:, :, None])[:, :, 0] * gate[:, None] * 5e5 * rate
    moved = model.means.detach().double().cpu() - before
    torch.testing.assert_close(moved[:4], expected[:4], rtol=1e-4, atol=1e-5)
    assert moved[0].abs().max() > 0.1 and moved[4].abs().max() < 1e-6 < moved[3].abs().max()


def test_noise_is_the_same_in_a_scene_of_any_size():
    steps = []
    for size in (1.0, 40.0):
        model = model_with([0.01] * 50, extent=5.0 * size)
        with torch.no_grad():
            model.means.zero_()
            model.log_scales.add_(math.log(size))
        chain().explore(model)
        steps.append(model.means.detach() / size)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=0)
    assert steps[0].std() > 0


def test_no_noise_where_positions_do_not_move():
    for options in ({"extent": 0.0}, {"position_lr_init": 0.0, "position_lr_final": 0.0}):
        model = model_with([0.01] * 3, **options)
        before = model.means.detach().clone()
        chain().explore(model)
        assert torch.equal(model.means, before)


def test_noise_in_pieces(monkeypatch):
    monkeypatch.setattr(mcmc, "PIECE", 7)
    model = model_with([0.01] * 20)
    before = model.means.detach().clone()
    chain().explore(model)
    assert ((model.means - before) != 0).all()


# Runs


def test_flags_bring_their_own_defaults():
    opt = parse_train("-s x --strategy mcmc".split()).opt
    assert (opt.opacity_lr, opt.densify_until_iter, opt.cap_max) == (0.05, 25_000, 1_000_000)
    opt = parse_train("-s x --strategy mcmc --opacity_lr 0.025 --cap_max 7".split()).opt
    assert (opt.opacity_lr, opt.densify_until_iter, opt.cap_max) == (0.025, 25_000, 7)
    assert parse_train(["-s", "x"]).opt == OptimizationParams()


def test_a_cap_is_asked_for(scene, tmp_path, capsys):
    assert train.main([*LINE, "-s", str(scene), "-m", str(tmp_path / "m"), "--cap_max", "0"]) == 1
    assert "cap_max must be at least 1 with --strategy mcmc" in capsys.readouterr().err


LINE = [
    "--strategy", "mcmc", "--iterations", "120", "--densify_from_iter", "5", "--densification_interval", "10",
    "--densify_until_iter", "100", "--position_lr_max_steps", "120", "--device", "cpu", "--disable_viewer",
    "--quiet", "--test_iterations", "1", "--feature_lr", "0.02", "--scaling_lr", "0.02",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


def run(scene, folder, *options) -> dict:
    """The parts of the last checkpoint."""
    arguments = [*LINE, "-s", str(scene), "-m", str(folder), *options]
    assert train.main(arguments) == 0
    return checkpoint.read(ModelFolder(folder).checkpoint(120))["parts"]


def same(ours: dict, theirs: dict) -> bool:
    pairs = [(ours["gaussians"]["params"][n], v) for n, v in theirs["gaussians"]["params"].items()]
    pairs.append((ours["mcmc"]["generator"], theirs["mcmc"]["generator"]))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(scene, tmp_path_factory):
    """A run, and its last state."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    options = ("--cap_max", "55", "--checkpoint_iterations", "47", "70", "120")
    return folder, run(scene, folder, *options)


def test_a_run_raises_psnr_up_to_the_cap(whole):
    folder, parts = whole

    scores = json.loads((folder / "summary.json").read_text())["scores"]["train"]
    assert scores["120"]["psnr"] > scores["1"]["psnr"] + 8, scores
    assert len(load_ply(ModelFolder(folder).ply(120))) == 55 == len(parts["gaussians"]["params"]["means"])


@pytest.mark.parametrize("at", [47, 70])
def test_a_continued_run_ends_with_the_same_bits(whole, scene, tmp_path, at):
    """Between refinements, and at one."""
    folder, expected = whole
    start = ["--start_checkpoint", str(ModelFolder(folder).checkpoint(at))]
    ours = run(scene, tmp_path / "m", "--cap_max", "55", "--checkpoint_iterations", "120", *start)
    assert same(ours, expected)


def test_the_seed_decides(whole, scene, tmp_path):
    options = ("--cap_max", "55", "--checkpoint_iterations", "120")
    assert same(run(scene, tmp_path / "a", *options), whole[1])
    assert not same(run(scene, tmp_path / "b", *options, "--seed", "1"), whole[1])


def test_start_and_regularizers(scene, tmp_path):
    """Opacities of 0.5 and a tenth of the distance to the neighbors; heavy weights bring both down."""
    for weight, name in (("0", "free"), ("10", "held")):
        line = ["--opacity_reg", weight, "--scale_reg", weight, "--checkpoint_iterations", "120"]
        run(scene, tmp_path / name, "--cap_max", "55", *line)
    free, held = (load_ply(ModelFolder(tmp_path / name).ply(120)) for name in ("free", "held"))
    assert held.opacities.mean() < 0.5 * free.opacities.mean()
    assert held.scales.mean() < 0.7 * free.scales.mean()
    strategy, model = chain(), make_model(4)
    scales = model.scales.detach()
    strategy.start(model)
    torch.testing.assert_close(model.opacities, torch.full((4, 1), 0.5))
    torch.testing.assert_close(model.scales, 0.1 * scales)


def test_regularizers_are_means():
    class Trainer:
        gaussians = make_model(7)
        opt = OptimizationParams(opacity_reg=0.5, scale_reg=0.25)
        splats = SimpleNamespace(mean=torch.mean)

    opacity, scale = (term(None, None, Trainer, 1) for term in (mean_opacity, mean_scale))
    torch.testing.assert_close(opacity, 0.5 * Trainer.gaussians.opacities.mean())
    torch.testing.assert_close(scale, 0.25 * Trainer.gaussians.scales.mean())


def test_a_ply_starts_as_it_is(whole, scene, tmp_path):
    """Its opacities and scales are not those of points."""
    ply = tmp_path / "scene.ply"  # not in a folder that names an iteration
    ply.write_bytes(ModelFolder(whole[0]).ply(120).read_bytes())
    line = ["--start_checkpoint", str(ply), "--iterations", "1", "--noise_lr", "0", "--overwrite"]
    assert train.main([*LINE, "-s", str(scene), "-m", str(tmp_path / "m"), *line]) == 0
    ours, theirs = load_ply(ModelFolder(tmp_path / "m").ply(1)), load_ply(ply)
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=0.1, atol=0)
