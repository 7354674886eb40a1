"""The still life: what stands where. Meters; z is up; the terrace is at the origin."""

from __future__ import annotations

import numpy as np

from . import materials as m
from .shapes import Box, Bush, Ellipsoid, Ground, Group, Lathe, Ring, Rod, rod, turned

FLOOR = 0.08  # height of the terrace above the grass

IRON = m.plain("#2b2d30", gloss=0.35, sharpness=25)
RUBBER = m.plain("#26262a", gloss=0.10, sharpness=12)
CHROME = m.plain("#a8adb3", gloss=0.8, sharpness=40, mirror=0.15)
COPPER = m.plain("#c98a5c", gloss=1.2, sharpness=160, mirror=0.62)
STONE = m.weathered("#a59a88", "#d2c9b8", 0.3, gloss=0.06)
CLAY = m.weathered("#a8512f", "#c97248", 0.3, gloss=0.06)
BARK = m.weathered("#4d3a28", "#7a6046", 0.5)
LEAVES = m.leaves("#274d1c", "#6f9a3a")


def terrace():
    yield Box((0, 0, FLOOR / 2 - 0.1), m.terrace, half=(2.25, 2.25, FLOOR / 2 + 0.1), floor=FLOOR)


def gazing_ball():
    """A copper ball on a turned stone column, in the middle."""
    profile = (
        (0, 0.30),
        (0.07, 0.30),
        (0.10, 0.24),
        (0.16, 0.20),
        (0.45, 0.13),
        (0.66, 0.17),
        (0.74, 0.26),
        (0.80, 0.26),
    )
    yield Lathe((0.05, 0.15, FLOOR), STONE, profile=profile)
    yield Ellipsoid((0.05, 0.15, FLOOR + 0.80 + 0.31), COPPER, radii=0.33)


def crates():
    """Two crates, a vase on the upper one, and a wheel that leans against them."""
    turn = turned(18)
    yield Box((-1.05, 0.75, FLOOR + 0.36), m.planks, half=(0.42, 0.42, 0.36), rotation=turn)
    yield Box((-1.12, 0.85, FLOOR + 0.72 + 0.22), m.planks, half=(0.26, 0.26, 0.22), rotation=turned(-20))
    vase = ((0, 0.10), (0.04, 0.12), (0.26, 0.215), (0.42, 0.19), (0.56, 0.085), (0.62, 0.085), (0.66, 0.12))
    yield Lathe((-1.12, 0.85, FLOOR + 1.16), m.glaze, profile=vase)


def wheel():
    radius, lean = 0.44, 72
    frame = turned(18 + 90) @ turned(lean, "y")
    hub = np.array([-0.66, 0.16, FLOOR + 0.45])
    yield Ring(hub, RUBBER, rotation=frame, radius=radius, thickness=0.032)
    yield Ring(hub, CHROME, rotation=frame, radius=radius - 0.05, thickness=0.017)
    yield Rod(hub, CHROME, rotation=frame, radius=0.035, length=0.12)
    for k in range(14):
        angle = 2 * np.pi * k / 14
        out = frame @ np.array([np.cos(angle), np.sin(angle), 0])
        side = frame @ np.array([0, 0, 0.05 if k % 2 else -0.05])
        yield rod(hub + side, hub + out * (radius - 0.05), 0.008, CHROME)


def toys():
    """Balls on the tiles, and a ring of marble on a plinth."""
    yield Ellipsoid(
        (0.75, -1.15, FLOOR + 0.29), m.beach_ball, radii=0.29, rotation=turned(35, "x") @ turned(25, "y")
    )
    yield Ellipsoid((-0.15, -0.95, FLOOR + 0.15), m.plain("#d8281f", 0.9, 80, 0.05), radii=0.15)
    yield Ellipsoid((-0.62, -1.30, FLOOR + 0.19), m.marble("#d2cdc2", "#3d4f60", 0.6, 0.5), radii=0.19)
    yield Ellipsoid((0.22, -1.42, FLOOR + 0.11), m.plain("#f0b429", 0.9, 80, 0.05), radii=0.11)
    yield Box((1.25, 0.55, FLOOR + 0.19), STONE, half=(0.36, 0.30, 0.19), rotation=turned(-28))
    frame = turned(-28) @ turned(90, "x")
    yield Ring(
        (1.25, 0.55, FLOOR + 0.38 + 0.44),
        m.marble("#ece4d8", "#8a6f62"),
        rotation=frame,
        radius=0.34,
        thickness=0.12,
    )


