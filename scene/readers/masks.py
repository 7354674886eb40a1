"""Masks: one picture per photo, white where the photo counts and black where it does not."""

from pathlib import Path

from scene.readers.views import Dataset, View, same_shape
from utils.files import DataError, image_size, is_file, some

ENDINGS = (".png", ".jpg", ".jpeg")


def find_masks(dataset: Dataset, folder: Path) -> None:
    """Give each view its mask in the folder, in place of one that the data set names."""
    if not folder.is_dir():
        raise DataError(f"{folder}: the folder of masks is not there")
    for view in dataset.views:
        found = (path for path in _places(folder, view, dataset.folder) if is_file(path))
        view.mask_path = next(found, None)
    if not any(view.mask_path for view in dataset.views):
        looked_for = ", ".join(str(path) for path in _places(folder, dataset.views[0], dataset.folder)[:3])
        raise DataError(f"{folder}: has no mask for any photo; for the first, looked for {looked_for}, ...")


def _places(folder: Path, view: View, dataset: Path) -> list[Path]:
    """The photo's name or path in the data set; with its own ending, another one, or one more."""
    names = [Path(view.name)]
    if view.image_path.is_relative_to(dataset):
        names.append(view.image_path.relative_to(dataset))
    places = []
    for name in dict.fromkeys(names):
        bare = name.with_suffix("") if name.suffix.lower() in ENDINGS else name
        places += [folder / name, *(folder / f"{n}{ending}" for n in (bare, name) for ending in ENDINGS)]
    return list(dict.fromkeys(places))


def check_masks(dataset: Dataset) -> list[str]:
    """Every mask that is named must be there, in the shape of its photo. Returns a line about them."""
    views = dataset.views
    masked = [(view, view.mask_path) for view in views if view.mask_path is not None]
    if not masked:
        return []
    missing = [str(path) for _, path in masked if not is_file(path)]
    if missing:
        raise DataError(
            f"{dataset.folder}: {len(missing)} of {len(masked)} masks are not there: {some(missing)}"
        )
    for view, path in masked:
        if not same_shape(view.size_of(path), view.camera_size):
            (width, height), photo = image_size(path), view.size_of(view.image_path)
            raise DataError(
                f"{path}: is {width}x{height}, which is not the shape of its photo ({photo[0]}x{photo[1]})"
            )
    without = [view.name for view in views if view.mask_path is None]
    if not without:
        return [f"Masks: {len(masked)}, one for each photo"]
    return [
        f"Warning: {len(without)} of {len(views)} photos have no mask and count in full: {some(without, 3)}"
    ]
