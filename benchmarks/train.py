"""The training table: scenes x seeds through train.py, render.py and metrics.py, a process and a row each.

    python benchmarks/train.py -s data/lego:-w data/fox data/bonsai --seeds 0 1 -o output/bench

A scene is a data set folder, with flags for train.py after colons; each has a model folder of its own, named
after both and the seed. Time is the optimization loop's wall time, densification, optimizer and transfers
included; decoding, evaluation and saving are in "total" only. PSNR is the mean over test views at each of
--test_iterations, unquantized; SSIM and LPIPS are of the saved 8-bit renders.
"""

import argparse
import json
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import number  # noqa: E402
from arguments.flag import LAST_SEED, MOST  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 100  # characters of a folder's name


def run(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{script} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


def folder_names(scenes: list[str]) -> dict[str, str]:
    """Scene -> the name of its model folders, before the seed: no two are the same."""
    names: dict[str, str] = {}
    for scene in dict.fromkeys(scenes):
        source, *flags = scene.split(":")
        words = [Path(source).resolve().name, *(flag.lstrip("-") for flag in flags)]
        name = re.sub(r"[^\w.-]+", "-", "_".join(words))[:LONGEST]
        candidates = (name if number == 1 else f"{name}_{number}" for number in count(1))
        names[scene] = next(candidate for candidate in candidates if candidate not in names.values())
    return names


def train(scene: str, seed: int, out: Path, iterations: int, tests: list[int]) -> dict:
    """One row of the table. Without iterations, as many as the flags say."""
    source, *flags = scene.split(":")
    steps = ["--iterations", str(iterations)] if iterations else []
    steps += ["--test_iterations", *map(str, tests)] if tests else []
    run(
        "train.py", "-s", source, "-m", str(out), "--overwrite", "--eval", "--disable_viewer", "--quiet",
        "--seed", str(seed), *steps, *flags,
    )  # fmt: skip
    run("render.py", "-m", str(out), "--skip_train", "--quiet")
    run("metrics.py", "-m", str(out))
    summary = json.loads((out / "summary.json").read_text())
    scores = json.loads((out / "results.json").read_text())[f"ours_{summary['iterations']}"]
    name = " ".join([Path(source).resolve().name, *flags])
    return {"scene": name, "seed": seed, "ssim": scores["SSIM"], "lpips": scores["LPIPS"]} | summary


def table(rows: list[dict], tests: list[int]) -> str:
    """Markdown."""
    head = [
        "scene",
        "seed",
        *[f"PSNR {i:,}" for i in tests],
        "SSIM",
        "LPIPS",
        "Gaussians",
        "loop s",
        "total s",
        "peak MB",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        scores = row["scores"]["test"]
        psnr = [f"{scores[str(i)]['psnr_by_channel']:.3f}" for i in tests]
        costs = [row["optimization_seconds"], row["total_seconds"], row["peak_memory_bytes"] / 1e6]
        lpips = "-" if row["lpips"] is None else f"{row['lpips']:.4f}"
        numbers = [f"{row['ssim']:.4f}", lpips, f"{row['gaussians']:,}", *[f"{c:.1f}" for c in costs]]
        lines.append([row["scene"], str(row["seed"]), *psnr, *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-s", "--scenes", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=number(int, 0, LAST_SEED), default=[0])
    parser.add_argument("--iterations", type=number(int, 1, MOST), default=30_000)
    parser.add_argument("--test_iterations", nargs="+", type=number(int, -1, MOST), default=[7_000, 30_000])
    parser.add_argument("-o", "--output", type=Path, default=Path("output/bench"))
    args = parser.parse_args()
    tests = [i for i in args.test_iterations if i < args.iterations] + [args.iterations]
    names = folder_names(args.scenes)
    rows = [
        train(scene, seed, args.output / f"{name}_{seed}", args.iterations, tests)
        for scene, name in names.items()
        for seed in args.seeds
    ]
    print(f"{rows[0]['device']}, {args.iterations:,} iterations\n")
    print(table(rows, tests))
    if rows[0]["lpips"] is None:
        print(f"\nLPIPS is left out: python metrics.py -m {rows[0]['model_path']} says which files it needs")


if __name__ == "__main__":
    main()
