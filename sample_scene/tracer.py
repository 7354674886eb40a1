"""From a camera to pictures: trace, shade, antialias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import garden
from .light import HAZE, SUN, SUN_COLOR, Light, sky
from .materials import mix, unit
from .shapes import FAR, Ground, Group, Shape, column, dot, normalize

BATCH = 130_000
SKY_DISTANCE = 150.0  # where the points of the sky are placed in the point cloud


SUBPIXELS = (
    (0.125, 0.375),
    (0.375, 0.875),
    (0.625, 0.125),
    (0.875, 0.625),
)  # with the center, five per pixel


@dataclass
class Camera:
    """A pinhole. Pixel (column i, row j) has its center at (i + 0.5, j + 0.5)."""

    name: str
    width: int
    height: int
    K: np.ndarray  # [3, 3]
    world_to_camera: np.ndarray  # [4, 4]; x right, y down, z forward

    @property
    def center(self) -> np.ndarray:
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]

    def rays(self, columns, rows):
        """Origin [3, 1], unit directions [3, n], and the z-depth per unit of distance [n]."""
        x, y = (columns - self.K[0, 2]) / self.K[0, 0], (rows - self.K[1, 2]) / self.K[1, 1]
        d = np.stack([x, y, np.ones_like(x)])
        cosine = 1 / np.sqrt(dot(d, d))
        directions = self.world_to_camera[:3, :3].T.astype(np.float32) @ (d * cosine).astype(np.float32)
        return column(self.center), directions, cosine.astype(np.float32)


class Paint(NamedTuple):
    """Surfaces of all hits together."""

    normal: np.ndarray  # [3, n]
    albedo: np.ndarray  # [3, n]
    gloss: np.ndarray  # [n]
    sharpness: np.ndarray  # [n]
    mirror: np.ndarray  # [n]

    def take(self, some):
        return Paint(*(part[..., some] for part in self))


def chosen(vectors, rays):
    """Some of the vectors; all rays may share one."""
    return vectors if vectors.shape[1] == 1 else vectors.take(rays, axis=1)


class World:
    def __init__(self, quality: float = 1.0):
        self.things = garden.build()
        self.shapes: list[Shape] = []
        for thing in self.things:
            for shape in thing if isinstance(thing, Group) else [thing]:
                shape.index = len(self.shapes)
                self.shapes.append(shape)
        self.light = Light(self.distance_to_shapes, quality=quality)
        self.light.bake_floor(garden.FLOOR, 2.3, int(640 * quality))
        self.light.bake_floor(0.0, 3.9, int(640 * quality))

    # --- where rays end -------------------------------------------------------------------------------------

    def trace(self, o, d, things=None):
        """First hits of rays: (distance [n], inf in the sky; index of the shape [n], -1 in the sky)."""
        n = np.broadcast_shapes(o.shape, d.shape)[1]
        best, which = np.full(n, FAR), np.full(n, -1, np.int32)

        def visit(shape, rays, o, d):
            t = shape.hit(o, d)
            closer = np.flatnonzero(t < best.take(rays))
            rays = rays.take(closer)
            best[rays] = t.take(closer)
            which[rays] = shape.index

        for thing in self.things if things is None else things:
            rays = np.flatnonzero(thing.near(o, d))
            if len(rays) == 0:
                continue
            near_o, near_d = chosen(o, rays), chosen(d, rays)
            if not isinstance(thing, Group):
                visit(thing, rays, near_o, near_d)
                continue
            for shape in thing:
                inner = np.flatnonzero(shape.near(near_o, near_d))
                if len(inner):
                    visit(shape, rays.take(inner), chosen(near_o, inner), chosen(near_d, inner))
        return best, which

    def distance_to_shapes(self, o, d):
        """What casts shadows: everything but the ground and the hills."""
        near = [
            t for t in self.things if not isinstance(t, Ground) and t.center[0] ** 2 + t.center[1] ** 2 < 400
        ]
        return self.trace(o, d, near)[0]

    # --- what they bring back -------------------------------------------------------------------------------

    def radiance(self, o, d, mirrors: int = 1):
        """Linear light along rays, [3, n], with their hits (distance [n], shape [n])."""
        color = np.empty(d.shape, np.float32)
        distance, which = np.empty(d.shape[1], np.float32), np.empty(d.shape[1], np.int32)
        for first in range(0, d.shape[1], BATCH):  # small enough to stay in the cache
            rays = slice(first, first + BATCH)
            start = o if o.shape[1] == 1 else o[:, rays]
            t, hit = self.trace(start, d[:, rays])
            color[:, rays] = self.shade(start, d[:, rays], t, hit, mirrors)
            distance[rays], which[rays] = t, hit
        return color, distance, which

    def shade(self, o, d, t, which, mirrors: int):
        """Light that comes back along rays whose hits are known, [3, n]."""
        color = np.empty(d.shape, np.float32)
        empty, solid = np.flatnonzero(which < 0), np.flatnonzero(which >= 0)
        color[:, empty] = sky(d.take(empty, axis=1))
        o, d, t, which = chosen(o, solid), d.take(solid, axis=1), t.take(solid), which.take(solid)
        points = o + t * d
        paint, ambient, sun = self.surfaces(points, which)

        # diffuse, and a highlight around the mirror direction of the sun (Blinn)
        facing = np.maximum(dot(paint.normal, SUN), 0)
        light = paint.albedo * (ambient + SUN_COLOR * (facing * sun))
        middle = np.maximum(dot(paint.normal, normalize(SUN - d)), 0)
        lobe = middle**paint.sharpness * (sun * paint.gloss * (facing > 0))
        light += SUN_COLOR * (np.float32(0.5) * lobe)

        glossy = np.flatnonzero(paint.gloss > 0)
        if mirrors and len(glossy):
            light[:, glossy] = self.reflect(
                paint.take(glossy), points[:, glossy], d[:, glossy], light[:, glossy]
            )
        color[:, solid] = mix(light, HAZE, 1 - np.exp(-np.maximum(t - 9, 0) / 190))
        return color

    def reflect(self, paint, points, d, light):
        """Mix in what polished things mirror: all of it at grazing angles (Schlick)."""
        cosine = dot(paint.normal, d)
        bounced = d - 2 * cosine * paint.normal
        grazing = (1 + np.minimum(cosine, 0)) ** 5
        share = paint.mirror + 0.35 * np.minimum(paint.gloss, 1) * (1 - paint.mirror) * grazing
        seen = sky(bounced) * (0.3 + 0.7 * unit(3 * bounced[2] + 0.5))  # mere gloss sees the sky alone
        true = np.flatnonzero(paint.mirror > 0.3)  # a mirror sees the things around it
        if len(true):
            away = points[:, true] + np.float32(2e-3) * paint.normal[:, true]
            seen[:, true] = self.radiance(away, bounced[:, true], mirrors=0)[0]
        tint = mix(np.float32(1), paint.albedo * np.float32(1.6), np.minimum(1, paint.mirror * 1.6))
        return mix(light, seen * tint, share)

    def surfaces(self, points, which):
        """Paint and light at points of known shapes: (Paint, ambient light [3, n], share of the sun [n])."""
        n = len(which)
        paint = Paint(
            *(np.empty((3, n), np.float32) for _ in range(2)), *(np.empty(n, np.float32) for _ in range(3))
        )
        ambient, sun = np.empty((3, n), np.float32), np.empty(n, np.float32)
        lit = np.zeros(n, bool)
        order = np.argsort(which, kind="stable")
        numbers, starts = np.unique(which[order], return_index=True)
        for number, first, last in zip(numbers, starts, [*starts[1:], n]):
            shape, here = self.shapes[number], order[first:last]
            at = points.take(here, axis=1)
            local = shape.local(at)
            normal = shape.rotation @ shape.normal_local(local)
            surface = shape.material(at, local)
            if surface.bump is not None:
                normal = normalize(normal + surface.bump)
            paint.normal[:, here], paint.albedo[:, here] = normal, surface.albedo
            paint.gloss[here], paint.sharpness[here], paint.mirror[here] = surface[1:4]
            for floor, reach in ((0.0, 3.8), (garden.FLOOR, 2.26)):  # most pixels look at a baked floor
                if shape.floor == floor:
                    flat = (normal[2] > 0.999) & (np.maximum(np.abs(at[0]), np.abs(at[1])) < reach)
                    inside = here[flat]
                    ambient[:, inside], sun[inside] = self.light.on_floor(floor, at[:, flat])
                    lit[inside] = True
        rest = np.flatnonzero(~lit)
        at = points.take(rest, axis=1)
        ambient[:, rest] = self.light.ambient(at, paint.normal.take(rest, axis=1))
        sun[rest] = self.light.sun(at)
        return paint, ambient, sun

    # --- pictures -------------------------------------------------------------------------------------------

    def picture(self, camera: Camera, alpha: bool = False) -> Picture:
        """Render one view; where neighboring pixels differ, five rays are averaged instead of one."""
        rows, columns = np.divmod(np.arange(camera.width * camera.height, dtype=np.int32), camera.width)
        o, d, cosine = camera.rays(columns + 0.5, rows + 0.5)
        light, t, which = self.radiance(o, d)
        image = self.develop(light, which, alpha)
        which = which.reshape(camera.height, camera.width)

        edges = np.flatnonzero(_contrast(image[:3].reshape(3, camera.height, camera.width), which) > 0.06)
        if len(edges):
            dx, dy = np.array(SUBPIXELS, np.float32).T[:, :, None]
            o, d, _ = camera.rays((columns[edges] + dx).ravel(), (rows[edges] + dy).ravel())
            light, _, hit = self.radiance(o, d)
            samples = self.develop(light, hit, alpha).reshape(len(image), len(SUBPIXELS), -1)
            image[:, edges] = (image[:, edges] + samples.sum(axis=1)) / (len(SUBPIXELS) + 1)
        image = _lens(image.reshape(-1, camera.height, camera.width))
        if alpha:
            image[:3] /= np.maximum(image[3:], 1e-6)
        return Picture(image.transpose(1, 2, 0), (t * cosine).reshape(which.shape), which)

    def develop(self, light, which, alpha: bool):
        """Linear light to display values in [0, 1], [3, n]; with alpha, premultiplied and [4, n]."""
        x = light * np.float32(0.56)
        x = x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14)  # a film-like shoulder
        x = np.clip(x, 0, 1)
        shown = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** np.float32(1 / 2.4) - 0.055)
        if not alpha:
            return shown
        opaque = np.array([s.subject for s in self.shapes] + [False], np.float32)[which]
        return np.concatenate([shown * opaque, opaque[None]])


@dataclass
class Picture:
    image: np.ndarray  # [H, W, 3 or 4] display values in 0..1; straight alpha
    depth: np.ndarray  # [H, W] distance along the optical axis; inf in the sky
    shape: np.ndarray  # [H, W] index of the shape in World.shapes, -1 in the sky


def _lens(image):
    """What a good lens and the pixels' own size do: a blur of 0.65 pixels, [C, H, W]."""
    for axis in (1, 2):
        padded = np.pad(image, [(0, 0), (int(axis == 1),) * 2, (int(axis == 2),) * 2], mode="edge")
        before, here, after = (np.take(padded, range(k, k + image.shape[axis]), axis) for k in range(3))
        image = 0.21 * (before + after) + 0.58 * here
    return image


