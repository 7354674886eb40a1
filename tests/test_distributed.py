"""Several processes that train one model: everything is as in one process with steps of as many views."""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

import distributed
import strategies
import train
from arguments import ConfigError, parse_train
from distributed import ALONE, Ranks, board
from gaussian_renderer import sharded
from gaussian_renderer.fused_sharded import ShardedIteration
from per_view import Motion, PerView, motion, per_photo
from scene import Scene
from scene.folder import ModelFolder
from scene.formats import read as read_ply
from scene.gaussian_model import GaussianModel
from strategies import adc
from strategies.scores import disagreement
from strategies.strategy import Strategy
from tests import dealt_twin, tiny_scenes
from tests.processes import in_processes, in_turn, joined, results_of
from tests.test_step_options import LINE
from training import checkpoint, health, method, report
from training.dealt import expect_possible
from training.run import device_of_rank
from training.trainer import Trainer
from utils.files import DataError

EXACT = 1e-12


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return str(tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene"))


def trainer(scene: str, *words: str, double: bool = False, device: str = "cpu") -> Trainer:
    options = parse_train(["-s", scene, "-m", "m", *LINE, "--no-fused", *words])
    torch.manual_seed(0)
    one = Trainer(Scene(options.model, torch.device(device), 0, quiet=True), options, lambda *lines: None)
    if double:
        in_double(one)
    return one


def in_double(one: Trainer) -> None:
    """Pictures and gradients are float64 from here on."""
    gaussians = one.gaussians
    gaussians.params = {k: torch.nn.Parameter(v.detach().double()) for k, v in gaussians.params.items()}
    gaussians.setup_optimizer(one.opt)
    cameras = one.scene.train_cameras + one.scene.test_cameras
    for camera in cameras:
        camera.world_to_camera, camera.K = camera.world_to_camera.double(), camera.K.double()
    one.scene.background = one.splats.background = one.scene.background.double()
    for module in one.modules:
        all_in_double(module)


def all_in_double(module: PerView) -> None:
    for name, value in vars(module).items():
        if isinstance(value, torch.nn.Parameter):
            setattr(module, name, torch.nn.Parameter(value.detach().double()))
        elif isinstance(value, torch.Tensor):
            setattr(module, name, value.double())
        elif isinstance(value, per_photo.Seen):
            setattr(module, name, per_photo.Seen(*(part.double() for part in value)))
        elif isinstance(value, torch.nn.Module):
            value.double()  # in place, as its optimizer needs it
        elif isinstance(value, PerView):
            all_in_double(value)


def rough(one: Trainer) -> None:
    """Turned, drawn out, of different opacities and in color: so that every gradient is there."""
    gaussians = one.gaussians
    with torch.no_grad():
        for at, value in enumerate(gaussians.params.values()):
            whole = torch.linspace(-1, 1, gaussians.total * value.shape[1:].numel(), dtype=value.dtype)
            whole = (17 * (at + 1) * whole).sin().view(gaussians.total, *value.shape[1:])
            value.add_(0.2 * gaussians.own(whole).to(value.device))
    gaussians.active_sh_degree = 3
    for module in one.modules:
        if isinstance(module, Motion):
            module.counts = [1, 7, 3, 2, 5, 1, 4, 6]  # pictures that photos are made of
            for camera in one.scene.train_cameras[::2]:
                camera.K = camera.K.clone()
                camera.K[0, 2] += 0.9 * camera.width  # much is out of view


def states(one: Trainer) -> dict[str, torch.Tensor]:
    """All that was learned, whole, in the order of the rows."""
    gaussians = one.gaussians
    found = {f"{name} now": gaussians.from_all(value.detach()) for name, value in gaussians.params.items()}
    for group in gaussians.optimizer.param_groups:
        state = gaussians.optimizer.state[group["params"][0]]
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} of {group['name']}"] = gaussians.from_all(state[key])
    stats = one.strategy.stats(gaussians, 1)
    for name, value in vars(stats).items():
        if value is not None:
            found[name] = gaussians.from_all(value)
    for module in one.modules:
        found |= {f"{module.name} {i}": v.detach() for i, v in enumerate(module.parameters())}
        found |= dict(tensors(module.state_dict(), module.name))
    return {name: value.clone() for name, value in found.items()}


