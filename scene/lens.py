"""Lenses that distort, and what is left of their pictures once the distortion is taken out.

A lens sends the direction (x, y, 1) to the pixel (fx u + cx, fy v + cy), where (u, v) is (x, y) distorted.
The models and the order of their coefficients are COLMAP's; transforms.json uses some of them.

The picture without distortion is a pinhole's with the same focal lengths, so that the middle keeps its
resolution. Its frame is the largest around the principal point in which every pixel was photographed: nothing
has to be made up or masked, and what lies outside of that rectangle is lost. No side of it is further than
60 degrees off the axis, however wide the lens; beyond that a pinhole shows little but stretched pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from utils.files import DataError

MAX_TANGENT = math.tan(math.radians(60))
SAME = 1e-3  # pixels: a lens that distorts by less is a pinhole
SLACK = 1e-5  # of the picture's size: less than what happens between the places that are looked at
BAND = 1 << 20  # pixels that are undistorted at a time

Array = np.ndarray


# Distortions: x and y of any one shape -> u and v of that shape


def _pinhole(x: Array, y: Array):
    return x, y


def _brown(x: Array, y: Array, k1=0.0, k2=0.0, p1=0.0, p2=0.0, k3=0.0, k4=0.0):
    """Polynomial in r², and a lens that is tilted."""
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y),
    )


def _rational(x: Array, y: Array, k1, k2, p1, p2, k3, k4, k5, k6):
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    tilt_x, tilt_y = _brown(x, y, 0, 0, p1, p2)
    return x * (radial - 1) + tilt_x, y * (radial - 1) + tilt_y


def _equidistant(x: Array, y: Array):
    """The distance from the middle is the angle off the axis."""
    r = np.hypot(x, y)
    scale = np.where(r > 1e-8, np.arctan(r) / np.maximum(r, 1e-8), 1.0)
    return x * scale, y * scale


def _fisheye(x: Array, y: Array, k1=0.0, k2=0.0, k3=0.0, k4=0.0):
    return _brown(*_equidistant(x, y), k1, k2, 0, 0, k3, k4)


def _thin_prism_fisheye(x: Array, y: Array, k1, k2, p1, p2, k3, k4, sx1, sy1):
    x, y = _equidistant(x, y)
    r2 = x * x + y * y
    u, v = _brown(x, y, k1, k2, p1, p2, k3, k4)
    return u + sx1 * r2, v + sy1 * r2


def _rad_tan_thin_prism_fisheye(x: Array, y: Array, k0, k1, k2, k3, k4, k5, p0, p1, s0, s1, s2, s3):
    """Tilt and prism act on what the radial part has moved already."""
    x, y = _equidistant(x, y)
    r2 = x * x + y * y
    radial = 1 + r2 * (k0 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * (k4 + r2 * k5)))))
    x, y = x * radial, y * radial
    r2 = x * x + y * y
    u, v = _brown(x, y, 0, 0, p1, p0)
    return u + r2 * (s0 + r2 * s1), v + r2 * (s2 + r2 * s3)


def _field_of_view(x: Array, y: Array, omega):
    """r -> atan(2 r tan(omega / 2)) / omega."""
    if abs(omega) < 1e-6:
        return x, y
    r = np.hypot(x, y)
    slope = 2 * math.tan(omega / 2)
    scale = np.where(r > 1e-8, np.arctan(slope * r) / (omega * np.maximum(r, 1e-8)), slope / omega)
    return x * scale, y * scale


def _division(x: Array, y: Array, k):
    """The inverse of r -> r / (1 + k r²)."""
    scale = 2 / (1 + np.sqrt(1 - 4 * k * (x * x + y * y)))
    return x * scale, y * scale


def _unified(x: Array, y: Array, alpha, beta):
    """Extended unified camera model."""
    scale = 1 / (alpha * np.sqrt(beta * (x * x + y * y) + 1) + 1 - alpha)
    return x * scale, y * scale


# Model -> distortion, number of focal lengths, number of coefficients. COLMAP lists fx, (fy,) cx, cy, then
# the coefficients.
MODELS: dict[str, tuple[Callable, int, int]] = {
    "SIMPLE_PINHOLE": (_pinhole, 1, 0),
    "PINHOLE": (_pinhole, 2, 0),
    "SIMPLE_RADIAL": (_brown, 1, 1),
    "RADIAL": (_brown, 1, 2),
    "OPENCV": (_brown, 2, 4),
    "FULL_OPENCV": (_rational, 2, 8),
    "OPENCV_FISHEYE": (_fisheye, 2, 4),
    "SIMPLE_RADIAL_FISHEYE": (_fisheye, 1, 1),
    "RADIAL_FISHEYE": (_fisheye, 1, 2),
    "SIMPLE_FISHEYE": (_fisheye, 1, 0),
    "FISHEYE": (_fisheye, 2, 0),
    "THIN_PRISM_FISHEYE": (_thin_prism_fisheye, 2, 8),
    "RAD_TAN_THIN_PRISM_FISHEYE": (_rad_tan_thin_prism_fisheye, 2, 12),
    "FOV": (_field_of_view, 2, 1),
    "SIMPLE_DIVISION": (_division, 1, 1),
    "DIVISION": (_division, 2, 1),
    "EUCM": (_unified, 2, 2),
}


def parameter_count(model: str) -> int:
    _, focals, coefficients = MODELS[model]
    return focals + 2 + coefficients


@dataclass(frozen=True)
class Pinhole:
    """A picture without distortion. Pixel centers are at .5."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float

    @property
    def matrix(self) -> Array:
        """[3, 3]"""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])


