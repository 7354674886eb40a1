"""Memory that runs out, at any allocation: nothing is half done, the run goes on, growth stops."""

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gaussian_renderer
import train
from gaussian_renderer import fused
from per_view import Exposure, Shown
from scene import images
from scene.formats.ply import load_ply
from scene.images import Picture, load_all
from scene.points import PointCloud
from strategies.rows import strongest
from tests import tiny_scenes
from tests.test_density import control, model_with, origins, pull
from tests.test_gaussians import make_model, moments, some_steps
from training.trainer import move
from utils.memory import grow_in_place, out_of_memory

NO_MEMORY = torch.OutOfMemoryError("out of memory, says this test")


class Allocations:
    """Lets the n-th call of any of these functions fail, and every later one up to `last`."""

    NAMES = ("index_select", "nonzero", "argsort", "__getitem__", "exp", "isfinite", "log", "new_empty")

    def __init__(self, monkeypatch, first: int, last: int):
        self.count, self._first, self._last = 0, first, last
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._failing(getattr(torch.Tensor, name)))
        for name in ("cat", "randn", "empty", "arange", "where"):
            monkeypatch.setattr(torch, name, self._failing(getattr(torch, name)))

    def _failing(self, function):
        def call(*arguments, **options):
            self.count += 1
            if self._first <= self.count <= self._last:
                raise NO_MEMORY
            return function(*arguments, **options)

        return call


def refinable():
    """A model of which some are cloned, some split, some pruned, some left alone."""
    model = model_with([0.05, 0.05, 0.5, 0.05, 0.05, 0.1], [0.5, 0.5, 0.5, 0.004, 0.004, 0.5])
    density = control()
    density.said = []
    density.say = density.said.append
    pull(density, model, 600, [0, 1, 1, 0, 1, 1])
    return model, density


def state(model) -> dict:
    return copy.deepcopy({"params": model.params, "moments": moments(model)})


def assert_equal(ours, theirs):
    for name, value in theirs["params"].items():
        assert torch.equal(ours["params"][name], value), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours["moments"][name][key], theirs["moments"][name][key]), name


def test_densification_is_whole_or_undone(monkeypatch):
    """One allocation after the other fails, until none is left to fail."""
    model, density = refinable()
    before = state(model)
    density.after_step(model, 600)
    after = state(model)
    assert len(after["params"]["means"]) != 6

    undone = whole = 0
    for failing in range(1, 1000):
        model, density = refinable()
        with monkeypatch.context() as patch:
            allocations = Allocations(patch, failing, failing)
            density.after_step(model, 600)
        if density.said:
            assert_equal(state(model), before)
            assert density.fits == 6 and "densification at iteration 600 undone" in density.said[0]
            undone += 1
        else:  # where old and new rows did not fit side by side, they went through the host
            assert_equal(state(model), after)
            whole += 1
        some_steps(model, 1)
        if allocations.count < failing:
            break
    assert undone > 20 and whole > 15, (undone, whole)


def test_growth_stops_at_what_fits():
    model, density = refinable()
    density.fits = 5
    density.after_step(model, 600)
    assert len(model) == 5

    # It is part of a checkpoint.
    other = control()
    other.load_state_dict(density.state_dict())
    assert other.fits == 5


@pytest.mark.parametrize("cap", [1, 3, 4, 5, 6, 7, 8, 100])
def test_cap_max(cap):
    """Four are left after pruning. Growing by one each, in the order of their pull: rows 1, 2, 5."""
    model = model_with([0.05, 0.05, 0.5, 0.05, 0.05, 0.1], [0.5, 0.5, 0.5, 0.004, 0.004, 0.5])
    old = model.sh_rest.detach().clone()
    density = control(cap_max=cap)
    pull(density, model, 600, [0, 4e-4, 3.5e-4, 0, 1, 3e-4])
    density.after_step(model, 600)
    grown = [1, 2, 5][: max(min(cap, 7) - 4, 0)]
    assert sorted(origins(model, old)) == sorted([0, 1, 2, 5, *grown])


