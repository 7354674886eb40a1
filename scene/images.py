"""Photos and depth maps: from files to tensors at training size, and where those live.

Pixels are uint8 [3, H, W], a quarter of float32; the loss converts them. This is the one place where lens
distortion is taken out and transparency is composited over the background, so training, evaluation and
rendering all see the same ground truth. Undistorted photos are kept as PNG files in the model folder; a file
there is used as long as photo and lens are the ones that it was made from.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from scene.lens import Lens, undistort
from scene.readers.views import DepthMap
from utils.files import BAD_IMAGE, DataError, atomic_write, open_image
from utils.memory import available, workers
from utils.terminal import progress

MAX_WIDTH = 1600  # of -r -1
DOWNSCALES = (1, 2, 4, 8)
PNG_LEVEL = 1
UPRIGHT = {  # what EXIF orientations of photos on their side ask for
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODED = 16  # bytes for each pixel of a file while it is decoded, measured
MADE_FROM = "Made from"  # PNG text of an undistorted photo
DEVICE_SHARE = 0.4  # of the device's free memory may hold pictures; the Gaussians need the rest


def training_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Size of the image for the flag -r; the rounding is the original's, case by case."""
    if resolution in DOWNSCALES:
        return max(round(width / resolution), 1), max(round(height / resolution), 1)
    if resolution == -1:
        scale = width / MAX_WIDTH if width > MAX_WIDTH else 1.0
    elif resolution > 0:
        scale = width / resolution
    else:
        raise DataError(f"resolution must be -1 or positive, got {resolution}")
    return max(int(width / scale), 1), max(int(height / scale), 1)


@dataclass(frozen=True)
class Mask:
    """A picture that is white where a photo counts; or black, if it is inverted."""

    path: Path
    inverted: bool = False
    turn: int = 1  # EXIF orientation


def load_image(
    path: Path,
    size: tuple[int, int],
    white_background: bool,
    lens: Lens | None = None,
    cache: Path | None = None,
    cutout: Mask | None = None,
    opaque: bool = False,
    turn: int = 1,
) -> Tensor:
    """A photo as uint8 [3, H, W], undistorted, composited over white or black, then resized (bicubic).

    `turn` is the EXIF orientation by which it is turned before all that. `cutout` adds transparency where it
    is black; `opaque` disregards the transparency of the file.
    """
    image = _open_photo(path, lens, cache, turn)
    if opaque:
        image = image.convert("RGB")
    if cutout is not None:
        alpha = _open_mask(cutout, lens).resize(image.size, Image.Resampling.BILINEAR)
        image.putalpha(ImageChops.multiply(image.getchannel("A"), alpha) if image.mode == "RGBA" else alpha)
    image = _composited(image, 255 if white_background else 0)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_counts(
    path: Path, size: tuple[int, int], lens: Lens | None, mask: Mask | None, by_alpha: bool, turn: int = 1
) -> Tensor:
    """Where a photo counts: uint8 [H, W], 1 or 0, by its mask and, if asked for, by its own alpha."""
    counts = np.ones(size[::-1], np.uint8)
    pictures = [_open_mask(mask, lens)] if mask else []
    if by_alpha and (photo := _open_photo(path, lens, None, turn)).mode == "RGBA":
        pictures.append(photo.getchannel("A"))
    for picture in pictures:
        counts &= np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) > 127
    return torch.from_numpy(counts)


def load_inverse_depth(
    depth: DepthMap, size: tuple[int, int], lens: Lens | None = None, turn: int = 1
) -> Tensor:
    """Inverse depth, float32 [H, W], in the units of the scene."""
    try:
        with open_image(depth.path) as image:
            values = np.asarray(_turned(image, turn), np.float32)
    except BAD_IMAGE as error:
        raise DataError(f"{depth.path}: cannot be read as an image ({error})") from None
    if values.ndim == 3:
        values = values[..., 0]
    if lens is not None:
        values = undistort(values[..., None], lens)[..., 0]
    values = torch.from_numpy(values / np.float32(depth.divisor))[None, None]
    values = torch.nn.functional.interpolate(values, size[::-1], mode="bilinear", align_corners=False)[0, 0]
    values = values.clamp_min(0)
    return values * depth.scale + depth.offset if depth.scale > 0 else values


