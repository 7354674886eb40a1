"""--average_last: the model at the end is the mean of the last iterations."""

import pytest
import torch

import train
from arguments import OptimizationParams
from scene.folder import ModelFolder
from tests import tiny_scenes
from training.average import EVERY, Average


class Model:
    """Parameters that are the number of the iteration."""

    def __init__(self, rows: int = 3):
        self.params = {"means": torch.zeros(rows, 3), "opacity_logits": torch.zeros(rows, 1)}

    def __len__(self) -> int:
        return len(self.params["means"])


def run(average: Average, model: Model, first: int, last: int) -> float:
    for iteration in range(first, last + 1):
        for value in model.params.values():
            value.fill_(iteration)
        average.after_step(model, iteration)
    assert all((value == value.flatten()[0]).all() for value in model.params.values())
    return float(model.params["means"][0, 0])


def average(iterations: int, last: int, until: int = 0) -> Average:
    params = OptimizationParams(iterations=iterations, average_last=last, densify_until_iter=until)
    return Average(params, pytest.fail)


def test_the_mean_of_every_tenth_iteration_and_of_the_last_one():
    assert EVERY == 10
    assert run(average(95, 40), Model(), 1, 94) == 94, "only at the end"
    assert run(average(95, 40), Model(), 1, 95) == pytest.approx((60 + 70 + 80 + 90 + 95) / 5)
    assert run(average(95, 40, until=75), Model(), 1, 95) == pytest.approx((80 + 90 + 95) / 3)
    assert run(average(95, 3), Model(), 1, 95) == 95


def test_rows_that_come_and_go_begin_anew():
    one, model = average(100, 50), Model()
    run(one, model, 1, 70)
    model.params = Model(4).params
    assert run(one, model, 71, 100) == pytest.approx((80 + 90 + 100) / 3)


def test_a_longer_run_takes_its_own_last_iterations():
    one = average(60, 40)
    run(one, Model(), 1, 59)
    other = average(100, 40)
    other.load_state_dict(one.state_dict())
    assert run(other, Model(), 60, 100) == pytest.approx((70 + 80 + 90 + 100) / 4)


def test_without_memory_the_last_iteration_counts(monkeypatch):
    said = []
    one = Average(OptimizationParams(iterations=50, average_last=40, densify_until_iter=0), said.append)

    def full(params):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(one, "_add", full)
    assert run(one, Model(), 1, 50) == 50
    assert said == ["out of memory: iteration 20: there will be no --average_last"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("average") / "scene")


@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_a_run_that_goes_on_ends_with_the_same_mean(way, scene, tmp_path):
    flags = ["-s", str(scene), "--device", "cpu", "--quiet", "--disable_viewer", way]
    flags += "--iterations 80 --densify_until_iter 30 --checkpoint_iterations 57 80".split()

    def ply(name: str) -> bytes:
        return ModelFolder(tmp_path / name).ply(80).read_bytes()

    for name in ("whole", "cut", "last"):
        mean = [] if name == "last" else ["--average_last", "45"]
        assert train.main([*flags, *mean, "-m", str(tmp_path / name)]) == 0
    cut = ModelFolder(tmp_path / "cut")
    for path in (cut.path / "chkpnt80.pth", cut.path / "summary.json", cut.ply(80)):
        path.unlink()
    assert train.main(["-m", str(tmp_path / "cut"), "--resume", "--quiet", "--disable_viewer"]) == 0
    assert ply("cut") == ply("whole") != ply("last")
