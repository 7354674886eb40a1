"""Films: MP4, animated WebP and GIF, or a folder of PNG files.

MP4 holds H.264 where the program ffmpeg is found, else AV1. For AV1 Pillow writes an animated AVIF, which is
an MP4 in all but a few words of its header.
"""

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from PIL import Image, features

from utils.files import DataError, atomic_write

ENDINGS = (".mp4", ".webp", ".gif")
TICKS = 1000  # of the clock, per frame
QUALITY = 80  # of 100, as Pillow has it; GIF has none
SPEED = 8  # of libaom: 0 slow to 10
CRF = "18"  # of x264: 0 lossless to 51
NESTED = (b"moov", b"trak", b"edts", b"mdia")  # boxes of an MP4 that are made of boxes


def check_target(path: Path, codec: str) -> None:
    """Can this be written? A name without an ending is a folder."""
    if path.suffix and path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: must end in one of {', '.join(ENDINGS)}, or be a folder")
    if path.suffix.lower() == ".mp4":
        chosen_codec(codec)


def chosen_codec(codec: str) -> str:
    """What "auto" means here."""
    ffmpeg = shutil.which("ffmpeg")
    if codec == "h264" and not ffmpeg:
        raise DataError("codec is h264, which needs the program ffmpeg on the PATH; --codec av1 does not")
    if codec == "h264" or (codec == "auto" and ffmpeg):
        return "h264"
    if not features.check("avif"):
        raise DataError("codec is av1, which needs a Pillow with AVIF (11.3 or newer); or install ffmpeg")
    return "av1"


def write(frames: Iterator[np.ndarray], count: int, path: Path, fps: float, codec: str = "auto") -> None:
    """frames: `count` of them, uint8 [H, W, 3], all of one size. They are asked for one after the other, and
    only a GIF keeps them."""
    ending = path.suffix.lower()
    if ending == ".mp4" and chosen_codec(codec) == "h264":
        _write_h264(frames, path, fps)
        return
    file = BytesIO()
    if ending == ".mp4":
        if count == 1:  # Pillow would write a still: the frame twice, each for half of its time
            frames, count, fps = repeat(next(frames)), 2, 2 * fps
        _Film(frames, count).save(file, "AVIF", save_all=True, quality=QUALITY, speed=SPEED, duration=TICKS)
        data = as_mp4(file.getvalue(), fps)
    else:
        film = _Film(frames, count, few_colors=ending == ".gif")
        film.save(file, ending[1:].upper(), save_all=True, duration=1000 / fps, loop=0, quality=QUALITY)
        data = file.getvalue()
    with atomic_write(path, len(data)) as target:
        target.write(data)


class _Film(Image.Image):
    """An animation to Pillow's eyes, whose frames are made when they are looked at."""

    is_animated = True  # also one of a single frame

    def __init__(self, frames: Iterator[np.ndarray], count: int, few_colors: bool = False):
        super().__init__()
        self.n_frames, self._frames, self._at, self._few_colors = count, iter(frames), -1, few_colors
        self.seek(0)

    def tell(self) -> int:
        return self._at

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError
        if frame > self._at:  # writers look at the first one again when they are done
            picture = Image.fromarray(next(self._frames))
            if self._few_colors:  # Pillow's own way to 256 takes ten times as long
                picture = picture.quantize(256, Image.Quantize.FASTOCTREE)
                self.palette = picture.palette
            self.im, self._mode, self._size, self._at = picture.im, picture.mode, picture.size, frame


def as_mp4(avif: bytes, fps: float) -> bytes:
    """An animated AVIF whose frames last TICKS each, as a film. No size changes, so all places stay right."""
    data = bytearray(avif)
    at = {name: start for name, start, _ in _boxes(data, 0, len(data))}
    data[at[b"ftyp"] : at[b"ftyp"] + 4] = b"iso6"
    still = at[b"meta"] - 4  # the name before it: demuxers would see a second film, of one frame
    data[still : still + 4] = b"free"
    kind = at[b"hdlr"] + 8
    data[kind : kind + 4] = b"vide"
    # After version 1, flags and two times: the clock and the duration, which is endless where AVIF repeats.
    (duration,) = struct.unpack_from(">Q", data, at[b"mdhd"] + 24)
    for name in (b"mvhd", b"mdhd"):
        struct.pack_into(">IQ", data, at[name] + 20, round(fps * TICKS), duration)
    struct.pack_into(">Q", data, at[b"tkhd"] + 28, duration)
    struct.pack_into(">I", data, at[b"elst"], 1 << 24)  # version 1, and no repetition
    return bytes(data)


def _boxes(data: bytes | bytearray, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of what is in each box, and of the boxes within."""
    while at + 8 <= end:
        size, name, header = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8]), 8
        if size == 1:
            size, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        after = at + size if size else end
        yield name, at + header, after
        if name in NESTED:
            yield from _boxes(data, at + header, after)
        at = after


def _write_h264(frames: Iterator[np.ndarray], path: Path, fps: float) -> None:
    """By ffmpeg. Sizes must be even: a last odd column or row stays away."""
    first = next(frames)
    size = f"{first.shape[1]}x{first.shape[0]}"
    even = "crop=trunc(iw/2)*2:trunc(ih/2)*2"
    command = ["ffmpeg", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size]
    command += ["-r", str(fps), "-i", "-", "-vf", even, "-c:v", "libx264", "-crf", CRF]
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder, "film.mp4")
        command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(film)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
            said = _feed(ffmpeg, chain([first], frames))
        if ffmpeg.returncode:
            raise DataError(f"{path}: ffmpeg did not write it: {said[-300:].strip()}")
        with atomic_write(path, film.stat().st_size) as target, open(film, "rb") as source:
            shutil.copyfileobj(source, target)


def _feed(ffmpeg: subprocess.Popen, frames: Iterator[np.ndarray]) -> str:
    """All frames; returns what ffmpeg said, which is an error."""
    assert ffmpeg.stdin and ffmpeg.stderr
    with suppress(BrokenPipeError):  # it has ended, and says why
        for frame in frames:
            ffmpeg.stdin.write(np.ascontiguousarray(frame).tobytes())
        ffmpeg.stdin.close()
    return ffmpeg.stderr.read().decode(errors="replace")
