"""Gaussians whose colors are in the host's memory, for more of them than a GPU has room for (--offload).

Of the 59 numbers of a Gaussian, 48 are spherical harmonics, and Adam has two moments for each. They are
rows of a table on the host. For each picture, the rows that the camera may see are fetched; after backward,
those with a gradient make their step on the device, by the same kernel as ever, and go back. Positions,
shapes and opacities stay on the device, with their moments. gaussian_renderer/fused_offload.py does the same
in native calls, in which they wait, too.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diff_gaussian_rasterization import ScreenStats
from diff_gaussian_rasterization.training import Kinds
from torch import Tensor, nn

from arguments import OptimizationParams
from scene.color_table import ON_HOST, Colors, Fetched
from scene.gaussian_model import MOMENTS, GaussianModel

SCAN = 2**22  # rows that are looked at in one go for which of them a camera may see
NEAR, FOV_MARGIN, TILE = 0.2, 1.3, 16  # constants of the rasterizer: nearest depth, see may_see(), pixels
DEVICES = ("cuda",)  # that have a memory of their own


def model_class(offload: bool, device: torch.device, say: Callable[[str], None]) -> type[GaussianModel]:
    """What a run with or without --offload trains."""
    if offload and device.type not in DEVICES:
        say(f"--offload changes nothing on a {device.type.upper()}: its memory is the host's")
    return Offloaded if offload and device.type in DEVICES else GaussianModel


class Part(GaussianModel):
    """What a camera may see of the model, with parameters of its own."""

    rows: Tensor  # [V] of the model, rising
    fetched: Fetched | None = None
    stats: tuple[ScreenStats, ScreenStats] | None = None  # of these rows, and of all

    def add_statistics(self) -> None:
        if self.stats:
            add_statistics(self.rows, *self.stats)


class Seen(NamedTuple):
    """Gradients of the rows that have any."""

    rows: Tensor  # [U]
    grads: dict[str, Tensor]  # by name [U, ...]
    fetched: Fetched | None


class Offloaded(GaussianModel):
    on_host = ON_HOST
    _colors: Colors | None = None

    def __init__(
        self, params: dict[str, Tensor], sh_degree: int, active_sh_degree: int = 0, extent: float = 1.0
    ):
        self._parts: list[Part] = []  # that the pictures of this step were made of
        self._seen: Seen | None = None
        super().__init__(params, sh_degree, active_sh_degree, extent)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        super().settle()
        return _Looked(self._params, self._look)

    @params.setter
    def params(self, params: dict[str, nn.Parameter]) -> None:
        self._params = params

    def _look(self) -> None:
        if self._colors:
            self._colors.catch_up()

    def settle(self) -> None:
        """Let the host see what the device has written. Colors may go on waiting."""
        super().settle()
        if self._colors:
            self._colors.wait()

    def setup_optimizer(self, opt: OptimizationParams) -> None:
        super().setup_optimizer(opt)
        self._pack()

    def _pack(self) -> Colors:
        """From parameters and moments, wherever they are, to the table."""
        states = {name: self.optimizer.state.get(self._params[name], {}) for name in ON_HOST}
        values = {
            name: [value := self._params[name], *(state.get(key, torch.zeros_like(value)) for key in MOMENTS)]
            for name, state in states.items()
        }
        step = int(states["sh_dc"].get("step", 0))
        return self._bind(Colors.of(values, self.device, step))

    def _bind(self, colors: Colors) -> Colors:
        """The parameters of that name, and their moments, are views of this table."""
        self._colors = colors
        step = float(0 if self.sparse else colors.clock.step)
        groups = {group["name"]: group for group in self.optimizer.param_groups}
        for name, (value, *moments) in colors.on_host().items():
            self.optimizer.state.pop(groups[name]["params"][0], None)
            param = self._params[name] = nn.Parameter(value)
            groups[name]["params"] = [param]
            self.optimizer.state[param] = {"step": torch.tensor(step), **dict(zip(MOMENTS, moments))}
        return colors

    # A picture

    def seen_by(
        self, camera, scaling_modifier: float = 1.0, stats: ScreenStats | None = None
    ) -> tuple[GaussianModel, ScreenStats | None]:
        assert self._colors
        super().settle()
        rows, params = self.rows_near(camera, scaling_modifier), self._params
        fetched = self._colors.fetch(rows)
        part = Part(
            {n: fetched.values[n][0] if n in ON_HOST else v.detach()[rows] for n, v in params.items()},
            self.sh_degree, self.active_sh_degree, self.extent,
        )  # fmt: skip
        part.rows, part._standard = rows, self.standard_activations()
        part.smallest = None if self.smallest is None else self.smallest[rows]
        if torch.is_grad_enabled():
            self._remember(part, fetched)
        if stats is not None:
            absolute = stats.abs_grad_norm_sum is not None
            part.stats = ScreenStats.zeros(len(rows), rows.device, absolute), stats
        return part, part.stats[0] if part.stats else None

    def _remember(self, part: Part, fetched: Fetched) -> None:
        """Moments of many pictures would take much memory: then they are fetched again."""
        if not self._parts and not self.collected:
            part.fetched = fetched
        for other in self._parts:
            other.fetched = None
        self._parts.append(part)

    def spread(self, part: GaussianModel, values: Tensor) -> Tensor:
        assert isinstance(part, Part)
        return values.new_zeros(*values.shape[:-1], len(self)).index_copy_(-1, part.rows, values)

    @torch.no_grad()
    def rows_near(self, camera, scaling_modifier: float = 1.0) -> Tensor:
        """Of what the camera may see, rising."""
        found = []
        for begin in range(0, len(self), SCAN):
            rows = {n: v[begin : begin + SCAN] for n, v in self._params.items() if n not in ON_HOST}
            piece = GaussianModel(rows, self.sh_degree)
            piece.smallest = None if self.smallest is None else self.smallest[begin : begin + SCAN]
            scales = piece.shown()[0].amax(1) * scaling_modifier
            found.append(begin + may_see(camera, piece.means, scales).nonzero()[:, 0])
        return torch.cat(found)

    # A step

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        parts, self._parts = self._parts, []
        for part in parts:
            part.add_statistics()
        found = [
            Seen(part.rows, {n: _gradient(value) for n, value in part._params.items()}, part.fetched)
            for part in parts
        ]
        alone = max(*self._opt.update_every, self._opt.views_per_step) == 1
        if len(found) == 1 and self._seen is None and alone:
            self._seen = found[0]
            return
        found = [*([self._seen] if self._seen else []), *found]
        for seen in found:  # those of a parameter on the device meet there
            for name in seen.grads.keys() - set(ON_HOST):
                _add_rows(self._params[name], seen.rows, seen.grads[name])
        self._seen = _joined(found)

    def step(self, visible: Tensor) -> None:
        seen, colors = self._seen, self._colors
        if seen is None or colors is None:
            return super().step(visible)
        whole = {n: v.grad for n, v in self._params.items() if n not in ON_HOST}  # of terms without a picture
        torch.empty(self._room_for_step(), device=self.device)
        fetched, moved = self._moved_colors(colors, seen, visible)
        for name in whole:  # one after the other: a gradient for each Gaussian takes memory
            for other in whole:
                self._params[other].grad = whole[other] if other == name else None
            if name in seen.grads:
                _add_rows(self._params[name], seen.rows, seen.grads[name])
            super().step(visible)
        if not self.sparse:
            self._tick()
            for name in ON_HOST:
                self.optimizer.state[self._params[name]]["step"] += 1
        colors.store(fetched, moved)

    def _room_for_step(self) -> int:
        """Numbers for which there must be room before anything moves."""
        others = [v for n, v in self._params.items() if n not in ON_HOST]
        moments = sum(len(MOMENTS) * v.numel() for v in others if not self.optimizer.state.get(v))
        return moments + max(v.numel() for v in others)

    def _tick(self) -> None:
        rates, betas, _ = self._adam_of_colors()
        assert self._colors
        self._colors.clock.tick(rates, betas)

    def _adam_of_colors(self) -> tuple[list[float], tuple[float, float], float]:
        """Learning rates, betas and eps."""
        groups = {group["name"]: group for group in self.optimizer.param_groups}
        first = groups[ON_HOST[0]]
        return [float(groups[name]["lr"]) for name in ON_HOST], first["betas"], first["eps"]

    @torch.no_grad()
    def _moved_colors(self, colors: Colors, seen: Seen, visible: Tensor) -> tuple[Fetched, Tensor]:
        """The seen rows after the step, and a mask of those that must be written. In the table nothing has
        moved yet."""
        fetched = seen.fetched or colors.fetch(seen.rows)
        params, *moments = ([fetched.values[name][i] for name in ON_HOST] for i in range(3))
        grads, number, shown = [seen.grads[name] for name in ON_HOST], colors.clock.step + 1, None
        moved = (grads[0] != 0).flatten(1).any(1)  # other rows can as well wait
        if self.sparse:
            number, shown = 1, visible[seen.rows]
            moved = shown
        rates, betas, eps = self._adam_of_colors()
        torch.ops.tilesplat.adam_step(params, grads, *moments, rates, *betas, eps, number, shown)
        return fetched, moved

    # A step that is one native call: see gaussian_renderer/fused_offload.py

    @torch.no_grad()
    def taken(self, rows: Tensor, of: Kinds) -> tuple[Fetched, Kinds]:
        """These rows of parameters and moments, in the optimizer's order, as tensors of their own."""
        assert self._colors
        fetched = self._colors.fetch(rows)

        def own(i: int) -> list[Tensor]:
            of_names = zip(self._names(), of[i])
            return [fetched.values[n][i] if n in ON_HOST else _rows(value, rows) for n, value in of_names]

        return fetched, (own(0), own(1), own(2))

    @torch.no_grad()
    def put_back(self, fetched: Fetched, moved: Tensor, parts: Kinds, of: Kinds) -> None:
        """After a step in which those of the rows have moved."""
        assert self._colors
        for part, values in zip(parts, of):
            for name, own, value in zip(self._names(), part, values):
                if name not in ON_HOST:
                    value.index_copy_(0, fetched.rows, own)
        self._tick()
        self._colors.store(fetched, moved)

    def _names(self) -> list[str]:
        return [group["name"] for group in self.optimizer.param_groups]

    def forget_gradients(self) -> None:
        super().forget_gradients()
        self._parts, self._seen = [], None

    def gradients(self) -> dict[str, Tensor]:
        """By name, with a row for each Gaussian; those of colors on the host."""
        found = {n: v.grad for n, v in self._params.items() if v.grad is not None}
        if self._seen:
            for name, gradient in self._seen.grads.items():
                known = found.get(name, torch.zeros(self._params[name].shape)).cpu()
                found[name] = known.index_add(0, self._seen.rows.cpu(), gradient.cpu())
        return found

    def _scale_gradients(self, factor: float) -> None:
        of_params = [value.grad for value in self._params.values() if value.grad is not None]
        for gradient in [*of_params, *(self._seen.grads.values() if self._seen else ())]:
            gradient.mul_(factor)

    # Rows that move, checkpoints, health

    @torch.no_grad()
    def reindex(self, index: Tensor, fresh: Tensor | None = None) -> None:
        assert self._colors
        colors = self._colors.reindexed(index, fresh)
        super().reindex(index, fresh)
        self._bind(colors)

    def state_dict(self) -> dict:
        """With rows as they wait, and what it takes to let them catch up: see up_to_date()."""
        assert self._colors
        state = super().state_dict() | {"behind": self._colors.state_dict()}
        own = lambda values: {key: value.contiguous() for key, value in values.items()}  # noqa: E731
        moments = {name: own(values) for name, values in state["moments"].items()}
        return state | {"params": own(state["params"]), "moments": moments}

    def load_state_dict(self, state: dict) -> None:
        gradients = dict(state.get("gradients", {}))
        of_colors = {name: gradients.pop(name) for name in ON_HOST if name in gradients}
        super().load_state_dict(state | {"gradients": gradients})
        colors = self._pack()
        if "behind" in state:
            colors.load_state_dict(state["behind"])
        self.smallest = None if self.smallest is None else self.smallest.to(self.device)
        if of_colors:
            rows = (of_colors["sh_dc"] != 0).flatten(1).any(1).nonzero()[:, 0]
            grads = {name: value[rows].to(self.device) for name, value in of_colors.items()}
            self._seen = Seen(rows.to(self.device), grads, None)

    def sums(self) -> list[Tensor]:
        """Of colors, what has been written since rows last moved: reading all of them takes too long."""
        assert self._colors
        others = [value.sum() for name, value in self._params.items() if name not in ON_HOST]
        return [*others, self._colors.sum]


