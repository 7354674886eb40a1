"""Ways to train, side by side: scenes x ways x seeds, and one row of means for each scene and way.

    python benchmarks/strategies.py -s data/lego:-w data/bonsai --seeds 0 1 \
        -w adc "mcmc --cap_max 300000" "adc --absgrad" "--preset best"

A scene is a data set folder, with flags for train.py after colons. A way is a strategy and more flags, or
flags alone. PSNR is the mean over test views after the last iteration, over the whole picture; SSIM is of the
saved 8-bit renders; seconds are those of the optimization loop.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import train  # beside this file
from arguments import number
from arguments.flag import LAST_SEED, MOST

COLUMNS = ["scene", "way", "seeds", "PSNR", "SSIM", "Gaussians", "loop s", "peak MB"]


def measure(scene: str, way: str, seeds: list[int], folder: Path, iterations: int) -> list[str]:
    """One row of the table."""
    flags = way.split() if way.startswith("-") else ["--strategy", *way.split()]
    place = folder / "_".join(way.replace("--", "").split())
    runs = [train.train(":".join([scene, *flags]), seed, place, iterations, []) for seed in seeds]
    for run in runs:
        print(json.dumps(run | {"way": way}), flush=True)
    psnr = [run["scores"]["test"][str(run["iterations"])]["psnr"] for run in runs]
    spread = f" ± {(max(psnr) - min(psnr)) / 2:.2f}" if len(runs) > 1 else ""
    name, *options = scene.split(":")
    return [
        " ".join([Path(name).name, *options]),
        way,
        " ".join(map(str, seeds)),
        f"{mean(psnr):.2f}{spread}",
        f"{mean(run['ssim'] for run in runs):.4f}",
        f"{mean(run['gaussians'] for run in runs):,.0f}",
        f"{mean(run['optimization_seconds'] for run in runs):.1f}",
        f"{mean(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-s", "--scenes", nargs="+", required=True)
    parser.add_argument("-w", "--ways", nargs="+", default=["adc", "adc --absgrad", "mcmc"])
    parser.add_argument("--seeds", nargs="+", type=number(int, 0, LAST_SEED), default=[0])
    parser.add_argument("--iterations", type=number(int, 0, MOST), default=0, help="0: as the way has it")
    parser.add_argument("-o", "--output", type=Path, default=Path("output/strategies"))
    args = parser.parse_args()
    rows = [
        measure(scene, way, args.seeds, args.output, args.iterations)
        for scene in args.scenes
        for way in args.ways
    ]
    print()
    for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
