"""Exposure: an affine color transform for each photo, as the published code has it.

Colors go through A[:, :3] and get A[:, 3] added, A [3, 4] starting at the identity. With --train_test_exp,
test views train on their left half, so that they have an exposure to be scored with on their right one. How
--appearance exposure learns the same is in affine.py; then views other than the train photos are shown with
the median of all exposures.
"""

from pathlib import Path

import torch
from diff_gaussian_rasterization import FusedAdam, Rendered
from torch import Tensor, nn

from arguments import OptimizationParams
from per_view.module import PerView
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json
from utils.schedules import for_views, log_linear

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class Exposure(PerView):
    name = "exposure"

    def __init__(
        self,
        names: list[str],
        device: torch.device,
        opt: OptimizationParams | None = None,
        median: bool = False,
    ):
        names = list(dict.fromkeys(names))  # train and test images of Blender scenes share names
        self.rows = {name: row for row, name in enumerate(names)}  # image name -> row
        self.values = nn.Parameter(torch.eye(3, 4, device=device).repeat(len(names), 1, 1))  # [V, 3, 4]
        self._opt, self.median = opt or OptimizationParams(), median
        self.optimizer = FusedAdam([self.values], lr=self._opt.exposure_lr_init)

    def of(self, name: str) -> Tensor:
        """The color transform [3, 4] of one image."""
        if name not in self.rows:
            raise DataError(
                f"there is no exposure for the image {name}, but --train_test_exp needs one for every view; "
                f"the model has {len(self.rows)} (exposure.json)"
            )
        return self.values[self.rows[name]]

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (rendered,) = pictures
        others = self.median and (camera.is_test or camera.name not in self.rows)
        exposure = self.values.detach().median(0).values if others else self.of(camera.name)
        return rendered._replace(image=apply_exposure(rendered.image, exposure))

    # Training

    def parameters(self) -> list[Tensor]:
        return [self.values]

    def schedule(self, iteration: int) -> None:
        opt = self._opt
        rate = log_linear(
            iteration,
            opt.exposure_lr_init,
            opt.exposure_lr_final,
            opt.iterations,
            opt.exposure_lr_delay_steps,
            opt.exposure_lr_delay_mult,
        )
        self.optimizer.param_groups[0] |= for_views(self.views, rate, ADAM_BETAS, ADAM_EPS)

    def prepare(self) -> None:
        if self.values.grad is not None:
            self.values.grad = self.values.grad.contiguous()
            self.optimizer.begin_step()
            self.optimizer.take_step_back()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        moments = dict(self.optimizer.state[self.values])
        return {"names": list(self.rows), "values": self.values.detach(), "moments": moments}

    def load_state_dict(self, state: dict) -> None:
        names, values, moments = state["names"], state["values"], state["moments"]
        if not names:  # of a run without exposures
            return
        if len(set(names)) != len(names) or not all(type(name) is str for name in names):
            raise ValueError("its exposures must have different names")
        for tensor in (values, *(moments[key] for key in MOMENTS if moments)):
            if tensor.shape != (len(names), 3, 4) or tensor.dtype != torch.float32:
                raise ValueError(f"exposures must be [{len(names)}, 3, 4] floats, got {list(tensor.shape)}")
        device = self.values.device
        self.__init__(names, device, self._opt, self.median)
        with torch.no_grad():
            self.values.copy_(values)
        if moments:
            kept = {key: moments[key].to(device).contiguous() for key in MOMENTS}
            if not 0 <= (steps := float(moments["step"])) < 2**31:
                raise ValueError(f"the steps of exposures must be a number from 0 on, got {steps}")
            self.optimizer.state[self.values] = {"step": torch.tensor(steps), **kept}

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """exposure.json in the model folder, and beside the model if an exposure changed."""
        self._write(folder.exposures)
        if (self.values != torch.eye(3, 4, device=self.values.device)).any():
            self._write(beside(folder.ply(iteration)))
        if self.median:
            path = folder.ply(iteration).with_name("appearance.json")
            write_json(path, {"appearance": "exposure"}, indent=1)

    def _write(self, path: Path) -> None:
        values = self.values.detach().cpu().tolist()
        write_json(path, {name: values[row] for name, row in self.rows.items()}, indent=2)

    @classmethod
    def load(
        cls, ply: Path, folder: ModelFolder | None, device: torch.device, median: bool = False
    ) -> "Exposure":
        """As saved beside this model, else those of its folder: the original has only the latter."""
        for path in (beside(ply), *([folder.exposures] if folder else [])):
            if path.is_file():
                return cls.read(path, device, median)
        return cls([], device)

    @classmethod
    def read(cls, path: Path, device: torch.device, median: bool = False) -> "Exposure":
        data = read_json(path)
        try:
            values = torch.tensor(list(data.values()), dtype=torch.float32).reshape(len(data), 3, 4)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{path}: must hold a 3x4 list of numbers for each image name") from None
        if not values.isfinite().all():
            raise DataError(f"{path}: must hold finite numbers")
        exposure = cls(list(data), device, median=median)
        with torch.no_grad():
            exposure.values.copy_(values)
        return exposure


def beside(ply: Path) -> Path:
    return ply.with_name("exposure.json")


def apply_exposure(image: Tensor, exposure: Tensor) -> Tensor:
    """Color [3] of each pixel through the affine map exposure [3, 4]: color · A[:, :3] + A[:, 3]."""
    matrix, shift = exposure[:, :3], exposure[:, 3]
    return (matrix.T @ image.flatten(1)).view_as(image) + shift[:, None, None]