def _composited(image: Image.Image, background: int) -> Image.Image:
    """RGB of RGB or RGBA."""
    if image.mode == "RGB":
        return image
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")  # rounds each product to the nearest level


def _turned(image: Image.Image, turn: int) -> Image.Image:
    """Upright, if EXIF says with this number how it lies."""
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


def _open_photo(path: Path, lens: Lens | None, cache: Path | None, turn: int) -> Image.Image:
    """The photo without distortion, RGB, or RGBA if it has transparency."""
    if lens is None:
        return _turned(_read(path), turn)
    status = path.stat()
    made_from = f"{path.name} {status.st_size} {status.st_mtime_ns} {lens!r}" + f" {turn}" * (turn != 1)
    if cache is not None and cache.is_file():
        with contextlib.suppress(*BAD_IMAGE), open_image(cache) as image:
            if image.info.get(MADE_FROM) == made_from:
                image.load()
                return image
    image = Image.fromarray(_undistorted(np.asarray(_turned(_read(path), turn)), lens))
    if cache is not None:
        info = PngInfo()
        info.add_text(MADE_FROM, made_from)
        with contextlib.suppress(OSError), atomic_write(cache) as file:  # what cannot be kept is made again
            image.save(file, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return image


def _open_mask(mask: Mask, lens: Lens | None) -> Image.Image:
    """The mask without distortion, 8-bit gray, white where the photo counts."""
    values = np.asarray(_turned(_read(mask.path), mask.turn).convert("L"))
    if values.max() == 1:  # 0 and 1 instead of black and white
        values = values * np.uint8(255)
    if mask.inverted:
        values = 255 - values
    if lens is not None:
        values = undistort(values[..., None].astype(np.float32), lens)[..., 0].round().astype(np.uint8)
    return Image.fromarray(values)


def _undistorted(pixels: np.ndarray, lens: Lens) -> np.ndarray:
    """Invisible pixels lend no color to their neighbors: color is weighted by alpha while it is mixed."""
    if pixels.shape[2] == 3:
        return undistort(pixels, lens)
    alpha = pixels[..., 3:].astype(np.uint16)
    weighted = np.concatenate(
        [((pixels[..., :3] * alpha + 127) // 255).astype(np.uint8), pixels[..., 3:]], -1
    )
    mixed = undistort(weighted, lens)
    alpha = np.maximum(mixed[..., 3:].astype(np.uint16), 1)
    color = np.minimum((mixed[..., :3].astype(np.uint16) * 255 + alpha // 2) // alpha, 255).astype(np.uint8)
    return np.concatenate([color, mixed[..., 3:]], -1)


def _read(path: Path) -> Image.Image:
    """Any image file as RGB, or as RGBA if it has transparency."""
    try:
        with open_image(path) as image:
            if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip it
                high_byte = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
                return Image.fromarray(high_byte).convert("RGB")
            if image.mode == "F":
                raise DataError(f"{path}: holds floating-point numbers; photos have 8 or 16 bits")
            transparent = "A" in image.getbands() or "transparency" in image.info
            return image.convert("RGBA" if transparent else "RGB")
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


# Where pictures live


class Picture:
    """A tensor from a file: decoded each time it is asked for, until it is told to stay somewhere."""

    def __init__(
        self,
        decode: Callable[[], Tensor],
        shape: tuple[int, ...],
        device: torch.device,
        decoding: int = 0,
        dtype: torch.dtype = torch.uint8,
    ):
        self.decode = decode  # on the host
        self.decoding = decoding  # bytes that it takes meanwhile
        self.shape, self.dtype = shape, dtype  # of the value
        self.size_in_bytes = math.prod(shape) * dtype.itemsize
        self.device = device  # where it is wanted
        self._kept: Tensor | None = None
        self._coming: tuple | None = None  # a copy under way to the device, and the event of its end
        self._on_disk: Tensor | None = None
        self._being_read: Future | None = None

    def keep(self, value: Tensor, on_device: bool) -> None:
        """Let the decoded value stay on the device or in host memory (pinned, so that copies can overlap)."""
        if on_device:
            self._kept = value.to(self.device)
        else:
            self._kept = value if self.device.type == "cpu" else value.pin_memory()

    def read_from(self, value: Tensor) -> None:
        """Let the value be in a file that is mapped into memory."""
        self._on_disk = value

    def _read(self) -> Tensor:
        """A copy, in memory that can be sent to a GPU beside the computation."""
        assert self._on_disk is not None
        pinned = self.device.type != "cpu"
        return torch.empty_like(self._on_disk, pin_memory=pinned).copy_(self._on_disk)

    def get(self) -> Tensor:
        """The value, on the device."""
        if self._on_disk is not None:
            reading, self._being_read = self._being_read, None
            value = self._read() if reading is None else reading.result()
            return value.to(self.device, non_blocking=True)
        if self._coming is not None:
            value, done = self._coming
            self._coming = None
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            value.record_stream(stream)
            return value
        value = self.decode() if self._kept is None else self._kept
        return value.to(self.device, non_blocking=True)

    def prefetch(self) -> None:
        """Begin the copy that the next get() would make, beside the computation."""
        if self._on_disk is not None:
            self._being_read = self._being_read or _reader().submit(self._read)
            return
        if self._kept is None or self._kept.device.type == self.device.type or self._coming is not None:
            return
        with torch.cuda.stream(_copy_stream(self.device)):
            value = self._kept.to(self.device, non_blocking=True)
            self._coming = value, torch.cuda.current_stream(self.device).record_event()


@cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "reads pictures")


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def load_all(pictures: Sequence[Picture], device: torch.device, on_host: bool, quiet: bool) -> str:
    """Decode all pictures, on all cores, and keep them on the device if they fit, else on the host."""
    total = sum(picture.size_in_bytes for picture in pictures)
    on_device = device.type == "cpu" or (
        not on_host and total <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    )
    elsewhere = ", or let the GPU hold them (--data_device cuda)" if on_host and device.type != "cpu" else ""
    if device.type == "cpu" or not on_device:
        _check_room(pictures, elsewhere)
    try:
        _decode_all(pictures, on_device, quiet)
    except torch.OutOfMemoryError:  # somebody else has taken the room
        on_device = False
        _check_room(pictures, elsewhere)
        _decode_all(pictures, on_device, quiet)
    place = f"on {device}" if on_device else "in host memory"
    return f"{len(pictures)} pictures {place}, {total / 2**20:.0f} MB"


def _check_room(pictures: Sequence[Picture], elsewhere: str) -> None:
    """Before hours are spent on swapping, or the system ends the run without a word."""
    total, largest = sum(p.size_in_bytes for p in pictures), max((p.decoding for p in pictures), default=0)
    free = available()
    if free is not None and total + largest > free:
        raise DataError(
            f"the {len(pictures)} pictures take {(total + largest) / 1e9:,.1f} GB of memory and "
            f"{free / 1e9:,.1f} GB are free: make them smaller (-r 2, -r 4, -r 8 or -r WIDTH), keep "
            f"them on the disk (--data_device disk){elsewhere}"
        )


def _decode_all(pictures: Sequence[Picture], on_device: bool, quiet: bool) -> None:
    pool = ThreadPoolExecutor(workers(max((p.decoding for p in pictures), default=0)))
    try:
        done = pool.map(lambda picture: picture.keep(picture.decode(), on_device), pictures)
        for _ in progress(done, "Loading images", len(pictures), disable=quiet):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, not before all others are decoded
