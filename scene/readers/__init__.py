"""From a folder to a Dataset: one module per format, with detect(folder) and read(folder, images, depths,
derived, outside), and its NAME and what it LOOKS_FOR for messages.

Adding a format is adding its module, and that to FORMATS; llff.py is a short one. What views.py says of a
Dataset is all that the rest of the code knows; `python -m scene.inspect` shows what was understood.
"""

from pathlib import Path
from types import ModuleType

import numpy as np

from scene.points import FARTHEST
from scene.readers import blender, colmap, llff, transforms
from scene.readers.depths import check_depths
from scene.readers.masks import check_masks, find_masks
from scene.readers.others import next_step
from scene.readers.photos import find_folder
from scene.readers.views import Dataset, DepthMap, View, check_names, check_shapes
from utils.files import DataError, is_file, some

FORMATS = (colmap, blender, transforms, llff)  # the first that detects itself is taken

__all__ = ["Dataset", "DepthMap", "View", "read_dataset"]


def read_dataset(
    folder: Path,
    images: str = "images",
    depths: str = "",
    derived: Path | None = None,
    skip_missing: bool = False,
    masks: str = "",
    outside: bool = False,
) -> Dataset:
    """`derived`: the folder of what is made from the data set, as that is never written to.
    `outside`: whether the data set's files may name files outside of it."""
    if not folder.is_dir():
        step = next_step(folder, _is_data_set) if folder.exists() else ""
        raise DataError(f"{folder}: the data set folder is not there{step}")
    depths = depths and str(find_folder(folder, depths))
    dataset = _reader_of(folder).read(folder, images, depths, derived, outside)
    _check_photos(dataset, skip_missing)
    _check_places(dataset)
    dataset.notes += check_shapes(dataset.views) + check_names(dataset.views)
    if depths:
        dataset.notes += check_depths(dataset.views)
    if masks:
        find_masks(dataset, find_folder(folder, masks))
    dataset.notes += check_masks(dataset)
    dataset.notes += [*dataset.photos.notes(), dataset.photos.pose_note(dataset.views)]
    return dataset


def _reader_of(folder: Path) -> ModuleType:
    if reader := _detected(folder):
        return reader
    looked_for = "; ".join(f"{reader.LOOKS_FOR} ({reader.NAME})" for reader in FORMATS)
    found = some(sorted(path.name for path in folder.iterdir()), most=8) or "nothing"
    raise DataError(
        f"{folder}: could not recognize the scene type{next_step(folder, _is_data_set)}. "
        f"Looked for {looked_for}. Found {found}"
    )


def _detected(folder: Path) -> ModuleType | None:
    for reader in FORMATS:
        if reader.detect(folder):
            return reader
    # nerfstudio has COLMAP's model there, beside a transforms.json that comes first
    return colmap if colmap.detect(folder / "colmap") else None


def _is_data_set(folder: Path) -> bool:
    return _detected(folder) is not None


def _check_places(dataset: Dataset) -> None:
    for view in dataset.views:
        if not (np.isfinite(view.world_to_camera).all() and np.abs(view.center).max() < FARTHEST):
            place = ", ".join(f"{x:.3g}" for x in view.center)
            raise DataError(
                f"{dataset.folder}: the camera of {view.name} is at an impossible place ({place})"
            )


def _check_photos(dataset: Dataset, skip_missing: bool) -> None:
    """Every photo that the data set names is there, or, on request, its view is left out."""
    there, missing = [], list(dataset.missing)
    for view in dataset.views:
        if is_file(view.image_path):
            there.append(view)
        else:
            missing.append(view.image_path)
    if missing:
        names = some([str(path) for path in missing])
        counted = f"{len(missing)} of {len(missing) + len(there)} images are not there"
        if not skip_missing or not there:
            raise DataError(
                f"{dataset.folder}: {counted}: {names}"
                + ("; --skip_missing leaves their views out" if there else "")
            )
        dataset.notes.append(f"Warning: {counted}; with --skip_missing their views are left out: {names}")
        dataset.views = there
    if not dataset.views:
        raise DataError(f"{dataset.folder}: the data set has no images")
