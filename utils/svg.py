"""Charts as SVG text, in the colors of the page around them (.s0, .s1, ... and .axis in its style sheet)."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 24, 24  # margins
COLORS = 6
MOST_POINTS = 200  # of a line; more are averaged
BARS = 10


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    color: int = 0


def chart(title: str, lines: Sequence[Line], unit: str = "") -> str:
    """Lines over the iteration. Points that are not finite are left out."""
    lines = [line._replace(points=thinned(line.points)) for line in lines]
    every = [point for line in lines for point in line.points]
    if not every:
        return ""
    across = Axis.of([0.0, *(x for x, _ in every)], LEFT, WIDTH - RIGHT)
    up = Axis.of([y for _, y in every], HEIGHT - BOTTOM, TOP)
    parts = [_title(title + (f" ({unit})" if unit else "")), *_grid(across, up)]
    for line in lines:
        color = f"s{line.color % COLORS}" + (" dashed" if line.dashed else "")
        places = [(across.at(x), up.at(y)) for x, y in line.points]
        parts.append(
            f'<polyline class="{color}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
        )
        single = len(places) == 1
        for (x, y), (step, value) in zip(places, line.points):
            said = f"{line.name}: {value:.5g} {unit}".strip() + f" at {step:,.0f}"
            dot = f'class="dot {color}" r="3"' if single else 'class="hover" r="5"'
            parts.append(
                f'<circle {dot} cx="{x:.1f}" cy="{y:.1f}"><title>{html.escape(said)}</title></circle>'
            )
    return _svg(title, parts)


def histogram(title: str, values: Sequence[float], unit: str = "") -> str:
    """How many of the values are in each of some even steps."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / BARS or 1.0
    counts = [0] * BARS
    for value in values:
        counts[min(BARS - 1, int((value - low) / step))] += 1
    across = Axis.of([low, low + BARS * step], LEFT, WIDTH - RIGHT, whole=False)
    up = Axis.of([0.0, *map(float, counts)], HEIGHT - BOTTOM, TOP)
    parts = [_title(title + (f" ({unit})" if unit else "")), *_grid(across, up)]
    for k, count in enumerate(counts):
        x, end, y = across.at(low + k * step), across.at(low + (k + 1) * step), up.at(count)
        said = f"{count} from {low + k * step:.2f} to {low + (k + 1) * step:.2f} {unit}"
        parts.append(
            f'<rect class="bar s0" x="{x + 1:.1f}" y="{y:.1f}" width="{end - x - 2:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{html.escape(said)}</title></rect>'
        )
    return _svg(title, parts)


class Mark(NamedTuple):
    """An arrow on a plan."""

    name: str
    place: tuple[float, float]
    toward: tuple[float, float]
    color: int = 0


def plan(title: str, marks: Sequence[Mark]) -> str:
    """Arrows on the ground, at one scale in both directions."""
    if not marks:
        return ""
    xs, ys = [m.place[0] for m in marks], [m.place[1] for m in marks]
    reach = max(max(xs) - min(xs), max(ys) - min(ys), 1e-9) * 1.2
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    side = HEIGHT - TOP
    parts = [_title(title)]
    for mark in marks:
        x = WIDTH / 2 + (mark.place[0] - middle[0]) / reach * side
        y = TOP + side / 2 - (mark.place[1] - middle[1]) / reach * side
        dx, dy = mark.toward[0], -mark.toward[1]
        points = [(x + 9 * dx, y + 9 * dy), (x - 3 * dy, y + 3 * dx), (x + 3 * dy, y - 3 * dx)]
        parts.append(
            f'<polygon class="bar s{mark.color % COLORS}" points="'
            + " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            + f'"><title>{html.escape(mark.name)}</title></polygon>'
        )
    return _svg(title, parts)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: means of neighbors."""
    points = [p for p in points if all(map(math.isfinite, p))]
    if len(points) <= MOST_POINTS:
        return points
    edges = [round(k * len(points) / MOST_POINTS) for k in range(MOST_POINTS + 1)]
    groups = [points[a:b] for a, b in zip(edges, edges[1:])]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


class Axis(NamedTuple):
    low: float
    high: float
    begin: float  # pixels
    end: float
    step: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float, whole: bool = True) -> "Axis":
        """From one round number to another, or from the least value to the largest."""
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        step = _round_step((high - low) / 4)
        if whole:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(low, high, begin, end, step)

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        first = math.ceil(self.low / self.step - 1e-9)
        return [k * self.step for k in range(first, math.floor(self.high / self.step + 1e-9) + 1)]


def _round_step(size: float) -> float:
    """The least of 1, 2, 5, 10, 20, ... that is not below the size."""
    power = 10 ** math.floor(math.log10(size))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= size * (1 - 1e-9))


def _grid(across: Axis, up: Axis) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_brief(value)}</text>')
    for value in across.ticks():
        x = across.at(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_brief(value)}</text>')
    return parts


def _brief(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def _title(text: str) -> str:
    return f'<text class="head" x="{LEFT}" y="14">{html.escape(text)}</text>'


def _svg(title: str, parts: list[str]) -> str:
    label = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