def test_cap_counts_children_that_outlive_their_parent():
    """Large ones are pruned, but the children of a split are small enough: two rows more, not one."""
    for cap, left in [(2, 1), (3, 3), (4, 3)]:
        model = model_with([0.05, 1.2], [0.5, 0.5])
        density = control(cap_max=cap)
        pull(density, model, 3100, [0, 1])
        density.after_step(model, 3100)
        assert len(model) == left, cap


def test_strongest():
    mask = strongest(torch.tensor([3.0, 1.0, 2.0, 3.0]), torch.tensor([1, 1, 2, 1]), 4)
    assert mask.tolist() == [True, False, True, True]
    assert strongest(torch.tensor([1.0]), torch.tensor([1]), 0).tolist() == [False]


def test_points_at_most():
    cloud = PointCloud(torch.rand(50, 3).numpy(), torch.rand(50, 3).numpy())
    assert cloud.at_most(0, 0) is cloud and cloud.at_most(50, 0) is cloud
    few = cloud.at_most(20, 1)
    rows = [int((cloud.xyz == xyz).all(1).nonzero()[0][0]) for xyz in few.xyz]
    assert rows == sorted(set(rows)) and len(rows) == 20 and (cloud.rgb[rows] == few.rgb).all()


# Whole runs


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


SHORT = [
    "--iterations", "60", "--densify_from_iter", "5", "--densification_interval", "10",
    "--densify_grad_threshold", "1e-5", "--device", "cpu", "--disable_viewer", "--save_iterations", "50",
]  # fmt: skip


def run(scene: Path, folder: Path, *options) -> tuple[int, str]:
    """Number of Gaussians at the end, and the log."""
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, *options, "--quiet"]) == 0
    model = load_ply(folder / "point_cloud" / "iteration_60" / "point_cloud.ply")
    assert all(value.isfinite().all() for value in model.params.values())
    return len(model), (folder / "train.log").read_text()


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_rendering_runs_out_of_memory(way, scene, tmp_path, monkeypatch):
    """A device that renders up to 200 Gaussians."""
    real = gaussian_renderer.render
    expected, _ = run(scene, tmp_path / "whole", way)
    assert expected > 400, "or nothing would have been limited"

    def limited_render(camera, gaussians, *arguments, **options):
        if len(gaussians) > 200:
            raise NO_MEMORY
        return real(camera, gaussians, *arguments, **options)

    def limited_steps(*arguments):
        step = limited_steps.real(*arguments)

        def limited(params, *rest, **options):
            if len(params[0]) > 200:
                raise NO_MEMORY
            return step(params, *rest, **options)

        limited.settle, limited.forget, limited.skipped = step.settle, step.forget, 0
        return limited

    if way == "--fused":
        limited_steps.real = fused.TrainStep
        monkeypatch.setattr(fused, "TrainStep", limited_steps)
    else:
        monkeypatch.setattr(gaussian_renderer, "render", limited_render)
    count, log = run(scene, tmp_path / "m", way)
    assert 150 <= count <= 200
    assert "is taken again; from now on there are at most" in log


def test_an_undone_step_counts_for_nothing(scene, tmp_path, monkeypatch):
    """One failure, and memory enough afterwards: the model is the one of a run without failures."""
    before, _ = run(scene, tmp_path / "whole", "--densify_from_iter", "1000")
    real, calls = fused.TrainStep.__call__, []

    def fails_once(step, *arguments, **options):
        calls.append(1)
        if len(calls) == 30:
            raise NO_MEMORY
        return real(step, *arguments, **options)

    monkeypatch.setattr(fused.TrainStep, "__call__", fails_once)
    run(scene, tmp_path / "m", "--densify_from_iter", "1000")
    a, b = (tmp_path / name / "point_cloud" / "iteration_60" / "point_cloud.ply" for name in ("whole", "m"))
    assert a.read_bytes() == b.read_bytes()


def test_cap_max_of_a_run(scene, tmp_path):
    count, _ = run(scene, tmp_path / "m", "--cap_max", "150")
    assert 140 <= count <= 150
    count, _ = run(scene, tmp_path / "few", "--cap_max", "30")
    assert count <= 30, "there are more points than that to start from"