class _Looked(dict):
    """Parameters by name. Those on the host catch up when somebody looks."""

    def __init__(self, params: dict[str, nn.Parameter], look: Callable[[], None]):
        super().__init__(params)
        self._look = look

    def __getitem__(self, name: str) -> nn.Parameter:
        if name in ON_HOST:
            self._look()
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self._look()
        return super().__iter__()

    def values(self):
        self._look()
        return super().values()

    def items(self):
        self._look()
        return super().items()


@torch.no_grad()
def may_see(camera, means: Tensor, largest: Tensor) -> Tensor:
    """Mask [N]: False only if the splat of such a Gaussian, of which this is the largest scale, lies behind
    the camera (or all of several) or, estimated generously, beside the image."""
    K, size = camera.K.to(means), means.new_tensor([camera.width, camera.height])
    focal, seen = K.diagonal()[:2], torch.zeros_like(largest, dtype=torch.bool)
    steep = 1 + (FOV_MARGIN * size / (2 * focal)) ** 2  # the projection is linearized no farther outside
    for matrix in camera.world_to_camera.detach().to(means).view(-1, 4, 4):
        at = means @ matrix[:3, :3].T + matrix[:3, 3]
        depth = at[:, 2:]
        sigma = (focal**2 * steep).sum().sqrt() * largest[:, None] / depth  # at least the splat's, in pixels
        reach = 3 * (sigma + 2) + TILE
        place = focal * at[:, :2] / depth + K[:2, 2]
        outside = ((place < -reach) | (place > size + reach)).any(1)
        seen |= (at[:, 2] > 0.999 * NEAR) & ~outside
    return seen


def add_statistics(rows: Tensor, own: ScreenStats, of_all: ScreenStats) -> None:
    for values, all_rows in zip(vars(own).values(), vars(of_all).values()):
        if values is not None:
            all_rows.index_add_(0, rows, values)


def _rows(value: Tensor, rows: Tensor) -> Tensor:
    """value[rows], which takes a GPU 30 times as long for rows of four numbers."""
    return value[rows[:, None], torch.arange(value.shape[1], device=rows.device)]


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def _add_rows(param: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    param.grad.index_add_(0, rows, gradient)


def _joined(found: list[Seen]) -> Seen:
    """Gradients of colors, of several pictures."""
    rows = torch.cat([seen.rows for seen in found]).unique()
    first = found[0].grads
    grads = {name: first[name].new_zeros(len(rows), *first[name].shape[1:]) for name in ON_HOST}
    for seen in found:
        places = torch.searchsorted(rows, seen.rows)
        for name in ON_HOST:
            grads[name].index_add_(0, places, seen.grads[name])
    return Seen(rows, grads, None)
