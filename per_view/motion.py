"""Motion blur: a photo is the mean of what its camera saw along its path during exposure (--blur motion).

As BAD-Gaussians has it (Zhao et al. 2024). A path has two poses, straight between, or four that steer a cubic
B-spline. A pose is (shift, rotation vector) from where the data set has the camera, in its own axes: position
and rotation go along the path apart. The sharp view is that from the middle. The data set's pose stays the
mean of the path: left free, all paths drift a little, and with them the scene. --poses is for poses that are
wrong.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view import light
from per_view.light import PLACES, Light
from per_view.mean import mean
from per_view.per_photo import PerPhoto, Seen, rate, seen
from per_view.poses import motions_to, moved, numbers, places
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json
from utils.rigid import rigid, so3_exp, so3_log
from utils.schedules import reaches

POSES = {"linear": 2, "spline": 4}  # of a path
# A path's poses are these mixtures of its mean, which stays, its half length and how it bends.
MODES = {2: [[1, -1], [1, 1]], 4: [[1, -3, 11, -1], [1, -1, -1, 3], [1, 1, -1, -3], [1, 3, 11, 1]]}
START = 0.25  # pixels of the random path that blur grows from: from none it cannot tell where to
PENALTY = 1e-3  # of the loss: how hard paths of a pixel are pulled shorter, about; others less
COUNT_EVERY = 100  # iterations after which it is looked how long paths have become
FEWEST = 3  # pictures of a path, however short


class Motion(PerPhoto):
    name = "motion"
    seen: Seen  # while training

    def __init__(
        self, names: Sequence[str], start: Tensor, units: Tensor, samples: int = 10, space: str = "srgb"
    ):
        """start [V, 2 or 4, 6]: as MODES has it, in units [V, 6] that move the picture by about a pixel."""
        super().__init__(names, start[:, 1:])
        self.means = start[: len(self.rows), :1]
        self.modes = torch.tensor(MODES[start.shape[1]]).to(start)
        self.straight = len(self.modes) == 2 and not self.means.any()
        self.units, self.samples, self.space = units, samples, space
        self.counts = [samples] * len(self.rows)  # pictures of each photo's path
        self.light: Light | None = None  # of --blur_weights
        self.active = True

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Motion":
        views, names = options.views, scene.exposure_names
        random = torch.Generator().manual_seed(options.run.seed)
        known = seen(scene)
        start = torch.zeros(len(known.K), POSES[views.blur_path], 6)
        start[:, 1] = START * torch.randn(len(start), 6, generator=random)
        start = start.to(known.K.device)
        motion = cls(names, start, known.units, views.blur_samples, views.blur_space)
        motion.options, motion.seen = options, known
        if views.blur_weights:
            motion.light = Light(names, start.new_zeros(len(start), PLACES))
        return motion

    def poses(self, row: int) -> Tensor:
        """Of this photo's path, [2 or 4, 6]."""
        return self.modes @ torch.cat([self.means[row], self.values[row]]) * self.units[row]

    def all_poses(self) -> Tensor:
        return self.modes @ torch.cat([self.means, self.values.detach()], 1) * self.units[:, None]

    def motions(self, row: int, times: Tensor) -> Tensor:
        """Along this photo's path, [n, 4, 4]."""
        if self.straight:  # then the turn between both ends is twice that from the middle to one
            return motions_to((2 * times - 1)[:, None] * (self.values[row] * self.units[row]))
        return along(self.poses(row), times)

    def cameras(self, camera: Camera) -> list[Camera]:
        if (row := self.row(camera)) is None or not self.active:
            return [self.sharp_camera(camera)]
        return places(camera, self.motions(row, self.times(self.counts[row])))

    def sharp_camera(self, camera: Camera) -> Camera:
        if (row := self.row(camera)) is None:
            return camera
        return moved(camera, self.motions(row, self.values.new_full((1,), 0.5))[0])

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        row, weights = self.row(camera), None
        if self.light and row is not None and len(pictures) > 1:
            weights = self.light.weights(row, self.times(len(pictures)))
        return mean(pictures, self.space, weights)

    def schedule(self, iteration: int) -> None:
        views = self.options.views
        self.rate = rate(
            self.options, iteration, views.blur_from_iter, views.pose_lr_init, views.pose_lr_final
        )
        if self.light:
            self.light.rate = rate(self.options, iteration, views.blur_from_iter, *light.RATES)
        self.active = iteration > views.blur_from_iter
        if self.active and reaches(COUNT_EVERY, iteration, self.views):
            lengths = self.lengths()
            self.counts = [count_for(length, self.samples) for length in lengths.tolist()]

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        """What is sharper than the truth and blurred again looks much alike: so paths that photos hardly show
        are to be short. Longer ones are pulled less."""
        if (row := self.row(camera)) is None or not self.active:
            return 0.0
        short = PENALTY * 0.5 * (2 * self.values[row]).square().sum().log1p()
        return short + self.light.restraint(row) if self.light else short

    def parameters(self) -> list[Tensor]:
        return [self.values, *(self.light.parameters() if self.light else [])]

    def step(self) -> None:
        super().step()
        if self.light:
            self.light.step()

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Of all paths, in pixels, where things are as far away as they usually are, [V]."""
        motions = along(self.all_poses(), self.times(5))
        return pixels(motions, self.seen.K, self.seen.inverse_depths)

    def times(self, count: int) -> Tensor:
        return torch.linspace(0, 1, count, dtype=self.values.dtype, device=self.values.device)

    def state_dict(self) -> dict:
        own = {"light": self.light.state_dict()} if self.light else {}
        return super().state_dict() | {"counts": list(self.counts)} | own

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        counts = dict(zip(state["names"], state["counts"], strict=True))
        if not all(type(count) is int and 1 <= count <= 1000 for count in counts.values()):
            raise ValueError("the counts of its paths must be integers from 1 to 1000")
        self.counts = [counts.get(name, self.samples) for name in self.rows]
        if self.light and "light" in state:
            self.light.load_state_dict(state["light"])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """blur.json beside the model: the poses of all paths, and how long they are."""
        paths, lengths = self.all_poses().tolist(), self.lengths().tolist()
        about = {"blur": "motion", "samples": self.samples, "space": self.space}
        about["paths"] = {name: paths[row] for name, row in self.rows.items()}
        about["pixels"] = {name: round(lengths[row], 3) for name, row in self.rows.items()}
        depths = self.seen.inverse_depths.tolist()
        about["inverse_depths"] = {name: depths[row] for name, row in self.rows.items()}
        if self.light:
            logits = self.light.values.tolist()
            about["light"] = {name: logits[row] for name, row in self.rows.items()}
        write_json(folder.ply(iteration).with_name("blur.json"), about, indent=1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Motion":
        about = read_json(path)
        paths, samples, space = about.get("paths"), about.get("samples"), about.get("space")
        if not isinstance(paths, dict) or type(samples) is not int or space not in ("srgb", "linear"):
            raise DataError(f"{path}: must have paths, samples and a space, which is srgb or linear")
        shape = (len(next(iter(paths.values()), [0, 0])), 6)
        if shape[0] not in POSES.values():
            raise DataError(f"{path}: a path must have 2 or 4 poses, got {shape[0]}")
        poses = numbers(path, paths, shape).to(device)
        start = torch.linalg.solve(torch.tensor(MODES[shape[0]]).to(poses), poses)
        motion = cls(list(paths), start, torch.ones_like(start[:, 0]), max(samples, 2), space)
        if "light" in about:
            light = {name: about["light"][name] for name in paths if name in about["light"]}
            motion.light = Light(list(paths), numbers(path, light, (PLACES,)).to(device))
        return motion


def drawn(blur: Path, cameras: Path) -> dict[str, Tensor]:
    """By photo: where nine points of it go, as parts of its size, [9, n, 2]; of blur.json and cameras.json.
    Nothing of another blur than motion."""
    about, found = read_json(blur), {}
    lenses = {camera["img_name"]: camera for camera in read_json(cameras, list)}
    depths = about.get("inverse_depths", {})
    for name, path in about.get("paths", {}).items():
        if name not in lenses or name not in depths:
            continue
        lens = lenses[name]
        size = torch.tensor([lens["width"], lens["height"]])
        K = torch.tensor([[lens["fx"], 0, size[0] / 2], [0, lens["fy"], size[1] / 2], [0, 0, 1]])
        motions = along(torch.tensor(path), torch.linspace(0, 1, 9))[None]
        pixels = trails(motions, K[None], torch.tensor([depths[name]]))
        found[name] = pixels[0].permute(2, 0, 1) / size
    return found


def count_for(length: float, most: int) -> int:
    """Pictures of a path of so many pixels: about one a pixel."""
    return min(most, max(FEWEST, int(length) + 2)) if length == length else most


def along(poses: Tensor, times: Tensor) -> Tensor:
    """Poses [..., 2 or 4, 6] and times [n] in [0, 1] -> motions [..., n, 4, 4] of the camera's axes."""
    weights, turns = _linear(times) if poses.shape[-2] == 2 else _spline(times)
    center = weights @ poses[..., :3]  # [..., n, 3]
    rotations = so3_exp(poses[..., 3:])
    between = so3_log(rotations[..., :-1, :, :].mT @ rotations[..., 1:, :, :])  # [..., K - 1, 3]
    now = rotations[..., :1, :, :]
    for k in range(poses.shape[-2] - 1):
        now = now @ so3_exp(turns[:, k, None] * between[..., k : k + 1, :])
    return rigid(now, -(now @ center[..., None])[..., 0])