def test_evaluation_runs_out_of_memory(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(Shown, "pair", lambda *arguments: (_ for _ in ()).throw(NO_MEMORY))
    _, log = run(scene, tmp_path / "m")
    assert "out of memory: iteration 60 is not evaluated in full" in log


FAILS_ONCE = """
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
static long calls, failing;
void fail_at(long call) { failing = calls + call; }
void *aligned_alloc(size_t align, size_t size) {
    static void *(*real)(size_t, size_t);
    if (!real) real = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
    if (__atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == failing) { errno = ENOMEM; return 0; }
    return real(align, size);
}
"""
EACH_ALLOCATION_IN_TURN = """
import ctypes, os, sys, torch, traceback
torch.set_num_threads(1)  # here: threads do not survive a fork
from tests.native.test_train_step import fresh, fused_step, target_like, training_scene
shim, scene, truth = ctypes.CDLL(sys.argv[1]), training_scene(5000), sys.argv[2]
target = target_like(scene, torch.uint8)

def everything(out):
    return [*out.params, *out.exp_avg, *out.exp_avg_sq, *vars(out.stats).values(), out.losses]

def attempt(failing):
    out = fresh(scene, "cpu", torch.float32, True)
    before = [t.clone() for t in everything(out)]
    shim.fail_at(ctypes.c_long(failing))
    try:
        fused_step(out, scene, 1, target, None, "cpu")
        if not failing:
            torch.save(everything(out), truth)
        return 2
    except (RuntimeError, MemoryError):
        assert all(torch.equal(a, b) for a, b in zip(everything(out), before)), "half a step was taken"
    fused_step(out, scene, 1, target, None, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(everything(out), torch.load(truth)))
    return 0

def forked(failing):  # memory that was given back is handed out again: each in a process of its own
    if not (child := os.fork()):
        status = 1
        torch.set_num_threads(2)
        try:
            status = attempt(failing)
        except AssertionError:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert forked(0) == 2
failed = 0
while (status := forked(failed + 1)) == 0:
    failed += 1
print(failed, status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")
def test_a_native_step_is_whole_or_not_taken(tmp_path):
    """Each of its allocations in turn fails; then it is taken again."""
    (tmp_path / "shim.c").write_text(FAILS_ONCE)
    shim = tmp_path / "shim.so"
    compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", shim]
    subprocess.run([*compiler, tmp_path / "shim.c", "-ldl"], check=True)
    told = subprocess.run(
        [sys.executable, "-c", EACH_ALLOCATION_IN_TURN, shim, tmp_path / "truth.pt"],
        capture_output=True, text=True, timeout=100, env=os.environ | {"LD_PRELOAD": str(shim)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    failed, status = map(int, told.stdout.split())
    assert status == 2 and failed >= 5, f"{failed} allocations failed, then: {told.stderr}"


@pytest.mark.parametrize("optimizer_type", ["default", "sparse_adam"])
def test_a_step_with_exposures_is_whole_or_not_taken(optimizer_type, monkeypatch):
    """Each of its allocations in turn fails; what is taken again ends as if nothing had failed."""

    contiguous = torch.Tensor.contiguous

    def stepped(failing: int):
        model, calls = make_model(optimizer_type=optimizer_type), []
        exposure = Exposure(["a", "b"], torch.device("cpu"))
        model.schedule(1)
        exposure.schedule(1)
        for value in [*model.params.values(), exposure.values]:  # of a layout that Adam does not take
            value.grad = (
                torch.linspace(-1, 1, value.numel())
                .view(value.shape[::-1])
                .permute(*reversed(range(value.dim())))
            )
        before = [value.clone() for value in (*model.params.values(), exposure.values)]

        def failing_at(function):
            def call(value, **options):
                if function is contiguous and value.is_contiguous():
                    return value  # takes no memory
                calls.append(1)
                if len(calls) == failing:
                    raise NO_MEMORY
                return function(value, **options)

            return call

        def step():
            move(model, [exposure], visible=torch.ones(len(model), dtype=torch.bool))

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", failing_at(torch.zeros_like))
            patch.setattr(torch.Tensor, "contiguous", failing_at(contiguous))
            try:
                step()
            except torch.OutOfMemoryError:
                after = [*model.params.values(), exposure.values]
                assert all(torch.equal(*values) for values in zip(before, after)), f"allocation {failing}"
                step()
        return model, exposure, len(calls)

    whole, exposed, count = stepped(0)
    assert count >= 20, "moments and gradients of six parameters and the exposures"
    for failing in range(1, count + 1):
        model, exposure, _ = stepped(failing)
        assert_equal(state(model), state(whole))
        assert torch.equal(exposure.values, exposed.values)
        assert exposure.optimizer.state[exposure.values]["step"] == 1


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_first_step_that_runs_out_of_memory_is_taken_again(failing, monkeypatch):
    """Adam makes its moments then, two for each parameter."""
    calls, zeros_like = [], torch.zeros_like

    def fails_once(*arguments, **options):
        calls.append(1)
        if len(calls) == failing:
            raise NO_MEMORY
        return zeros_like(*arguments, **options)

    model, other = make_model(), make_model()
    monkeypatch.setattr(torch, "zeros_like", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        some_steps(model, 1)
    before = {name: value.detach().clone() for name, value in other.params.items()}
    for one in (model, other):
        one.optimizer.begin_step()
    assert_equal(state(model), state(other))
    assert all(torch.equal(model.params[name], value) for name, value in before.items())
    assert all(moment["step"] == 1 for moment in moments(model).values())


def test_pictures_that_do_not_fit_go_to_the_host(monkeypatch):
    values = [torch.full((3, 4, 5), i, dtype=torch.uint8) for i in range(5)]
    pictures = [Picture(lambda i=i: values[i], (3, 4, 5), torch.device("cpu")) for i in range(5)]
    keep, kept = Picture.keep, []

    def third_does_not_fit(picture, value, on_device):
        if on_device and sum(on_device for on_device in kept) == 2:
            raise NO_MEMORY
        kept.append(on_device)
        keep(picture, value, on_device)

    monkeypatch.setattr(images.Picture, "keep", third_does_not_fit)
    told = load_all(pictures, torch.device("cpu"), on_host=False, quiet=True)
    assert "in host memory" in told
    assert all(torch.equal(picture.get(), value) for picture, value in zip(pictures, values))
    assert kept[-5:] == [False] * 5


def test_which_errors_mean_that_memory_is_out():
    assert out_of_memory(NO_MEMORY) and out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value), error.value
    assert not out_of_memory(RuntimeError("quats must be [6, 4]")) and not out_of_memory(ValueError())


def test_settings_of_the_allocator(monkeypatch):
    def after(system: str, release: str, settings: dict) -> dict:
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "release", lambda: release)
        monkeypatch.setattr(os, "environ", dict(settings))
        grow_in_place()
        return os.environ

    ours = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert after("linux", "6.8.0-generic", {}) == ours
    for theirs in ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}):
        assert after("linux", "6.8.0-generic", theirs) == theirs
    assert after("win32", "11", {}) == after("linux", "6.6.87-microsoft-standard-WSL2", {}) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gaussians_grow_in_place(tmp_path):
    """In a process of its own: PyTorch reads the settings once."""
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    code = (
        "import sys, torch, train; status = train.main(sys.argv[1:]); "
        "assert torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments']; sys.exit(status)"
    )
    arguments = ["-s", data, "-m", tmp_path / "m", *SHORT, "--device", "cuda", "--quiet"]
    told = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_out_of_memory(tmp_path):
    """For real: 240 MB are enough for about 180,000 Gaussians; more are wanted. In a process of its own."""
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    arguments = ["-s", data, "-m", tmp_path / "m", *SHORT, "--device", "cuda", "--iterations", "400"]
    arguments += ["--random_init", "60000", "--densify_grad_threshold", "0", "--quiet"]
    limited = (
        "import sys, torch; total = torch.cuda.get_device_properties(0).total_memory; "
        "torch.cuda.set_per_process_memory_fraction(240e6 / total); import train; "
        "sys.exit(train.main(sys.argv[1:]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    log = (tmp_path / "m" / "train.log").read_text()
    assert "out of memory" in log and "from now on there are at most" in log
    model = load_ply(tmp_path / "m" / "point_cloud" / "iteration_400" / "point_cloud.ply")
    assert all(value.isfinite().all() for value in model.params.values())
    assert 60_000 < len(model) < 300_000
