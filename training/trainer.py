"""The published method: what a step of training is.

Schedule, next view, picture, loss, backward, Adam; then the strategy lets Gaussians come and go.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

import per_view
import strategies
from arguments import PRESETS, ModelParams, Options, PipelineParams
from gaussian_renderer import Splats, looks
from gaussian_renderer.fused import FusedIteration, can_fuse
from gaussian_renderer.network_gui import Request
from per_view import Pair, PerView, Shown
from scene import Scene, formats
from scene.cameras import Camera, smaller
from scene.filter_3d import smallest_scales
from scene.folder import ModelFolder
from scene.formats.ply import save_ply
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from scene.offload import model_class
from training.average import Average
from training.checkpoint import Part
from training.health import drop_nonfinite, drop_unusable
from training.losses import depth, mean_opacity, mean_scale, photometric
from training.memory import step_that_fits
from training.method import Method
from training.queue import ViewQueue

COMPARE_EVERY = 500  # iterations: does the native step still do what render() and the loss terms say?
BLUR_EVERY = 100  # iterations
MADE_UP = 15_000  # what points that the data set does not have count as, in a budget
ROUNDING = 1e-5  # by which their losses may differ, as a fraction


class Trainer(Method):
    def __init__(self, scene: Scene, options: Options, say: Callable[[str], None]):
        options = within_budget(options, scene)
        super().__init__(scene, options, say)
        model, self.opt, self.pipe, run, *_ = options
        points = scene.points.at_most(self.opt.cap_max, run.seed)
        kind = model_class(run.offload, self.device, say)
        self.gaussians = kind.from_points(points, model.sh_degree, scene.extent, self.device)
        self.gaussians.setup_optimizer(self.opt)
        self.strategy = strategies.make(options, scene.extent, say)
        self.strategy.see(scene.train_cameras, self.pipe, scene.background)
        self.modules = per_view.attached(options, scene)
        self.splats = Splats(self.gaussians, self.pipe, scene.background)
        self.shown = Shown(self.splats, self.modules, right_half=model.train_test_exp)
        held = [mean_opacity] * (self.opt.opacity_reg > 0) + [mean_scale] * (self.opt.scale_reg > 0)
        self.losses = [photometric, *held, *([depth] if model.depths else []), *self.strategy.loss_terms()]
        self.losses += [term for module in self.modules for term in module.loss_terms()]
        self.queue = ViewQueue(len(scene.train_cameras), run.seed)
        self.native: FusedIteration | None = None
        self._coarse: dict[int, Camera] = {}  # by view: its photo at the size of this time
        if can_fuse(self.gaussians, options) and self.losses == [photometric, *held] and not self.modules:
            self.native = FusedIteration(len(scene.train_cameras), options, self.device)
        self.average = Average(self.opt, say) if self.opt.average_last else None
        self._compared: tuple | None = None  # when the native step was last compared with the others

    def start(self) -> None:
        self.strategy.start(self.gaussians)

    def step(self, iteration: int) -> dict[str, Tensor]:
        """If memory runs out, the step is taken again, with fewer Gaussians."""
        self.pipe.debug |= iteration - 1 == self.options.run.debug_from
        self.gaussians.schedule(iteration)  # learning rates, SH degree
        for module in self.modules:
            module.schedule(iteration)
        view, background = self.queue.next(), self._background()
        learn = partial(self._learn, iteration, view, background)
        losses = step_that_fits(learn, iteration, self.gaussians, self.strategy, self.say)
        if self.average:
            self.average.after_step(self.gaussians, iteration)
        return losses

    def _learn(self, iteration: int, view: int, background: Tensor) -> dict[str, Tensor]:
        """Render, compare, backward and step; nothing has moved if it fails."""
        camera = self._camera(view, iteration)
        self.last_view = camera.name
        moves = iteration % self._shared_by(iteration) == 0 or iteration == self.opt.iterations
        upcoming = self.scene.train_cameras[self.queue.peek()]
        upcoming.prefetch()
        self.gaussians.expect(upcoming)
        self._blur(iteration)
        stats = self.strategy.stats(self.gaussians, iteration)
        if native := self._truthful(iteration, camera, background):
            loss, l1, *_ = native(view, camera, self.gaussians, background, stats, moves)
            return {"loss": loss, "l1": l1}
        visits = stats.visits.clone() if stats and self.modules else None
        loss, visible = self.loss(iteration, camera, background, stats)
        self.gaussians.collect(loss)
        if stats and visits is not None:  # however many renders one picture was made of
            torch.minimum(stats.visits, visits + 1, out=stats.visits)
        move(self.gaussians if moves else None, self.modules, visible)
        return {"loss": loss} | self.parts_shown

    def loss(
        self, iteration: int, camera: Camera, background: Tensor, stats: ScreenStats | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of all terms, and which Gaussians were in view [N]."""
        render = partial(self.splats.picture, background=background, stats=stats)
        picture = self.shown.picture(camera, render)
        self.parts_shown: dict[str, Tensor] = {}
        first, *others = (term(picture, camera, self, iteration) for term in self.losses)
        return sum(others, first), picture.radii > 0

    def show(self, **parts: Tensor) -> None:
        """Of a loss term: what to show beside the loss."""
        self.parts_shown |= parts

    def refine(self, iteration: int) -> None:
        self.strategy.after_step(self.gaussians, iteration)

    def _shared_by(self, iteration: int) -> int:
        """How many views a step is made from at this time."""
        opt, number = self.opt, 0
        if iteration > opt.densify_until_iter:
            number = 1 if 2 * iteration <= opt.densify_until_iter + opt.iterations else 2
        return opt.update_every[: number + 1][-1]

    def _blur(self, iteration: int = 0) -> None:
        """With --filter_3d: what Gaussians are blurred by, anew when rows have moved, and now and then when
        they no longer do, but not in the last steps."""
        opt, cameras = self.opt, self.scene.train_cameras
        late = opt.densify_until_iter <= iteration <= opt.iterations - BLUR_EVERY
        if self.pipe.filter_3d and (
            self.gaussians.smallest is None or (late and iteration % BLUR_EVERY == 0)
        ):
            self.gaussians.smallest = smallest_scales(self.gaussians.means, cameras)

    def pair(self, camera: Camera) -> Pair:
        self._blur()
        return super().pair(camera)

    def _camera(self, view: int, iteration: int) -> Camera:
        """The view, with a smaller photo at first."""
        camera, until = self.scene.train_cameras[view], self.opt.coarse_until
        if iteration > until:
            self._coarse.clear()
            return camera
        times = 4 if 3 * iteration <= until else 2
        known = self._coarse.get(view)
        if known is None or known.coarseness != times:
            known = self._coarse[view] = smaller(camera, times)
        return known

    def _background(self) -> Tensor:
        return torch.rand(3, device=self.device) if self.opt.random_background else self.scene.background

    def _truthful(self, iteration: int, camera: Camera, background: Tensor) -> FusedIteration | None:
        """The native step, as long as it does what render() and the loss terms say.

        It knows the published step alone. An edit of render(), of a loss term or of what the parameters mean
        shows in the loss; then the steps are taken apart from here on.
        """
        now = self.gaussians.active_sh_degree, iteration // COMPARE_EVERY
        if self.native is None or now == self._compared:
            return self.native
        self._compared = now
        with torch.no_grad():
            ours = self.loss(iteration, camera, background)[0].item()
        native = self.native.loss(camera, self.gaussians, background).item()
        if math.isfinite(native) and not abs(ours - native) <= ROUNDING * abs(native):
            self.say(
                f"iteration {iteration}: render() and the loss terms give a loss of {ours:.6f}, the "
                f"native step {native:.6f}; from here on a step is {APART}"
            )
            self.native = None
        return self.native

    # Around the method

    def parts(self) -> dict[str, Part]:
        named: dict[str, Part] = {module.name: module for module in self.modules}
        if self.average:
            named["average"] = self.average
        return {"gaussians": self.gaussians, self.opt.strategy: self.strategy, "queue": self.queue} | named

    def loaded(self) -> None:
        self.strategy.check(self.gaussians)
        for note in drop_unusable(self.gaussians, self.strategy):
            self.say(note)
        model, degree = self.options.model, self.gaussians.sh_degree
        if degree != model.sh_degree:
            self.say(f"SH degree {degree}, as in the checkpoint, not {model.sh_degree}")
            self.options = self.options._replace(model=replace(model, sh_degree=degree))

    def save(self, folder: ModelFolder, iteration: int) -> Path:
        path = folder.ply(iteration)
        self._blur()
        save_ply(self.gaussians.as_shown(), path, self.pipe.antialiasing, self.scene.frame)
        for module in self.modules:
            module.save(folder, iteration)
        self._save_cameras(path.with_name("cameras.json"))
        if not any(isinstance(module, per_view.Exposure) for module in self.modules):
            per_view.Exposure(self.scene.exposure_names, self.device).save(folder, iteration)  # identities
        return path

    @torch.no_grad()
    def _save_cameras(self, path: Path) -> None:
        """If modules moved them."""
        pairs = [(camera, self.shown.sharp_camera(camera)) for camera in self.scene.train_cameras]
        refined = {
            camera.uid: seen.world_to_camera.double().cpu().numpy()
            for camera, seen in pairs
            if seen is not camera
        }
        if refined:
            self.scene.write_cameras(path, refined)

    @torch.no_grad()
    def viewed(self, camera: Camera, request: Request) -> Tensor:
        """The viewer's switches are for its pictures, not for training."""
        pipe = PipelineParams(
            convert_SHs_python=request.shs_python,
            compute_cov3D_python=request.rot_scale_python,
            antialiasing=self.pipe.antialiasing,
        )
        self._blur()
        asked = request.mode, request.scaling_modifier, request.degree
        return looks.picture(camera, self.gaussians, pipe, self.scene.background, *asked)

    def check(self, when: str, known_bad: bool = False) -> None:
        drop_nonfinite(self.gaussians, self.modules, self.strategy, when, self.say, known_bad)

    def histograms(self) -> dict[str, Tensor]:
        return {"scene/opacity_histogram": self.gaussians.opacities.detach()}

    def describe(self) -> str:
        how = "one native call (--no-fused takes it apart)" if self.native else APART
        how += ", colors wait on the host" if self.gaussians.on_host else ""
        opt, named = self.opt, ""
        if opt.preset != "published":
            flags = " ".join(f"--{name} {_word(getattr(opt, name))}" for name in PRESETS[opt.preset])
            named = f"; --preset {opt.preset}: {flags}"
        return f"extent {self.scene.extent:.4g}, {len(self):,} Gaussians; a step is {how}{named}"

    def closing_notes(self) -> list[str]:
        if not self.native or not self.native.skipped:
            return []
        return [f"{self.native.skipped:,} steps were not taken: their views had begun to show much more"]


