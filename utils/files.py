"""Files from and for others: errors name the file and the cause, writes happen whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError


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
        with open(temporary, "wb") as file:
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
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=indent).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a data set."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def read_array(path: Path) -> np.ndarray:
    """A NumPy array of numbers, as float64; nothing in the file is executed."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header asks for no memory
        return np.array(array, np.float64)
    except Exception as error:  # whatever NumPy makes of bytes that it did not write
        raise DataError(f"{path}: cannot be read as a NumPy array ({error})") from None


# What Pillow raises on files that are not images, are cut off, or are too large to be meant seriously.
BAD_IMAGE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    ValueError,
    SyntaxError,
    MemoryError,
)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    return image_header(path)[0]


def image_header(path: Path) -> tuple[tuple[int, int], str]:
    """(width, height) and Pillow's mode."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def some(names: list[str], most: int = 5) -> str:
    """A list for an error message: the first few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
