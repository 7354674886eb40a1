"""NeRF-synthetic ("Blender") scenes: transforms_train.json and transforms_test.json next to RGBA images.

Frames and cameras are read as those of transforms.json are.
"""

from pathlib import Path

from scene.formats.ply import read_points
from scene.points import PointCloud
from scene.readers import transforms
from scene.readers.photos import Photos
from scene.readers.views import Dataset, DepthMap, View
from utils.files import read_json

NAME = "Blender"
LOOKS_FOR = "transforms_train.json"
CUBE = 1.3  # half the side of the cube that holds every scene of the original data set
DEPTH_DIVISOR = 512.0


def detect(folder: Path) -> bool:
    return (folder / LOOKS_FOR).is_file()


def read(
    folder: Path, images: str = "", depths: str = "", derived: Path | None = None, outside: bool = False
) -> Dataset:
    """`images` and `derived` are not used: each frame names its file, and depth maps need no parameters."""
    photos = Photos(folder, outside=outside)
    views, missing = _read_split(photos, "train", depths)
    if (folder / "transforms_test.json").is_file():
        more, more_missing = _read_split(photos, "test", depths)
        for view in views:
            view.held_out = False
        for view in more:
            view.held_out = True
        views, missing = views + more, missing + more_missing
    return Dataset(
        format=NAME,
        folder=folder,
        views=views,
        split_folders=[folder],
        read_points=lambda: _read_points(folder),
        photos=photos,
        cube=CUBE,
        missing=missing,
    )


def _read_split(photos: Photos, split: str, depths: str) -> tuple[list[View], list[Path]]:
    path = photos.folder / f"transforms_{split}.json"
    views, missing = transforms.read_frames(photos, path, read_json(path))
    for view in views:
        view.name = view.image_path.stem
        if depths:
            view.depth = DepthMap(photos.folder / depths / f"{view.name}.png", DEPTH_DIVISOR)
    return views, missing


def _read_points(folder: Path) -> tuple[PointCloud, str] | None:
    path = folder / "points3d.ply"
    return (read_points(path), str(path)) if path.is_file() else None