def _contrast(image, which):
    """The largest difference of a pixel to its four neighbors, [H * W]; another shape counts too."""
    found = np.zeros(which.shape, np.float32)
    for a, b in (
        ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        difference = np.abs(image[(slice(None), *a)] - image[(slice(None), *b)]).max(axis=0)
        difference = np.maximum(difference, 0.05 * (which[a] != which[b]))
        found[a] = np.maximum(found[a], difference)
        found[b] = np.maximum(found[b], difference)
    return found.ravel()


def orbit(
    count: int, width: int, height: int, field_of_view: float = 52.0, principal=None, seed: int = 0
) -> list[Camera]:
    """Cameras on a dome around the terrace, spread evenly over all sides and over low and high views.

    `field_of_view` is horizontal, in degrees; `principal` the principal point in pixels (default: center).
    """
    focal = 0.5 * width / np.tan(np.radians(field_of_view) / 2)
    cx, cy = principal or (width / 2, height / 2)
    K = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    cameras = []
    taken = [7 * seed, 7 * seed]
    for i in range(count):
        flies = (i + i // 8) % 2  # half of them walk, half of them fly; so do the held-out ones, every 8th
        taken[flies] += 1
        turn, lift, out = (taken[flies] * step % 1 for step in (2**0.5, 5**0.5, 3**0.5))
        azimuth, distance = 2 * np.pi * turn, 5.6 + 1.2 * out
        elevation = np.radians(10 + 33 * lift if flies else 6.5 + 3 * lift)
        target = np.array([0.25 * np.cos(5 * azimuth), 0.25 * np.sin(3 * azimuth), 0.62])
        eye = target + distance * np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        cameras.append(Camera(f"view_{i:03d}", width, height, K, look_at(eye, target)))
    return cameras


def look_at(eye, target, up=(0, 0, 1)) -> np.ndarray:
    """world_to_camera [4, 4] of a camera at `eye` that looks at `target`."""
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross(z, up)
    x /= np.linalg.norm(x)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([x, np.cross(z, x), z])
    matrix[:3, 3] = -matrix[:3, :3] @ eye
    return matrix
