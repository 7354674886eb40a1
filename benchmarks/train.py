"""The training table: scenes x seeds through train.py, render.py and metrics.py, a process and a row each.

    python benchmarks/train.py -s data/lego:-w data/fox data/bonsai --seeds 0 1 -o output/bench

A scene is a data set folder, with flags for train.py after colons. Time is the optimization loop's wall time,
densification, optimizer and transfers included; decoding, evaluation and saving are in "total" only. PSNR is
the mean over test views at each of --test_iterations, unquantized; SSIM is of the saved 8-bit renders.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import LAST_SEED, MOST, number  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{script} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


def train(scene: str, seed: int, folder: Path, iterations: int, tests: list[int]) -> dict:
    """One row of the table."""
    source, *flags = scene.split(":")
    out = folder / f"{Path(source).name}_{seed}"
    steps = [str(i) for i in tests]
    run(
        "train.py", "-s", source, "-m", str(out), "--overwrite", "--eval", "--disable_viewer", "--quiet",
        "--seed", str(seed), "--iterations", str(iterations), "--test_iterations", *steps, *flags,
    )  # fmt: skip
    run("render.py", "-m", str(out), "--skip_train", "--quiet")
    run("metrics.py", "-m", str(out), "--lpips", "none")
    summary = json.loads((out / "summary.json").read_text())
    ssim = next(iter(json.loads((out / "results.json").read_text()).values()))["SSIM"]
    return {"scene": " ".join([Path(source).name, *flags]), "seed": seed, "ssim": ssim} | summary


def table(rows: list[dict], tests: list[int]) -> str:
    """Markdown."""
    head = [
        "scene",
        "seed",
        *[f"PSNR {i:,}" for i in tests],
        "SSIM",
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
        numbers = [f"{row['ssim']:.4f}", f"{row['gaussians']:,}", *[f"{c:.1f}" for c in costs]]
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
    rows = [
        train(scene, seed, args.output, args.iterations, tests)
        for scene in args.scenes
        for seed in args.seeds
    ]
    print(f"{rows[0]['device']}, {args.iterations:,} iterations\n")
    print(table(rows, tests))


if __name__ == "__main__":
    main()
