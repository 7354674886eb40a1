"""Cameras of a model folder in the frame of its model: those of the data set or, where that is away, those
of cameras.json, which have no photos."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from arguments import ModelParams, PipelineParams, build, saved_options
from scene import Camera, Scene, paths
from scene.folder import ModelFolder
from scene.frame import Similarity
from utils.files import DataError, read_json


@dataclass
class Views:
    train: list[Camera]
    test: list[Camera]
    frame: Similarity  # from the data set's coordinates to the model's
    photos: bool  # have they got some?
    model: ModelParams
    pipe: PipelineParams


def views_of(folder: ModelFolder, device: torch.device) -> Views:
    groups = (ModelParams, PipelineParams)
    model, pipe = build(groups, saved_options(folder.path, groups))
    model.model_path = str(folder)
    frame = Similarity.stored(folder.normalization)
    try:
        scene = Scene(model, device, for_training=False, quiet=True)
        return Views(scene.train_cameras, scene.test_cameras, frame, True, model, pipe)
    except (DataError, OSError):
        train, test = _listed(folder, frame, device)
        return Views(train, test, frame, False, model, pipe)


def _listed(
    folder: ModelFolder, frame: Similarity, device: torch.device
) -> tuple[list[Camera], list[Camera]]:
    """Train and test cameras of cameras.json."""
    poses, _ = paths.of_cameras(folder.cameras)
    held_out = set(read_json(folder.split).get("test", ())) if folder.split.is_file() else set()
    sets: tuple[list[Camera], list[Camera]] = [], []
    for pose, entry in zip(poses, read_json(folder.cameras, list)):
        name, width, height = str(entry.get("img_name", "")), int(entry["width"]), int(entry["height"])
        focal = 0.5 * height / math.tan(0.5 * pose.fov)
        K = np.array([[float(entry.get("fx", focal)), 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        matrix = frame.enter_camera(pose.world_to_camera)
        matrix, K = (torch.tensor(m, dtype=torch.float32, device=device) for m in (matrix, K))
        sets[name in held_out].append(Camera(name, width, height, matrix, K))
    return sets
