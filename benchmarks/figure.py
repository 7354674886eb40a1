"""Quality against the number of Gaussians, and against seconds where they were measured, as an SVG file.

    python benchmarks/strategies.py -s data/bonsai -w adc "improved --cap_max 250000" > runs.jsonl
    python benchmarks/figure.py runs.jsonl --scene bonsai -o bonsai.svg

Reads the lines of JSON that benchmarks/strategies.py prints, and takes the means of seeds. A line is of a
scene if its "scene" begins with that name.
"""

import argparse
import json
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import mean
from typing import NamedTuple

WIDTH, HEIGHT = 430, 330  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 48  # margins
COLORS = {"adc": "#555555", "mcmc": "#c05a00", "improved": "#0b66c3"}  # by strategy
OTHER = "#7a3b9d"


class Point(NamedTuple):
    way: str
    gaussians: float
    seconds: float | None
    psnr: float


class Axis(NamedTuple):
    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: list[float], ticks: int = 5, from_zero: bool = False) -> "Axis":
        """Round numbers around the values."""
        low, high = 0.0 if from_zero else min(values), max(values)
        rough = max(high - low, 1e-6) / ticks
        power = 10.0 ** (len(f"{int(rough)}") - 1 if rough >= 1 else -len(f"{int(1 / rough)}"))
        step = next(power * k for k in (1, 2, 2.5, 5, 10, 20, 50, 100) if power * k >= rough)
        return cls(step * (low // step), step * -(-high // step), step)

    def part(self, value: float) -> float:
        return (value - self.low) / max(self.high - self.low, 1e-12)

    def ticks(self) -> list[float]:
        return [self.low + k * self.step for k in range(round((self.high - self.low) / self.step) + 1)]


def read(lines: list[str], scene: str) -> list[Point]:
    """One point for each way, the mean over seeds."""
    runs = defaultdict(list)
    for line in lines:
        if line.startswith("{") and (row := json.loads(line))["scene"].startswith(scene):
            runs[row["way"]].append(row)
    return [
        Point(
            way,
            mean(row["gaussians"] for row in rows),
            mean(row["optimization_seconds"] for row in rows) if "optimization_seconds" in rows[0] else None,
            mean(list(row["scores"]["test"].values())[-1]["psnr"] for row in rows),
        )
        for way, rows in runs.items()
    ]


def panel(points: list[tuple[int, str, float, float]], title: str, unit: str, left: float) -> list[str]:
    """Of (number, way, x, PSNR)."""
    across = Axis.over([x for *_, x, _ in points], from_zero=True)
    up = Axis.over([psnr for *_, psnr in points])
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = TOP + tall
    parts = [f'<g transform="translate({left + LEFT},0)">', text(wide / 2, 18, title, "middle", 14)]
    for tick in up.ticks():
        y = bottom - tall * up.part(tick)
        parts += [f'<path d="M0,{y:.1f}H{wide}" stroke="#dddddd"/>', text(-6, y + 4, f"{tick:.4g}", "end")]
    for tick in across.ticks():
        x = wide * across.part(tick)
        parts += [text(x, bottom + 17, f"{tick:,.4g}" if tick < 1e4 else f"{tick / 1e3:,.0f} k", "middle")]
    parts += [text(wide / 2, HEIGHT - 10, unit, "middle"), f'<path d="M0,{bottom}H{wide}" stroke="#444444"/>']
    for number, way, x, psnr in points:
        at = wide * across.part(x), bottom - tall * up.part(psnr)
        color = COLORS.get(way.split()[0], OTHER)
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" fill="{color}"/>')
        parts.append(text(at[0] + 8, at[1] - 5, str(number), "start", color=color))
    return [*parts, "</g>"]


def text(x: float, y: float, words: str, anchor: str, size: int = 11, color: str = "#222222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">'
        f"{escape(words)}</text>"
    )


def figure(points: list[Point], scene: str) -> str:
    points = sorted(points, key=lambda point: -point.psnr)
    numbered = list(enumerate(points, start=1))
    counted = [(k, point.way, point.gaussians, point.psnr) for k, point in numbered]
    timed = [(k, point.way, point.seconds, point.psnr) for k, point in numbered if point.seconds is not None]
    parts = panel(counted, f"{scene}: test PSNR, dB", "Gaussians", 0)
    panels = 1
    if timed:
        parts += panel(timed, f"{scene}: test PSNR, dB", "seconds of the loop", WIDTH)
        panels = 2
    height = HEIGHT + 16 * len(points) + 8
    for number, point in numbered:
        color = COLORS.get(point.way.split()[0], OTHER)
        parts.append(text(LEFT, HEIGHT + 16 * number - 4, f"{number}  {point.way}", "start", color=color))
    width = max(panels * WIDTH, LEFT + RIGHT + round(6.2 * max(len(point.way) + 4 for point in points)))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'{head} font-family="sans-serif">', paper, *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--scene", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    points = read(args.runs.read_text(encoding="utf-8").splitlines(), args.scene)
    if not points:
        raise SystemExit(f"{args.runs} has no run of {args.scene}")
    args.output.write_text(figure(points, args.scene), encoding="utf-8")


if __name__ == "__main__":
    main()
