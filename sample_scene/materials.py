"""What the surfaces look like: procedural paint, evaluated at the points that rays hit.

A material is a function of (world points, local points) that returns a Surface. Frequencies are kept so low
that a picture of 400x300 can show them: about 4 cm at the distance of the cameras.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TABLE = 512


class Surface(NamedTuple):
    albedo: np.ndarray  # [3, n] linear reflectance
    gloss: float | np.ndarray = 0.0  # strength of the highlight
    sharpness: float = 30.0  # exponent of the highlight
    mirror: float | np.ndarray = 0.0  # share of the light that is reflected as by a mirror
    bump: np.ndarray | None = None  # [3, n] is added to the normal


def _cloudy(seed: int, slope: float) -> np.ndarray:
    """A tileable table [512, 512] of noise whose spectrum falls as frequency^-slope; mean 0, deviation 1."""
    rng = np.random.default_rng(seed)
    fx, fy = np.meshgrid(np.fft.rfftfreq(TABLE), np.fft.fftfreq(TABLE))
    frequency = np.maximum(np.hypot(fx, fy) * TABLE, 1)
    spectrum = np.fft.rfft2(rng.standard_normal((TABLE, TABLE))) * frequency**-slope
    spectrum[0, 0] = 0
    spectrum *= np.exp(-((frequency / 170) ** 2))
    values = np.fft.irfft2(spectrum)
    return (values / values.std()).astype(np.float32)


TABLES = {"cloud": _cloudy(1, 1.7), "fine": _cloudy(2, 0.9)}


def noise(u: np.ndarray, v: np.ndarray, kind: str = "cloud") -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1 that repeats after 1 unit in u and v, [n]."""
    table = TABLES[kind].reshape(-1)
    u, v = u * np.float32(TABLE), v * np.float32(TABLE)
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    iu, iv = iu.astype(np.int32) & (TABLE - 1), iv.astype(np.int32) & (TABLE - 1)
    row, next_row = iv * TABLE, ((iv + 1) & (TABLE - 1)) * TABLE
    next_u = (iu + 1) & (TABLE - 1)
    top = table.take(row + iu) * (1 - fu) + table.take(row + next_u) * fu
    bottom = table.take(next_row + iu) * (1 - fu) + table.take(next_row + next_u) * fu
    return top * (1 - fv) + bottom * fv


def solid(p: np.ndarray, scale: float, kind: str = "cloud") -> np.ndarray:
    """Noise for solid things: two skewed planes keep any one direction from smearing."""
    s = np.float32(scale)
    return 0.7 * (
        noise(s * (p[0] + 0.37 * p[2]), s * (p[1] - 0.61 * p[2]), kind)
        + noise(s * (p[2] + 0.29 * p[0]) + 0.5, s * (0.83 * p[1] - 0.41 * p[0]), kind)
    )


