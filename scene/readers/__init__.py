"""From a folder to a Dataset: one module per format, with detect(folder) and read(folder, images, depths,
derived).

Adding a format is adding its module and its name in FORMATS.
"""

from pathlib import Path

from scene.files import DataError, some
from scene.readers import blender, colmap
from scene.readers.views import Dataset, DepthMap, View

FORMATS = (colmap, blender)  # the first that detects itself is taken

__all__ = ["Dataset", "DepthMap", "View", "read_dataset"]


def read_dataset(
    folder: Path, images: str = "images", depths: str = "", derived: Path | None = None
) -> Dataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: the data set folder is not there")
    for reader in FORMATS:
        if reader.detect(folder):
            dataset = reader.read(folder, images, depths, derived)
            _check(dataset)
            return dataset
    looked_for = "; ".join(f"{reader.LOOKS_FOR} ({reader.NAME})" for reader in FORMATS)
    found = some(sorted(path.name for path in folder.iterdir()), most=8) or "nothing"
    raise DataError(f"{folder}: could not recognize the scene type. Looked for {looked_for}. Found {found}")


def _check(dataset: Dataset) -> None:
    """Every file that the data set names is there."""
    if not dataset.views:
        raise DataError(f"{dataset.folder}: the data set has no images")
    for kind, paths in (
        ("image", [view.image_path for view in dataset.views]),
        ("depth map", [view.depth.path for view in dataset.views if view.depth]),
    ):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(paths)} {kind}s are not there: {some(missing)}")