def _linear(u: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the poses [n, K], and how much of each turn between them is done [n, K - 1]."""
    return torch.stack([1 - u, u], 1), u[:, None]


def _spline(u: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform cubic B-spline; the turns are sums of the weights of the poses after them."""
    a, b, c, d = (1 - u) ** 3, 4 - 6 * u**2 + 3 * u**3, 1 + 3 * u + 3 * u**2 - 3 * u**3, u**3
    weights = torch.stack([a, b, c, d], 1) / 6
    return weights, weights.flip(1).cumsum(1).flip(1)[:, 1:]


def pixels(motions: Tensor, K: Tensor, inverse_depths: Tensor) -> Tensor:
    """How far points move in the picture along motions [V, n, 4, 4] of cameras K [V, 3, 3], on average over
    the picture, where they are at these depths [V]: [V]."""
    return trails(motions, K, inverse_depths).diff(dim=1).norm(dim=2).sum(1).mean(-1)


def trails(motions: Tensor, K: Tensor, inverse_depths: Tensor) -> Tensor:
    """Where nine points of the picture go, [V, n, 2, 9] pixels."""
    at = torch.tensor([0.2, 0.5, 0.8], device=K.device)
    size = 2 * K[:, :2, 2]  # near enough
    x, y = (part.flatten() for part in torch.meshgrid(at, at, indexing="xy"))
    seen = (
        torch.stack([x, y, torch.ones_like(x)]) * torch.nn.functional.pad(size, (0, 1), value=1)[:, :, None]
    )
    rays = torch.linalg.solve(K, seen)  # [V, 3, 9]
    # a point at depth z moves to R (z ray) + t: in the picture, as R ray + t / z
    there = motions[..., :3, :3] @ rays[:, None] + motions[..., :3, 3:] * inverse_depths[:, None, None, None]
    shown = K[:, None] @ there
    return shown[..., :2, :] / shown[..., 2:, :]
