"""Small pictures with labels, to learn to tell shapes apart: one shape or two on the ground, all else random.

pictures, labels = draw(SINGLES, 600, seed=0)     # [600, 3, 32, 32] uint8 and [600], classes by turns
"""

from __future__ import annotations

from itertools import combinations
from multiprocessing import get_context

import numpy as np

from . import materials, shapes
from .light import sky
from .shapes import column, dot, normalize, turned
from .tracer import Camera, look_at

SIDE, RAYS = 32, 2  # pixels along a side of the picture; rays along a side of a pixel
SHAPES = {  # u draws numbers between two others; a lathe has its radius at five heights
    "ellipsoid": lambda u, **at: shapes.Ellipsoid(radii=u(0.35, 0.8, 3), **at),
    "box": lambda u, **at: shapes.Box(half=u(0.3, 0.6, 3), **at),
    "rod": lambda u, **at: shapes.Rod(radius=u(0.15, 0.3), length=u(1, 1.6), **at),
    "ring": lambda u, **at: shapes.Ring(radius=u(0.45, 0.6), thickness=u(0.1, 0.22), **at),
    "lathe": lambda u, **at: shapes.Lathe(
        profile=tuple(zip(np.linspace(-0.7, 0.7, 5), u(0.1, 0.6, 5))), **at
    ),
    "bush": lambda u, **at: shapes.Bush(radius=u(0.5, 0.7), lumps=u(4, 8), depth=0.12, **at),
}
SINGLES, PAIRS = [(name,) for name in SHAPES], list(combinations(SHAPES, 2))  # 6 classes; 15
GRAVEL, CLAY = np.array([[0.55, 0.55, 0.55], [0.65, 0.5, 0.4]])


def paint(rng, tint, vary: float):
    a, b = (tint * rng.uniform(1 - vary, 1 + vary) for _ in range(2))
    a, b = ("#" + bytes((255 * color).astype(np.uint8)).hex() for color in (a, b))
    plain, scale = materials.plain(a, gloss=rng.uniform(), sharpness=60), rng.uniform(0.2, 0.6)
    return rng.choice([plain, materials.marble(a, b, scale), materials.weathered(a, b, scale)])


def still_life(names, rng) -> list:
    turn, out = rng.uniform(0, 2 * np.pi), 0.75 * (len(names) - 1)
    things = [shapes.Ground((0, 0, 0), paint(rng, GRAVEL, 0.07))]
    for name, side in zip(names, (out, -out)):
        center = (side * np.cos(turn), side * np.sin(turn), rng.uniform(0.5, 0.9))
        pose = turned(rng.uniform(0, 360)) @ turned(rng.uniform(0, 90), "x") @ turned(rng.uniform(0, 360))
        things.append(
            SHAPES[name](rng.uniform, center=center, rotation=pose, material=paint(rng, CLAY, 0.15))
        )
    return things


def rays(rng):
    """Origin [3, 1] and directions [3, n] of a camera that looks at the middle from a random side."""
    turn, lift, n = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(10, 60)), SIDE * RAYS
    away = np.array([np.cos(turn) * np.cos(lift), np.sin(turn) * np.cos(lift), np.sin(lift)])
    target, focal = (0, 0, 0.6) + rng.uniform(-0.25, 0.25, 3), n * rng.uniform(1.3, 1.7)
    K = np.array([[focal, 0, n / 2], [0, focal, n / 2], [0, 0, 1]])
    camera = Camera("", n, n, K, look_at(target + rng.uniform(3.6, 4.4) * away, target))
    rows, columns = np.divmod(np.arange(n * n), n)
    return camera.rays(columns + 0.5, rows + 0.5)[:2]


def shade(thing, things, points, d, sun):
    """Light from points of a thing towards the camera, [3, n]: sky, sun with its shadows, highlight."""
    local = thing.local(points)
    normal, surface = thing.rotation @ thing.normal_local(local), thing.material(points, local)
    lifted = points + np.float32(2e-3) * normal
    lit = np.all([np.isinf(other.hit(lifted, sun)) for other in things[1:]], axis=0) * (dot(normal, sun) > 0)
    shine = surface.gloss * np.maximum(dot(normal, normalize(sun - d)), 0) ** surface.sharpness
    return surface.albedo * (0.5 + 0.3 * normal[2] + 2 * lit * dot(normal, sun)) + lit * shine


def picture(names, seed) -> np.ndarray:
    """[3, SIDE, SIDE] uint8: shapes under a random sun. The same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    things, (o, d) = still_life(names, rng), rays(rng)
    sun = normalize(column((*rng.uniform(-1, 1, 2), rng.uniform(0.5, 1.2))))
    t = np.stack([np.where(thing.near(o, d), thing.hit(o, d), np.inf) for thing in things])
    light = sky(d)
    for k, thing in enumerate(things):
        here = np.flatnonzero((t.argmin(0) == k) & np.isfinite(t[k]))
        light[:, here] = shade(thing, things, o + t[k, here] * d[:, here], d[:, here], sun)
    shown = np.clip(1.4 * light / (1 + light), 0, 1) ** (1 / 2.2)
    return (255 * shown.reshape(3, SIDE, RAYS, SIDE, RAYS).mean((2, 4)) + 0.5).astype(np.uint8)


def draw(classes, count: int, seed: int, workers: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures [count, 3, SIDE, SIDE] uint8, classes by turns, and their labels [count]."""
    labels = np.arange(count) % len(classes)
    jobs = [(classes[label], (seed, k)) for k, label in enumerate(labels)]
    if workers == 1:
        return np.stack([picture(*job) for job in jobs]), labels
    with get_context("spawn").Pool(workers) as pool:
        return np.stack(pool.starmap(picture, jobs, chunksize=64)), labels
