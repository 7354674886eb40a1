"""Pictures of Gaussians that several processes hold together, each of them some of the rows.

Every process asks for a picture of its own at the same time. Each projects its rows for all of these cameras,
and what is visible goes to where it is wanted, as records of a fixed size. A process blends what it has got,
and in the backward the gradients of the records go back to where they are from. Spherical harmonics, moments
and statistics never travel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diff_gaussian_rasterization import Rendered, ScreenStats, stages
from diff_gaussian_rasterization.pair_colors import pair_colors
from diff_gaussian_rasterization.stages import Projected, blend, lists, project
from torch import Tensor
from torch.autograd.function import once_differentiable

from arguments import PipelineParams
from distributed import Ranks, exchanged
from gaussian_renderer import Splats, shape_of
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from utils.geometry import camera_center

FIELDS = [2, 3, 1, 1, 3, 1, 1]  # of a record: center, conic, opacity, depth, color, radius, row; and, if
ABSOLUTE = sum(FIELDS)  # statistics ask for it, two columns for the absolute gradient of the center
ROW = ABSOLUTE - 1
INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}  # as wide: what the row is


class Seen(NamedTuple):
    """A camera, as other processes need it; without pixels if no picture is wanted."""

    world_to_camera: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    width: int
    height: int


class Pairs:
    """Pairs of a camera and a Gaussian that it sees: those with a radius, in [cameras, N]."""

    def __init__(self, radii: Tensor):
        self.count, seen = radii.shape[1], radii > 0
        self.counts: list[int] = seen.sum(1).tolist()  # for each camera
        self.index = seen.flatten().nonzero()[:, 0]  # number of the camera x N + row
        self.radii = radii.flatten().index_select(0, self.index)
        self.cameras = self.index.div(max(self.count, 1), rounding_mode="floor")
        self.rows = self.index - self.cameras * self.count


class ShardedSplats(Splats):
    """picture() must be called by all processes together, by those that want none with None."""

    def __init__(
        self, gaussians: GaussianModel, pipe: PipelineParams, background: Tensor, with_depth: bool = False
    ):
        super().__init__(gaussians, pipe, background)
        self.ranks, self.with_depth = gaussians.ranks, with_depth

    def __len__(self) -> int:
        return self.gaussians.total

    def mean(self, values: Tensor) -> Tensor:
        """For each of the photos shown at once, the part that the Gaussians here have in it."""
        return values.sum() * (self.at_once / max(self.gaussians.total * values.shape[1], 1))

    def picture(
        self,
        camera: Camera | None,
        background: Tensor | None = None,
        stats: ScreenStats | None = None,
        visited: Tensor | None = None,
    ) -> Rendered:
        """visited [W N]: of each process's photo, the Gaussians here that statistics have counted already."""
        with self.ranks.together():
            cameras = self._cameras(camera)
            absolute = stats is not None and stats.abs_grad_norm_sum is not None
            screens, pairs = self._projected(cameras)
            colors = self._colors(cameras, pairs)
            records = self._records(screens, pairs, colors, absolute)
        watch = partial(add_statistics, stats, pairs, cameras, visited) if stats else None
        got = self._sent(records, pairs, watch)
        with self.ranks.together():
            radii = torch.zeros(pairs.count, dtype=torch.int32, device=got.device)
            radii.index_fill_(0, pairs.rows, 1)  # what counts is whether one is seen at all
            background = self.background if background is None else background
            return self._blended(got, cameras[self.ranks.rank], background, radii)

    def pictures(
        self, cameras: list, background: Tensor | None = None, stats: ScreenStats | None = None
    ) -> list[Rendered]:
        """Those that one photo is made of; of [None], none. All processes go on until the last of them has
        what it wants."""
        numbers = self.ranks.meet("pictures", len(cameras), int(cameras[0] is not None))
        most, own = max(count for count, _ in numbers), len(cameras)
        visited = None
        if stats and most > 1:
            rows = self.ranks.count * len(self.gaussians)
            visited = torch.zeros(rows, dtype=torch.bool, device=self.gaussians.device)
        wanted = [*cameras, *[None] * (most - own)]
        views = [self.picture(camera, background, stats, visited) for camera in wanted]
        self.at_once = sum(shows for _, shows in numbers)
        if most == 1:
            return views
        radii = torch.stack([view.radii for view in views]).amax(0)
        rest = sum(view.image.sum() for view in views[own:])  # 0, but others wait for its backward
        views[0] = views[0]._replace(image=views[0].image + rest)
        return [view._replace(radii=radii) for view in views[:own]]

    @torch.no_grad()
    def scores(self, camera: Camera, names: Sequence[str], **pictures) -> Tensor:
        """[W, N, names]: of each process's picture, what the Gaussians here do to it. `pictures`, one's own,
        and names are those of stages.scores()."""
        with self.ranks.together():
            cameras = self._cameras(camera)
            screens, pairs = self._projected(cameras)
            records = self._records(screens, pairs, self._colors(cameras, pairs), absolute=False)
        expected = self._expected(pairs)
        with self.ranks.together():
            got = exchanged(self.ranks, records, pairs.counts, expected)
            screen, colors, _, order = self._screen(got, cameras[self.ranks.rank])
            pictures |= {"colors": colors} if "gradient" in pictures else {}
            found = stages.scores(screen, lists(screen), **pictures)
            columns = torch.stack([getattr(found, name).to(got) for name in names], 1)
            columns = torch.empty_like(columns).index_copy_(0, order, columns)
            parts = exchanged(self.ranks, columns, expected, pairs.counts)
            whole = parts.new_zeros(len(cameras) * pairs.count, len(names))
            return whole.index_copy_(0, pairs.index, parts).view(len(cameras), pairs.count, len(names))

    def _sent(self, records: Tensor, pairs: Pairs, watch: Callable[[Tensor], None] | None) -> Tensor:
        """What the others have sent here."""
        expected = self._expected(pairs)
        with self.ranks.together():
            return _Exchange.apply(records, pairs.counts, expected, self.ranks, watch)

    def _expected(self, pairs: Pairs) -> list[int]:
        """How many records come from each process."""
        return [row[self.ranks.rank] for row in self.ranks.meet("records", *pairs.counts)]

    def _cameras(self, camera: Camera | None) -> list[Seen]:
        """Those of all processes. Gradients of poses go back to where they are from."""
        means = self.gaussians.means
        numbers, moving = [0, 0], False
        pose = means.new_zeros(25)
        if camera is not None:
            numbers = [camera.width, camera.height]
            moving = torch.is_grad_enabled() and camera.world_to_camera.requires_grad
            pose = torch.cat([camera.world_to_camera.flatten(), camera.K.flatten()]).to(means.dtype)
        sizes = self.ranks.meet("cameras", *numbers, int(moving))
        if any(row[2] for row in sizes) and not pose.requires_grad:
            pose.requires_grad_()
        poses = _Gathered.apply(pose, self.ranks)
        return [
            Seen(row[:16].view(4, 4), row[16:].view(3, 3), width, height)
            for row, (width, height, _) in zip(poses, sizes)
        ]

    def _projected(self, cameras: list[Seen]) -> tuple[list[Projected], Pairs]:
        """The Gaussians here, as each camera sees them."""
        model, rule = self.gaussians, "antialiasing" if self.pipe.antialiasing else "none"
        shape = shape_of(model, self.pipe, 1.0)
        real = next(camera for camera in cameras if camera.width)  # it stands in for those that are not
        screens = [
            project(model.means, **shape, **(camera if camera.width else real)._asdict(), compensation=rule)
            for camera in cameras
        ]
        radii = torch.stack([screen.radii for screen in screens])
        for i, camera in enumerate(cameras):
            if not camera.width:
                radii[i] = 0
        return screens, Pairs(radii)

    def _colors(self, cameras: list[Seen], pairs: Pairs) -> Tensor:
        model = self.gaussians
        centers = torch.stack([camera_center(camera.world_to_camera) for camera in cameras])
        sh = model.sh_dc, model.sh_rest
        return pair_colors(model.means, *sh, centers, pairs.index, model.active_sh_degree)

    def _records(self, screens: list[Projected], pairs: Pairs, colors: Tensor, absolute: bool) -> Tensor:
        """Of each pair, one camera after the other."""
        center, conic, opacity, depth = (
            torch.cat(parts).index_select(0, pairs.index) for parts in zip(*(s[:4] for s in screens))
        )
        number = pairs.rows * self.ranks.count + self.ranks.rank  # of the row, among those of all
        columns = [center, conic, opacity[:, None], depth[:, None], colors, pairs.radii[:, None].to(center)]
        columns += [number[:, None].to(INTEGER[center.dtype]).view(center.dtype)]
        columns += [torch.zeros_like(center)] * absolute
        return torch.cat(columns, 1)

    def _blended(self, got: Tensor, camera: Seen, background: Tensor, radii: Tensor) -> Rendered:
        if not camera.width:
            nothing = got.sum()  # of no records
            return Rendered(nothing.expand(3, 1, 1), nothing.expand(1, 1, 1), nothing.expand(1, 1, 1), radii)
        screen, colors, carrier, _ = self._screen(got, camera)
        if self.with_depth:
            colors = torch.cat([colors, 1 / screen.depths[:, None]], 1)
            background = torch.cat([background, background.new_zeros(1)])
        image, alpha = blend(screen, colors, lists(screen), background, carrier)
        inv_depth = image[3:] if self.with_depth else torch.zeros_like(alpha)
        return Rendered(image[:3], alpha, inv_depth, radii)

    def _screen(self, got: Tensor, camera: Seen) -> tuple[Projected, Tensor, Tensor | None, Tensor]:
        """Records as what is blended: splats, colors, what carries absolute gradients; and their order."""
        rows = got[:, ROW : ROW + 1].detach().contiguous().view(INTEGER[got.dtype])[:, 0]
        order = rows.argsort()  # equal depths are blended in the order of all rows
        parts = got.index_select(0, order).split([*FIELDS, got.shape[1] - ABSOLUTE], 1)
        center, conic, opacity, depth, colors, radius, _, absolute = parts
        flat = opacity[:, 0], depth[:, 0], radius[:, 0].detach().int()
        screen = Projected(center, conic, *flat, camera.width, camera.height)
        return screen, colors, absolute if absolute.shape[1] else None, order


