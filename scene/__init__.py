"""A scene: the data set as cameras with pictures, its points and extent, and the model folder.

data set folder -> Dataset (readers) -> split -> Cameras. Nothing is ever written to the data set.
"""

import math
import random
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from arguments import ModelParams
from scene.cameras import Camera
from scene.fingerprint import Fingerprint
from scene.folder import ModelFolder
from scene.formats.ply import load_ply, write_points
from scene.frame import OF_DATA, Similarity, fitting, move, warnings
from scene.gaussian_model import GaussianModel
from scene.images import (
    DECODED,
    MAX_WIDTH,
    Mask,
    Picture,
    load_all,
    load_counts,
    load_image,
    load_inverse_depth,
    training_size,
)
from scene.lens import undistorted_size
from scene.on_disk import keep_on_disk
from scene.points import PointCloud, bounds_of_points, points_in_view, uniform_points
from scene.readers import View, read_dataset
from scene.readers.views import Points
from scene.split import split_views
from scene.sweep import points_from_photos
from utils.files import DataError, atomic_write, some, write_json
from utils.terminal import say

__all__ = [
    "Camera",
    "DataError",
    "GaussianModel",
    "PointCloud",
    "Scene",
    "load_gaussians",
]
MADE_POINTS = 100_000  # where the data set has none, as many as the original draws for Blender scenes
ONE_PLACE = 1e-4  # of the distance to the points: cameras that are not farther apart
FEW_POINTS = 1000  # from photos; with less of them random ones are better