@dataclass(frozen=True)
class Lens:
    """What a camera does to directions; in pixels of its pictures, which are width x height."""

    model: str
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    coefficients: tuple[float, ...] = ()

    @classmethod
    def from_parameters(cls, model: str, width: int, height: int, params: tuple[float, ...]) -> "Lens":
        """From COLMAP's list of parameters."""
        _, focals, _ = MODELS[model]
        cx, cy, *coefficients = params[focals:]
        return cls(model, width, height, params[0], params[focals - 1], cx, cy, tuple(coefficients))

    def project(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Directions (x, y, 1) -> pixels. NaN where the model knows no answer."""
        with np.errstate(all="ignore"):
            u, v = MODELS[self.model][0](x, y, *self.coefficients)
        return self.fx * u + self.cx, self.fy * v + self.cy

    def distorts(self) -> bool:
        x = (np.linspace(0, self.width, 33) - self.cx)[None, :] / self.fx
        y = (np.linspace(0, self.height, 33) - self.cy)[:, None] / self.fy
        x, y = np.broadcast_arrays(x, y)
        u, v = self.project(x, y)
        off = np.hypot(u - (self.fx * x + self.cx), v - (self.fy * y + self.cy))
        return not off.max() < SAME  # NaN: it does

    def pinhole(self) -> Pinhole:
        """The camera of the picture without distortion. DataError if hardly any of it is left."""
        if not self.distorts():
            return Pinhole(self.width, self.height, self.fx, self.fy, self.cx, self.cy)
        return _valid_frame(self)


@lru_cache(maxsize=4096)
def _valid_frame(lens: Lens) -> Pinhole:
    """Grow a frame around the principal point, first in proportion, then side by side, until it is stuck."""
    if not (0 < lens.cx < lens.width and 0 < lens.cy < lens.height):
        raise DataError(
            f"{lens.model} has its principal point ({lens.cx:g}, {lens.cy:g}) outside of the picture "
            f"({lens.width} x {lens.height}), and distorts: cannot be undistorted"
        )
    most = [min(MAX_TANGENT, side) for side in (lens.width / lens.fx, lens.height / lens.fy)]
    limits = np.array([-most[0], -most[1], most[0], most[1]])  # left, top, right, bottom
    reach = _Reach(lens)
    start = [-lens.cx / lens.fx, -lens.cy / lens.fy]
    start += [(lens.width - lens.cx) / lens.fx, (lens.height - lens.cy) / lens.fy]
    start = np.clip(start, np.minimum(limits, 0), np.maximum(limits, 0))
    frame = start * _largest(lambda t: reach.covers(start * t, 0), 2.0)
    frame = np.clip(frame, np.minimum(limits, 0), np.maximum(limits, 0))
    for side in range(4):
        step = np.zeros(4)
        step[side] = limits[side] - frame[side]
        slack = (
            (side + 1) * SLACK * max(lens.width, lens.height)
        )  # a side that is stuck must not stop the next
        frame = frame + step * _largest(lambda t, f=frame, s=step, e=slack: reach.covers(f + s * t, e), 1.0)
    left, top, right, bottom = frame
    width, height = (int(s + 1e-3) for s in ((right - left) * lens.fx, (bottom - top) * lens.fy))
    if width < 0.05 * lens.width or height < 0.05 * lens.height:
        raise DataError(
            f"{lens.model} with the coefficients {', '.join(f'{c:g}' for c in lens.coefficients)} leaves "
            f"{width} x {height} of {lens.width} x {lens.height} pixels once undistorted: it cannot be right"
        )
    return Pinhole(width, height, lens.fx, lens.fy, float(-left * lens.fx), float(-top * lens.fy))


class _Reach:
    """Which directions a lens has photographed.

    Polynomials turn around somewhere, and what lies beyond comes back into the picture: in each direction
    from the axis, the first place where that happens ends the usable part.
    """

    ANGLES = 512

    def __init__(self, lens: Lens):
        self.lens = lens
        angle = np.linspace(0, 2 * np.pi, self.ANGLES + 1)[:, None]
        radius = np.linspace(0, math.sqrt(2) * MAX_TANGENT, 2048)[None, :]
        u, v = lens.project(np.cos(angle) * radius, np.sin(angle) * radius)
        away = np.hypot((u - lens.cx) / lens.fx, (v - lens.cy) / lens.fy)
        outwards = np.diff(away, axis=1) > 0
        steps = np.where(outwards.all(axis=1), outwards.shape[1], outwards.argmin(axis=1))
        self.radius = radius[0, steps]

    def covers(self, frame: Array, slack: float) -> bool:
        """Was all of (left, top, right, bottom) photographed, but for `slack` pixels? Its border tells."""
        left, top, right, bottom = frame
        t = np.linspace(0, 1, 129)
        along_x, along_y = left + (right - left) * t, top + (bottom - top) * t
        x = np.concatenate([along_x, along_x, np.full_like(t, left), np.full_like(t, right)])
        y = np.concatenate([np.full_like(t, top), np.full_like(t, bottom), along_y, along_y])
        u, v = self.lens.project(x, y)
        inside = (u >= -slack) & (u <= self.lens.width + slack)
        inside &= (v >= -slack) & (v <= self.lens.height + slack)
        place = np.mod(np.arctan2(y, x), 2 * np.pi) / (2 * np.pi) * self.ANGLES
        before = place.astype(int).clip(max=self.ANGLES - 1)
        radius = np.minimum(self.radius[before], self.radius[before + 1])
        return bool((inside & (np.hypot(x, y) <= radius)).all())


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """The largest t in 0..most up to which `holds` holds."""
    if holds(most):
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def undistorted_size(lens: Lens, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the undistorted picture of a file of this size: files may be smaller than the
    camera."""
    frame = lens.pinhole()
    return (
        max(round(frame.width * size[0] / lens.width), 1),
        max(round(frame.height * size[1] / lens.height), 1),
    )


def undistort(picture: Array, lens: Lens) -> Array:
    """A picture [H, W, C], uint8 or float32, as the lens's pinhole would have taken it.

    Bytes are interpolated bicubically; floats (depths) linearly, as they must not overshoot.
    """
    height, width = picture.shape[:2]
    out_width, out_height = undistorted_size(lens, (width, height))
    frame = lens.pinhole()
    result = np.empty((out_height, out_width, picture.shape[2]), picture.dtype)
    x = ((np.arange(out_width) + 0.5) * frame.width / out_width - frame.cx) / frame.fx
    y = ((np.arange(out_height) + 0.5) * frame.height / out_height - frame.cy) / frame.fy
    rows = max(BAND // out_width, 1)
    for start in range(0, out_height, rows):
        u, v = lens.project(*np.broadcast_arrays(x[None, :], y[start : start + rows, None]))
        u, v = u * width / lens.width, v * height / lens.height
        result[start : start + rows] = _sample(picture, u, v)
    return result


def _sample(picture: Array, u: Array, v: Array) -> Array:
    """The picture [H, W, C] at the pixels (u, v), each [h, w]. Reads only the rows it needs."""
    first = int(np.clip(math.floor(v.min()) - 3, 0, picture.shape[0] - 1))
    last = int(np.clip(math.ceil(v.max()) + 3, first + 1, picture.shape[0]))
    source = torch.from_numpy(picture[first:last].astype(np.float32)).permute(2, 0, 1)[None]
    at = torch.from_numpy(np.stack([2 * u / picture.shape[1] - 1, 2 * (v - first) / (last - first) - 1], -1))
    is_bytes = picture.dtype == np.uint8
    sampled = torch.nn.functional.grid_sample(
        source,
        at[None].float(),
        mode="bicubic" if is_bytes else "bilinear",
        padding_mode="border",
        align_corners=False,
    )[0].permute(1, 2, 0)
    return (sampled.round().clamp(0, 255).byte() if is_bytes else sampled).numpy()