def hashed(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """A fixed random number in [0, 1) for each cell of a grid, [n]."""
    x = (i.astype(np.int32) * 73 + j.astype(np.int32) * 1031 + 77) & (TABLE * TABLE - 1)
    value = TABLES["fine"].reshape(-1)[(x * 2503) & (TABLE * TABLE - 1)] * np.float32(43.17)
    return value - np.floor(value)


def rgb(text: str) -> np.ndarray:
    """'#c08050' as the eye sees it, to linear light, [3, 1]."""
    value = np.array([int(text[k : k + 2], 16) for k in (1, 3, 5)], np.float32) / 255
    return (
        np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        .astype(np.float32)
        .reshape(3, 1)
    )


def mix(a, b, t):
    return a + (b - a) * t


def unit(x: np.ndarray) -> np.ndarray:
    """x, kept between 0 and 1 (np.clip does the same, with more ado for small arrays)."""
    return np.minimum(np.maximum(x, 0), 1)


def step(x: np.ndarray, edge: float, width: float) -> np.ndarray:
    """0 below the edge, 1 above it, smooth over `width`."""
    t = unit((x - edge) * np.float32(1 / width) + np.float32(0.5))
    return t * t * (3 - 2 * t)


# --- paints -------------------------------------------------------------------------------------------------


def plain(color: str, gloss=0.0, sharpness=30.0, mirror=0.0):
    albedo = rgb(color)
    return lambda world, local: Surface(np.broadcast_to(albedo, local.shape), gloss, sharpness, mirror)


def marble(light: str, vein: str, scale=0.35, gloss=0.25):
    ground, veins = rgb(light), rgb(vein)

    def paint(world, local):
        bend = solid(local, scale)
        line = np.exp(-5 * np.abs(np.sin(4.2 * local[0] + 2.6 * local[1] + 3.4 * local[2] + 1.5 * bend)))
        cloud = 0.06 * solid(local + 7, 0.8 * scale)
        return Surface(mix(ground, veins, 0.75 * line) * (1 + cloud), gloss, 60.0)

    return paint


def brick_color(u, v, size=(0.38, 0.155)):
    """Running bond in the (u, v) plane, [3, n]; a joint is 1.2 cm."""
    row = np.floor(v / size[1])
    u = u + 0.5 * size[0] * (row % 2)
    cell = np.floor(u / size[0])
    du, dv = np.abs(u / size[0] - cell - 0.5) * size[0], np.abs(v / size[1] - row - 0.5) * size[1]
    joint = np.maximum(step(du, size[0] / 2 - 0.008, 0.012), step(dv, size[1] / 2 - 0.008, 0.012))
    tone = hashed(cell, row)
    body = mix(rgb("#a35a42"), rgb("#c08464"), tone) * (1 + 0.05 * noise(u * 0.9, v * 0.9, "fine"))
    return mix(body, rgb("#b3a08c"), 0.8 * joint)


def bricks(world, local):
    """Courses around a pillar: the horizontal coordinate follows whichever face is seen."""
    on_x = np.abs(local[0]) > np.abs(local[1])
    return Surface(brick_color(np.where(on_x, local[1], local[0]) + 0.13, world[2]), 0.04, 12.0)


def planks(world, local):
    """A crate: boards across each face, a frame of darker battens around them."""
    size = np.abs(local).max(axis=0, keepdims=True)
    face = np.argmax(np.abs(local), axis=0)
    u = np.choose(face, [local[1], local[0], local[0]])
    v = np.choose(face, [local[2], local[2], local[1]])
    board = np.floor(v / 0.13 + 0.5)
    tone = hashed(board, face)
    grain = noise(0.12 * u + 0.37 * board, 1.1 * v + 0.21 * face) + 0.4 * noise(0.3 * u, 3 * v, "fine")
    gap = step(np.abs(v / 0.13 + 0.5 - board - 0.5) * 0.13, 0.058, 0.012)
    wood = mix(rgb("#b98a54"), rgb("#8f5f36"), unit(0.5 * tone + 0.22 * grain + 0.2))
    wood = wood * (1 - 0.75 * gap)
    edge = step(np.maximum(np.abs(u), np.abs(v)) / size[0], 0.82, 0.03)
    batten = mix(rgb("#8a5a30"), rgb("#6f4524"), unit(0.5 + 0.25 * grain))
    line = np.exp(-(((np.maximum(np.abs(u), np.abs(v)) / size[0] - 0.82) / 0.03) ** 2))
    return Surface(mix(wood, batten, edge) * (1 - 0.6 * line), 0.08, 20.0)


def weathered(dark: str, light: str, scale=0.25, gloss=0.03):
    """Stone, clay, bark: one color in two tones."""
    tones = rgb(dark), rgb(light)

    def paint(world, local):
        t = unit(0.5 + 0.22 * solid(world, scale) + 0.06 * solid(world, 3 * scale, "fine"))
        return Surface(mix(*tones, t), gloss, 15.0)

    return paint


def leaves(dark: str, light: str, scale=0.22):
    tones = rgb(dark), rgb(light)

    def paint(world, local):
        t = unit(0.45 + 0.2 * solid(world, scale, "fine") + 0.2 * solid(world, 0.3 * scale))
        bump = 0.15 * np.stack([solid(world + 3, scale, "fine"), solid(world + 5, scale, "fine"), 0 * t])
        return Surface(mix(*tones, t), 0.04, 10.0, 0.0, bump)

    return paint


def glaze(world, local):
    """The vase: deep blue, a cream band with a zigzag, and a strong highlight."""
    angle = np.arctan2(local[1], local[0]) * np.float32(8 / np.pi)
    zigzag = np.abs((angle % 1) - 0.5) * 0.16
    low = step(local[2], 0.30, 0.01) * (1 - step(local[2], 0.52, 0.01))
    tooth = low * step(local[2] - zigzag, 0.36, 0.012) * (1 - step(local[2] + zigzag, 0.46, 0.012))
    body = mix(rgb("#12306e"), rgb("#1d57a8"), unit(0.5 + 0.3 * solid(local, 0.3)))
    color = mix(mix(body, rgb("#efe3c4"), low), rgb("#c5502d"), tooth)
    return Surface(color, 0.9, 90.0, 0.06)


def beach_ball(world, local):
    sector = np.floor((np.arctan2(local[1], local[0]) / (2 * np.pi) + 0.5) * 6).astype(np.int32) % 3
    colors = np.concatenate([rgb("#e8473b"), rgb("#f7f2e6"), rgb("#f2b632")], axis=1)
    across = np.abs(((np.arctan2(local[1], local[0]) / (2 * np.pi) + 0.5) * 6) % 1 - 0.5)
    cap = step(np.abs(local[2]), 0.245, 0.012)
    color = mix(np.take(colors, sector, axis=1), rgb("#2f77b5"), cap)
    seam = step(across, 0.48, 0.03) * (1 - cap)
    return Surface(color * (1 - 0.25 * seam), 0.6, 70.0, 0.03)


def terrace(world, local):
    """Marble tiles in two colors inside a course of bricks."""
    x, y = local[0], local[1]
    tile = np.float32(0.5)
    i, j = np.floor(x / tile), np.floor(y / tile)
    du, dv = np.abs(x / tile - i - 0.5) * tile, np.abs(y / tile - j - 0.5) * tile
    joint = step(np.maximum(du, dv), 0.243, 0.010)
    dark = ((i + j) % 2).astype(np.float32)
    shift = 3 * hashed(i, j)
    bend = noise(0.28 * x + shift, 0.28 * y + shift)
    vein = np.exp(-4 * np.abs(np.sin(2.2 * x + 1.9 * y + 2 * shift + 1.3 * bend)))
    cream = mix(rgb("#e6dac2"), rgb("#b79f80"), 0.55 * vein) * (0.92 + 0.12 * hashed(j, i))
    slate = mix(rgb("#51606b"), rgb("#8d9aa0"), 0.55 * vein) * (0.88 + 0.2 * hashed(j, i))
    inner = mix(mix(cream, slate, dark), rgb("#6d665c"), joint)
    reach = np.maximum(np.abs(x), np.abs(y))
    border = brick_color(np.where(np.abs(x) > np.abs(y), y, x), reach, (0.42, 0.125))
    outside = step(reach, 2.0, 0.008)
    return Surface(mix(inner, border, outside), 0.05 * (1 - outside), 40.0)


def meadow(world, local):
    """Grass in large and small patches, with a worn gravel path that leads away from the terrace."""
    x, y = world[0], world[1]
    broad, small = noise(0.013 * x, 0.013 * y), noise(0.11 * x, 0.11 * y, "fine")
    grass = mix(rgb("#48612c"), rgb("#8b9a50"), unit(0.45 + 0.2 * broad + 0.11 * small))
    dry = step(noise(0.021 * x + 0.3, 0.021 * y + 0.6), 1.0, 1.0)
    grass = mix(grass, rgb("#b5a55c"), 0.6 * dry)
    off = np.abs(x - 0.8 * np.sin(0.45 * y)) + 0.07 * small
    path = (1 - step(off, 0.62, 0.22)) * (y < 0)
    gravel = mix(rgb("#a8977c"), rgb("#cfc2a8"), unit(0.5 + 0.25 * small))
    return Surface(mix(grass, gravel, path))


def hillside(world, local):
    """Far slopes: fields below, woods above."""
    woods = step(noise(0.006 * world[0], 0.006 * world[1] + 0.004 * world[2]) + 0.05 * world[2], 0.15, 0.7)
    mottle = noise(0.05 * world[0], 0.05 * world[1], "fine")
    fields = mix(rgb("#7f9440"), rgb("#b3ab5c"), unit(0.5 + 0.4 * noise(0.009 * world[0], 0.007 * world[1])))
    trees = mix(rgb("#2f4a22"), rgb("#4c6a32"), unit(0.5 + 0.25 * mottle))
    return Surface(mix(fields, trees, woods))
