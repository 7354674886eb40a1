"""What a model folder tells about its run: options, scores, curves, views, cameras."""

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from arguments import (
    ConfigError,
    FieldParams,
    ModelParams,
    OptimizationParams,
    PipelineParams,
    RunParams,
    defaults_with,
    saved_options,
)
from scene import paths
from scene.folder import ModelFolder
from tools import contact_sheet
from utils.files import DataError, read_json
from utils.image import photo_names
from utils.terminal import say

GROUPS = (ModelParams, OptimizationParams, PipelineParams, RunParams, FieldParams)
OF_THE_PLACE = {"source_path", "model_path", "quiet", "resume", "overwrite"}  # named apart, or no matter
COUNT = "Gaussians"  # or what else a model is made of
CURVES = {  # tag of TensorBoard -> curve, name of the line
    "train_loss_patches/total_loss": ("Loss", "train"),
    "test/loss_viewpoint - psnr": ("PSNR", "test"),
    "train/loss_viewpoint - psnr": ("PSNR", "train"),
    "total_points": (COUNT, ""),
    "memory": ("Memory", ""),
    "iter_time": ("Time of an iteration", ""),
}
Points = list[tuple[float, float]]


@dataclass
class View:
    """A test view that was rendered."""

    file: str
    name: str  # of the photo
    scores: dict[str, float | None]  # by metric

    @property
    def psnr(self) -> float:
        """Of a view of which nothing counts: above all others, as it is no bad one."""
        value = self.scores.get("PSNR")
        return math.inf if value is None else value


@dataclass
class Facts:
    folder: ModelFolder
    options: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]  # option -> its value, and its default
    summary: dict[str, Any]
    scores: dict[str, float | None]  # means over the test views
    method: Path | None  # folder of the rendered test views
    views: list[View]  # the worst first
    curves: dict[str, dict[str, Points]] = field(default_factory=dict)  # curve -> line -> points
    cameras: list[tuple[str, np.ndarray, np.ndarray, bool]] = field(default_factory=list)  # see _cameras()

    @property
    def name(self) -> str:
        return self.folder.path.name or str(self.folder)

    @property
    def command(self) -> str:
        """The one that trains such a model again."""
        words = ["python", "train.py", "-s", str(self.options.get("source_path", ""))]
        words += ["-m", str(self.options.get("model_path", ""))]
        for name, (value, _) in self.changed.items():
            words += _as_flag(name, value)
        return shlex.join(words)


def gather(path: Path) -> Facts:
    folder = ModelFolder(path)
    if not folder.path.is_dir():
        raise DataError(f"{path}: is no folder")
    options = _options(folder)
    method = _rendered(folder)
    return Facts(
        folder=folder,
        options=options,
        changed=_changed(options),
        summary=_json(folder.summary),
        scores=_ordered(_json(folder.results).get(method.name, {})) if method else {},
        method=method,
        views=_views(folder, method) if method else [],
        curves=_curves(folder),
        cameras=_cameras(folder),
    )


def _options(folder: ModelFolder) -> dict[str, Any]:
    try:
        return saved_options(folder.path, GROUPS)
    except ConfigError as error:
        say(f"{error}; the report is without its options")
        return {}


