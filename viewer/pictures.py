"""Pictures of a finished model, by our own rasterizer: from any place, or beside the photo of a camera."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arguments import ModelParams, PipelineParams, build, saved_options
from gaussian_renderer import Splats, looks
from per_view import Shown
from scene import Camera, Scene, formats
from scene.folder import ModelFolder
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from training import method
from utils.files import DataError
from utils.image import to_float
from utils.terminal import say
from viewer.views import camera_entries


@dataclass
class Ask:
    """One picture that somebody wants, checked."""

    where: int | Camera  # a number in cameras.json, or any other place
    size: tuple[int, int] | None = None  # a picture of a camera in cameras.json is as large as fits, if given
    mode: str = "color"
    scale: float = 1.0
    degree: int = 3
    iteration: int = -1


class Pictures:
    """Of a model folder, or of a file of splats."""

    def __init__(self, source: ModelFolder | Path, device: torch.device):
        self.source, self.device = source, device
        self.folder = source if isinstance(source, ModelFolder) else None
        self._file = source if isinstance(source, Path) else Path()
        self.model, self.pipe = ModelParams(), PipelineParams()
        if self.folder:
            groups = (ModelParams, PipelineParams)
            self.model, self.pipe = build(groups, saved_options(self.folder.path, groups))
            self.model.model_path = str(self.folder)
        self.background = torch.full((3,), float(self.model.white_background), device=device)
        self._frame = Similarity.stored(self.folder.normalization) if self.folder else OF_DATA
        self._kept: tuple[int, Shown] | None = None

    @property
    def iterations(self) -> list[int]:
        """Those that are saved, the newest first; -1 for a file."""
        return self.folder.saved_iterations()[::-1] if self.folder else [-1]

    @property
    def of_splats(self) -> bool:
        """Else of a NeRF or a voxel grid, which browsers cannot draw."""
        return self.folder is None or self.model.method == "gaussians"

    def shown(self, iteration: int) -> Shown:
        """The last one that was looked at stays in memory."""
        if self._kept is None or self._kept[0] != iteration:
            self._kept = None
            self._kept = iteration, self._load(iteration)
        return self._kept[1]

    def _load(self, iteration: int) -> Shown:
        if self.folder:
            return method.load(self.model, self.pipe, iteration, self.background)[0]
        gaussians = formats.read(self._file, self.device)
        pipe = PipelineParams(antialiasing=gaussians.antialiased)
        return Shown(Splats(gaussians, pipe, self.background))

    @cached_property
    def photos(self) -> dict[int, Camera]:
        """Cameras with photos, by their numbers in cameras.json; none where the data set is away."""
        if not self.folder or not self.model.source_path:
            return {}
        try:
            scene = Scene(self.model, self.device, for_training=False, quiet=True)
        except (DataError, OSError) as error:
            say(f"No photos to compare with: {error}")
            return {}
        return {camera.uid: camera for camera in [*scene.train_cameras, *scene.test_cameras]}

    @torch.no_grad()
    def picture(self, ask: Ask) -> Tensor:
        """[3, H, W], not clamped."""
        shown = self.shown(ask.iteration)
        camera = self.camera(ask)
        if ask.mode == "error":
            return looks.error(shown.picture(camera).image.clamp(0, 1), self._photo(ask, camera))
        as_trained = ask.mode == "color" and ask.scale == 1 and ask.degree == 3
        if as_trained or not isinstance(shown.scene, Splats):
            own = shown if isinstance(ask.where, int) else shown.scene
            rendered, flat = own.picture(camera), ask.mode not in looks.OF_RAYS
            return rendered.image if flat else looks.look(rendered, camera, ask.mode, self.background)
        splats = shown.scene
        asked = ask.mode, ask.scale, ask.degree
        return looks.picture(camera, splats.gaussians, splats.pipe, self.background, *asked)

    @torch.no_grad()
    def photo(self, number: int) -> Tensor:
        """uint8 [3, H, W]."""
        if number not in self.photos:
            raise DataError(f"camera must be one that has a photo, got {number}")
        return self.photos[number].image()

    def splats(self, iteration: int) -> GaussianModel:
        """The Gaussians in the data set's coordinates, for browsers."""
        if not self.of_splats:
            raise DataError("this model is not made of splats: a browser cannot draw it")
        gaussians = formats.read(self.folder.ply(iteration) if self.folder else self._file, self.device)
        gaussians.antialiased |= self.pipe.antialiasing
        return gaussians

    def listed(self, ask: Ask) -> Camera:
        """The place for a run that trains: as cameras.json has it."""
        return ask.where if isinstance(ask.where, Camera) else _fitting(self._listed.get(ask.where), ask)

    def camera(self, ask: Ask) -> Camera:
        """The place, with a picture no larger than asked for."""
        if isinstance(ask.where, Camera) or ask.where not in self.photos:
            return self._entered(self.listed(ask))
        return _fitting(self.photos[ask.where], ask)

    def _entered(self, camera: Camera) -> Camera:
        """A camera in the data set's coordinates, put where the loaded model is."""
        if self._frame.trivial:
            return camera
        moved = self._frame.enter_camera(camera.world_to_camera.double().cpu().numpy())
        return replace(camera, world_to_camera=torch.from_numpy(moved).to(camera.world_to_camera))

    @cached_property
    def _listed(self) -> dict[int, Camera]:
        """Cameras of cameras.json, without photos."""
        entries = camera_entries(self.folder) if self.folder else []
        return {i: self._from_entry(entry) for i, entry in enumerate(entries)}

    def _from_entry(self, entry: dict) -> Camera:
        width, height = int(entry["width"]), int(entry["height"])
        lens = entry["fx"], entry["fy"], width / 2, height / 2
        camera = camera_at(entry["position"], np.ravel(entry["rotation"]), lens, (width, height), self.device)
        return replace(camera, name=entry["img_name"])

    def _photo(self, ask: Ask, camera: Camera) -> Tensor:
        photo = to_float(self.photo(ask.where if isinstance(ask.where, int) else -1))
        size = (camera.height, camera.width)
        return torch.nn.functional.interpolate(photo[None], size, mode="area")[0]


def camera_at(place, turn, lens, size: tuple[int, int], device: torch.device) -> Camera:
    """place [3], turn [9]: camera to world by rows; lens: fx fy cx cy."""
    to_camera = np.eye(4)
    to_camera[:3, :3] = np.reshape(turn, (3, 3)).T
    to_camera[:3, 3] = -to_camera[:3, :3] @ np.asarray(place, np.float64)
    K = [[lens[0], 0.0, lens[2]], [0.0, lens[1], lens[3]], [0.0, 0.0, 1.0]]
    matrix = torch.tensor(to_camera, dtype=torch.float32, device=device)
    return Camera("viewer", *size, matrix, torch.tensor(K, dtype=torch.float32, device=device))


def _fitting(camera: Camera | None, ask: Ask) -> Camera:
    if camera is None:
        raise DataError(f"camera must be one of cameras.json, got {ask.where}")
    if ask.size is None:
        return camera
    return resized(camera, min(1.0, ask.size[0] / camera.width, ask.size[1] / camera.height))


def resized(camera: Camera, share: float) -> Camera:
    width, height = (max(1, round(share * side)) for side in (camera.width, camera.height))
    K = torch.diag(torch.tensor([width / camera.width, height / camera.height, 1.0])).to(camera.K) @ camera.K
    return replace(camera, width=width, height=height, K=K)
