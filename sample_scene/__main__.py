"""python -m sample_scene FOLDER: write the sample scene to a folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

from arguments import number
from arguments.flag import MOST

from .dataset import Options, photograph, write_blender, write_colmap

RANGES = {
    "width": (1, 10_000),
    "height": (1, 10_000),
    "views": (1, 10_000),
    "points": (1, 10_000_000),
    "seed": (0, MOST),
    "blur_samples": (1, 1000),
}


def main(argv: list[str] | None = None) -> None:
    default = {field.name: field.default for field in fields(Options)}
    parser = argparse.ArgumentParser(
        "python -m sample_scene", description="Render the sample scene to a folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("colmap", "blender"), default="colmap")
    for name, (least, most) in RANGES.items():
        parser.add_argument(f"--{name}", type=number(int, least, most), default=default[name])
    parser.add_argument(
        "--exposures",
        type=number(float, 0, 10),
        default=0.0,
        help="random color change of each view, e.g. 0.3",
    )
    parser.add_argument(
        "--blur", choices=("none", "motion", "defocus"), default="none", help="of the training views"
    )
    parser.add_argument(
        "--pose_noise",
        type=number(float, 0, 90),
        default=0.0,
        help="error of the training views' poses: degrees, and percent of the cameras' spread, per axis",
    )
    parser.add_argument(
        "--distractor", action="store_true", help="a ball that is elsewhere in each view; see --masks"
    )
    parser.add_argument("--masks", action="store_true", help="write masks/ (white: use this pixel)")
    parser.add_argument("--depths", action="store_true", help="write depths/ and depth_params.json")
    parser.add_argument(
        "--alpha", action="store_true", help="RGBA pictures of the terrace alone (always in Blender form)"
    )
    parser.add_argument("--text", action="store_true", help="COLMAP's text files instead of binary ones")
    parser.add_argument(
        "--workers",
        type=number(int, 1, 1024),
        default=os.cpu_count() or 1,
        help="processes (default: all cores)",
    )
    args = parser.parse_args(argv)
    for name in ("masks", "depths", "text"):
        if args.format == "blender" and getattr(args, name):
            parser.error(f"--{name} is for --format colmap")

    start = time.perf_counter()
    chosen = {name: getattr(args, name) for name in default if hasattr(args, name)}
    options = Options(**{**chosen, "alpha": args.alpha or args.format == "blender"})
    views, points = photograph(options, min(args.workers, options.views), _counter(options.views))
    if args.format == "blender":
        write_blender(args.folder, views)
    else:
        write_colmap(args.folder, views, points, text=args.text, depths=args.depths, masks=args.masks)
    print(
        f"{len(views)} views, {len(points.xyz)} points in {args.folder} ({time.perf_counter() - start:.0f} s)"
    )


def _counter(total: int):
    def count(items):
        for done, item in enumerate(items, start=1):
            yield item
            if sys.stderr.isatty():
                print(
                    f"\r  view {done}/{total} ",
                    end="\n" if done == total else "",
                    file=sys.stderr,
                    flush=True,
                )

    return count


if __name__ == "__main__":
    main()