def _changed(options: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that are not as they are by default, some of which depend on others."""
    defaults = defaults_with(options, GROUPS)
    known = [f.name for group in GROUPS for f in fields(group) if f.name not in OF_THE_PLACE]
    changed = {}
    for name in known:
        value, default = options.get(name, defaults[name]), defaults[name]
        if name == "save_iterations":  # the last one is always among them
            default = sorted({*default, options.get("iterations", defaults["iterations"])})
        if value != default:
            changed[name] = value, default
    return changed


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}={value}"] if isinstance(value, str) else [f"--{name}", *map(str, values)]


def _rendered(folder: ModelFolder) -> Path | None:
    try:
        return contact_sheet.newest(folder.path)
    except DataError:
        return None


def _views(folder: ModelFolder, method: Path) -> list[View]:
    """With what metrics.py has measured, if it has."""
    names = photo_names(method)
    measured = _json(folder.per_view).get(method.name, {})
    views = []
    for path in sorted((method / "renders").glob("*.png")):
        scores = {metric: values.get(path.name) for metric, values in measured.items()}
        if "PSNR" not in scores:
            scores["PSNR"] = contact_sheet.read_row(method, path.name).psnr()
        views.append(View(path.name, names.get(path.name, path.name), _ordered(scores)))
    return sorted(views, key=lambda view: (view.psnr, view.file))


def _ordered(scores: dict[str, Any]) -> dict[str, Any]:
    """PSNR first, as in the table of metrics.py."""
    return dict(sorted(scores.items(), key=lambda item: item[0] != "PSNR"))


def _curves(folder: ModelFolder) -> dict[str, dict[str, Points]]:
    """From TensorBoard's events, and the scores of the summary, which has the PSNR of the whole picture."""
    curves: dict[str, dict[str, Points]] = {}
    for tag, points in _events(folder.path).items():
        curve, line = CURVES[tag]
        curves.setdefault(curve, {})[line] = points
    summary = _json(folder.summary)
    for line, by_iteration in summary.get("scores", {}).items():
        points = [(float(step), float(scores["psnr"])) for step, scores in by_iteration.items()]
        curves.setdefault("PSNR", {})[line] = points
    names = {name: name for name, _ in CURVES.values()} | {COUNT: summary.get("unit", COUNT).capitalize()}
    return {title: curves[name] for name, title in names.items() if name in curves}


def _events(folder: Path) -> dict[str, Points]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    sizes = {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1, "compressedHistograms": 1}
    events = EventAccumulator(str(folder), sizes).Reload()
    known = events.Tags()["scalars"]
    return {tag: [(float(e.step), e.value) for e in events.Scalars(tag)] for tag in CURVES if tag in known}


def _cameras(folder: ModelFolder) -> list[tuple[str, np.ndarray, np.ndarray, bool]]:
    """Name, place and direction [2] each, as seen from above, and whether it is a test view."""
    if not folder.cameras.is_file():
        return []
    poses, _ = paths.of_cameras(folder.cameras)
    names = [str(entry.get("img_name", "")) for entry in read_json(folder.cameras, list)]
    held_out = set(_json(folder.split).get("test", ()))
    ahead = np.mean([pose.turn[:, 2] for pose in poses], axis=0) + [1e-3, 0, 1e-3]
    ground = paths.looking(-paths.mean_up(poses), ahead)  # a camera that looks down
    right, forward = ground[:, 0], -ground[:, 1]
    seen = []
    for name, pose in zip(names, poses):
        place = np.array([pose.place @ right, pose.place @ forward])
        toward = np.array([pose.turn[:, 2] @ right, pose.turn[:, 2] @ forward])
        seen.append((name, place, toward, name in held_out))
    return seen


def _json(path: Path) -> dict[str, Any]:
    """Nothing where there is no such file; a damaged one is told."""
    try:
        return read_json(path) if path.is_file() else {}
    except DataError as error:
        say(f"{error}; the report is without it")
        return {}


def run_rows(facts: Facts) -> list[tuple[str, str]]:
    """How the run went, in words and numbers."""
    summary, rows = facts.summary, []
    if "gaussians" in summary:
        rows.append((str(summary.get("unit", "Gaussians")), f"{summary['gaussians']:,}"))
    if "iterations" in summary:
        rows.append(("Iterations", f"{summary['iterations']:,}"))
    if "optimization_seconds" in summary:
        rows.append(("Optimization", f"{summary['optimization_seconds']:,.1f} s"))
        rows.append(("In all", f"{summary['total_seconds']:,.1f} s"))
    if "peak_memory_bytes" in summary:
        rows.append(("Peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB"))
    if "device" in summary:
        rows.append(("Device", str(summary["device"])))
    return rows