class Scene:
    """The data of one run.

    For training, cameras come shuffled and with their pictures loaded. Otherwise they come in the order of
    the data set, and pictures are decoded when asked for. Nothing is written but photos that had to be
    undistorted, until write_inputs() and save().
    """

    train_cameras: list[Camera]
    test_cameras: list[Camera]
    extent: float  # radius of the scene: how far the train cameras are spread, and 10 % more
    background: torch.Tensor  # [3]
    frame: Similarity  # from the data set's coordinates to those of everything here
    warnings: list[str]  # about what is hard to train, for the log
    cube: float | None  # half the side of what Blender scenes show

    def __init__(
        self,
        model: ModelParams,
        device: torch.device,
        seed: int = 0,
        for_training: bool = True,
        quiet: bool = False,
    ):
        if model.data_device not in ("cpu", "disk") and not model.data_device.startswith("cuda"):
            raise DataError(f"data_device must be cuda, cpu or disk, got {model.data_device}")
        self._model, self._device, self._seed = model, device, seed
        self._say: Callable[[str], None] = (lambda text: None) if quiet else say
        depths = model.depths if for_training else ""
        self._folder = ModelFolder(model.model_path)
        self._dataset = read_dataset(
            Path(model.source_path),
            model.images,
            depths,
            self._folder.path,
            model.skip_missing,
            model.masks,
            model.allow_outside_paths,
        )
        self.warnings = self._settle_frame(for_training)
        self.cube = self._dataset.cube
        train, test, reason = split_views(self._dataset, model.eval, model.llffhold)
        self._say(f"{self._dataset.format} data set {model.source_path}: {len(self._dataset.views)} views")
        self._split = {
            "by": reason, "train": [view.name for view in train], "test": [view.name for view in test],
        }  # fmt: skip
        self._say(f"Split: {len(train)} train, {len(test)} test ({reason})")
        if model.train_test_exp:  # the left halves of test views train, too
            shown = {*train, *test}
            train = [view for view in self._dataset.views if view in shown]
        self._views = test + train  # in the order of cameras.json

        sizes = {view: view.size_of(view.image_path) for view in self._views}
        self._report(sizes)
        pictures = {view: self._pictures(view, size) for view, size in sizes.items()}
        left, right = ("left", "right") if model.train_test_exp else ("", "")
        held_out = set(test)
        self.test_cameras = [self._camera(i, v, pictures[v], True, right) for i, v in enumerate(test)]
        self.train_cameras = [
            self._camera(i, v, pictures[v], v in held_out, left if v in held_out else "")
            for i, v in enumerate(train, start=len(test))
        ]
        self.fingerprint = Fingerprint.of(self._dataset.views, train, test, self.frame)
        self.exposure_names = [view.name for view in train]
        self.extent = extent(train)
        self.background = torch.full((3,), 1.0 if model.white_background else 0.0, device=device)

        if for_training:
            to_load = [p for seen in pictures.values() for p in seen if isinstance(p, Picture)]
            self._say(self._load(to_load, quiet))
            self._check_masks()
            self.extent = self._extent_or_distance(train)
            shuffle = random.Random(seed).shuffle
            shuffle(self.train_cameras)
            shuffle(self.test_cameras)

    @cached_property
    def points(self) -> PointCloud:
        """What the Gaussians start from."""
        return self._points_and_origin[0]

    @property
    def has_points(self) -> bool:
        """Are the points those of the data set?"""
        return bool(self._found and len(self._found.cloud)) and not self._model.random_init

    def write_inputs(self) -> None:
        """What the run starts from, into the model folder: split.json, cameras.json and input.ply."""
        write_json(self._folder.split, self._split, indent=1)
        self.frame.write(self._folder.normalization)
        self.write_cameras(self._folder.cameras, {})
        points, origin = self._points_and_origin
        if origin is not None and origin.suffix == ".ply":
            with open(origin, "rb") as source, atomic_write(self._folder.input_points) as target:
                shutil.copyfileobj(source, target)
        else:
            xyz = self.frame.leave(points.xyz)
            xyz = xyz if self.frame.needs_doubles else xyz.astype(np.float32)
            write_points(self._folder.input_points, PointCloud(xyz, points.rgb))

    def write_cameras(self, path: Path, refined: dict[int, np.ndarray]) -> None:
        """As cameras.json; those that are refined, by their uid, with these world to camera matrices."""
        matrices = [refined.get(i, view.world_to_camera) for i, view in enumerate(self._views)]
        cameras = [_camera_json(i, v, m, self.frame) for i, (v, m) in enumerate(zip(self._views, matrices))]
        write_json(path, cameras)

    def enter(self, camera: Camera) -> None:
        """Put a camera of somebody else, in the data set's coordinates, where the scene is."""
        if not self.frame.trivial:
            moved = self.frame.enter_camera(camera.world_to_camera.double().cpu().numpy())
            camera.world_to_camera = torch.from_numpy(moved).to(camera.world_to_camera)

    def _settle_frame(self, for_training: bool) -> list[str]:
        """A model that is trained already has its frame. Returns warnings, for those who train."""
        dataset = self._dataset
        if not for_training:
            self.frame = Similarity.stored(self._folder.normalization)
            move(dataset, self.frame)
            return []
        self.frame = fitting(dataset) if self._model.normalize else OF_DATA
        move(dataset, self.frame)
        if self._model.normalize:
            center = ", ".join(f"{x:.6g}" for x in self.frame.center)
            self._say(f"Normalized: training is around ({center}), in units of {self.frame.unit:.4g}")
        if (found := self._found) is None:
            return warnings(dataset.views, None)
        wrong = [f"Warning: of the points in {found.origin}, {found.wrong}"] if found.wrong else []
        return wrong + warnings(dataset.views, found.cloud)

    # From views to cameras

    def _pictures(self, view: View, file_size: tuple[int, int]) -> "_Pictures":
        lens = view.lens
        size = training_size(
            *(undistorted_size(lens, file_size) if lens else file_size), self._model.resolution
        )
        width, height = size
        cache = self._undistorted_path(view) if lens else None
        turn = view.turn(view.image_path)
        mask = None
        if view.mask_path:
            mask = Mask(view.mask_path, self._model.invert_masks, view.turn(view.mask_path))
        ignored, cutout = (mask, None) if self._model.mask_mode == "ignore" else (None, mask)
        by_alpha = self._model.alpha == "mask"
        white, device, decoded = self._model.white_background, self._device, DECODED * math.prod(file_size)
        decode = partial(load_image, view.image_path, size, white, lens, cache, cutout, by_alpha, turn)
        photo, depth, counted = Picture(decode, (3, height, width), device, decoded), None, None
        if view.depth is not None and view.depth.reliable:
            decode = partial(load_inverse_depth, view.depth, size, lens, view.turn(view.depth.path))
            depth = Picture(decode, (height, width), device, decoded, torch.float32)
        if ignored is not None or by_alpha:
            decode = partial(load_counts, view.image_path, size, lens, ignored, by_alpha, turn)
            counted = Picture(decode, (height, width), device, decoded)
        return _Pictures(width, height, photo, depth, counted)

    def _load(self, pictures: list[Picture], quiet: bool) -> str:
        if self._model.data_device == "disk":
            return keep_on_disk(pictures, self._folder.path, quiet)
        return load_all(pictures, self._device, on_host=self._model.data_device == "cpu", quiet=quiet)

    def _undistorted_path(self, view: View) -> Path:
        photo, folder = view.image_path, self._dataset.folder
        name = photo.relative_to(folder if photo.is_relative_to(folder) else photo.anchor)
        inner = ["up" if part == ".." else part for part in name.parts]  # stays in the model folder
        return Path(self._folder.undistorted, *inner[:-1], f"{inner[-1]}.png")

    def _camera(self, uid: int, view: View, pictures: "_Pictures", is_test: bool, half: str) -> Camera:
        width, height, photo, depth, counted = pictures
        to_training_size = np.diag([width / view.width, height / view.height, 1.0])
        return Camera(
            name=view.name,
            width=width,
            height=height,
            world_to_camera=torch.tensor(view.world_to_camera, dtype=torch.float32, device=self._device),
            K=torch.tensor(to_training_size @ view.intrinsics, dtype=torch.float32, device=self._device),
            uid=uid,
            original_width=view.width,
            original_height=view.height,
            is_test=is_test,
            half={"": None, "left": slice(0, width // 2), "right": slice(width // 2, None)}[half],
            photo=photo,
            depth=depth,
            counted=counted,
        )

    def _report(self, sizes: dict[View, tuple[int, int]]) -> None:
        """What is worth a line before hours of training. sizes: of the image files."""
        for note in self._dataset.notes:
            self._say(note)
        if lenses := {view.lens for view in sizes if view.lens}:
            models = ", ".join(sorted({lens.model for lens in lenses}))
            self._say(
                f"Lenses: {len(lenses)} that distort ({models}); photos are undistorted, copies kept in "
                f"{self._folder.undistorted}"
            )
        if self._model.resolution == -1 and any(width > MAX_WIDTH for width, _ in sizes.values()):
            self._say(
                f"Images wider than {MAX_WIDTH} pixels are scaled down to that; -r 1 keeps them as they are"
            )

    # Points

    @cached_property
    def _found(self) -> Points | None:
        return self._dataset.points()

    @cached_property
    def _points_and_origin(self) -> tuple[PointCloud, Path | None]:
        """The points, and the file they are from if that has just these."""
        told = len(self._dataset.notes)
        found = self._found if self._found and len(self._found.cloud) else None
        for note in self._dataset.notes[told:]:
            self._say(note)
        if found and not self._model.random_init:
            self._say(f"Points: {len(found.cloud)} from {found.origin}")
            return found.cloud, None if found.wrong else Path(found.origin)
        points, how = self._made_points(found.cloud if found else None)
        self._say(f"Points: {len(points)} {how}" + ("" if found else "; the data set has none"))
        return points, None

    def _made_points(self, found: PointCloud | None) -> tuple[PointCloud, str]:
        """Points that are not those of the data set, and in words what they are."""
        count, views, cube = self._model.random_init, self._dataset.views, self._dataset.cube
        if found:
            low, high = bounds_of_points(found)
            where = f"in the bounds of the data set's points: {low.round(2)} to {high.round(2)}"
            return uniform_points(count, low, high, self._seed), f"random ones, {where}"
        if cube:
            low, high = self.frame.enter(np.full(3, -cube)), self.frame.enter(np.full(3, cube))
            points = uniform_points(count or MADE_POINTS, low, high, self._seed)
            return points, f"random ones, between {-cube} and {cube} in each coordinate"
        if count:
            return points_in_view(views, count, self._seed), "random ones, in what the cameras see"
        cameras = [camera for camera in self.train_cameras if not camera.is_test]
        points = points_from_photos(cameras, MADE_POINTS, self._seed)
        if len(points) >= FEW_POINTS:
            return points, "on the surfaces that the photos show"
        why = f"as the photos gave only {len(points)}"
        return points_in_view(views, MADE_POINTS, self._seed), f"random ones, in what the cameras see, {why}"

    def _check_masks(self) -> None:
        blank = []
        for camera in self.train_cameras:
            counts = camera.counts()
            if counts is not None and not counts.any():
                blank.append(camera.name)
        if blank and len(blank) == len(self.train_cameras):
            raise DataError("nothing of any train photo counts; --invert_masks swaps black and white")
        if blank:
            self._say(f"Warning: masks leave nothing of {len(blank)} train photos: {some(blank)}")

    def _extent_or_distance(self, views: list[View]) -> float:
        """Where all cameras are in one place, how far the points are from there is a measure of the scene."""
        if not len(self.points):
            return self.extent
        center = np.mean([view.center for view in views], axis=0)
        distance = 1.1 * float(np.median(np.linalg.norm(self.points.xyz - center, axis=1)))
        if self.extent >= ONE_PLACE * distance:
            return self.extent
        self._say(
            f"All train cameras are in one place: the scene's extent is that of its points, {distance:.4g}"
        )
        return distance


class _Pictures(NamedTuple):
    """What one view shows, shared by the cameras of its two roles with --train_test_exp."""

    width: int  # in training
    height: int
    photo: Picture
    depth: Picture | None  # where it can be trusted
    counted: Picture | None  # where the photo counts, if not everywhere


def extent(views: list[View]) -> float:
    """1.1 times the largest distance of a train camera from their mean."""
    centers = np.array([view.center for view in views])
    return 1.1 * float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max())


def _camera_json(number: int, view: View, world_to_camera: np.ndarray, frame: Similarity) -> dict:
    """One entry of cameras.json, as viewers read it: at the camera's own size, camera to world."""
    return {
        "id": number,
        "img_name": view.name,
        "width": view.width,
        "height": view.height,
        "position": frame.leave(-world_to_camera[:3, :3].T @ world_to_camera[:3, 3]).tolist(),
        "rotation": world_to_camera[:3, :3].T.tolist(),
        "fy": float(view.intrinsics[1, 1]),
        "fx": float(view.intrinsics[0, 0]),
    }


def load_gaussians(model_path: str | Path, iteration: int, device: torch.device) -> tuple[GaussianModel, int]:
    """The Gaussians saved at this iteration (-1: the last one), and which iteration it is."""
    folder = ModelFolder(model_path)
    iteration = folder.saved(iteration)
    return load_ply(folder.ply(iteration), device, Similarity.stored(folder.normalization)), iteration
