"""Milliseconds of a training step with what photos add to the picture: poses, blur, colors.

    python benchmarks/per_view.py -m output/plain

Training goes on from the model for --steps steps, in which nothing is added or removed. Blur takes --samples
renders a step; "one by one" renders them in as many calls as there are renders, for comparison.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from arguments import ModelParams, number, saved_options  # noqa: E402
from gaussian_renderer import Splats  # noqa: E402
from per_view import motion  # noqa: E402
from scene.folder import ModelFolder  # noqa: E402

COLORS = [f"--appearance {kind}" for kind in ("exposure", "ppisp", "bilateral")]
BLURS = [f"--blur {kind}" for kind in ("motion", "defocus", "kernel")]
SCHEDULE = "--eval --pose_from_iter 0 --blur_from_iter 0 --densify_until_iter 1 --checkpoint_every -1"
QUIET = "--test_iterations -1 --save_iterations -1 --disable_viewer --quiet --overwrite"


def milliseconds(model: ModelFolder, steps: int, flags: list[str]) -> float:
    data, done = saved_options(model.path, (ModelParams,))["source_path"], model.saved(-1)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-s", data, "-m", folder, "--start_checkpoint", str(model.ply(done))]
        options += ["--iterations", str(done + steps)]
        if train.main([*options, *SCHEDULE.split(), *QUIET.split(), *flags]) != 0:
            raise SystemExit(1)
        seconds = json.loads((Path(folder) / "summary.json").read_text())["optimization_seconds"]
    return 1000 * seconds / steps


def one_by_one(splats: Splats, cameras: list, **how) -> list:
    return [splats.picture(camera, **how) for camera in cameras]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model_path", type=Path, required=True)
    parser.add_argument("--steps", type=number(int, 2, 100_000), default=400)
    parser.add_argument("--samples", type=number(int, 2, 1000), default=10)
    parser.add_argument("-w", "--ways", nargs="+", default=["--no-fused", "--poses", *BLURS, *COLORS])
    args = parser.parse_args(argv)
    motion.FEWEST = args.samples  # however short a path is
    together = Splats.pictures
    for way in args.ways:
        for name in ("", ", one by one") if way == "--blur motion" else ("",):
            Splats.pictures = one_by_one if name else together
            flags = [*way.split(), "--blur_samples", str(args.samples)]
            spent = milliseconds(ModelFolder(args.model_path), args.steps, flags)
            print(f"{way + name:30} {spent:8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
