"""The light of the sample scene: sky, sun, and how much of both reaches a point.

What a point sees of the sky is baked once: 24 directions over the hemisphere, each with a picture of the
still life as the light sees it (a depth map along parallel rays). Ambient light at a point is the sum over
those directions; so corners are dark and blue comes from above. The sun has two larger maps of the same kind,
and soft edges that widen with the distance between what casts and what receives a shadow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .materials import mix, noise, rgb, step
from .shapes import FAR, column, dot, frame_along, normalize

SUN = normalize(column((0.52, -0.38, 0.62)))  # towards the sun, [3, 1]
SUN_COLOR = column((1.0, 0.88, 0.70)) * 3.0
SUN_WIDTH = 0.022  # tangent of the sun's angular radius; five times the real one, for soft edges
HAZE = rgb("#cdd9e2") * np.float32(1.05)


def sky(d: np.ndarray) -> np.ndarray:
    """Radiance from the direction d of an empty sky with clouds and a far mountain range, [3, n]."""
    up = np.clip(d[2], 0, 1)
    color = mix(rgb("#c9e0f0"), rgb("#2767b8"), np.minimum(1, 1.15 * up**0.5)) * np.float32(1.25)

    plane = 1 / (up + np.float32(0.18))  # clouds live on a plane overhead
    u, v = 0.062 * d[0] * plane + 0.13, 0.062 * d[1] * plane + 0.41
    cloud = noise(u, v)
    cover = step(cloud, 0.50, 1.1) * step(up, 0.07, 0.10)
    shaded = step(noise(u + 0.012 * SUN[0], v + 0.012 * SUN[1]), 0.9, 2.4)  # thick towards the sun: gray
    color = mix(color, mix(rgb("#ffffff") * np.float32(1.7), rgb("#b4c0cc"), 0.8 * shaded), 0.9 * cover)

    toward = np.maximum(dot(d, SUN), 0)
    color = color + SUN_COLOR * (0.10 * toward**8 + 0.5 * toward**180)

    around = np.arctan2(d[1], d[0]) * np.float32(1 / (2 * np.pi))
    ridge = 0.075 + 0.026 * noise(around, 0 * around + 0.21) + 0.009 * noise(3 * around, 0 * around + 0.7)
    snow = step(d[2] + 0.012 * noise(6 * around, 4 * d[2], "fine"), 0.093, 0.02)
    rock = mix(rgb("#8fa6bd"), rgb("#e8eef2"), 0.7 * snow)
    return mix(rock, color, step(d[2] - ridge, 0, 0.004))


@dataclass
class DepthMap:
    """The distance of the nearest thing along parallel rays from the direction `toward`, on a square grid."""

    toward: np.ndarray  # [3, 1] unit vector from the scene to the light
    center: np.ndarray  # [3, 1]
    reach: float  # half of the side of the square
    size: int
    depth: np.ndarray = field(
        init=False
    )  # [size * size] distance below the plane at `reach * 2` towards the light

    def __post_init__(self):
        self.frame = frame_along(self.toward[:, 0])

    def bake(self, first_hit) -> DepthMap:
        at = (np.arange(self.size, dtype=np.float32) + 0.5) * np.float32(
            2 * self.reach / self.size
        ) - self.reach
        v, u = np.meshgrid(at, at, indexing="ij")
        plane = np.stack([u.ravel(), v.ravel(), np.full(u.size, 2 * self.reach, np.float32)])
        depth = first_hit(self.frame @ plane + self.center, -self.toward).reshape(self.size, self.size)
        depth[[0, -1]] = depth[:, [0, -1]] = FAR  # the rim stands for all that is outside
        self.depth = depth.ravel()
        return self

    def place(self, points):
        """Grid coordinates (columns, rows) and depth of points, each [n]."""
        u, v, w = self.frame.T @ (points - self.center)
        scale = np.float32(self.size / (2 * self.reach))
        return (u + self.reach) * scale, (v + self.reach) * scale, 2 * self.reach - w

    def at(self, u, v) -> np.ndarray:
        u = np.minimum(np.maximum(u, 0), self.size - 1).astype(np.int32)
        v = np.minimum(np.maximum(v, 0), self.size - 1).astype(np.int32)
        return self.depth.take(v * np.int32(self.size) + u)


def _disk(count: int) -> np.ndarray:
    """Points spread evenly over the unit disk, [count, 2]."""
    k = np.arange(count) + 0.5
    return (np.sqrt(k / count) * np.array([np.cos(2.39996 * k), np.sin(2.39996 * k)])).T.astype(np.float32)


def soft_shadow(lamp: DepthMap, points, bias: float, taps: int = 14) -> np.ndarray:
    """Share of the sun's disk that is seen, 0..1 [n]: look for what casts, then blur as wide as it is far."""
    u, v, depth = lamp.place(points)
    texel = np.float32(lamp.size / (2 * lamp.reach))
    gap, casters = np.zeros_like(depth), np.zeros_like(depth)
    for du, dv in _disk(8):
        near = lamp.at(u + 7 * du, v + 7 * dv)
        casts = near < depth - bias
        gap += np.where(casts, depth - np.where(casts, near, 0), 0)
        casters += casts
    lit = np.ones_like(depth)
    some = np.flatnonzero(casters)
    if len(some):
        u, v, depth = u[some], v[some], depth[some]
        width = np.clip(SUN_WIDTH * texel * gap[some] / casters[some], 1.3, 9)
        seen = np.zeros_like(depth)
        for du, dv in _disk(taps):
            seen += lamp.at(u + width * du, v + width * dv) > depth - bias
        lit[some] = seen / taps
    return lit


