"""Which views train and which test.

Without --eval everything trains. With it, in this order of precedence: train.txt and test.txt in the data
set, the data set's own split (transforms_test.json), every n-th view by name (--llffhold).
"""

from pathlib import Path

from scene.readers.views import Dataset, View
from utils.files import DataError, refuse_pointer, some, text_encoding


def split_views(dataset: Dataset, hold_out: bool, llffhold: int) -> tuple[list[View], list[View], str]:
    """Train views, test views, and in words what decided."""
    views = dataset.views
    if not hold_out:
        return views, [], "no --eval, all views train"
    listed = {kind: _read_list(dataset, kind) for kind in ("train", "test")}
    if listed["train"] or listed["test"]:
        train, test = _by_lists(dataset, listed)
        reason = " and ".join(str(path) for path, _ in filter(None, listed.values()))
    elif any(view.held_out is not None for view in views):
        train = [view for view in views if not view.held_out]
        test = [view for view in views if view.held_out]
        reason = "the data set's own split"
    elif llffhold == 0:
        return views, [], "--llffhold 0"
    else:
        train = [view for i, view in enumerate(views) if i % llffhold]
        test = [view for i, view in enumerate(views) if not i % llffhold]
        reason = f"by name, one in {llffhold} (--llffhold {llffhold})"
    if not train:
        raise DataError(f"{dataset.folder}: no view is left to train on ({reason})")
    return train, test, reason


def _read_list(dataset: Dataset, kind: str) -> tuple[Path, set[str]] | None:
    """Where train.txt or test.txt is, and the image names in it, one a line."""
    for path in (folder / f"{kind}.txt" for folder in dataset.split_folders):
        if not path.is_file():
            continue
        refuse_pointer(path)
        try:
            lines = path.read_text(encoding=text_encoding(path)).splitlines()
            names = {line.strip() for line in lines} - {""}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        known = set().union(*(_names(view, dataset.folder) for view in dataset.views))
        if unknown := sorted(names - known):
            raise DataError(f"{path}: names {some(unknown)}, which the data set does not have")
        return path, names
    return None


def _by_lists(dataset: Dataset, listed: dict) -> tuple[list[View], list[View]]:
    """With both lists each view goes where it is named, or nowhere; with one, the rest is the other kind."""

    def named(kind: str) -> list[View] | None:
        if listed[kind] is None:
            return None
        _, names = listed[kind]
        return [view for view in dataset.views if names & _names(view, dataset.folder)]

    train, test = named("train"), named("test")
    if train is None:
        train = [view for view in dataset.views if view not in (test or [])]
    elif test is None:
        test = [view for view in dataset.views if view not in train]
    return train, test or []


def _names(view: View, folder: Path) -> set[str]:
    """What a list may call a view: its name or its path in the data set, with or without the ending."""
    names = {view.name, Path(view.name).with_suffix("").as_posix()}
    if view.image_path.is_relative_to(folder):
        path = view.image_path.relative_to(folder)
        names |= {path.as_posix(), path.with_suffix("").as_posix()}
    return names