def fence():
    """A wrought-iron screen between two brick pillars along the back edge."""
    y, ends = 1.85, (-1.75, 1.75)
    for x in ends:
        yield Box((x, y, FLOOR + 0.55), m.bricks, half=(0.19, 0.19, 0.55))
        yield Box((x, y, FLOOR + 1.14), STONE, half=(0.25, 0.25, 0.05))
        yield Ellipsoid((x, y, FLOOR + 1.31), STONE, radii=0.14)
    for height in (0.18, 0.92):
        yield rod((ends[0], y, FLOOR + height), (ends[1], y, FLOOR + height), 0.017, IRON)
    for k in range(1, 12):
        x = ends[0] + 0.19 + k * (ends[1] - ends[0] - 0.38) / 12
        top = FLOOR + 0.98 + 0.10 * np.sin(np.pi * k / 12)
        yield rod((x, y, FLOOR), (x, y, top), 0.014, IRON)
        yield Ellipsoid((x, y, top + 0.025), IRON, radii=(0.025, 0.025, 0.05))


def topiary():
    """Two pots with bushes at the front corners."""
    pot = ((0, 0.15), (0.30, 0.22), (0.31, 0.26), (0.38, 0.26))
    for x, y, size in ((1.75, -1.65, 0.36), (-1.80, -1.70, 0.33)):
        yield Lathe((x, y, FLOOR), CLAY, profile=pot)
        yield rod((x, y, FLOOR + 0.3), (x, y, FLOOR + 0.7), 0.03, BARK)
        yield Bush((x, y, FLOOR + 0.62 + size), LEAVES, radius=size)


def rail_fence():
    """Posts and rails around the meadow."""
    count, radius = 22, 9.5
    wood = m.weathered("#6e5a45", "#9c866b", 0.3)
    posts = [(radius * np.cos(a), radius * np.sin(a)) for a in np.arange(count) * 2 * np.pi / count]
    for k, (x, y) in enumerate(posts):
        if k in (16, 17):
            continue  # the gate, where the path leaves
        yield rod((x, y, 0), (x, y, 1.15), 0.075, wood, subject=False)
        if k != 15:
            ahead = posts[(k + 1) % count]
            for height in (0.45, 0.9):
                yield rod((x, y, height), (*ahead, height), 0.045, wood, subject=False)


def trees():
    """Round trees outside the fence: a trunk and five balls of leaves each."""
    rng = np.random.default_rng(5)
    greens = [
        m.leaves("#2d5220", "#7da045", 0.05),
        m.leaves("#3f5f22", "#a0a845", 0.05),
        m.leaves("#244a2a", "#5f8f4a", 0.05),
    ]
    for k, angle in enumerate(np.radians([8, 41, 66, 104, 137, 171, 205, 232, 302, 334])):
        distance = rng.uniform(11.5, 15.5)
        x, y, height = distance * np.cos(angle), distance * np.sin(angle), rng.uniform(1.1, 1.7)
        size = rng.uniform(0.9, 1.3)
        yield rod((x, y, 0), (x, y, height + 0.3), 0.16, BARK, subject=False)
        for ball in range(5):
            turn = angle + 2 * np.pi * ball / 4
            side = 0.0 if ball == 4 else 0.62 * size
            at = (
                x + side * np.cos(turn),
                y + side * np.sin(turn),
                height + (1.35 if ball == 4 else 0.7) * size,
            )
            yield Ellipsoid(at, greens[k % 3], radii=size * rng.uniform(0.7, 0.95), subject=False)


def hills():
    rng = np.random.default_rng(11)
    for angle in np.radians(np.arange(0, 360, 24)):
        distance = rng.uniform(48, 95)
        wide, high = rng.uniform(20, 34), rng.uniform(4.5, 9.5)
        at = (distance * np.cos(angle), distance * np.sin(angle), -0.5)
        yield Ellipsoid(
            at, m.hillside, radii=(wide, wide * 0.8, high), rotation=turned(np.degrees(angle)), subject=False
        )


def build() -> list:
    """All of it: shapes, and groups of shapes that are close together."""
    rails, wood = list(rail_fence()), list(trees())
    return [
        Ground((0, 0, 0), m.meadow, subject=False, floor=0.0),
        *terrace(),
        *gazing_ball(),
        *crates(),
        *toys(),
        Group(list(wheel())),
        Group(list(fence())),
        Group(list(topiary())),
        *(Group(rails[k : k + 6]) for k in range(0, len(rails), 6)),
        *(Group(wood[k : k + 6]) for k in range(0, len(wood), 6)),
        *hills(),
    ]
