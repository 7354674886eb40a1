"""The Gaussians: raw parameters, what they mean, their optimizer, and the one way in which rows move.

Optimized are unconstrained numbers; the activations make opacities of logits, scales of logarithms and unit
quaternions of any (Kerbl et al. 2023, section 4). add_attribute() adds a tensor of your own with a row per
Gaussian: steps, clones, splits, pruning, checkpoints and the PLY then have it, too.
"""

import copy
from collections.abc import Callable

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, SparseGaussianAdam, knn_mean_dist2
from torch import Tensor, nn

from arguments import OptimizationParams
from distributed import ALONE, Move, Ranks
from distributed.rows import from_all, on_first, own, own_of
from scene.filter_3d import blurred
from scene.points import PointCloud
from utils.files import DataError
from utils.geometry import covariances
from utils.memory import in_short, out_of_memory
from utils.schedules import for_views, log_linear, sh_degree_at
from utils.sh import rgb_to_sh

INITIAL_OPACITY = 0.1
RESET_OPACITY = 0.01
FAINTEST = 1e-12  # opacity whose logit is kept
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-15  # gradients of positions are tiny: the usual 1e-8 would damp them
MOMENTS = ("exp_avg", "exp_avg_sq")
PROBES = 32  # rows on which the activations are tried
GPU_PIECES = 2**24  # numbers that may be lost at the ends of the pieces in which a GPU's memory is handed out


def learning_rates(opt: OptimizationParams, extent: float) -> dict[str, float]:
    """Parameter name -> learning rate, in the order of the original's optimizer groups."""
    return {
        "means": opt.position_lr_init * extent,
        "sh_dc": opt.feature_lr,
        "sh_rest": opt.feature_lr / opt.feature_rest_div,
        "opacity_logits": opt.opacity_lr,
        "log_scales": opt.scaling_lr,
        "raw_quats": opt.rotation_lr,
    }


