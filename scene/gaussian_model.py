"""The Gaussians: raw parameters, what they mean, their optimizers, and the one way in which rows move.

Optimized are unconstrained numbers; the activations make opacities of logits, scales of logarithms and unit
quaternions of any (Kerbl et al. 2023, section 4). A new per-Gaussian attribute is a tensor in
GaussianModel.from_points(), with at least two dimensions, and a learning rate in learning_rates(). Steps,
clones, splits, pruning and checkpoints then have it; the PLY has what save_ply() and load_ply() name.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diff_gaussian_rasterization import FusedAdam, SparseGaussianAdam, knn_mean_dist2
from torch import Tensor, nn

from arguments import OptimizationParams
from scene.points import PointCloud
from utils.files import DataError, read_json, write_json
from utils.memory import in_short, out_of_memory
from utils.schedules import log_linear, sh_degree_at
from utils.sh import rgb_to_sh

INITIAL_OPACITY = 0.1
RESET_OPACITY = 0.01
ADAM_EPS = 1e-15  # gradients of positions are tiny: the usual 1e-8 would damp them
MOMENTS = ("exp_avg", "exp_avg_sq")
GPU_PIECES = 2**24  # numbers that may be lost at the ends of the pieces in which a GPU's memory is handed out


def learning_rates(opt: OptimizationParams, extent: float) -> dict[str, float]:
    """Parameter name -> learning rate, in the order of the original's optimizer groups."""
    return {
        "xyz": opt.position_lr_init * extent,
        "f_dc": opt.feature_lr,
        "f_rest": opt.feature_lr / 20,
        "opacity": opt.opacity_lr,
        "scaling": opt.scaling_lr,
        "rotation": opt.rotation_lr,
    }


