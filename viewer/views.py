"""What a model folder says to the page: its cameras with their scores, which way is up, the background."""

import numpy as np
import torch

from arguments import ConfigError, ModelParams, build, saved_options
from scene import edit
from scene.folder import ModelFolder
from scene.frame import Similarity
from utils.files import DataError, read_json
from utils.geometry import rotation_matrices
from viewer.page import NEAR, UP, scene_view, view_camera


def folder_view(folder: ModelFolder, iteration: int, turn: torch.Tensor | None = None) -> dict:
    """scene_view() of a model folder. `turn`: the quaternion by which the model was turned."""
    entries = camera_entries(folder)
    held_out, scores = _held_out(folder), _scores(folder, iteration)
    cameras = [view_camera(c, c["img_name"] in held_out, scores.get(c["img_name"])) for c in entries]
    up = UP if turn is not None else mean_up(entries, folder)
    if turn is not None:
        _turn(cameras, turn)
    background = [float(model_options(folder).white_background)] * 3
    near = NEAR * Similarity.stored(folder.normalization).unit
    return scene_view(cameras, up, background, _best(cameras), near)


def model_options(folder: ModelFolder) -> ModelParams:
    """The options of the run; the defaults where the folder has none."""
    try:
        return build((ModelParams,), saved_options(folder.path, (ModelParams,)))[0]
    except ConfigError:
        return ModelParams()


def camera_entries(folder: ModelFolder) -> list[dict]:
    """cameras.json, checked; none where there is no such file."""
    if not folder.cameras.is_file():
        return []
    entries = read_json(folder.cameras, list)
    for entry in entries:
        if not _is_camera(entry):
            raise DataError(f"{folder.cameras}: an entry is no camera: {str(entry)[:100]}")
    return entries


def mean_up(entries: list[dict], folder: ModelFolder) -> tuple[float, float, float]:
    try:
        up = edit.mean_up(entries, folder.cameras)
    except DataError:  # they look everywhere, or there are none
        return UP
    return tuple((up / up.norm()).tolist())


def _is_camera(entry) -> bool:
    try:
        sizes = [entry[key] for key in ("width", "height", "fx", "fy")]
        numbers = np.array([*np.ravel(entry["position"]), *np.ravel(entry["rotation"]), *sizes], np.float64)
        return numbers.shape == (16,) and bool(np.isfinite(numbers).all()) and min(sizes) > 0
    except (KeyError, TypeError, ValueError):
        return False


def _held_out(folder: ModelFolder) -> set[str]:
    return set(read_json(folder.split).get("test", ())) if folder.split.is_file() else set()


def _scores(folder: ModelFolder, iteration: int) -> dict[str, float]:
    """PSNR by name of the photo, as far as metrics.py has measured it."""
    names = folder.pictures("test", iteration) / "names.json"
    if not (folder.per_view.is_file() and names.is_file()):
        return {}
    measured = read_json(folder.per_view).get(f"ours_{iteration}", {}).get("PSNR", {})
    return {photo: measured[file] for file, photo in read_json(names).items() if measured.get(file)}


def _best(cameras: list[dict]) -> int:
    """The view to begin with: the best of the measured ones, else the first."""
    return max(range(len(cameras)), key=lambda i: cameras[i]["psnr"] or 0.0, default=0)


def _turn(cameras: list[dict], quat: torch.Tensor) -> None:
    rotation = rotation_matrices(quat.double()[None])[0].numpy()
    for camera in cameras:
        camera["place"] = (rotation @ camera["place"]).tolist()
        camera["turn"] = (rotation @ np.reshape(camera["turn"], (3, 3))).ravel().tolist()
