"""Shapes that rays can hit: where, and with which normal.

Vectors are structures of arrays: points and directions are [3, n], so that formulas run over whole rows.
Origins may be [3, 1] (a pinhole: all rays start together) and so may directions (the sun: parallel rays).
Distances are along unit directions; `inf` says that nothing is hit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

EPSILON = np.float32(1e-3)  # hits nearer than this are the surface that the ray has just left
FAR = np.float32(np.inf)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(dot(v, v) + np.float32(1e-24))


def column(v) -> np.ndarray:
    return np.asarray(v, np.float32).reshape(3, 1)


def turned(degrees: float, axis: str = "z") -> np.ndarray:
    """Rotation matrix about one coordinate axis; its columns are the object's own axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = {"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]]}
    return np.asarray(matrix.get(axis, [[c, -s, 0], [s, c, 0], [0, 0, 1]]), np.float32)


def frame_along(axis) -> np.ndarray:
    """A rotation whose third column is `axis`."""
    z = np.asarray(axis, np.float32) / np.linalg.norm(axis)
    helper = np.array([1, 0, 0]) if abs(z[0]) < 0.7 else np.array([0, 1, 0])
    x = np.cross(helper, z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1).astype(np.float32)


@dataclass
class Shape:
    """A placed shape. `material` paints it; a sphere of radius `bound` about `center` contains it."""

    center: Any  # three numbers, here as a column
    material: object
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3, dtype=np.float32), kw_only=True)
    subject: bool = field(default=True, kw_only=True)  # part of the still life (opaque in RGBA renders)
    floor: float | None = field(default=None, kw_only=True)  # height of its top, if its light is baked there

    def __post_init__(self):
        self.center = column(self.center)
        self.to_local = np.ascontiguousarray(self.rotation.T.astype(np.float32))
        self.bound = np.float32(self.measure())

    def measure(self) -> float:
        """The radius of a sphere around the center that contains it."""
        raise NotImplementedError

    def hit_local(self, o: np.ndarray, d: np.ndarray, least: np.ndarray) -> np.ndarray:
        """Distance of the first hit beyond `least` of each ray in the shape's own frame, [n]."""
        raise NotImplementedError

    def normal_local(self, p: np.ndarray) -> np.ndarray:
        """Outward unit normals in the shape's own frame, [3, n]."""
        raise NotImplementedError

    def local(self, points: np.ndarray) -> np.ndarray:
        return self.to_local @ (points - self.center)

    def hit(self, o: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Distance of the first hit of each ray o + t d, [n].

        Local rays start where they come nearest to the center: float32 would lose a thin rod from afar.
        """
        ahead = dot(self.center - o, d)
        return ahead + self.hit_local(self.local(o + ahead * d), self.to_local @ d, EPSILON - ahead)

    def normal(self, points: np.ndarray) -> np.ndarray:
        """Outward unit normals at points of the surface, [3, n]."""
        return self.rotation @ self.normal_local(self.local(points))

    def near(self, o: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Which rays pass through the bounding sphere, bool [n]."""
        c = self.center - o
        along = dot(c, d)
        return (along > -self.bound) & (dot(c, c) - along * along < self.bound * self.bound)


def first_root(a, b, c, least) -> np.ndarray:
    """The smaller root of a t^2 + 2 b t + c beyond `least`, else the larger one, else inf."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - a * c)  # NaN where the ray misses; NaN compares false below
        near, far = (-b - root) / a, (-b + root) / a
        return np.where(near > least, near, np.where(far > least, far, FAR))


@dataclass
class Ellipsoid(Shape):
    radii: Any = (1, 1, 1)

    def measure(self):
        self.radii = column(np.broadcast_to(self.radii, 3))
        return self.radii.max()

    def hit_local(self, o, d, least):
        o, d = o / self.radii, d / self.radii
        return first_root(dot(d, d), dot(o, d), dot(o, o) - 1, least)

    def normal_local(self, p):
        return normalize(p / (self.radii * self.radii))


@dataclass
class Box(Shape):
    half: Any = (1, 1, 1)

    def measure(self):
        self.half = column(self.half)
        return np.linalg.norm(self.half)

    def hit_local(self, o, d, least):
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / d
            a, b = (-self.half - o) * inverse, (self.half - o) * inverse
        enter = np.minimum(a, b).max(axis=0)
        leave = np.maximum(a, b).min(axis=0)
        return np.where((enter < leave) & (enter > least), enter, FAR)

    def normal_local(self, p):
        inside = np.abs(p) / self.half
        return np.where(inside == inside.max(axis=0), np.sign(p), 0).astype(np.float32)


@dataclass
class Rod(Shape):
    """A capped cylinder along its own third axis; see `rod` for one between two points."""

    radius: float = 0.1
    length: float = 1.0  # half of it on either side of the center

    def measure(self):
        self.axis = self.rotation[:, 2:]
        return np.hypot(self.radius, self.length / 2)

    def near(self, o, d):
        """Most rays through the bounding sphere of a thin rod still miss the line along its axis."""
        across = np.stack(
            [
                d[1] * self.axis[2] - d[2] * self.axis[1],
                d[2] * self.axis[0] - d[0] * self.axis[2],
                d[0] * self.axis[1] - d[1] * self.axis[0],
            ]
        )
        gap = dot(self.center - o, across)
        return (gap * gap <= self.radius**2 * dot(across, across) + 1e-9) & super().near(o, d)

    def hit_local(self, o, d, least):
        side = first_root(
            d[0] * d[0] + d[1] * d[1],
            o[0] * d[0] + o[1] * d[1],
            o[0] ** 2 + o[1] ** 2 - self.radius**2,
            least,
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            side = np.where(np.abs(o[2] + side * d[2]) <= self.length / 2, side, FAR)
            cap = (-np.sign(d[2]) * self.length / 2 - o[2]) / d[2]
            outside = (o[0] + cap * d[0]) ** 2 + (o[1] + cap * d[1]) ** 2 > self.radius**2
            cap = np.where(outside | ~(cap > least), FAR, cap)
        return np.minimum(side, cap)

    def normal_local(self, p):
        cap = np.abs(p[2]) > self.length / 2 - 1e-3 * self.radius
        flat = normalize(np.stack([p[0], p[1], np.zeros_like(p[0])]))
        return np.where(cap, np.stack([0 * p[0], 0 * p[0], np.sign(p[2])]), flat)


def rod(a, b, radius: float, material, **kw) -> Rod:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    length = float(np.linalg.norm(b - a))
    return Rod((a + b) / 2, material, rotation=frame_along(b - a), radius=radius, length=length, **kw)


@dataclass
class Marched(Shape):
    """A shape known by its signed distance: the ray steps forward by what is surely free."""

    steps = 48
    close = np.float32(8e-4)

    def distance(self, p: np.ndarray) -> np.ndarray:
        """Signed distance of points in the shape's own frame, [n]."""
        raise NotImplementedError

    def hit_local(self, o, d, least):
        n = np.broadcast_shapes(o.shape, d.shape)[1]
        o, d = np.broadcast_to(o, (3, n)), np.broadcast_to(d, (3, n))
        along, out = -dot(o, d), np.full(n, FAR)
        half = np.sqrt(np.maximum(self.bound**2 - dot(o, o) + along * along, 0))
        t, live = np.maximum(along - half, least + 4 * self.close), np.arange(n)
        for _ in range(self.steps):
            free = self.distance(o[:, live] + t[live] * d[:, live])
            done = free < self.close
            out[live[done]] = t[live[done]]
            t[live] += free
            live = live[~done & (t[live] < (along + half)[live])]
            if len(live) == 0:
                break
        return out

    def normal_local(self, p):
        """The gradient of the distance, from its values at the corners of a small tetrahedron."""
        total = np.zeros_like(p)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            total += column(corner) * self.distance(p + 2e-3 * column(corner))
        return normalize(total)


@dataclass
class Ring(Marched):
    """A torus about its own third axis."""

    radius: float = 1.0
    thickness: float = 0.1

    def measure(self):
        return self.radius + self.thickness + 0.01

    def distance(self, p):
        return np.hypot(np.hypot(p[0], p[1]) - self.radius, p[2]) - np.float32(self.thickness)


@dataclass
class Lathe(Marched):
    """A surface of revolution: `profile` lists (height, radius) knots, joined smoothly."""

    profile: tuple = ((0, 1), (1, 1))

    def measure(self):
        heights, radii = np.array(self.profile, np.float32).T
        self.low, self.high = heights[0], heights[-1]
        fine = np.linspace(self.low, self.high, 256, dtype=np.float32)
        soft = np.interp(fine, heights, radii)
        for _ in range(24):  # round the corners between the knots
            soft[1:-1] = 0.5 * soft[1:-1] + 0.25 * (soft[:-2] + soft[2:])
        self.table = soft.astype(np.float32)
        slope = np.abs(np.gradient(self.table, fine)).max()
        self.safe = np.float32(1 / np.sqrt(1 + slope * slope))  # radial distance to true distance
        return np.hypot(max(abs(self.low), abs(self.high)), radii.max()) + 0.01

    def distance(self, p):
        at = (p[2] - self.low) * np.float32(255 / (self.high - self.low))
        index = np.clip(at, 0, 255).astype(np.int32)
        part = np.clip(at - index, 0, 1)
        radius = self.table[index] * (1 - part) + self.table[np.minimum(index + 1, 255)] * part
        side = (np.hypot(p[0], p[1]) - radius) * self.safe
        return np.maximum(side, np.maximum(self.low - p[2], p[2] - self.high))


@dataclass
class Bush(Marched):
    """A ball with lumps of leaves."""

    radius: float = 0.5
    lumps: float = 9.0
    depth: float = 0.05

    def measure(self):
        return self.radius + 2 * self.depth

    def distance(self, p):
        k = np.float32(self.lumps / self.radius)
        wave = (
            np.sin(k * p[0] + 0.9 * np.sin(k * p[2])) * np.sin(k * p[1] + 1.7) * np.sin(0.9 * k * p[2] + 0.4)
        )
        return (np.sqrt(dot(p, p)) - np.float32(self.radius) - np.float32(self.depth) * wave) * np.float32(
            0.7
        )


@dataclass
class Ground(Shape):
    """The plane z = 0, without end."""

    def measure(self):
        return np.inf

    def near(self, o, d):
        return np.broadcast_to(d[2] < 0, np.broadcast_shapes(o.shape, d.shape)[1:])

    def hit(self, o, d):
        with np.errstate(divide="ignore"):
            t = -o[2] / d[2]
        return np.where((d[2] < 0) & (t > EPSILON), t, FAR)

    def normal_local(self, p):
        return np.broadcast_to(column((0, 0, 1)), p.shape)


class Group(list):
    """Shapes close together, tested only by the rays that pass the sphere around them all."""

    def __init__(self, shapes):
        super().__init__(shapes)
        self.center = np.mean([s.center for s in shapes], axis=0)
        self.bound = max(np.linalg.norm(s.center - self.center) + s.bound for s in shapes)

    near = Shape.near
