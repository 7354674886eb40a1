"""What a run asks of whatever is trained: Gaussians, a radiance field, voxels.

`--method name` takes the class Trainer and the function load() of a module: "gaussians" are
training/trainer.py, another name is baselines/name.py, and a name with dots is a module of your own.
"""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from torch import Tensor

import distributed
from arguments import ConfigError, ModelParams, Options, PipelineParams
from gaussian_renderer import looks
from gaussian_renderer.network_gui import Request
from per_view import Pair, Shown
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from training.checkpoint import Part


class Method:
    """Something that is trained on a Scene. It must have step(), parts(), save() and `shown`, the pictures of
    it."""

    shown: Shown
    unit = "Gaussians"  # what its length counts
    views_per_step = 1
    views = 1  # of the step that comes: the last ones of a run may be fewer
    last_view = ""  # name of the photo of the last step

    def __init__(self, scene: Scene, options: Options, say: Callable[[str], None]):
        self.scene, self.options, self.say = scene, options, say
        self.device = scene.background.device

    def __len__(self) -> int:
        return len(self.shown)

    def start(self) -> None:
        """Once, before the first step of a run that does not go on from a file."""

    def step(self, iteration: int) -> dict[str, Tensor]:
        """Learn from `views` views, the last of them being the one of this number. Returns scalars on the
        device, "loss" being what was minimized."""
        raise NotImplementedError

    def refine(self, iteration: int) -> None:
        """Change what the model is made of, after the step."""

    def parts(self) -> dict[str, Part]:
        """By name: all that has a state. Checkpoints and exact resume follow from it."""
        raise NotImplementedError

    def loaded(self) -> None:
        """The parts have got their states. Raise ValueError if they do not fit together."""

    def save(self, folder: ModelFolder, iteration: int) -> Path:
        """Write the model as of this iteration; returns the file."""
        raise NotImplementedError

    def pair(self, camera) -> Pair:
        return self.shown.pair(camera)

    def pairs(self, cameras: list[Camera]) -> Iterable[Pair]:
        """Of all these views, in their order."""
        return map(self.pair, cameras)

    def viewed(self, camera: Camera, request: Request) -> Tensor:
        """The picture [3, H, W] that a live viewer asks for, from this camera."""
        rendered, background = self.shown.scene.picture(camera), self.scene.background
        if request.mode in looks.OF_RAYS:
            return looks.look(rendered, camera, request.mode, background)
        return rendered.image

    def check(self, when: str, known_bad: bool = False) -> None:
        """Numbers that are not finite are dropped, or end the run. `when`, for the user."""

    def histograms(self) -> dict[str, Tensor]:
        """For TensorBoard, by tag."""
        return {}

    def describe(self) -> str:
        """How a step is taken, for the log."""
        return "an iteration is a step of autograd"

    def closing_notes(self) -> list[str]:
        """What is worth a line when the run has ended."""
        return []


def trainer(scene: Scene, options: Options, say: Callable[[str], None]) -> Method:
    method, views = options.model.method, options.opt.views_per_step
    if method != "gaussians" and not distributed.current().alone:
        raise ConfigError(f"method {method} trains in one process: start it without torchrun")
    made = _module(method).Trainer(scene, options, say)
    if views > made.views_per_step:
        raise ConfigError(f"views_per_step must be {made.views_per_step} with --method {method}, got {views}")
    return made


def load(model: ModelParams, pipe: PipelineParams, iteration: int, background: Tensor) -> tuple[Shown, int]:
    """A saved model, ready to be looked at, and which iteration it is (of -1: the last one)."""
    folder = ModelFolder(model.model_path)
    iteration = folder.saved(iteration)
    return _module(model.method).load(model, pipe, folder, iteration, background), iteration


def _module(method: str) -> ModuleType:
    name = "training.trainer" if method == "gaussians" else method if "." in method else f"baselines.{method}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):
            raise
        raise ConfigError(f"method must be gaussians, or a module with a Trainer, got {method}") from None