class GaussianModel:
    """Trainable Gaussians. Row i of every parameter and of every optimizer state is Gaussian i."""

    xyz: nn.Parameter  # [N, 3]
    f_dc: nn.Parameter  # [N, 1, 3]     constant SH coefficient
    f_rest: nn.Parameter  # [N, K-1, 3]   the others, K = (sh_degree + 1)^2
    opacity: nn.Parameter  # [N, 1]        logit
    scaling: nn.Parameter  # [N, 3]        natural logarithm
    rotation: nn.Parameter  # [N, 4]        quaternion (w, x, y, z), any length

    def __init__(
        self, params: dict[str, Tensor], sh_degree: int, active_sh_degree: int = 0, extent: float = 1.0
    ):
        self._settle: Callable[[], None] | None = None
        self.params = {name: nn.Parameter(value.detach().contiguous()) for name, value in params.items()}
        self.sh_degree = sh_degree  # the highest
        self.active_sh_degree = active_sh_degree  # the highest in use so far
        self.extent = extent  # radius of the scene, to which position learning rates are relative
        self.exposure_names: dict[str, int] = {}  # image name -> row of exposures
        self.exposures = nn.Parameter(torch.empty(0, 3, 4, device=self.device))  # [V, 3, 4] color transforms

    @classmethod
    def from_points(
        cls,
        points: PointCloud,
        sh_degree: int,
        extent: float,
        device: torch.device,
        exposure_names: list[str] | tuple[str, ...] = (),
    ) -> "GaussianModel":
        """One round, faint Gaussian per point, as large as the distance to its neighbors."""
        xyz = torch.tensor(points.xyz, dtype=torch.float32, device=device)  # a copy: training writes to it
        count = len(xyz)
        if count == 0:
            raise DataError("there are no points to start from; --random_init makes some")
        spacing = knn_mean_dist2(xyz).clamp_min(1e-7).sqrt()
        params = {
            "xyz": xyz,
            "f_dc": rgb_to_sh(torch.tensor(points.rgb, device=device))[:, None, :],
            "f_rest": torch.zeros(count, (sh_degree + 1) ** 2 - 1, 3, device=device),
            "opacity": torch.full((count, 1), INITIAL_OPACITY, device=device).logit(),
            "scaling": spacing.log()[:, None].repeat(1, 3),
            "rotation": torch.tensor([1.0, 0.0, 0.0, 0.0], device=device).repeat(count, 1),
        }
        model = cls(params, sh_degree, extent=extent)
        model.set_exposures(exposure_names)
        return model

    # What the parameters mean

    def __getattr__(self, name: str) -> nn.Parameter:
        """gaussians.xyz is gaussians.params["xyz"]."""
        if name in self.__dict__.get("_params", {}):
            return self.params[name]
        raise AttributeError(f"GaussianModel has no attribute {name}")

    def __setattr__(self, name: str, value) -> None:
        """gaussians.xyz += 1 changes the parameter, and gaussians.xyz = other would not."""
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
        return len(self._params["xyz"])

    @property
    def device(self) -> torch.device:
        return self._params["xyz"].device

    @property
    def means(self) -> Tensor:
        return self.params["xyz"]  # [N, 3]

    @property
    def scales(self) -> Tensor:
        return self.params["scaling"].exp()  # [N, 3]

    @property
    def quats(self) -> Tensor:
        return nn.functional.normalize(self.params["rotation"], dim=-1)  # [N, 4]

    @property
    def opacities(self) -> Tensor:
        return self.params["opacity"].sigmoid()  # [N, 1]

    def finite(self) -> Tensor:
        """Mask [N]: no parameter is infinite or not a number."""
        return torch.stack([value.isfinite().flatten(1).all(1) for value in self.params.values()]).all(0)

    # Optimization

    def setup_optimizer(self, opt: OptimizationParams) -> None:
        """Fresh optimizers, with zero moments."""
        self._opt = opt
        rates = learning_rates(opt, self.extent)
        groups = [{"name": name, "params": [self.params[name]], "lr": rate} for name, rate in rates.items()]
        self.sparse = opt.optimizer_type == "sparse_adam"
        adam = SparseGaussianAdam if self.sparse else FusedAdam
        self.optimizer: FusedAdam | SparseGaussianAdam = adam(groups, lr=0.0, eps=ADAM_EPS)
        self.exposure_optimizer = FusedAdam([self.exposures], lr=opt.exposure_lr_init)

    def schedule(self, iteration: int) -> None:
        """Learning rates and SH degree of this step (counted from 1)."""
        opt = self._opt
        for group in self.optimizer.param_groups:
            if group["name"] == "xyz":
                start, end = opt.position_lr_init * self.extent, opt.position_lr_final * self.extent
                group["lr"] = log_linear(iteration, start, end, opt.position_lr_max_steps)
        self.exposure_optimizer.param_groups[0]["lr"] = log_linear(
            iteration,
            opt.exposure_lr_init,
            opt.exposure_lr_final,
            opt.iterations,
            opt.exposure_lr_delay_steps,
            opt.exposure_lr_delay_mult,
        )
        self.active_sh_degree = max(self.active_sh_degree, sh_degree_at(iteration, self.sh_degree))

    def step(self, visible: Tensor) -> None:
        """Move the parameters along their gradients, and drop the gradients. visible: bool [N].

        When memory is lacking, it fails before anything has moved.
        """
        if self.exposures.grad is not None:  # they move last, and are ready before others do
            self.exposures.grad = self.exposures.grad.contiguous()
            self.exposure_optimizer.begin_step()
            self.exposure_optimizer.take_step_back()
        if isinstance(self.optimizer, SparseGaussianAdam):
            self.optimizer.step(visible, len(self))
        else:
            self.optimizer.step()
        self.exposure_optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.exposure_optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def reindex(self, index: Tensor, fresh: Tensor | None = None) -> None:
        """Make row k of the model what row index[k] was, carrying Adam's moments along.

        Pruning, cloning, splitting and sorting are all this one move. Rows in the mask `fresh` are new
        Gaussians: they start with zero moments. Gradients do not move; call after the optimizer's step.
        When memory for the new rows is lacking, it fails before anything has moved.
        """
        self.settle()
        self._reserve(len(index))
        device = self.device
        try:
            self._move(index, fresh)
            self._bring_back(device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(f"while Gaussians were moved: {in_short(error)}") from None

    def _move(self, index: Tensor, fresh: Tensor | None) -> None:
        for group in self.optimizer.param_groups:  # nothing old is kept longer than it takes to copy it
            old = group["params"].pop()
            state = self.optimizer.state.pop(old, {})
            new = group["params"] = [nn.Parameter(_rows(old, index))]
            self._params[group["name"]] = new[0]
            del old
            for key in MOMENTS:
                if key in state:
                    state[key] = _rows(state[key], index)
                    if fresh is not None:
                        rows = fresh.view(-1, *[1] * (state[key].dim() - 1))
                        state[key].masked_fill_(rows.to(state[key].device), 0)
            if state:
                self.optimizer.state[new[0]] = state

    def _bring_back(self, device: torch.device) -> None:
        """What had to go to the host in the course of _move(). Should holes in the device's memory be in the
        way, everything goes to the host first."""
        states = self.optimizer.state.values()
        moments = [state[key] for state in states for key in MOMENTS if key in state]
        tensors = [*self._params.values(), *moments]
        try:
            _send(tensors, device)
        except torch.OutOfMemoryError:
            _send(tensors, torch.device("cpu"))
            _send(tensors, device)

    def _reserve(self, count: int) -> None:
        """Fail if there is no room for so many rows, with their moments. Tensor after tensor, the new one is
        made before the old one goes; a GPU can do without, as _rows() goes through the host then."""
        rows = [value.shape[1:].numel() for value in self._params.values()]
        more = max(count - len(self), 0) * sum(rows) * (1 + len(MOMENTS))
        if self.device.type == "cpu":
            more += count * max(rows)
        elif more:
            more += GPU_PIECES
        torch.empty(more, device=self.device)

    @torch.no_grad()
    def reset_opacity(self) -> None:
        """Make everything nearly transparent: what is needed comes back, the rest is pruned."""
        opacity = self.params["opacity"]
        opacity.copy_(self.opacities.clamp_max(RESET_OPACITY).logit())
        for key in MOMENTS:
            if key in self.optimizer.state.get(opacity, {}):
                self.optimizer.state[opacity][key].zero_()

    # Exposures

    def set_exposures(self, names: list[str] | tuple[str, ...], values: Tensor | None = None) -> None:
        """One color transform per image: the identity, or the given ones [V, 3, 4]."""
        names = list(dict.fromkeys(names))  # train and test images of Blender scenes share names
        identity = torch.eye(3, 4, device=self.device).repeat(len(names), 1, 1)
        self.exposure_names = {name: row for row, name in enumerate(names)}
        self.exposures = nn.Parameter(identity if values is None else values.to(self.device).contiguous())

    @property
    def exposed(self) -> bool:
        """Has any exposure changed?"""
        return bool((self.exposures != torch.eye(3, 4, device=self.exposures.device)).any())

    def exposure(self, name: str) -> Tensor:
        """The color transform [3, 4] of one image."""
        if name not in self.exposure_names:
            raise DataError(
                f"there is no exposure for the image {name}, but --train_test_exp needs one for every view; "
                f"the model has {len(self.exposure_names)} (exposure.json)"
            )
        return self.exposures[self.exposure_names[name]]

    def save_exposures(self, path: Path) -> None:
        """exposure.json: {image name: 3x4}."""
        values = self.exposures.detach().cpu().tolist()
        write_json(path, {name: values[row] for name, row in self.exposure_names.items()}, indent=2)

    def load_exposures(self, path: Path) -> None:
        data = read_json(path)
        try:
            values = torch.tensor(list(data.values()), dtype=torch.float32).reshape(len(data), 3, 4)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{path}: must hold a 3x4 list of numbers for each image name") from None
        if not values.isfinite().all():
            raise DataError(f"{path}: must hold finite numbers")
        self.set_exposures(list(data), values)

    # For checkpoints

    def state_dict(self) -> dict:
        """Everything that training goes on from, as plain tensors and values."""
        return {
            "params": {name: value.detach() for name, value in self.params.items()},
            "moments": {
                g["name"]: dict(self.optimizer.state[g["params"][0]]) for g in self.optimizer.param_groups
            },
            "sh_degree": self.sh_degree,
            "active_sh_degree": self.active_sh_degree,
            "extent": self.extent,
            "exposure_names": list(self.exposure_names),
            "exposures": self.exposures.detach(),
            "exposure_moments": dict(self.exposure_optimizer.state[self.exposures]),
        }

    def load_state_dict(self, state: dict) -> None:
        """Become the model as it was, its optimizers too. Call setup_optimizer() before."""
        device = self.device
        self.params = {
            name: nn.Parameter(value.to(device).contiguous()) for name, value in state["params"].items()
        }
        self.sh_degree, self.active_sh_degree = state["sh_degree"], state["active_sh_degree"]
        self.extent = state["extent"] or self.extent
        if state["exposure_names"]:
            self.set_exposures(state["exposure_names"], state["exposures"])
        self.setup_optimizer(self._opt)
        for group in self.optimizer.param_groups:
            _set_moments(self.optimizer, group["params"][0], state["moments"].get(group["name"], {}))
        _set_moments(self.exposure_optimizer, self.exposures, state["exposure_moments"])


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """These rows of a tensor that nobody needs afterwards. Where old and new do not fit side by side, the old
    one gives up its place, and the new one is on the host."""
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