def splats_of(
    gaussians: GaussianModel, pipe: PipelineParams, background: Tensor, with_depth: bool = False
) -> Splats:
    """Of the Gaussians of one process or of several."""
    if gaussians.ranks.alone:
        return Splats(gaussians, pipe, background)
    return ShardedSplats(gaussians, pipe, background, with_depth)


def add_statistics(
    stats: ScreenStats, pairs: Pairs, cameras: list[Seen], visited: Tensor | None, grads: Tensor
) -> None:
    """Of each visible pair of camera and Gaussian, from the gradients of its record. However many pictures a
    photo is made of, it counts once."""
    rows, counted = pairs.rows, torch.ones_like(pairs.rows, dtype=stats.visits.dtype)
    halves = grads.new_tensor([[camera.width / 2, camera.height / 2] for camera in cameras])[pairs.cameras]
    if visited is not None:
        counted -= visited[pairs.index].to(counted)
        visited[pairs.index] = True
    stats.visits.index_add_(0, rows, counted)
    for at, total in ((0, stats.grad_norm_sum), (ABSOLUTE, stats.abs_grad_norm_sum)):
        if total is not None:
            total.index_add_(0, rows, (grads[:, at : at + 2] * halves).norm(dim=1).to(total))


class _Exchange(torch.autograd.Function):
    """Records go to where they are blended, their gradients back."""

    @staticmethod
    def forward(
        ctx,
        records: Tensor,
        counts: list[int],
        expected: list[int],
        ranks: Ranks,
        watch: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.way, ctx.ranks, ctx.watch = (expected, counts), ranks, watch
        return exchanged(ranks, records, counts, expected)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        grads = exchanged(ctx.ranks, grad, *ctx.way)
        if ctx.watch:
            ctx.watch(grads)
        return grads, None, None, None, None


class _Gathered(torch.autograd.Function):
    """A vector of each process, [W, n]."""

    @staticmethod
    def forward(ctx, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gathered(own)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        ctx.ranks.meet("gradients of poses")
        return ctx.ranks.add_up(grad.contiguous())[ctx.ranks.rank], None
