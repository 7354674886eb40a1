"""Files from and for others: errors name the file and the cause, writes happen whole or not at all."""

import codecs
import contextlib
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError


class DataError(ValueError):
    """A file or folder that was given to us is not what it should be."""

    for_the_user = True  # the message says it all
    LONGEST = 1000  # characters; a broken file can have names as long as itself

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= self.LONGEST else f"{text[: self.LONGEST]}..."


def is_file(path: Path) -> bool:
    """Also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that we keep in a folder: not of what a link there leads to, and a pipe is not
    waited for."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DataError(f"{path} must be a plain file, got a link, a folder or a pipe")
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # if it has just become one; not under Windows
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Say so if Git LFS has left a few lines about a file in its place: readers would misread them."""
    start = b""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise DataError(f"{path}: is only Git LFS's pointer to the file; fetch it with: git lfs pull")


def text_encoding(path: Path) -> str:
    """UTF-8, with or without a mark, unless the file begins with the mark of UTF-16."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


@contextmanager
def atomic_write(path: str | os.PathLike, size: int = 0) -> Iterator[BinaryIO]:
    """A binary file to write to. `path` holds all of it once the block ends, and is untouched if it fails.

    size: about how many bytes it will have; where there is no room for them, writing does not begin.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free if size else 0
    if size and free < size:
        room = f"needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({room})", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process that had our number
        with open(temporary, "xb") as file:  # x: follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        if cause := _failed_write(error):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _failed_write(error: BaseException | None) -> OSError | None:
    """The system's error; libraries that were writing put theirs on top of it. It does not say which file."""
    while error and not (isinstance(error, OSError) and error.errno):
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Let a new name survive a power cut, too. Not every system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | os.PathLike, data: Any, indent: int | None = None) -> None:
    """What is not a finite number, which JSON does not have, becomes null."""
    with atomic_write(path) as file:
        file.write(json.dumps(_finite(data), indent=indent, allow_nan=False).encode())


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object, or a list, from a data set, in UTF-8, UTF-16 or UTF-32."""
    refuse_pointer(path)
    try:
        data = path.read_bytes()
        data = json.loads(data.decode(json.detect_encoding(data)))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, kind):
        expected = {dict: "a JSON object", list: "a JSON list"}[kind]
        raise DataError(f"{path}: must hold {expected}, got {type(data).__name__}")
    return data


def read_array(path: Path) -> np.ndarray:
    """A NumPy array of numbers, as float64; nothing in the file is executed."""
    refuse_pointer(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header asks for no memory
        return np.array(array, np.float64)
    except Exception as error:  # whatever NumPy makes of bytes that it did not write
        raise DataError(f"{path}: cannot be read as a NumPy array ({error})") from None


# Pictures. Pillow knows more formats, some of which start programs (EPS) or are not for photos.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM")
MAX_PIXELS = 500_000_000  # of one picture; more is a mistake or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses its double

# What Pillow raises on files that are not images, are cut off, or are too large to be meant seriously.
BAD_IMAGE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    ValueError,
    SyntaxError,
    MemoryError,
)


def open_image(path: Path, *more: str) -> Image.Image:
    """A picture whose pixels are not decoded yet. `more`: formats that are meant here, too."""
    return Image.open(path, formats=(*FORMATS, *more))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    return image_header(path)[0]


def image_header(path: Path) -> tuple[tuple[int, int], str]:
    """(width, height) and Pillow's mode."""
    try:
        with open_image(path) as image:
            return image.size, image.mode
    except BAD_IMAGE as error:
        refuse_pointer(path)
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def picture_path(target: Path, name: str) -> Path:
    """Where to save a picture: the file `target`, or the file `name` in it if it is a folder."""
    if target.is_dir() or not target.suffix:
        target = target / name
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DataError(f"{target}: the picture must end in .png or .jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def orientation(path: Path) -> int:
    """EXIF's number for how the camera was held, 1 to 8; 1 is upright, as is what does not say."""
    try:
        with open_image(path) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def some(names: list[str], most: int = 5) -> str:
    """A list for an error message: the first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
