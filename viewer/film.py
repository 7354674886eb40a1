"""Films of a model along a camera's path, and of training through its saved models. No photos are needed."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arguments import ModelParams, RenderParams
from gaussian_renderer import Splats, outputs
from per_view import Shown
from scene import paths
from scene.cameras import Camera
from scene.folder import ModelFolder
from scene.frame import OF_DATA, Similarity
from scene.paths import CameraPath, Pose
from utils import video
from utils.files import DataError
from utils.image import PngWriter, to_uint8
from utils.terminal import progress, say

SECONDS, FPS = 10.0, 24.0  # if nobody says otherwise
WIDEST = 1280  # pixels of a film whose size nobody names
PROBES = 8  # frames that the range of depths is taken from

Load = Callable[[int], Shown]  # of an iteration; -1: the last, or the file


def make(model: ModelParams, options: RenderParams, load: Load, background: Tensor) -> None:
    target = Path(options.to)
    as_path = target.suffix.lower() == ".json"
    if not as_path:  # before any work
        video.check_target(target, options.codec)
    way = camera_path(model, options, load)
    if as_path:
        paths.write(target, way)
    else:
        film = Film(way, _frame(model), background, options.outputs)
        frames = film.frames(_models(model, options, load, len(way.poses)))
        shown = progress(frames, "Rendering a film", len(way.poses), disable=options.quiet)
        write(iter(shown), way, target, options.codec)
    if not options.quiet:
        say(f"{len(way.poses)} frames, {len(way.poses) / way.fps:.1f} s: {target}")


def write(frames: Iterator[dict[str, Tensor]], way: CameraPath, target: Path, codec: str = "auto") -> None:
    if target.suffix:
        video.write(map(_side_by_side, frames), len(way.poses), target, way.fps, codec)
        return
    with PngWriter() as files:
        for number, pictures in enumerate(frames):
            for kind, picture in pictures.items():
                folder = target / kind if len(pictures) > 1 else target
                folder.mkdir(parents=True, exist_ok=True)
                files.write(picture, folder / f"{number:05d}.png")


def _side_by_side(pictures: dict[str, Tensor]) -> np.ndarray:
    return torch.cat(list(pictures.values()), dim=2).permute(1, 2, 0).contiguous().cpu().numpy()


# Where the camera goes


def camera_path(model: ModelParams, options: RenderParams, load: Load) -> CameraPath:
    if options.path.endswith(".json"):
        way = paths.read(Path(options.path), options.seconds or None, options.fps or None)
    else:
        poses, size = _cameras(model, options, load)
        fps = options.fps or FPS
        count = paths.frame_count(options.seconds or SECONDS, fps)
        frames, keys, loop = paths.automatic(options.path, poses, count)
        share = min(1.0, WIDEST / size[0])
        width, height = (max(1, round(share * side)) for side in size)
        way = CameraPath(frames, width, height, fps, loop, keys)
    if options.size:
        way.width, way.height = options.size
    return way


def _cameras(model: ModelParams, options: RenderParams, load: Load) -> tuple[list[Pose], tuple[int, int]]:
    """Those of the model folder; around a bare file of splats, a circle of them."""
    if model.model_path:
        return paths.of_cameras(ModelFolder(model.model_path).cameras)
    scene = load(-1).scene
    if not isinstance(scene, Splats) or not len(scene):
        raise DataError(f"{options.ply}: has no splats to look at")
    return paths.around(scene.gaussians.means.detach().double().cpu().numpy()), (WIDEST, WIDEST * 9 // 16)


def _frame(model: ModelParams) -> Similarity:
    return Similarity.stored(ModelFolder(model.model_path).normalization) if model.model_path else OF_DATA


def _models(
    model: ModelParams, options: RenderParams, load: Load, count: int
) -> Iterator[tuple[Shown, list[int]]]:
    """Each model that is filmed, with the numbers of its frames."""
    if not options.timelapse:
        yield load(options.iteration), list(range(count))
        return
    saved = ModelFolder(model.model_path).saved_iterations()
    for iteration, numbers in zip(saved, np.array_split(np.arange(count), len(saved))):
        yield load(iteration), numbers.tolist()


class Film:
    """The frames of a path, of whatever can be looked at."""

    def __init__(self, way: CameraPath, frame: Similarity, background: Tensor, kinds: list[str]):
        self.way, self.frame, self.background, self.kinds = way, frame, background, kinds
        self._near: outputs.Range | None = None

    @torch.no_grad()
    def frames(self, models: Iterable[tuple[Shown, list[int]]]) -> Iterator[dict[str, Tensor]]:
        """uint8 [3, H, W] by kind, for each frame."""
        for shown, numbers in models:
            for number in numbers:
                yield self._frame(shown, self._camera(number))

    def _frame(self, shown: Shown, camera: Camera) -> dict[str, Tensor]:
        rendered, near = shown.scene.picture(camera), self._range(shown)
        return {
            kind: to_uint8(outputs.picture(rendered, camera, kind, self.background, near))
            for kind in self.kinds
        }

    def _range(self, shown: Shown) -> outputs.Range:
        """That of the first model all along: colors of depths must not flicker."""
        if "depth" in self.kinds and self._near is None:
            last = len(self.way.poses) - 1
            few = np.linspace(0, last, min(PROBES, last + 1)).astype(int)
            self._near = outputs.depth_range(shown.scene.picture(self._camera(number)) for number in few)
        return self._near or (0.0, 1.0)

    def _camera(self, number: int) -> Camera:
        """A frame, from the data set's coordinates to the model's."""
        pose, device = self.way.poses[number], self.background.device
        matrix = torch.tensor(self.frame.enter_camera(pose.world_to_camera), dtype=torch.float32)
        K = torch.tensor(self.way.intrinsics(pose), dtype=torch.float32)
        return Camera("film", self.way.width, self.way.height, matrix.to(device), K.to(device))