def within_budget(options: Options, scene: Scene) -> Options:
    """With --budget: the number of Gaussians that suits what is known of the scene before training.

    Points tell how much there is to show; how large the photos are matters little.
    """
    opt = options.opt
    if opt.budget == 0:
        return options
    pixels = sum(camera.width * camera.height for camera in scene.train_cameras)
    points = len(scene.points) if scene.has_points else MADE_UP
    count = max(round(opt.budget * math.sqrt(points) * pixels ** (1 / 6)), 1)
    return options._replace(opt=replace(opt, cap_max=count))


def move(gaussians: GaussianModel | None, modules: list[PerView], visible: Tensor) -> None:
    """Everything along its gradient; if memory is lacking, nothing."""
    for module in modules:
        module.prepare()
    if gaussians is not None:
        gaussians.step(visible)
    for module in modules:
        module.step()


def _word(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


APART = "render, compare, backward"


def load(
    model: ModelParams, pipe: PipelineParams, folder: ModelFolder, iteration: int, background: Tensor
) -> Shown:
    return load_file(folder.ply(iteration), model, pipe, background)


def load_file(ply: Path, model: ModelParams, pipe: PipelineParams, background: Tensor) -> Shown:
    """The Gaussians of any file of splats, seen as these options say."""
    folder = ModelFolder(model.model_path) if model.model_path else None
    frame = Similarity.stored(folder.normalization) if folder else OF_DATA
    gaussians = formats.read(ply, background.device, frame)
    modules = per_view.saved(model, ply, folder, background.device)
    return Shown(Splats(gaussians, pipe, background), modules, right_half=model.train_test_exp)