class GaussianModel:
    """Trainable Gaussians. Row i of every parameter and of every optimizer state is Gaussian i."""

    means: nn.Parameter  # [N, 3]
    sh_dc: nn.Parameter  # [N, 1, 3]     constant SH coefficient
    sh_rest: nn.Parameter  # [N, K-1, 3]   the others, K = (sh_degree + 1)^2
    opacity_logits: nn.Parameter  # [N, 1]
    log_scales: nn.Parameter  # [N, 3]        natural logarithms
    raw_quats: nn.Parameter  # [N, 4]        quaternions (w, x, y, z) of any length
    on_host: tuple[str, ...] = ()  # parameters that are elsewhere: see scene/offload.py
    rows: Tensor | slice = slice(None)  # which of the model's, if this is what a camera sees of it
    antialiased = False  # trained with --antialiasing, as far as the file that it is from tells

    def __init__(
        self, params: dict[str, Tensor], sh_degree: int, active_sh_degree: int = 0, extent: float = 1.0
    ):
        self._settle: Callable[[], None] | None = None
        self.smallest: Tensor | None = None  # [N] what they are blurred by: see scene/filter_3d.py
        self.collected = 0  # views of which the gradients, if there are any, are the mean
        self.params = {name: nn.Parameter(value.detach().contiguous()) for name, value in params.items()}
        self.sh_degree = sh_degree  # the highest
        self.active_sh_degree = active_sh_degree  # the highest in use so far
        self.extent = extent  # radius of the scene, to which position learning rates are relative
        self.rates_for = 1.0  # views of a step, for which learning rates are larger: see for_views()
        self.ranks, self._total = ALONE, 0  # see deal()
        self._own_rates: dict[str, float] = {}  # attributes of one's own -> learning rate
        self._standard: bool | None = None  # see standard_activations()

    @classmethod
    def from_points(
        cls,
        points: PointCloud,
        sh_degree: int,
        extent: float,
        device: torch.device,
    ) -> "GaussianModel":
        """One round, faint Gaussian per point, as large as the distance to its neighbors."""
        means = torch.tensor(points.xyz, dtype=torch.float32, device=device)  # a copy: training writes to it
        count = len(means)
        if count == 0:
            raise DataError("there are no points to start from; --random_init makes some")
        spacing = knn_mean_dist2(means).clamp_min(1e-7).sqrt()
        params = {
            "means": means,
            "sh_dc": rgb_to_sh(torch.tensor(points.rgb, device=device))[:, None, :],
            "sh_rest": torch.zeros(count, (sh_degree + 1) ** 2 - 1, 3, device=device),
            "opacity_logits": torch.full((count, 1), INITIAL_OPACITY, device=device).logit(),
            "log_scales": spacing.log()[:, None].repeat(1, 3),
            "raw_quats": torch.tensor([1.0, 0.0, 0.0, 0.0], device=device).repeat(count, 1),
        }
        return cls(params, sh_degree, extent=extent)

    def add_attribute(self, name: str, values: Tensor, lr: float) -> None:
        """A tensor of your own, [N, ...] with at least two dimensions, optimized with this learning rate.
        Call it before setup_optimizer()."""
        if name in self._params or values.dim() < 2 or len(values) != len(self):
            raise ValueError(f"{name} must be a new name and [{len(self)}, ...], got {list(values.shape)}")
        self._params[name] = nn.Parameter(values.detach().to(self.device, torch.float32).contiguous())
        self._own_rates[name] = lr

    # What the parameters mean

    def __getattr__(self, name: str) -> nn.Parameter:
        """gaussians.means is gaussians.params["means"]."""
        if name in self.__dict__.get("_params", {}):
            return self.params[name]
        raise AttributeError(f"GaussianModel has no attribute {name}")

    def __setattr__(self, name: str, value) -> None:
        """gaussians.means += 1 changes the parameter, and gaussians.means = other would not."""
        if name not in self.__dict__.get("_params", {}):
            super().__setattr__(name, value)
        elif value is not self._params[name]:
            raise AttributeError(
                f"the optimizer would not know another {name}: copy_() into this one, or reindex() the model"
            )

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """By name. Rows that waited have caught up when somebody looks."""
        self.settle()
        return self._params

    @params.setter
    def params(self, params: dict[str, nn.Parameter]) -> None:
        self._params = params

    def settle_with(self, settle: Callable[[], None]) -> None:
        """From now on rows may be behind the optimizer's step count; `settle` lets them catch up."""
        self._settle = settle

    def settle(self) -> None:
        """Bring all rows, and their moments, up to date with the last step."""
        settle, self._settle = self._settle, None
        if settle:
            settle()

    def __len__(self) -> int:
        """How many Gaussians there are here."""
        return len(self._params["means"])

    # Several processes, each with its own rows

    def deal(self, ranks: Ranks) -> None:
        """Of all rows, keep those of this process. Call it before setup_optimizer()."""
        self.ranks, self._total = ranks, len(self)
        self.params = {k: nn.Parameter(own(ranks, v.detach())) for k, v in self.params.items()}

    @property
    def total(self) -> int:
        """How many Gaussians there are in all processes."""
        return len(self) if self.ranks.alone else self._total

    def from_all(self, values: Tensor) -> Tensor:
        """The rows [total, ...] of all processes, of values [N, ...] with a row for each Gaussian here."""
        return from_all(self.ranks, values, self.total)

    def own(self, values: Tensor) -> Tensor:
        """The other way: of the rows of all processes, those of the Gaussians here."""
        return own(self.ranks, values)

    def add_to(self, name: str, index: Tensor, values: Tensor) -> None:
        """To these rows, counted over all processes, of a parameter."""
        self.params[name].index_add_(0, *own_of(self.ranks, index, values.to(self.means.dtype)))

    def set_rows(self, name: str, index: Tensor, values: Tensor) -> None:
        self.params[name].index_copy_(0, *own_of(self.ranks, index, values.to(self.means.dtype)))

    @property
    def device(self) -> torch.device:
        return self._params["means"].device

    @property
    def scales(self) -> Tensor:
        return self.params["log_scales"].exp()  # [N, 3]

    @property
    def quats(self) -> Tensor:
        return nn.functional.normalize(self.params["raw_quats"], dim=-1)  # [N, 4]

    @property
    def opacities(self) -> Tensor:
        return self.params["opacity_logits"].sigmoid()  # [N, 1]

    def shown(self) -> tuple[Tensor, Tensor]:
        """Scales and opacities as pictures have them."""
        if self.smallest is None:
            return self.scales, self.opacities
        return blurred(self.scales, self.opacities, self.smallest)

    @torch.no_grad()
    def as_shown(self) -> "GaussianModel":
        """A model that looks the same everywhere, with the blur in its parameters."""
        if self.smallest is None:
            return self
        scales, opacities = self.shown()
        params = dict(self.params)
        params |= {"log_scales": scales.log(), "opacity_logits": opacities.clamp_min(FAINTEST).logit()}
        shown = GaussianModel(params, self.sh_degree, self.active_sh_degree, self.extent)
        shown.ranks, shown._total = self.ranks, self._total
        return shown

    def whole(self) -> "GaussianModel":
        """The Gaussians of all processes, on the host of the first; in the others it has none."""
        if self.ranks.alone:
            return self
        params = {name: on_first(self.ranks, v.detach(), self.total) for name, v in self.params.items()}
        return GaussianModel(params, self.sh_degree, self.active_sh_degree, self.extent)

    def standard_activations(self) -> bool:
        """Are the three above what the kernels compute from raw parameters? Tried on a few numbers once, and
        again when schedule() adds a band of color: an activation that was edited is not passed over."""
        if self._standard is None:
            self._standard = _standard_activations(self)
        return self._standard

    # The original's names, for code that was written for it

    get_xyz = property(lambda self: self.means)
    get_features_dc = property(lambda self: self.sh_dc)
    get_features_rest = property(lambda self: self.sh_rest)
    get_features = property(lambda self: torch.cat([self.sh_dc, self.sh_rest], dim=1))
    get_opacity = property(lambda self: self.opacities)
    get_scaling = property(lambda self: self.scales)
    get_rotation = property(lambda self: self.quats)
    max_sh_degree = property(lambda self: self.sh_degree)

    def get_covariance(self, scaling_modifier: float = 1.0) -> Tensor:
        return covariances(self.scales, self.quats, scaling_modifier)

    def finite(self) -> Tensor:
        """Mask [N]: no parameter is infinite or not a number."""
        self.settle()
        finite = [value.isfinite().flatten(1).all(1).to(self.device) for value in self._params.values()]
        return torch.stack(finite).all(0)

    def sums(self) -> list[Tensor]:
        """Of all numbers: finite if each number is."""
        return [value.sum() for value in self.params.values()]

    # What a picture is made of

    def seen_by(
        self, camera, scaling_modifier: float = 1.0, stats: ScreenStats | None = None
    ) -> tuple["GaussianModel", ScreenStats | None]:
        """The Gaussians that a camera may show, and the statistics of their rows."""
        return self, stats

    def spread(self, part: "GaussianModel", values: Tensor) -> Tensor:
        """Values [..., V] of what seen_by() returned as [..., N] of all Gaussians; the others are 0."""
        return values

    # Optimization

    def setup_optimizer(self, opt: OptimizationParams) -> None:
        """A fresh optimizer, with zero moments."""
        self._opt = opt
        rates = learning_rates(opt, self.extent) | self._own_rates
        groups = [{"name": name, "params": [self.params[name]], "lr": rate} for name, rate in rates.items()]
        self._rates = rates
        self.sparse = opt.optimizer_type == "sparse_adam"
        adam = SparseGaussianAdam if self.sparse else FusedAdam
        self.optimizer: FusedAdam | SparseGaussianAdam = adam(groups, lr=0.0, eps=ADAM_EPS)

    def schedule(self, iteration: int) -> None:
        """Learning rates and SH degree of this step (counted from 1)."""
        opt = self._opt
        late = max(iteration - opt.iterations // 2, 0)
        part = log_linear(late, 1.0, opt.rates_final, opt.iterations - opt.iterations // 2)
        for group in self.optimizer.param_groups:
            rate = part * self._rates[group["name"]]
            if group["name"] == "means":
                start, end = opt.position_lr_init * self.extent, opt.position_lr_final * self.extent
                rate = log_linear(iteration, start, end, opt.position_lr_max_steps)
            group |= for_views(self.rates_for, rate, ADAM_BETAS, ADAM_EPS)
        degree = max(self.active_sh_degree, sh_degree_at(iteration, self.sh_degree))
        if degree != self.active_sh_degree:
            self.active_sh_degree, self._standard = degree, None

    def step(self, visible: Tensor) -> None:
        """Move the parameters along their gradients, and drop the gradients. visible: bool [N].

        When memory is lacking, it fails before anything has moved.
        """
        if isinstance(self.optimizer, SparseGaussianAdam):
            self.optimizer.step(visible, len(self))
        else:
            self.optimizer.step()
        self.forget_gradients()

    def prepare(self) -> None:
        """Take the memory that step() needs."""
        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.begin_step()
            self.optimizer.take_step_back()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.collected = 0

    def gradients(self) -> dict[str, Tensor]:
        """By name, of parameters that have one."""
        return {name: value.grad for name, value in self.params.items() if value.grad is not None}

    def collect(self, loss: Tensor, views: int = 1) -> None:
        """Backward of a view, and of those that other processes show at the same time; the gradients are then
        the mean over so many views more."""
        if self.collected:
            self._scale_gradients(self.collected)
        self._backward(loss)
        self.collected += views
        if self.collected > 1:
            self._scale_gradients(1 / self.collected)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _scale_gradients(self, factor: float) -> None:
        for gradient in self.gradients().values():
            gradient.mul_(factor)

    @torch.no_grad()
    def reindex(self, index: Tensor, fresh: Tensor | None = None) -> None:
        """Make row k of the model what row index[k] was, carrying Adam's moments along. Rows are counted over
        all processes.

        Pruning, cloning, splitting and sorting are all this one move. Rows in the mask `fresh` are new
        Gaussians: they start with zero moments. Gradients do not move; call after the optimizer's step.
        When memory for the new rows is lacking, it fails before anything has moved.
        """
        self.settle()
        move = Move(self.ranks, index)
        self._reserve(move.count)
        self.ranks.meet("room for rows")
        self.forget_gradients()
        self.smallest = None
        device = self.device
        try:
            self._move(move, None if fresh is None else self.own(fresh))
            self._total = len(index)
            self._bring_back(device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(f"while Gaussians were moved: {in_short(error)}") from None

    def _move(self, move: Move, fresh: Tensor | None) -> None:
        groups = [group for group in self.optimizer.param_groups if group["name"] not in self.on_host]
        for group in groups:  # nothing old is kept longer than it takes to copy it
            old = group["params"].pop()
            state = self.optimizer.state.pop(old, {})
            new = group["params"] = [nn.Parameter(_rows(old, move))]
            self._params[group["name"]] = new[0]
            del old
            for key in MOMENTS:
                if key in state:
                    state[key] = _rows(state[key], move)
                    if fresh is not None:
                        rows = fresh.view(-1, *[1] * (state[key].dim() - 1))
                        state[key].masked_fill_(rows.to(state[key].device), 0)
            if state:
                self.optimizer.state[new[0]] = state

    def _bring_back(self, device: torch.device) -> None:
        """What had to go to the host in the course of _move(). Should holes in the device's memory be in the
        way, everything goes to the host first."""
        params = [value for name, value in self._params.items() if name not in self.on_host]
        states = [self.optimizer.state.get(value, {}) for value in params]
        tensors = [*params, *(state[key] for state in states for key in MOMENTS if key in state)]
        try:
            _send(tensors, device)
        except torch.OutOfMemoryError:
            _send(tensors, torch.device("cpu"))
            _send(tensors, device)

    def _reserve(self, count: int) -> None:
        """Fail if there is no room for so many rows, with their moments. Tensor after tensor, the new one is
        made before the old one goes; a GPU can do without, as _rows() goes through the host then."""
        here = [value for name, value in self._params.items() if name not in self.on_host]
        rows = [value.shape[1:].numel() for value in here]  # numbers in each
        more = max(count - len(self), 0) * sum(rows) * (1 + len(MOMENTS))
        if not self.ranks.alone:  # what is sent, what is received, and what becomes of it
            more += 3 * max(count, len(self)) * max(rows)
        elif self.device.type == "cpu":
            more += count * max(rows)
        elif more:
            more += GPU_PIECES
        torch.empty(more, device=self.device)

    @torch.no_grad()
    def reset_opacity(self, most: float = RESET_OPACITY) -> None:
        """Make everything nearly transparent: what is needed comes back, the rest is pruned."""
        opacity = self.params["opacity_logits"]
        if self.smallest is None:
            opacity.copy_(self.opacities.clamp_max(most).logit())
        else:
            part = self.shown()[1] / self.opacities
            opacity.copy_(self.opacities.minimum(most / part).logit())
        for key in MOMENTS:
            if key in self.optimizer.state.get(opacity, {}):
                self.optimizer.state[opacity][key].zero_()

    # For checkpoints

    def state_dict(self) -> dict:
        """Everything that training goes on from, as plain tensors and values."""
        self.settle()
        return {
            "params": {name: value.detach() for name, value in self._params.items()},
            "moments": {
                g["name"]: dict(self.optimizer.state[g["params"][0]]) for g in self.optimizer.param_groups
            },
            "sh_degree": self.sh_degree,
            "active_sh_degree": self.active_sh_degree,
            "extent": self.extent,
            **({} if self.smallest is None else {"smallest": self.smallest}),
            **({"gradients": self.gradients(), "collected": self.collected} if self.collected else {}),
        }

    def load_state_dict(self, state: dict) -> None:
        """Become the model as it was, its optimizer too. Call setup_optimizer() before."""
        device, params = self.device, state["params"]
        if not params.keys() >= self._params.keys():  # what is not of this model is left out
            raise ValueError(f"its parameters must be {', '.join(self._params)}, got {', '.join(params)}")
        self.params = {
            name: nn.Parameter(params[name].to("cpu" if name in self.on_host else device).contiguous())
            for name in self._params
        }
        self._total = state.get("total", len(self))
        self.sh_degree, self.active_sh_degree = state["sh_degree"], state["active_sh_degree"]
        self.extent = state["extent"] or self.extent
        self.setup_optimizer(self._opt)
        for group in self.optimizer.param_groups:
            _set_moments(self.optimizer, group["params"][0], state["moments"].get(group["name"], {}))
        self.smallest = state.get("smallest")
        self.collected = state.get("collected", 0)
        for name, gradient in state.get("gradients", {}).items():
            self.params[name].grad = gradient.to(device).contiguous()


def _standard_activations(model: GaussianModel) -> bool:
    probe = copy.copy(model)
    probe._settle = None
    raw = probe._params = {
        name: nn.Parameter(
            torch.linspace(-8, 8, PROBES * value.shape[1:].numel()).view(PROBES, *value.shape[1:])
        )
        for name, value in model._params.items()
    }
    return (
        torch.equal(probe.opacities, raw["opacity_logits"].sigmoid())
        and torch.equal(probe.scales, raw["log_scales"].exp())
        and torch.equal(probe.quats, nn.functional.normalize(raw["raw_quats"], dim=-1))
    )


def _rows(tensor: Tensor, move: Move) -> Tensor:
    """These rows of a tensor that nobody needs afterwards. Where old and new do not fit side by side, the old
    one gives up its place, and the new one is on the host."""
    if not move.alone:
        return move(tensor.detach())
    index = move.index
    try:
        return tensor.index_select(0, index)
    except torch.OutOfMemoryError:
        on_host = tensor.detach().cpu()
        tensor.data = tensor.new_empty(0)
    torch.cuda.empty_cache()
    return on_host[index.cpu()]


def _send(tensors: list[Tensor], device: torch.device) -> None:
    """In place: nobody has to be told. The largest goes first: a small one would break up the room for it."""
    elsewhere = [tensor for tensor in tensors if tensor.device != device]
    for tensor in sorted(elsewhere, key=Tensor.numel, reverse=True):
        tensor.data = tensor.data.to(device)
    if elsewhere:
        torch.cuda.empty_cache()


def _set_moments(optimizer: torch.optim.Optimizer, param: nn.Parameter, state: dict) -> None:
    """Moments go to where the parameter is; a step count stays where the optimizer keeps it."""
    if state:
        optimizer.state[param] = {
            k: v.to(param.device).contiguous() if k in MOMENTS else v for k, v in state.items()
        }
