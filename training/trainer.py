"""The published method: what a step of training is.

Schedule, next view, picture, loss, backward, Adam; then the strategy lets Gaussians come and go.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

import distributed
import per_view
import strategies
from arguments import PRESETS, STAGES, ModelParams, Options, PipelineParams
from gaussian_renderer import Splats, looks
from gaussian_renderer.fused_sharded import Native, native_step
from gaussian_renderer.network_gui import Request
from gaussian_renderer.sharded import splats_of
from per_view import Pair, PerView, Shown
from scene import Scene, formats
from scene.cameras import Camera, smaller
from scene.filter_3d import smallest_scales
from scene.folder import ModelFolder
from scene.formats.ply import save_ply
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from scene.offload import model_class
from training import dealt
from training.average import Average
from training.checkpoint import Part
from training.health import drop_nonfinite, drop_unusable
from training.losses import depth, mean_opacity, mean_scale, photometric
from training.memory import step_that_fits
from training.method import Method
from training.queue import ViewQueue
from utils.schedules import reaches

COMPARE_EVERY = 500  # iterations: does the native step still do what render() and the loss terms say?
BLUR_EVERY = 100  # iterations
FEWEST = 5_000  # iterations that --visits leaves
MADE_UP = 15_000  # what points that the data set does not have count as, in a budget
ROUNDING = 1e-5  # by which their losses may differ, as a fraction


class Shot(NamedTuple):
    """A view of a step."""

    number: int  # of the iteration
    view: int  # of the train cameras
    background: Tensor


class Trainer(Method):
    def __init__(self, scene: Scene, options: Options, say: Callable[[str], None]):
        options = suited(options, scene)
        super().__init__(scene, options, say)
        model, self.opt, self.pipe, run, *_ = options
        points = scene.points.at_most(self.opt.cap_max, run.seed)
        self.ranks, kind = distributed.current(), model_class(run.offload, self.device, say)
        self.gaussians = kind.from_points(points, model.sh_degree, scene.extent, self.device)
        self.gaussians.deal(self.ranks)
        self.gaussians.setup_optimizer(self.opt)
        self.strategy = strategies.make(options, scene.extent, say)
        self.strategy.see(scene.train_cameras, self.pipe, scene.background)
        self.modules = per_view.attached(options, scene)
        dealt.expect_possible(self.ranks, options, self.strategy)
        with_depth = bool(model.depths) or any(module.sees_depth for module in self.modules)
        self.splats = splats_of(self.gaussians, self.pipe, scene.background, with_depth)
        self.shown = Shown(self.splats, self.modules, right_half=model.train_test_exp)
        held = [mean_opacity] * (self.opt.opacity_reg > 0) + [mean_scale] * (self.opt.scale_reg > 0)
        self.held = held  # terms that need no picture
        self.losses = [photometric, *held, *([depth] if model.depths else []), *self.strategy.loss_terms()]
        self.losses += [term for module in self.modules for term in module.loss_terms()]
        self.queue = ViewQueue(len(scene.train_cameras), run.seed)
        self.views_per_step = self.views = max(self.opt.views_per_step, self.ranks.count)
        self.native: Native | None = None
        self._coarse: dict[int, Camera] = {}  # by view: its photo at the size of this time
        if self.losses == [photometric, *held] and not self.modules:
            self.native = native_step(self.gaussians, scene.train_cameras, options)
        self.average = Average(self.opt, say) if self.opt.average_last else None
        self._compared: tuple | None = None  # when the native step was last compared with the others

    def start(self) -> None:
        self.strategy.start(self.gaussians)

    def step(self, iteration: int) -> dict[str, Tensor]:
        """If memory runs out, the step is taken again, with fewer Gaussians."""
        self.pipe.debug |= iteration - self.views <= self.options.run.debug_from < iteration
        shared_by = self._shared_by(iteration)
        self.gaussians.rates_for = max(self.views / shared_by, 1)
        self.gaussians.schedule(iteration)  # learning rates, SH degree
        for module in self.modules:
            module.views = self.views
            module.schedule(iteration)
        moves = reaches(shared_by, iteration, self.views) or iteration == self.opt.iterations
        shots = [Shot(number, self.queue.next(), self._background()) for number in self._numbers(iteration)]
        learn = partial(self._learn, iteration, shots, moves)
        losses = step_that_fits(learn, iteration, self.gaussians, self.strategy, self.say)
        if self.average:
            self.average.after_step(self.gaussians, iteration, self.views)
        return losses

    def _numbers(self, iteration: int) -> range:
        """Of the views of the step that ends with this one."""
        return range(iteration - self.views + 1, iteration + 1)

    def _learn(self, iteration: int, shots: list[Shot], moves: bool) -> dict[str, Tensor]:
        """Render, compare and backward for each view, and step; nothing has moved if it fails."""
        for module in self.modules:
            module.forget_gradients()
        self.last_view = ", ".join(self.scene.train_cameras[shot.view].name for shot in shots)
        stats = self.strategy.stats(self.gaussians, shots[0].number)
        found, at_once = [], self.ranks.count
        with self.ranks.together():
            self._blur(iteration)
            for first in range(0, len(shots), at_once):
                self._prefetch(shots, first + at_once)
                last = moves and first + at_once >= len(shots)
                found.append(self._see(iteration, shots[first : first + at_once], stats, last))
        losses, seen = zip(*found)
        if seen[-1] is not None:
            move(self.gaussians, self.modules, seen[-1], self.views, moves)
        names = ["loss", "l1", *["depth"] * bool(self.options.model.depths)]
        return dealt.mean_of(self.ranks, losses, len(shots), names)

    def _prefetch(self, shots: list[Shot], first: int) -> None:
        """The photo that this process shows next: of the shots from here on, or else in the next step."""
        rank = self.ranks.rank
        view = shots[first + rank].view if first + rank < len(shots) else self.queue.peek(rank)
        self.scene.train_cameras[view].prefetch()

    def _see(
        self, iteration: int, shots: list[Shot], stats: ScreenStats | None, last: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Learn from views that are shown at once, one in each process. Returns the losses of the own one,
        and which Gaussians are seen [N], unless the native step has moved them."""
        if self.ranks.rank >= len(shots):
            return self._collect(stats, *self._nothing(iteration, shots[0].background, stats))
        own = shots[self.ranks.rank]
        camera, background = self._camera(own.view, iteration), own.background
        views = [shot.view for shot in shots]
        full = len(views) == self.ranks.count
        if full and (native := self._truthful(iteration, views, camera, background)):
            losses = native(views, camera, self.gaussians, background, stats, last)
            if losses is not None:
                return dict(zip(("loss", "l1"), losses)), None
        return self._collect(stats, *self.loss(iteration, camera, background, stats))

    def _collect(self, stats: ScreenStats | None, loss: Tensor, seen: Tensor) -> tuple[dict, Tensor]:
        """Gradients become the mean over the views shown at once and those before them in this step."""
        visits = stats.visits.clone() if stats and self.modules else None
        self.gaussians.collect(loss, self.splats.at_once)
        if stats and visits is not None:  # however many renders one picture was made of
            torch.minimum(stats.visits, visits + self.splats.at_once, out=stats.visits)
        return {"loss": loss} | self.parts_shown, seen

    def _nothing(
        self, iteration: int, background: Tensor, stats: ScreenStats | None
    ) -> tuple[Tensor, Tensor]:
        """As loss(), of no view, while other processes show theirs."""
        (picture,), self.parts_shown = self.splats.pictures([None], background, stats), {}
        camera = self.scene.train_cameras[0]  # these terms do not look at it
        terms = [term(picture, camera, self, iteration) for term in self.held]
        return sum(terms, picture.image.sum()), picture.radii > 0

    def loss(
        self, iteration: int, camera: Camera, background: Tensor, stats: ScreenStats | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of all terms, and which Gaussians were in view [N]."""
        render = partial(self.splats.pictures, background=background, stats=stats)
        picture = self.shown.picture(camera, render)
        self.parts_shown: dict[str, Tensor] = {}
        first, *others = (term(picture, camera, self, iteration) for term in self.losses)
        return sum(others, first), picture.radii > 0

    def show(self, **parts: Tensor) -> None:
        """Of a loss term: what to show beside the loss."""
        self.parts_shown |= parts

    def refine(self, iteration: int) -> None:
        for number in self._numbers(iteration):
            self.strategy.after_step(self.gaussians, number)

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
            self.gaussians.smallest is None or (late and reaches(BLUR_EVERY, iteration, self.views))
        ):
            self.gaussians.smallest = smallest_scales(self.gaussians.means, cameras)

    def pair(self, camera: Camera) -> Pair:
        self._blur()
        return self.shown.pair(camera, self.splats.pictures)

    def pairs(self, cameras: list[Camera]) -> Iterable[Pair]:
        """Each process shows a view at a time, and all get all pictures."""
        rank, at_once = self.ranks.rank, self.ranks.count
        for first in range(0, len(cameras), at_once):
            some = cameras[first : first + at_once]
            own = self.pair(some[min(rank, len(some) - 1)])
            for other, camera in enumerate(some):
                _, truth, mask = own if other == rank else (None, *self.shown.photo(camera))
                yield Pair(self.ranks.from_one(other, own.image, truth.shape), truth, mask)

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
        fixed = self.scene.background
        return torch.rand(3, device=self.device).to(fixed) if self.opt.random_background else fixed

    def _truthful(
        self, iteration: int, views: list[int], camera: Camera, background: Tensor
    ) -> Native | None:
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
        native = self.native.loss(views, camera, self.gaussians, background).item()
        differ = math.isfinite(native) and not abs(ours - native) <= ROUNDING * abs(native)
        if self.ranks.any(differ):
            self.say(
                f"iteration {iteration}: render() and the loss terms give a loss of {ours:.6f}, the "
                f"native step {native:.6f}; from here on a step is {APART}"
            )
            self.native = None
        return self.native

    # Around the method

    def parts(self) -> dict[str, Part]:
        rows: dict[str, Part] = {"gaussians": self.gaussians, self.opt.strategy: self.strategy}
        if self.average:
            rows["average"] = self.average
        modules = {module.name: module for module in self.modules}
        return dealt.parts(rows, self.gaussians) | {"queue": self.queue} | modules

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
        whole = self.gaussians.as_shown().whole()
        if not self.ranks.first:
            return path
        save_ply(whole, path, self.pipe.antialiasing, self.scene.frame)
        for module in self.modules:
            module.save(folder, iteration)
        self._save_cameras(path.with_name("cameras.json"))
        if not any(module.name == "exposure" for module in self.modules):
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
        dealt.expect_same(self.ranks, self.modules, self.queue)
        drop_nonfinite(self.gaussians, self.modules, self.strategy, when, self.say, known_bad)

    def histograms(self) -> dict[str, Tensor]:
        return {"scene/opacity_histogram": self.gaussians.from_all(self.gaussians.opacities.detach())}

    def describe(self) -> str:
        how = "one native call (--no-fused takes it apart)" if self.native else APART
        how += ", colors wait on the host" if self.gaussians.on_host else ""
        if not self.ranks.alone:
            kind = "native" if self.native else APART
            how = f"{self.views_per_step} views, shown by {self.ranks.count} processes: {kind}"
        opt, named = self.opt, ""
        if opt.preset != "published":
            values = vars(opt) | vars(self.pipe)
            flags = " ".join(_flag(name, values[name]) for name in PRESETS[opt.preset])
            named = f"; --preset {opt.preset}: {flags}"
        return f"extent {self.scene.extent:.4g}, {len(self):,} Gaussians; a step is {how}{named}"

    def closing_notes(self) -> list[str]:
        if not self.native or not self.native.skipped:
            return []
        count = self.native.skipped
        were = "step was not taken: its view" if count == 1 else "steps were not taken: their views"
        return [f"{count:,} {were} had begun to show much more"]


def suited(options: Options, scene: Scene) -> Options:
    """With --visits and --budget: as many iterations and Gaussians as suit what is known before training.

    Few photos are soon learned by heart. Points tell how much there is to show; how large the photos are
    matters little.
    """
    opt = options.opt
    most = max(opt.visits * len(scene.train_cameras), FEWEST)
    if opt.visits and most < opt.iterations:
        stages = {name: -(-getattr(opt, name) * most // opt.iterations) for name in STAGES}
        opt = replace(opt, iterations=most, **stages)
    if opt.budget:
        pixels = sum(camera.width * camera.height for camera in scene.train_cameras)
        points = len(scene.points) if scene.has_points else MADE_UP
        opt = replace(opt, cap_max=max(round(opt.budget * math.sqrt(points) * pixels ** (1 / 6)), 1))
    return options._replace(opt=opt)


def move(
    gaussians: GaussianModel, modules: list[PerView], visible: Tensor, views: int = 1, rows: bool = True
) -> None:
    """Everything along its mean gradient over the views, rows if they are to; if memory lacks, nothing."""
    ranks = gaussians.ranks
    with ranks.together():
        dealt.add_up_gradients(ranks, modules)
        for module in modules:
            module.average_gradients(views)
            module.prepare()
        if not ranks.alone:
            gaussians.prepare()
    ranks.meet("step")
    if rows:
        gaussians.step(visible)
    for module in modules:
        module.step()


def _flag(name: str, value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


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
