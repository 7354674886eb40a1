"""A model folder: where everything is that a run writes and reads. Each path is named here, once."""

import os
import re
from pathlib import Path

from arguments import CONFIG_FILE, LEGACY_FILE, config_files
from utils.files import DataError, atomic_write, some

CANONICAL = re.compile("0|[1-9][0-9]*")  # a number as we write it
MODELS = "point_cloud.ply", "field.pth"  # files of a saved iteration


class ModelFolder:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        # options
        self.config = self.path / CONFIG_FILE
        self.cfg_args = self.path / LEGACY_FILE
        # what a run starts from
        self.split = self.path / "split.json"
        self.cameras = self.path / "cameras.json"
        self.input_points = self.path / "input.ply"
        self.undistorted = self.path / "undistorted"
        self.normalization = self.path / "normalization.json"  # if it was trained with --normalize
        self.camera_path = self.path / "camera_path.json"  # made in the page
        # what it tells
        self.log = self.path / "train.log"
        self.summary = self.path / "summary.json"
        self.viewer = self.path / "viewer.json"  # while it trains: where the live viewer connects to
        # what per-view modules and scores leave
        self.exposures = self.path / "exposure.json"
        self.results = self.path / "results.json"
        self.per_view = self.path / "per_view.json"
        self.report = self.path / "report.html"

    def __str__(self) -> str:
        return str(self.path)

    def ply(self, iteration: int) -> Path:
        return self.path / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply"

    def splats(self, iteration: int) -> Path:
        """As ply(), for those who can use nothing else."""
        if self.field(iteration).is_file():
            raise DataError(f"{self}: is a NeRF or a voxel grid, it has no splats")
        return self.ply(iteration)

    def field(self, iteration: int) -> Path:
        """Of a method that has no Gaussians: its model."""
        return self.ply(iteration).with_name("field.pth")

    def checkpoint(self, iteration: int) -> Path:
        return self.path / f"chkpnt{iteration}.pth"

    def pictures(self, views: str, iteration: int) -> Path:
        """Of "train" or "test" views: the folder with renders/, gt/ and names.json."""
        return self.path / views / f"ours_{iteration}"

    def write_options(self, groups) -> None:
        """config.json and cfg_args. groups: instances of the dataclasses in arguments/."""
        for name, text in config_files(groups).items():
            with atomic_write(self.path / name) as file:
                file.write(text.encode("utf-8"))

    def saved_iterations(self) -> list[int]:
        """Iterations of which there is a model, in order."""
        saved = [path for name in MODELS for path in self.path.glob(f"point_cloud/iteration_*/{name}")]
        numbers = {path.parent.name.removeprefix("iteration_") for path in saved}
        return sorted(int(number) for number in numbers if CANONICAL.fullmatch(number))

    def checkpoints(self) -> dict[int, Path]:
        """Iteration -> checkpoint, the newest first."""
        numbers = [
            path.stem.removeprefix("chkpnt") for path in self.path.glob("chkpnt*.pth") if path.is_file()
        ]
        newest_first = sorted((int(n) for n in numbers if CANONICAL.fullmatch(n)), reverse=True)
        return {n: self.checkpoint(n) for n in newest_first}

    def saved(self, iteration: int = -1) -> int:
        """This iteration, or the last (-1), of those that have a saved model."""
        saved = self.saved_iterations()
        if not saved:
            raise DataError(f"{self}: has no point_cloud/iteration_N/point_cloud.ply; was it trained?")
        if iteration != -1 and iteration not in saved:
            numbers = some([str(i) for i in saved], 10)
            raise DataError(f"{self}: has no iteration {iteration}, only {numbers}")
        return saved[-1] if iteration == -1 else iteration
