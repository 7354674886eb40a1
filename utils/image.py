"""Pictures: number ranges, PSNR, and PNG files written beside the work.

A picture is a tensor [3, H, W], float in [0, 1] or uint8 in 0..255.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.files import BAD_IMAGE, DataError, read_json
from utils.terminal import say

# PNG level 1 costs a few percent of size against level 6 and saves most of the time.
PNG_LEVEL = 1

FITS = 50  # rounds of a color fit

LOOKED_AT = 640  # sharpness is measured at this width: smaller blur does not hurt, and noise counts less


def to_float(image: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1; floats pass through."""
    return image.float() / 255.0 if image.dtype == torch.uint8 else image


def to_uint8(image: Tensor) -> Tensor:
    """Float -> uint8, clamped to [0, 1] and rounded to the nearest level; uint8 passes through."""
    if image.dtype == torch.uint8:
        return image
    return image.clamp(0.0, 1.0).mul(255.0).add(0.5).to(torch.uint8)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [C] of values [C, H, W] over the pixels where the mask [H, W] is 1; over all without a mask."""
    if mask is None:
        return values.flatten(1).mean(dim=1)
    return (values * mask).flatten(1).sum(dim=1) / mask.sum()


def psnr(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """-10 log10 of the mean squared error over all pixels that count, in dB for values in [0, 1]."""
    return -10.0 * masked_mean((image - truth).square(), mask).mean().log10()


def with_colors_of(truth: Tensor, image: Tensor, mask: Tensor | None = None) -> Tensor:
    """The picture after the affine color transform that fits it best to the truth, where that counts.

    Both are clamped: each round takes what came out brighter than white, where the photo is white, for true.
    """
    image = image.clamp(0, 1)
    ones = torch.ones_like(image[:1])
    weights = (ones if mask is None else mask[None]).flatten()
    colors = torch.cat([image, ones]).flatten(1).double()  # [4, H W]
    weighted = colors * weights
    products, targets = weighted @ colors.T, truth.flatten(1).double()
    damped = products + 1e-6 * products.diagonal().mean() * torch.eye(4).to(products)  # of one color, too
    fitted = targets
    for _ in range(FITS):
        beyond = (targets >= 1) & (fitted > 1) | (targets <= 0) & (fitted < 0)
        aims = torch.where(beyond, fitted, targets)
        fitted = torch.linalg.solve(damped, weighted @ aims.T).T @ colors
    return fitted.view_as(image).to(image.dtype)


def psnr_of_one_color(truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a picture of a single color can reach, at most 30 dB."""
    mean = masked_mean(truth, mask)[:, None, None]
    return -10.0 * masked_mean((truth - mean).square(), mask).mean().clamp_min(1e-3).log10()


def psnr_by_channel(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the three channels' PSNR.

    This is what the original prints while it trains. It is never below psnr(), and as a rule a few hundredths
    of a dB above it; the two must not be compared with each other.
    """
    return -10.0 * masked_mean((image - truth).square(), mask).log10().mean()


def ssim_where(image: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity, averaged over the pixels where the mask [H, W] is 1, with the window of ssim().

    What the mask hides is black in both pictures, so windows that reach there see no difference.
    """
    taps = torch.exp(-0.5 * (torch.arange(11.0, device=image.device) - 5).square() / 1.5**2)
    taps = taps / taps.sum()

    def blur(x: Tensor) -> Tensor:
        x = torch.nn.functional.conv2d(x[:, None], taps.view(1, 1, 1, 11), padding=(0, 5))
        return torch.nn.functional.conv2d(x, taps.view(1, 1, 11, 1), padding=(5, 0))[:, 0]

    a, b = image * mask, truth * mask
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) + blur(b * b) - mean_a.square() - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a.square() + mean_b.square() + c1) * (variances + c2))
    return masked_mean(similarity, mask).mean()


def read_image(path: Path) -> Tensor:
    """A PNG file as uint8 [3, H, W]."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            pixels = np.array(picture.convert("RGB"))
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as a PNG picture ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def photo_names(method: Path) -> dict[str, str]:
    """Picture file -> name of the photo, where render.py left names.json; pictures go by their own names, and
    a line says so, if it is damaged."""
    path = method / "names.json"
    try:
        names = read_json(path) if path.is_file() else {}
    except DataError as error:
        say(f"{error}; views are called by their files")
        return {}
    return {file: name for file, name in names.items() if isinstance(name, str)}


class PngWriter:
    """Writes pictures as PNG files on a few threads. Used as a context; leaving it waits for the last one.

    At most `waiting` pictures are held: a slow disk slows the caller down and does not fill the memory.
    """

    def __init__(self, threads: int = min(16, os.cpu_count() or 4), waiting: int = 32):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="png")
        self._waiting = waiting
        self._pending: deque[Future] = deque()

    def write(self, image: Tensor, path: Path) -> None:
        """Raises what an earlier picture met, e.g. a full disk."""
        pixels = to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()
        while len(self._pending) >= self._waiting:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(write_png, pixels, path))

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, kind, value, trace) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


def write_png(pixels: np.ndarray, path: Path) -> None:
    """uint8 [H, W, 3]."""
    Image.fromarray(pixels).save(path, compress_level=PNG_LEVEL)


def sharpness(frame: np.ndarray) -> float:
    """Variance of the Laplacian of the gray picture [H, W, 3], at a common width."""
    step = max(frame.shape[1] // LOOKED_AT, 1)
    height, width = (side // step * step for side in frame.shape[:2])
    gray = frame[:height, :width].mean(axis=2, dtype=np.float32)
    gray = gray.reshape(height // step, step, width // step, step).mean(axis=(1, 3))
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    return float(laplacian.var())