def tensors(state: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a state, with names."""
    if isinstance(state, torch.Tensor):
        yield name, state.detach()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name} {key}")


def met(by_board: bool) -> list:
    """What processes tell each other, and what they do not do when one of them cannot."""
    board.possible = lambda: by_board  # in a process of its own
    with joined() as ranks:
        found = [ranks.meet("here", ranks.rank, 7), ranks.most(ranks.rank), ranks.any(ranks.rank == 1)]
        found.append(ranks.mean([0.1 * number + ranks.rank for number in range(11)]))
        for _ in range(50):
            ranks.meet("again and again")
        try:
            with ranks.together():
                if ranks.rank == 1:
                    raise MemoryError
            ranks.meet("there")
        except (MemoryError, torch.OutOfMemoryError) as error:
            found.append(str(error))
        found.append(ranks.meet("after that", -ranks.rank))
        try:
            ranks.meet("one place" if ranks.rank else "another place")
        except RuntimeError as error:
            found.append(str(error)[:29])
    return found


def test_processes_meet():
    """On a board in memory that they share, or over sockets."""
    for rank, found in enumerate(in_processes(3, in_turn, {"board": (met, True), "sockets": (met, False)})):
        reason = "" if rank == 1 else "out of memory on rank 1 (there)"
        mean = pytest.approx([0.1 * number + 1 for number in range(11)], rel=1e-15)
        expected = [[[0, 7], [1, 7], [2, 7]], 2, True, mean, reason, [[0], [-1], [-2]]]
        assert found["board"] == found["sockets"] == [*expected, "processes are out of step: on"]


def steps(
    scene: str, words: tuple, count: int, views: int, keep: int | None = None, native: bool = False
) -> tuple[dict, dict]:
    """A few steps in float64, of a model of `keep` rows. native: as on GPUs, with twins of the kernels."""
    one = trainer(scene, *words, "--views_per_step", str(views), double=True)
    if keep is not None:
        one.gaussians.reindex(torch.arange(keep))
        one.strategy.forget()
    rough(one)
    if native:
        library = dealt_twin.register()
        one.native = ShardedIteration(one.scene.train_cameras, one.ranks, one.options, one.device)
    losses = [one.step(views * (i + 1)) for i in range(count)]
    if native:
        assert one.native and not one.gaussians.collected
        library._destroy()
    numbers = one.ranks.mean([float(v) for v in losses[-1].values()])
    return dict(zip(losses[-1], numbers)), states(one)


def resting(scene: str) -> dict:
    """After a step, one of photos that have no kernels: as test views that are half trained on have none."""
    one = trainer(scene, *WORDS["kernel"], "--views_per_step", "2", double=True)
    rough(one)
    one.step(2)
    for camera in one.scene.train_cameras:
        camera.is_test = True
    one.step(4)
    return states(one)


NATIVE = ["plain", "antialiasing", "regularized", "background", "smaller"]  # of WORDS


def all_of(jobs: dict) -> dict:
    """What functions return, by name, in processes that are joined once."""
    with joined():
        return {name: function(*arguments) for name, (function, *arguments) in jobs.items()}


def jobs_of(scene: str, count: int) -> dict[tuple, tuple]:
    """What so many processes are asked for."""
    jobs: dict[tuple, tuple] = {}
    for views in {2: (2, 3), 3: (3, 4)}[count]:
        jobs |= {("steps", name, views): (steps, scene, words, 1, views) for name, words in WORDS.items()}
    jobs |= {("native", name): (steps, scene, WORDS[name], 3, count, None, True) for name in NATIVE}
    if count == 3:
        jobs |= {("rows", keep): (steps, scene, (), 2, 3, keep) for keep in (0, 1, 2, 4)}
        jobs |= {("native rows", keep): (steps, scene, (), 2, 3, keep, True) for keep in (0, 1, 2, 4)}
        jobs |= {("pictures", words): (judged, scene, words) for words in JUDGED}
    if count == 2:
        jobs[("resting",)] = (resting, scene)
    jobs[("disagreement",)] = (disagreeing, scene)
    jobs |= {("refined", name): (refined, scene, REFINED[name], 6, 84) for name in GROWN[count]}
    return jobs


@pytest.fixture(scope="module")
def found(scene):
    """By how many processes there are, of each of them."""
    return {count: in_processes(count, all_of, jobs_of(scene, count)) for count in (2, 3)}


def compare(found: tuple[dict, dict], expected: tuple[dict, dict], name) -> None:
    assert found[0] == pytest.approx(expected[0], rel=EXACT), name
    assert found[1].keys() == expected[1].keys()
    for what, value in expected[1].items():
        limit = 1e-6 if value.dtype == torch.float32 else EXACT  # statistics are float32
        assert found[1][what].shape == value.shape, (name, what)
        if value.numel():
            most = value.abs().max().clamp_min(1e-30)
            assert (found[1][what] - value).abs().max() <= limit * most, (name, what)


BLURRED = "--pose_from_iter", "0", "--blur_from_iter", "0", "--blur"
WORDS = {
    "plain": (),
    "antialiasing": ("--antialiasing", "--absgrad"),
    "regularized": ("--opacity_reg", "0.3", "--scale_reg", "0.2"),
    "modules": ("--poses", "--pose_from_iter", "0", "--train_test_exp"),
    "background": ("--random_background", "--white_background"),
    "filter": ("--filter_3d",),
    "covariances": ("--compute_cov3D_python",),
    "smaller": ("--coarse_until", "50"),
    "motion": (*BLURRED, "motion", "--absgrad", "--opacity_reg", "0.3", "--blur_weights", "--poses"),
    "light": (*BLURRED, "motion", "--blur_space", "linear", "--blur_path", "spline"),
    "defocus": (*BLURRED, "defocus", "--blur_samples", "4", "--train_test_exp", "--eval"),
    "kernel": (*BLURRED, "kernel", "--train_test_exp", "--eval"),
}


@pytest.mark.parametrize("count, views", [(2, 2), (2, 3), (3, 3), (3, 4)])
def test_steps_are_those_of_one_process(scene, found, count, views):
    """Moments (that is, gradients), statistics, losses and what is learned of photos; shards are uneven, and
    where views are fewer than processes, one of these shows none."""
    for name, words in WORDS.items():
        expected = steps(scene, words, 1, views)
        assert expected[1]["visits"].max() >= 2 and expected[1]["exp_avg of means"].abs().max() > 1e-8
        for results in found[count]:
            compare(results["steps", name, views], expected, name)


def test_what_no_photo_of_a_step_teaches_rests(scene, found):
    expected = resting(scene)
    assert expected["kernel optimizer state 0 step"] == 1
    for results in found[2]:
        compare(({}, results[("resting",)]), ({}, expected), "resting")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NATIVE)
def test_native_steps_are_those_of_one_process(scene, found, count, name):
    """What GPUs do, but for the kernels. The loss that a native step shows is without regularizers."""
    losses, expected = steps(scene, WORDS[name], 3, count)
    for results in found[count]:
        ours, values = results["native", name]
        shown = {key: losses[key] for key in losses if key == "l1" or name != "regularized"}
        compare(({key: ours[key] for key in shown}, values), (shown, expected), name)


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_processes_without_rows(scene, found, keep):
    """A model of fewer Gaussians than processes, or of none."""
    expected = steps(scene, (), 2, 3, keep)
    for results in found[3]:
        compare(results["rows", keep], expected, keep)
        compare(results["native rows", keep], expected, keep)


def on_gpus(scene: str, words: tuple) -> list[dict[str, torch.Tensor]]:
    """Of one process and of all, what is learned in three steps."""
    with joined(gpu=True) as ranks:
        torch.cuda.set_device(ranks.rank)
        found = []
        for how in (ALONE, ranks):
            distributed.current = lambda how=how: how
            one = trainer(scene, *words, "--views_per_step", "2", device=f"cuda:{ranks.rank}")
            rough(one)
            one.native = None if how.alone else one.native  # in one process taken apart
            for iteration in (2, 4, 6):
                one.step(iteration)
            found.append({name: value.cpu() for name, value in states(one).items()})
            assert how.alone or (one.native is not None) == ("--fused" in words)
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "name, way", [(name, "--no-fused") for name in WORDS] + [(name, "--fused") for name in NATIVE]
)
def test_steps_on_gpus_are_those_of_one(scene, name, way):
    for expected, found in in_processes(2, on_gpus, scene, (*WORDS[name], way)):
        for what, value in expected.items():
            most = value.abs().max().clamp_min(1e-30)
            assert (found[what] - value).abs().max() <= 1e-3 * most, what


# Density control


def refined(scene: str, words: tuple, views: int, iterations: int) -> list:
    """Of a run in float64: how many Gaussians there are after each refinement, and all that was learned."""
    one = trainer(scene, *words, "--views_per_step", str(views), "--iterations", str(iterations), double=True)
    one.start()
    rough(one)  # of balls, quaternions have no gradient but rounding
    counts = []
    for iteration in range(views, iterations + 1, views):
        one.step(iteration)
        one.refine(iteration)
        counts.append(one.gaussians.total)
    found = {name: one.gaussians.from_all(value.detach()) for name, value in one.gaussians.params.items()}
    pairs = [one.pair(camera) for camera in one.scene.train_cameras]
    error = torch.stack([(pair.image - pair.truth / 255).square().mean() for pair in pairs]).mean()
    return [counts, found, -10 * error.log10()]


GROWING = ["--densify_grad_threshold", "4e-4", "--densify_until_iter", "60", "--opacity_reset_interval", "30"]
IMPROVED = [*GROWING, "--strategy", "improved", "--densify_grad_threshold", "1e-4"]
REFINED = {
    "adc": (*GROWING, "--cap_max", "0"),
    "capped": (*GROWING, "--cap_max", "150"),
    "absgrad": (*GROWING, "--absgrad", "--cap_max", "150"),
    "mcmc": (*GROWING, "--strategy", "mcmc", "--cap_max", "150"),
    "improved": (*IMPROVED, "--cap_max", "150"),
    "by error": (*IMPROVED, "--cap_max", "150", "--grow_by", "error", "--opacity_decay", "0.002"),
    "blurred": (*GROWING, "--absgrad", "--cap_max", "150", *BLURRED, "motion"),
    "by disagreement": (*IMPROVED, "--cap_max", "150", "--grow_by", "disagreement"),
    "thinned": (*IMPROVED, "--cap_max", "150", "--final_count", "60", "--update_every", "1", "4", "8"),
}


GROWN = {
    2: ["capped", "absgrad", "by error", "blurred", "by disagreement"],
    3: ["adc", "mcmc", "improved", "thinned"],
}


@pytest.mark.parametrize("count", [2, 3])
def test_density_control_is_that_of_one_process(scene, found, count):
    """As many Gaussians after each refinement, in the same order, and the same pictures."""
    for name in GROWN[count]:
        counts, params, quality = refined(scene, REFINED[name], 6, 84)
        assert len(set(counts)) >= 4 or 150 in counts, name
        for results in found[count]:
            ours = results["refined", name]
            assert ours[0] == counts and abs(ours[2] - quality) <= 1e-6, name
            for key, value in params.items():
                torch.testing.assert_close(ours[1][key], value, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


def disagreeing(scene: str) -> torch.Tensor:
    one = trainer(scene, "--white_background", double=True)
    rough(one)
    return disagreement(one.splats, one.scene.train_cameras, 0.2)


@pytest.mark.parametrize("count", [2, 3])
def test_disagreement_is_that_of_one_process(scene, found, count):
    expected = disagreeing(scene)
    assert (expected > 0.01 * expected.max()).sum() > 10
    for results in found[count]:
        assert (results[("disagreement",)] - expected).abs().max() <= EXACT * expected.max()


# Evaluation


JUDGED = ("--eval", "--train_test_exp"), (*BLURRED, "motion")


def judged(scene: str, words: tuple) -> list:
    """Of all views: picture and photo."""
    one = trainer(scene, *words, double=True)
    rough(one)
    return [[pair.image, pair.truth] for pair in one.pairs(one.scene.train_cameras)]


@pytest.mark.parametrize("words", JUDGED)
def test_pictures_of_all_views_are_those_of_one_process(scene, found, words):
    """Eight views, three at a time."""
    expected = judged(scene, words)
    assert len(expected) == 8
    for results in found[3]:
        for ours, theirs in zip(results["pictures", words], expected, strict=True):
            assert torch.equal(ours[1], theirs[1]) and (ours[0] - theirs[0]).abs().max() <= EXACT


# Whole runs


RUN = [
    "--test_iterations",
    "30",
    "60",
    "--save_iterations",
    "30",
    "--checkpoint_iterations",
    "30",
    "60",
    "--eval",
]


def trained(scene: str, out: str, *words: str) -> int:
    """The exit code of train.py."""
    return train.main([*LINE, *RUN, "-s", scene, "-m", out, *words])


def gaussians_of(folder: ModelFolder, iteration: int = 60) -> dict:
    return checkpoint.read(folder.checkpoint(iteration))["parts"]["gaussians"]


def assert_same_bits(one: ModelFolder, other: ModelFolder) -> None:
    ours, theirs = gaussians_of(one), gaussians_of(other)
    for name, value in theirs["params"].items():
        assert torch.equal(ours["params"][name], value), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours["moments"][name][key], theirs["moments"][name][key]), (name, key)


@pytest.fixture(scope="module")
def runs(scene, tmp_path_factory):
    """The same run in one process, in two and in three, with steps of six views."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2, 3):
        line = (scene, str(folder / str(count)), "--views_per_step", "6", "--train_test_exp")
        codes = in_processes(count, trained, *line) if count > 1 else [trained(*line, "--no-fused")]
        assert codes == [0] * count
    return {count: ModelFolder(folder / str(count)) for count in (1, 2, 3)}


def test_a_run_leaves_what_one_process_leaves(runs):
    """The same files, from the first process alone, and numbers that differ by rounding."""
    files = {
        count: {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if "tfevents" not in p.name}
        for count, folder in runs.items()
    }
    assert files[2] == files[3] == files[1]
    one = json.loads(runs[1].summary.read_text())
    for count in (2, 3):
        told = json.loads(runs[count].summary.read_text())
        assert told["gaussians"] == one["gaussians"] and told["device"].startswith(f"{count} x ")
        for kind in ("test", "train"):
            ours, theirs = (run["scores"][kind]["60"] for run in (told, one))
            assert ours["views"] == theirs["views"] and ours["psnr"] == pytest.approx(
                theirs["psnr"], abs=0.05
            )
        assert len(list(runs[count].path.glob("events*"))) == 1
        log = runs[count].log.read_text()
        assert log.count("Training from iteration 1") == 1 and f"shown by {count} processes" in log
        assert len(read_ply(runs[count].ply(60))) == told["gaussians"]


def test_any_number_of_processes_goes_on(scene, runs, tmp_path):
    """From one checkpoint; with as many as before to the same bits."""
    ways = {1: [2], 2: [1, 2, 3], 3: [2]}  # after: before
    for after, all_before in ways.items():
        jobs = {}
        for before in all_before:
            line = "--views_per_step", "6", "--train_test_exp", "--start_checkpoint"
            start, out = str(runs[before].checkpoint(30)), str(tmp_path / f"{before}{after}")
            jobs[out] = (trained, scene, out, *line, start)
        results = (
            in_processes(after, in_turn, jobs) if after > 1 else [{k: f(*a) for k, (f, *a) in jobs.items()}]
        )
        assert all(set(codes.values()) == {0} for codes in results)
        for before in all_before:
            folder = ModelFolder(tmp_path / f"{before}{after}")
            ours, theirs = gaussians_of(folder), gaussians_of(runs[before])
            assert len(ours["params"]["means"]) == len(theirs["params"]["means"])
            if before == after:
                assert_same_bits(folder, runs[before])


def blurred(scene: str, out: str, *words: str) -> int:
    motion.COUNT_EVERY, motion.START = 13, 2.0  # in a process of its own
    line = *BLURRED, "motion", "--blur_weights", "--views_per_step", "6", "--poses"
    return trained(scene, out, *line, *words)


def test_a_blurred_run_that_goes_on_has_the_same_bits(scene, tmp_path):
    """Its photos are made of different numbers of pictures."""
    whole, on = (ModelFolder(tmp_path / name) for name in ("whole", "on"))
    jobs = {"whole": (blurred, scene, str(whole))}
    jobs["on"] = blurred, scene, str(on), "--start_checkpoint", str(whole.checkpoint(30))
    assert all(set(codes.values()) == {0} for codes in in_processes(2, in_turn, jobs))
    assert_same_bits(on, whole)
    ours, theirs = (checkpoint.read(folder.checkpoint(60))["parts"] for folder in (on, whole))
    for name in ("motion", "poses"):
        learned = dict(tensors(theirs[name], name))
        assert all(torch.equal(value, learned[key]) for key, value in tensors(ours[name], name))
    assert len(set(theirs["motion"]["counts"])) > 1
    assert ours["motion"]["counts"] == theirs["motion"]["counts"]


# What goes wrong in one of them


def told(scene: str, out: str, *words: str) -> tuple:
    """Exit code, what it says as it ends, and how long it takes."""
    begun, text = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            code = trained(scene, out, *words)
        except SystemExit as error:
            code = error.code
        except ZeroDivisionError as error:
            code = 1
            print("Traceback", error, file=text)
    return code, text.getvalue(), time.perf_counter() - begun


def at_step(number: int, rank: int, what: Callable[[Trainer], None]) -> None:
    """In this process, what(trainer) happens at the beginning of this step."""
    step = Trainer.step

    def changed(self, iteration):
        if iteration == number:
            Trainer.step = step
            if self.ranks.rank == rank:
                what(self)
        return step(self, iteration)

    Trainer.step = changed  # in a process of its own


def failing(scene: str, out: str, how: str) -> tuple:
    def fail(trainer):
        if how == "dies":
            os._exit(7)
        raise {"tells": DataError("the cat sat on it"), "breaks": ZeroDivisionError("by zero")}[how]

    at_step(24, 1, fail)
    return told(scene, out)


def test_an_exception_ends_all(scene, tmp_path):
    """The process that has failed says why, and so do the first and the log."""
    reasons = {"tells": "the cat sat on it", "breaks": "by zero"}
    jobs = {how: (failing, scene, str(tmp_path / how), how) for how in reasons}
    results = in_processes(3, in_turn, jobs)
    for how, reason in reasons.items():
        first, second, third = (result[how] for result in results)
        assert (first[0], second[0], third[0]) == (1, 1, 1) and max(first[2], second[2], third[2]) < 15
        assert f"train.py: rank 1: {reason}" in first[1] and reason in second[1] and third[1] == ""
        assert f"Ended: rank 1: {reason}" in ModelFolder(tmp_path / how).log.read_text()
        assert not (tmp_path / how / ".training").exists()


def test_a_process_that_dies_ends_all(scene, tmp_path):
    first, second = results_of(2, failing, scene, str(tmp_path / "m"), "dies")
    assert isinstance(second, RuntimeError) and first[0] == 1 and first[2] < 15
    assert "train.py: another process has ended" in first[1]


def interrupted(scene: str, out: str) -> tuple:
    at_step(24, 1, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    return told(scene, out, "--views_per_step", "6", "--train_test_exp")


def resumed(out: str) -> int:
    return train.main(["-m", out, "--resume", "--disable_viewer", "--quiet"])


@pytest.fixture(scope="module")
def mishaps(scene, runs, tmp_path_factory):
    """Of two processes, one run after the other: what each says of them, by their folders' names."""
    folder = tmp_path_factory.mktemp("mishaps")
    jobs = {"signal": (interrupted, scene, str(folder / "signal")), "on": (resumed, str(folder / "signal"))}
    jobs["used"] = told, scene, str(runs[2])
    for name, (function, argument) in MISHAPS.items():
        jobs[name] = function, scene, str(folder / name), argument
    first, second = in_processes(2, in_turn, jobs)
    return {name: (first[name], second[name], ModelFolder(folder / name)) for name in jobs}


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(runs, mishaps):
    first, second, folder = mishaps["signal"]
    assert (first[0], second[0]) == (143, 143)
    assert "train.py: terminated" in first[1] and second[1] == ""
    assert mishaps["on"][:2] == (0, 0)
    stopped = [i for i in folder.checkpoints() if i not in (30, 60)]
    assert len(stopped) == 1 and 24 <= stopped[0] <= 36 and stopped[0] % 6 == 0
    assert folder.ply(stopped[0]).is_file()
    assert_same_bits(folder, runs[2])


def lacking(scene: str, out: str, where: str) -> tuple[int, list[int]]:
    """Memory runs out in the second process: as a picture is made, in its backward, in a refinement, ..."""
    counts, refine = [], Trainer.refine

    def fails_once(owner, name):
        function = getattr(owner, name)

        def fails(*arguments, **named):
            setattr(owner, name, function)
            raise torch.OutOfMemoryError("no room")

        setattr(owner, name, fails)

    place = {
        "picture": (sharded, "blend"),
        "backward": (sharded, "add_statistics"),
        "blurred": (sharded, "add_statistics"),
        "refinement": (adc, "morton_order"),
        "rows": (GaussianModel, "_reserve"),
        "evaluation": (report, "psnr"),
        "checkpoint": (GaussianModel, "state_dict"),
    }[where]
    at_step(30, 1, lambda trainer: fails_once(*place))

    def counted(self, iteration):
        refine(self, iteration)
        counts.append(self.gaussians.total)

    Trainer.refine = counted
    blur = (*BLURRED, "motion") if where == "blurred" else ()
    code = trained(scene, out, "--views_per_step", "6", "--densify_grad_threshold", "1e-5", *blur)
    Trainer.refine = refine
    return code, counts


LACKING = ["picture", "backward", "blurred", "refinement", "rows", "evaluation", "checkpoint"]


@pytest.mark.parametrize("where", LACKING)
def test_memory_that_runs_out_in_one_process(mishaps, where):
    """All of them take the step again, or leave something out, and go on alike."""
    first, second, folder = mishaps[where]
    assert first[0] == 0 and second == first
    said = {"evaluation": "30 is not evaluated", "checkpoint": "not written: out of memory"}
    said |= dict.fromkeys(("picture", "backward", "blurred"), "out of memory: iteration 30 is taken again")
    said |= dict.fromkeys(("refinement", "rows"), "out of memory: densification at iteration 30 undone")
    assert said[where] in folder.log.read_text()


def apart(scene: str, out: str, what: str) -> tuple:
    """The second process goes its own way."""

    def go(trainer):
        if what == "random numbers":
            torch.rand(1)
        elif what == "the order of views":
            trainer.queue.next()
        else:
            trainer.modules[0].values.data[0, 0, 0] += 1e-7

    at_step(24, 1, go)
    return told(scene, out, "--train_test_exp")


APART = ["random numbers", "the order of views", "what is learned of photos"]


@pytest.mark.parametrize("what", APART)
def test_processes_that_go_apart_are_noticed(mishaps, what):
    first, second, _ = mishaps[what]
    assert (first[0], second[0]) == (1, 1)
    assert f"processes do not agree on {what}" in first[1] and second[1] == ""


def spoilt(scene: str, out: str, rows: slice) -> tuple:
    health.FEW = 0.25

    def spoil(trainer):
        with torch.no_grad():
            trainer.gaussians.means[rows] = torch.nan

    at_step(24, 1, spoil)
    return told(scene, out, "--densify_grad_threshold", "1e-2")


MISHAPS = {
    **{what: (lacking, what) for what in LACKING},
    **{what: (apart, what) for what in ("random numbers", "the order of views", "what is learned of photos")},
    "few": (spoilt, slice(0, 1)),
    "many": (spoilt, slice(None)),
}


@pytest.mark.parametrize(
    "name, code, said", [("few", 0, "dropped 1 Gaussians"), ("many", 1, "Gaussians are not finite; lower")]
)
def test_numbers_that_are_not_finite_in_one_process(mishaps, name, code, said):
    """Few of them go; after many of them the run ends, and one process says why."""
    first, second, folder = mishaps[name]
    assert first[0] == second[0] == code and second[1] == "" and said in folder.log.read_text()


@pytest.mark.parametrize(
    "words",
    ["--optimizer_type sparse_adam", "--debug",
     "--convert_SHs_python", "--view --no-disable_viewer", "--strategy tests.test_distributed"],
)  # fmt: skip
def test_what_one_process_must_do_says_so(words):
    options = parse_train([*LINE, "-s", "x", *words.split()])
    strategy = Strategy() if "tests" in words else strategies.make(options, 1.0, print)
    with pytest.raises(ConfigError) as caught:
        expect_possible(Ranks(0, 2, host="gloo"), options, strategy)
    given = words.removesuffix(" --no-disable_viewer")
    assert str(caught.value) == f"{given} trains in one process: start it without torchrun"


def test_processes_choose_their_gpus(monkeypatch):
    assert device_of_rank("cuda:1") == "cuda:1" and device_of_rank("") == ""
    for name, value in {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert device_of_rank("cuda") == "cuda:1" and device_of_rank("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device must be cuda or cpu with several processes, got 'cuda:1'"):
        device_of_rank("cuda:1")


def test_other_methods_train_in_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "current", lambda: Ranks(0, 2, host="gloo"))
    options = parse_train([*LINE, "-s", "x", "--method", "nerf"])
    with pytest.raises(ConfigError, match="method nerf trains in one process: start it without torchrun"):
        method.trainer(cast(Scene, None), options, print)


def test_a_used_folder_is_refused(mishaps):
    first, second, _ = mishaps["used"]
    assert (first[0], second[0]) == (1, 1) and second[1] == ""
    assert "has the results of an earlier run" in first[1]