class Light:
    """All light that reaches a point, from maps that are baked once."""

    def __init__(self, first_hit, directions: int = 24, quality: float = 1.0):
        k = np.arange(directions) + 0.5
        z = k / directions
        ring = np.sqrt(1 - z * z)
        self.dome = np.stack([ring * np.cos(2.39996 * k), ring * np.sin(2.39996 * k), z], axis=1).astype(
            np.float32
        )
        center = column((0, 0, 0.6))
        lamps = [
            DepthMap(toward[:, None], center, 4.2, int(160 * quality)).bake(first_hit) for toward in self.dome
        ]
        self.sky_reach, self.sky_size, self.sky_center = lamps[0].reach, lamps[0].size, center
        self.sky_frames = np.stack([lamp.frame.T for lamp in lamps], axis=1)  # [3, directions, 3]
        self.sky_depth = np.concatenate([lamp.depth for lamp in lamps])
        self.sky_color = sky(self.dome.T) * np.float32(
            2 / directions
        )  # [3, directions], with the weight of each
        self.open_sky = self.sky_color @ self.dome[:, 2:]  # [3, 1] what a free horizontal surface gets
        self.near = DepthMap(SUN, center, 3.9, int(1100 * quality)).bake(first_hit)
        self.wide = DepthMap(SUN, center, 17.0, int(900 * quality)).bake(first_hit)
        self.floors = {}

    def sun(self, points: np.ndarray) -> np.ndarray:
        """Share of the sun that is seen, [n]."""
        lit = np.ones(points.shape[1], np.float32)
        close = dot(points, points) < 3.6**2
        for lamp, chosen, bias in ((self.near, close, 0.012), (self.wide, ~close, 0.08)):
            chosen = np.flatnonzero(chosen)
            if len(chosen):
                lit[chosen] = soft_shadow(lamp, points[:, chosen], bias)
        return lit

    def ambient(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Light from the sky and from the ground, [3, n]; a white diffuse surface would send it on."""
        facing = np.maximum(self.dome @ normals, 0)  # [directions, n]
        seen = np.empty_like(facing)
        lifted = points + np.float32(0.03) * normals - self.sky_center
        scale, size = np.float32(self.sky_size / (2 * self.sky_reach)), self.sky_size
        for k in range(len(self.dome)):  # as DepthMap.place and DepthMap.at
            u, v, w = self.sky_frames[:, k] @ lifted
            u, v = (
                ((u + self.sky_reach) * scale).astype(np.int32),
                ((v + self.sky_reach) * scale).astype(np.int32),
            )
            u, v = np.minimum(np.maximum(u, 0), size - 1), np.minimum(np.maximum(v, 0), size - 1)
            seen[k] = (
                self.sky_depth.take((k * size + v) * size + u) > 2 * self.sky_reach - np.float32(0.05) - w
            )
        from_below = np.float32(0.5) * (1 - normals[2]) * column((0.30, 0.27, 0.18))
        return self.sky_color @ (facing * seen) + from_below

    def bake_floor(self, z: float, reach: float, size: int) -> None:
        """Keep what reaches a horizontal square at height z: most pixels look at a floor."""
        at = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * np.float32(reach)
        y, x = np.meshgrid(at, at, indexing="ij")
        points = np.stack([x.ravel(), y.ravel(), np.full(x.size, z, np.float32)])
        normals = np.broadcast_to(column((0, 0, 1)), points.shape)
        self.floors[z] = reach, size, np.concatenate([self.ambient(points, normals), self.sun(points)[None]])

    def on_floor(self, z: float, points: np.ndarray):
        """(ambient [3, n], sun [n]) from the baked square; open sky outside of it."""
        reach, size, table = self.floors[z]
        u = (points[0] + reach) * np.float32(size / (2 * reach)) - np.float32(0.5)
        v = (points[1] + reach) * np.float32(size / (2 * reach)) - np.float32(0.5)
        u, v = np.clip(u, 0, size - 1.001), np.clip(v, 0, size - 1.001)
        iu, iv = u.astype(np.int32), v.astype(np.int32)
        fu, fv = u - iu, v - iv
        base = iv * size + iu
        found = (table[:, base] * (1 - fu) + table[:, base + 1] * fu) * (1 - fv)
        found += (table[:, base + size] * (1 - fu) + table[:, base + size + 1] * fu) * fv
        return found[:3], found[3]
