"""Where the files are that a data set names, also after it was moved or its photos were saved anew.

A name is looked for, in this order: where it says, and there with another ending; then by the end of its path
below the data set, if it leads elsewhere. Outside the data set nothing is read unless that is allowed.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from scene.readers.views import View
from utils.files import DataError, is_file, some

IMAGES = "images"  # the folder that -i takes the place of
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
LONGEST_TAIL = 8  # parts of a path
BESIDE_A_PHOTO = re.compile(r"[._-](depth|normal|mask|alpha)", re.IGNORECASE)  # pictures of something else


class Photos:
    """Finds files by the names that a data set has for them, and remembers what was not where it says."""

    def __init__(self, folder: Path, root: Path | None = None, images: str = IMAGES, outside: bool = False):
        """`images` takes the place of images/ in names; `outside`: whether they may leave the data set."""
        self.folder = folder
        self.root = root or folder  # what names are relative to
        self.images = images
        self.outside = outside
        self.renamed: dict[Path, Path] = {}  # where it should be -> where it is, with another ending
        self.moved: dict[Path, Path] = {}  # the same, in another place
        self._taken: dict[Path, Path] = {}  # where it is -> where it should be, of all that was found

    def find(self, name: str) -> Path:
        """The file that is called so. If there is none, where it should be."""
        named = self.root / self._in_chosen_folder(Path(name))
        inside = self._is_inside(named)
        if (inside or self.outside) and (found := _with_any_ending(named)):
            if named.suffix.lower() not in ENDINGS:  # then none is expected, and any is right
                return found
            return self._remember(self.renamed, named, found)
        parts = self._parts(named)
        if not (inside and len(parts) > 1 and os.path.isdir(self.root / parts[0])) and (
            found := self._by_tail(parts)
        ):
            return self._remember(self.moved, named, found)
        if not inside and not self.outside and is_file(named):
            raise DataError(
                f"{named}: is outside the data set {self.folder}, whose files name it; "
                "--allow_outside_paths lets it be read"
            )
        return named

    def _in_chosen_folder(self, path: Path) -> Path:
        if self.images != IMAGES and path.parts[:1] == (IMAGES,):
            return Path(self.images, *path.parts[1:])
        return path

    def _is_inside(self, path: Path) -> bool:
        """By name, or once links are followed."""
        places = (self.folder, self.root, self.folder / self.images)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # of names that no file can have
            return any(
                Path(form(path)).is_relative_to(form(place))
                for form in (os.path.abspath, os.path.realpath)
                for place in places
            )
        return False

    def _parts(self, path: Path) -> list[str]:
        """Of the path below `root`, or of all of it. Paths of Windows come as one part."""
        path = Path(os.path.normpath(path))
        below = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        return [part for part in str(below).replace("\\", "/").split("/") if part]

    def _by_tail(self, parts: list[str]) -> Path | None:
        """The file with the longest such end of its path."""
        for start in range(max(len(parts) - LONGEST_TAIL, 0), len(parts)):
            tail = self._in_chosen_folder(Path(*parts[start:]))
            if found := _with_any_ending(self.root / tail):
                return found
        return _with_any_ending(self.root / self.images / parts[-1]) if parts else None

    def _remember(self, kind: dict[Path, Path], named: Path, found: Path) -> Path:
        """Note what stands in for what. It cannot do so for two, nor for one beside itself."""
        other = self._taken.setdefault(found, named)
        if other != named:
            raise DataError(f"{found}: would be both {other} and {named}, which are not one photo")
        if found != named:
            kind[named] = found
        return found

    def notes(self) -> list[str]:
        """A line for each kind of thing that was not where the data set says."""
        notes = []
        for named, found in list(self.renamed.items())[:1]:
            count = len(self.renamed)
            notes.append(
                f"Photos: {count} have another ending than in the data set's files: {found} is taken for "
                f"{named.name}" + (", and so on" if count > 1 else "")
            )
        for named, found in list(self.moved.items())[:1]:
            count = len(self.moved)
            notes.append(
                f"Photos: {count} paths do not lead into the data set; the files with the same end of their "
                f"path are used: {found} for {named}" + (", and so on" if count > 1 else "")
            )
        return notes

    def pose_note(self, views: list[View]) -> str:
        """How many of the photos beside those of the views have no pose."""
        folders = [self.root] if self.root != self.folder else sorted({v.image_path.parent for v in views})
        known = {_without_ending(view.image_path) for view in views}
        others = {view.mask_path for view in views} | {view.depth.path for view in views if view.depth}
        unknown = [
            path
            for path in _pictures(folders, self.root != self.folder)
            if path not in others
            and _without_ending(path) not in known
            and not BESIDE_A_PHOTO.search(path.stem)
        ]
        total, where = len(known) + len(unknown), some([str(folder) for folder in folders], 2)
        if not unknown:
            return f"Photos: all {total} in {where} have a pose"
        names = some([path.name for path in unknown], 3)
        note = f"{len(unknown)} of {total} photos in {where} have no pose and are not used: {names}"
        return f"Warning: {note}" if 2 * len(unknown) > total else f"Photos: {note}"


def find_folder(dataset: Path, name: str) -> Path:
    """A folder in the data set; one in the folder where the command was given, if only that is there."""
    below = dataset / name
    return below if os.path.isdir(below) or not os.path.isdir(name) else Path(name).absolute()


def _with_any_ending(path: Path) -> Path | None:
    """The file, or that with another ending of photos, or with one where the name has none."""
    if is_file(path):
        return path
    bare = _without_ending(path)
    named = (
        bare.with_name(bare.name + ending)
        for lower in ENDINGS
        for ending in (lower, lower.upper())
        if bare.name
    )
    return next((candidate for candidate in named if is_file(candidate)), None)


def _without_ending(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in ENDINGS else path


def _pictures(folders: Iterable[Path], deep: bool) -> Iterator[Path]:
    for folder in folders:
        for place, below, names in os.walk(folder):
            below[:] = sorted(below) if deep else []
            for name in sorted(names):
                if Path(name).suffix.lower() in ENDINGS and not name.startswith("."):
                    yield Path(place, name)
