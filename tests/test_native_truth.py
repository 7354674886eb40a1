"""The default path hears an edit: of a loss term, of render(), of what a parameter means. And a part that is
added to the trainer is checkpointed and resumed with the rest."""

import sys
from pathlib import Path

import pytest
import torch
from diff_gaussian_rasterization import photometric_loss

import gaussian_renderer
import train
from scene import GaussianModel
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from tests import tiny_scenes
from training import trainer as training_trainer
from training.trainer import Trainer

SHORT = [
    "--iterations", "12", "--test_iterations", "12", "--device", "cpu", "--quiet", "--disable_viewer",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(scene: Path, folder: Path, *options) -> Path:
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, *map(str, options)]) == 0
    return folder


def ply(folder: Path, iteration: int = 12) -> bytes:
    return ModelFolder(folder).ply(iteration).read_bytes()


def log(folder: Path) -> str:
    return ModelFolder(folder).log.read_text()


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Up to the rounding of other operators, or of the same ones in another order."""
    ours, theirs = (load_ply(ModelFolder(folder).ply(12)).params for folder in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4, msg=name)


# Edits. Each changes what the run ends with, and says so in its own words.


def another_loss(monkeypatch):
    """The first experiment of anyone: a regularizer inside the loss."""

    def photometric(picture, camera, trainer, iteration):
        loss, l1 = photometric_loss(picture.image, camera.image(), 0.2, camera.mask())
        trainer.show(l1=l1)
        return loss + 10 * trainer.gaussians.scales.mean()

    monkeypatch.setattr(training_trainer, "photometric", photometric)


def another_picture(monkeypatch):
    render = gaussian_renderer.render

    def darker(*arguments, **options):
        rendered = render(*arguments, **options)
        return rendered._replace(image=0.9 * rendered.image)

    monkeypatch.setattr(gaussian_renderer, "render", darker)


def other_scales(monkeypatch):
    larger = property(lambda gaussians: 1.5 * gaussians.params["log_scales"].exp())
    monkeypatch.setattr(GaussianModel, "scales", larger)


def other_opacities(monkeypatch):
    softer = property(lambda gaussians: 0.8 * gaussians.params["opacity_logits"].sigmoid())
    monkeypatch.setattr(GaussianModel, "opacities", softer)


@pytest.mark.parametrize("edit", [another_loss, another_picture, other_scales, other_opacities])
def test_an_edit_is_heard_by_default(edit, scene, tmp_path, monkeypatch):
    before = trained(scene, tmp_path / "before")
    edit(monkeypatch)
    by_default = trained(scene, tmp_path / "default")
    assert "from here on a step is render, compare, backward" in log(by_default)
    assert ply(by_default) != ply(before), "the edit was passed over"
    in_steps = trained(scene, tmp_path / "steps", "--no-fused")
    assert "from here on" not in log(in_steps)
    assert ply(by_default) == ply(in_steps), "the edit was heard from the first step on"


def test_without_an_edit_steps_stay_native(scene, tmp_path):
    ours = trained(scene, tmp_path / "ours")
    assert "a step is one native call" in log(ours) and "from here on" not in log(ours)
    steps = trained(scene, tmp_path / "steps", "--no-fused")
    assert "a step is one native call" not in log(steps)
    assert_same_model(ours, steps)


def test_an_edit_in_mid_run_is_heard(scene, tmp_path, monkeypatch):
    """As when an edited loss begins to differ at some iteration: with the SH degree that is added there."""
    monkeypatch.setattr(training_trainer, "COMPARE_EVERY", 5)

    def photometric(picture, camera, trainer, iteration):
        loss, l1 = photometric_loss(picture.image, camera.image(), 0.2, camera.mask())
        trainer.show(l1=l1)
        return loss * (3 if iteration > 7 else 1)

    monkeypatch.setattr(training_trainer, "photometric", photometric)
    folder = trained(scene, tmp_path / "m")
    assert "iteration 10: render() and the loss terms" in log(folder)


# A part of one's own


class Momentum:
    """Anything with a state: here the mean of the losses so far, which the next steps learn from."""

    def __init__(self):
        self.mean, self.count = torch.zeros(()), 0

    def add(self, loss: torch.Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.count += 1

    def state_dict(self) -> dict:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.count = state["mean"], state["count"]


class WithMomentum(Trainer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.momentum = Momentum()
        self.losses.append(lambda picture, *_: self.momentum.mean * picture.image.mean())
        self.native = None

    def step(self, iteration):
        losses = super().step(iteration)
        self.momentum.add(losses["loss"])
        return losses

    def parts(self):
        return super().parts() | {"momentum": self.momentum}


load = training_trainer.load  # with Trainer, what makes a module a method


def test_a_part_of_ones_own_is_checkpointed_and_resumed(scene, tmp_path, monkeypatch):
    module = sys.modules["tests.a_method"] = type(sys)("tests.a_method")
    module.Trainer, module.load = WithMomentum, load
    method = ["--method", "tests.a_method"]
    whole = trained(scene, tmp_path / "whole", *method, "--checkpoint_iterations", 5)
    state = torch.load(whole / "chkpnt5.pth", weights_only=True)["parts"]["momentum"]
    assert state["count"] == 5 and 0 < state["mean"] < 1
    rest = trained(scene, tmp_path / "rest", *method, "--start_checkpoint", whole / "chkpnt5.pth")
    assert ply(rest) == ply(whole)
    monkeypatch.setattr(Momentum, "load_state_dict", lambda self, state: None)
    lost = trained(scene, tmp_path / "lost", *method, "--start_checkpoint", whole / "chkpnt5.pth")
    assert ply(lost) != ply(whole), "the part's state matters"
