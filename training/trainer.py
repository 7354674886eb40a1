"""The published method: what a step of training is.

Schedule, next view, picture, loss, backward, Adam; then the strategy lets Gaussians come and go.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

import distributed
import per_view
import strategies
from arguments import PRESETS, ConfigError, ModelParams, Options, PipelineParams
from gaussian_renderer import Splats, looks
from gaussian_renderer.fused import FusedIteration, can_fuse
from gaussian_renderer.network_gui import Request
from gaussian_renderer.sharded import ShardedSplats
from per_view import Pair, PerView, Shown
from scene import Scene, formats
from scene.cameras import Camera, smaller
from scene.filter_3d import smallest_scales
from scene.folder import ModelFolder
from scene.formats.ply import save_ply
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from training.average import Average
from training.checkpoint import Part
from training.dealt import Dealt
from training.health import drop_nonfinite, drop_unusable
from training.losses import depth, mean_opacity, mean_scale, photometric
from training.memory import step_that_fits
from training.method import Method
from training.queue import ViewQueue
from utils.schedules import reaches

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
        self.ranks = distributed.current()
        self.gaussians = GaussianModel.from_points(points, model.sh_degree, scene.extent, self.device)
        self.gaussians.deal(self.ranks)
        self.gaussians.setup_optimizer(self.opt)
        self.strategy = strategies.make(options, scene.extent, say)
        self.strategy.see(scene.train_cameras, self.pipe, scene.background)
        self.modules = per_view.attached(options, scene)
        self.splats = Splats(self.gaussians, self.pipe, scene.background)
        if not self.ranks.alone:
            expect_many(options, self.strategy)
            self.splats = ShardedSplats(self.gaussians, self.pipe, scene.background, bool(model.depths))
        self.shown = Shown(self.splats, self.modules, right_half=model.train_test_exp)
        held = [mean_opacity] * (self.opt.opacity_reg > 0) + [mean_scale] * (self.opt.scale_reg > 0)
        self.held = held  # terms that need no picture
        self.losses = [photometric, *held, *([depth] if model.depths else []), *self.strategy.loss_terms()]
        self.losses += [term for module in self.modules for term in module.loss_terms()]
        self.queue = ViewQueue(len(scene.train_cameras), run.seed)
        self.views_per_step = self.views = max(self.opt.views_per_step, self.ranks.count)
        self._at_once = 1  # views that all processes show together
        self.native: FusedIteration | None = None
        self._coarse: dict[int, Camera] = {}  # by view: its photo at the size of this time
        plain = self.losses == [photometric, *held] and not self.modules and self.ranks.alone
        if plain and can_fuse(self.gaussians, options):
            self.native = FusedIteration(len(scene.train_cameras), options, self.device)
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
        views = [(number, self.queue.next(), self._background()) for number in self._numbers(iteration)]
        learn = partial(self._learn, iteration, views, moves)
        losses = step_that_fits(learn, iteration, self.gaussians, self.strategy, self.say)
        if self.average:
            self.average.after_step(self.gaussians, iteration, self.views)
        return losses

    def _numbers(self, iteration: int) -> range:
        """Of the views of the step that ends with this one."""
        return range(iteration - self.views + 1, iteration + 1)

    def _learn(self, iteration: int, views: list[tuple[int, int, Tensor]], moves: bool) -> dict[str, Tensor]:
        """Render, compare and backward for each view, and step; nothing has moved if it fails. Views: their
        numbers, which ones they are, and their backgrounds."""
        for module in self.modules:
            module.forget_gradients()
        self.last_view = ", ".join(self.scene.train_cameras[view].name for _, view, _ in views)
        losses: list[dict[str, Tensor]] = []
        with self.ranks.together():
            self._blur(iteration)
            visible = self._see(iteration, views, moves, losses)
            if not self.ranks.alone:
                self._prepare()
        self.ranks.meet("step")
        losses_of_all = self._mean(losses, len(views))
        if visible is not None:
            move(self.gaussians if moves else None, self.modules, visible, self.views)
        return losses_of_all

    def _see(
        self,
        iteration: int,
        views: list[tuple[int, int, Tensor]],
        moves: bool,
        losses: list[dict[str, Tensor]],
    ) -> Tensor | None:
        """Learn from the views that are this process's. Returns what the last one shows, unless the native
        step has taken it."""
        mine = views[self.ranks.rank :: self.ranks.count]
        cameras = [self._camera(view, iteration) for _, view, _ in mine]
        upcoming = [*cameras[1:], self.scene.train_cameras[self.queue.peek(self.ranks.rank)]]
        visible, stats = None, self.strategy.stats(self.gaussians, views[0][0])
        for first in range(0, len(views), self.ranks.count):
            self._at_once = min(len(views) - first, self.ranks.count)
            background = views[first][2]
            if not cameras:
                visible = self._collect(iteration, None, background, stats, losses)
                continue
            camera, (number, view, background) = cameras.pop(0), mine.pop(0)
            upcoming.pop(0).prefetch()
            if native := self._truthful(iteration, camera, background):
                last = moves and number == iteration
                loss, l1, *_ = native(view, camera, self.gaussians, background, stats, last)
                losses.append({"loss": loss, "l1": l1})
            else:
                visible = self._collect(iteration, camera, background, stats, losses)
        return visible

    def _collect(
        self,
        iteration: int,
        camera: Camera | None,
        background: Tensor,
        stats: ScreenStats | None,
        losses: list[dict[str, Tensor]],
    ) -> Tensor:
        """The gradients of one view more, or of none while other processes show theirs. Returns which
        Gaussians are seen [N]."""
        visits = stats.visits.clone() if stats and self.modules else None
        if camera is None:
            loss, visible = self._nothing(iteration, background, stats)
        else:
            loss, visible = self.loss(iteration, camera, background, stats)
        self.gaussians.collect(loss, self._at_once)
        if stats and visits is not None:  # however many renders one picture was made of
            torch.minimum(stats.visits, visits + self._at_once, out=stats.visits)
        losses.append({"loss": loss} | self.parts_shown)
        return visible

    def _nothing(
        self, iteration: int, background: Tensor, stats: ScreenStats | None
    ) -> tuple[Tensor, Tensor]:
        """As loss(), of no view."""
        picture, self.parts_shown = self.splats.picture(None, background, stats), {}
        camera: Any = None  # these terms ask for none
        terms = [term(picture, camera, self, iteration) for term in self.held]
        return sum(terms, picture.image.sum()), picture.radii > 0

    def _prepare(self) -> None:
        """Take the memory that the step needs, and add up what all processes have found out of the photos."""
        self.gaussians.prepare()
        values = [value for module in self.modules for value in module.parameters()]
        if not values:
            return
        grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
        total = torch.cat([grad.flatten() for grad in grads])
        self.ranks.meet("gradients of modules")
        parts = self.ranks.add_up(total).split([value.numel() for value in values])
        for value, part in zip(values, parts):
            value.grad = part.view_as(value)

    def _mean(self, losses: list[dict[str, Tensor]], views: int) -> dict[str, Tensor]:
        """Over the views of all processes."""
        if self.ranks.alone:
            return mean_of(losses)
        names = ["loss", "l1"] + ["depth"] * bool(self.options.model.depths)
        zero = torch.zeros((), device=self.device)
        sums = [sum((row[name].detach() for row in losses if name in row), zero) for name in names]
        return dict(zip(names, self.ranks.add_up(torch.stack(sums)) / views))

    def mean(self, values: Tensor) -> Tensor:
        """Over all Gaussians, of values [N, n], as a part of the loss of each view."""
        if self.ranks.alone:
            return values.mean()
        return values.sum() * (self._at_once / max(self.gaussians.total * values.shape[1], 1))

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
        return super().pair(camera)

    def pairs(self, cameras: list[Camera]) -> Iterable[Pair]:
        """Each process shows a view at a time, and all get all pictures."""
        for first in range(0, len(cameras), self.ranks.count):
            some = cameras[first : first + self.ranks.count]
            own = self.pair(some[min(self.ranks.rank, len(some) - 1)])
            if self.ranks.alone:
                yield own
                continue
            for rank, camera in enumerate(some):
                truth, mask = self.shown.photo(camera)
                yield Pair(self.ranks.from_one(rank, own.image, truth.shape), truth, mask)

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
        rows: dict[str, Part] = {"gaussians": self.gaussians, self.opt.strategy: self.strategy}
        if self.average:
            rows["average"] = self.average
        if not self.ranks.alone:
            rows = {name: Dealt(part, self.gaussians) for name, part in rows.items()}
        return rows | {"queue": self.queue} | named

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
        if not self.ranks.alone:
            self._expect_same()
        drop_nonfinite(self.gaussians, self.modules, self.strategy, when, self.say, known_bad)

    def _expect_same(self) -> None:
        """Sums over processes might differ in their last bits; then what each goes on with would, too."""
        bits = [
            int(value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
            for module in self.modules
            for value in module.parameters()
        ]
        self.ranks.expect_same("what is learned of photos", sum(bits))
        self.ranks.expect_same("random numbers", crc32(torch.get_rng_state().numpy().tobytes()))
        views = [self.queue.peek(ahead) for ahead in range(self.ranks.count)]
        self.ranks.expect_same("the order of views", crc32(repr(views).encode()))

    def histograms(self) -> dict[str, Tensor]:
        return {"scene/opacity_histogram": self.gaussians.from_all(self.gaussians.opacities.detach())}

    def describe(self) -> str:
        how = "one native call (--no-fused takes it apart)" if self.native else APART
        if not self.ranks.alone:
            how = f"{self.views_per_step} views, shown by {self.ranks.count} processes"
        opt, named = self.opt, ""
        if opt.preset != "published":
            flags = " ".join(f"--{name} {_word(getattr(opt, name))}" for name in PRESETS[opt.preset])
            named = f"; --preset {opt.preset}: {flags}"
        return f"extent {self.scene.extent:.4g}, {len(self):,} Gaussians; a step is {how}{named}"

    def closing_notes(self) -> list[str]:
        if not self.native or not self.native.skipped:
            return []
        return [f"{self.native.skipped:,} steps were not taken: their views had begun to show much more"]


def expect_many(options: Options, strategy: strategies.Strategy) -> None:
    """Several processes cannot do everything yet."""
    _, opt, pipe, run, _, views = options
    wrong = {
        "strategy": "" if strategy.for_many else opt.strategy,
        "grow_by": opt.grow_by if opt.grow_by == "disagreement" else "",
        "optimizer_type": "" if opt.optimizer_type == "default" else opt.optimizer_type,
        "blur": "" if views.blur == "none" else views.blur,
        "debug": pipe.debug or run.debug_from >= 0,
        "convert_SHs_python": pipe.convert_SHs_python,
        "view": run.view,
    }
    for name, value in wrong.items():
        if value:
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise ConfigError(f"{given} trains in one process: start it without torchrun")


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


def mean_of(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of some views. A part that a view does not have counts as 0."""
    if len(losses) == 1:
        return losses[0]
    names = dict.fromkeys(name for row in losses for name in row)
    found = {name: torch.stack([row[name].detach() for row in losses if name in row]) for name in names}
    return {name: values.sum() / len(losses) for name, values in found.items()}


def move(gaussians: GaussianModel | None, modules: list[PerView], visible: Tensor, views: int = 1) -> None:
    """Everything along its mean gradient over the views; if memory is lacking, nothing."""
    for module in modules:
        module.average_gradients(views)
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
