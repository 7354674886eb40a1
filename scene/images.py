"""Photos and depth maps: from files to tensors at training size, and where those live.

Pixels are uint8 [3, H, W], a quarter of float32; the loss converts them. This is the one place where
transparency is composited over the background, so training, evaluation and rendering all see the same ground
truth.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from scene.files import DataError
from scene.readers.views import DepthMap

MAX_WIDTH = 1600  # of -r -1
DOWNSCALES = (1, 2, 4, 8)
DEVICE_SHARE = 0.4  # of the device's free memory may hold pictures; the Gaussians need the rest

# What Pillow raises on files that are not images, are cut off, or are too large to be meant seriously.
BAD_IMAGE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    ValueError,
    SyntaxError,
    MemoryError,
)


def training_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Size of the image for the flag -r; the rounding is the original's, case by case."""
    if resolution in DOWNSCALES:
        return round(width / resolution), round(height / resolution)
    if resolution == -1:
        scale = width / MAX_WIDTH if width > MAX_WIDTH else 1.0
    elif resolution > 0:
        scale = width / resolution
    else:
        raise DataError(f"resolution must be -1 or positive, got {resolution}")
    return max(int(width / scale), 1), max(int(height / scale), 1)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def load_image(path: Path, size: tuple[int, int], white_background: bool) -> Tensor:
    """A photo as uint8 [3, H, W], composited over white or black, then resized (bicubic)."""
    try:
        with Image.open(path) as image:
            pixels = _composited(image, 255 if white_background else 0)
            if pixels.size != size:
                pixels = pixels.resize(size, Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def load_inverse_depth(depth: DepthMap, size: tuple[int, int]) -> Tensor:
    """Inverse depth, float32 [H, W], in the units of the scene."""
    try:
        with Image.open(depth.path) as image:
            values = np.asarray(image, np.float32)
    except BAD_IMAGE as error:
        raise DataError(f"{depth.path}: cannot be read as an image ({error})") from None
    if values.ndim == 3:
        values = values[..., 0]
    values = torch.from_numpy(values / np.float32(depth.divisor))[None, None]
    values = torch.nn.functional.interpolate(values, size[::-1], mode="bilinear", align_corners=False)[0, 0]
    values = values.clamp_min(0)
    return values * depth.scale + depth.offset if depth.scale > 0 else values


def depth_bits(path: Path) -> int:
    """Bits per value of a depth map; others than 16 deserve a word."""
    try:
        with Image.open(path) as image:
            return {"1": 1, "I": 16, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def _composited(image: Image.Image, background: int) -> Image.Image:
    """RGB of any mode."""
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip it
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")  # rounds each product to the nearest level


# Where pictures live


class Picture:
    """A tensor from a file: decoded each time it is asked for, until it is told to stay somewhere."""

    def __init__(self, decode: Callable[[], Tensor], size_in_bytes: int, device: torch.device):
        self.decode = decode  # on the host
        self.size_in_bytes = size_in_bytes
        self.device = device  # where it is wanted
        self._kept: Tensor | None = None
        self._coming: tuple | None = None  # a copy under way to the device, and the event of its end

    def keep(self, value: Tensor, on_device: bool) -> None:
        """Let the decoded value stay on the device or in host memory (pinned, so that copies can overlap)."""
        if on_device:
            self._kept = value.to(self.device)
        else:
            self._kept = value if self.device.type == "cpu" else value.pin_memory()

    def get(self) -> Tensor:
        """The value, on the device."""
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
        if self._kept is None or self._kept.device.type == self.device.type or self._coming is not None:
            return
        with torch.cuda.stream(_copy_stream(self.device)):
            value = self._kept.to(self.device, non_blocking=True)
            self._coming = value, torch.cuda.current_stream(self.device).record_event()


_copy_streams: dict[torch.device, torch.Stream] = {}


def _copy_stream(device: torch.device) -> torch.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def load_all(pictures: Sequence[Picture], device: torch.device, on_host: bool, quiet: bool) -> str:
    """Decode all pictures, on all cores, and keep them on the device if they fit, else on the host."""
    total = sum(picture.size_in_bytes for picture in pictures)
    on_device = device.type == "cpu" or (
        not on_host and total <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    )
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(lambda picture: picture.keep(picture.decode(), on_device), pictures)
        for _ in tqdm(done, "Loading images", len(pictures), disable=quiet):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, not before all others are decoded
    place = f"on {device}" if on_device else "in host memory"
    return f"{len(pictures)} pictures {place}, {total / 2**20:.0f} MB"
