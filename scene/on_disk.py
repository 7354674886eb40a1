"""Decoded pictures in a file, for photos that do not fit into memory (--data_device disk).

The system keeps of the file in memory what there is room for, once for all processes of a run. Each of them
decodes its share. The file has no name any more when training begins: it goes when the run does.
"""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
import torch

import distributed
from scene.images import Picture
from utils.files import DataError
from utils.memory import workers
from utils.terminal import progress

NAME = ".pictures"
PAGE = 4096  # bytes: pictures begin at multiples


def keep_on_disk(pictures: Sequence[Picture], folder: Path, quiet: bool) -> str:
    """Decode all pictures into a file in this folder, from which they are read when they are shown."""
    starts = [0, *accumulate(-(-picture.size_in_bytes // PAGE) * PAGE for picture in pictures)]
    path = folder / NAME
    try:
        file = _written(path, pictures, starts, quiet)
    finally:
        if distributed.current().first:
            with suppress(OSError):  # Windows does not let go of it
                path.unlink()
    for picture, place in zip(pictures, _places(file, pictures, starts)):
        picture.read_from(torch.from_numpy(place).view(picture.dtype).view(picture.shape))
    return f"{len(pictures)} pictures on the disk, {starts[-1] / 2**20:.0f} MB"


def _written(path: Path, pictures: Sequence[Picture], starts: list[int], quiet: bool) -> np.ndarray:
    """The file, mapped into memory, when all processes have written their pictures."""
    ranks = distributed.current()
    with ranks.together():
        if ranks.first:
            _make(path, max(starts[-1], 1))
    ranks.meet("file of pictures")
    with ranks.together():
        file = np.memmap(path, np.uint8, "r+")
        mine = slice(ranks.rank, None, ranks.count)
        _decode(pictures[mine], _places(file, pictures, starts)[mine], quiet)
    ranks.meet("pictures")
    return file


def _places(file: np.ndarray, pictures: Sequence[Picture], starts: list[int]) -> list[np.ndarray]:
    return [file[start:][: picture.size_in_bytes] for start, picture in zip(starts, pictures)]


def _make(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise DataError(
            f"{path.parent}: the pictures take {size / 1e9:,.1f} GB there and {free / 1e9:,.1f} GB are free: "
            "make them smaller (-r 2, -r 4, -r 8 or -r WIDTH), or name another folder (-m)"
        )
    with suppress(FileNotFoundError):
        path.unlink()  # of a run that was killed
    with open(path, "xb") as file:
        reserve = getattr(os, "posix_fallocate", None)  # else a full disk would show when it is written to
        file.truncate(size) if reserve is None else reserve(file.fileno(), 0, size)


def _decode(pictures: Sequence[Picture], places: Sequence[np.ndarray], quiet: bool) -> None:
    def write(picture: Picture, place: np.ndarray) -> None:
        place[:] = picture.decode().contiguous().view(torch.uint8).flatten().numpy()

    assert all(prod(p.shape) * p.dtype.itemsize == p.size_in_bytes for p in pictures)
    pool = ThreadPoolExecutor(workers(max((p.decoding for p in pictures), default=0)))
    try:
        done = pool.map(write, pictures, places)
        for _ in progress(done, "Loading images", len(pictures), disable=quiet):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
