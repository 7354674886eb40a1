"""Several models in one table: the settings in which they differ, and what came of each.

A row is a scored folder <model>/test/<method>. PSNR, SSIM and LPIPS are those of its results.json. Gaussians
are counted in the file that was rendered, and MB is its size; NeRF and voxel grids have none to count. The
time is that of the optimization loop; it is known for the last iteration of a run. Milliseconds a view are
render.py's, the median of the test views.
"""

import csv
import io
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from arguments import (
    ConfigError,
    FieldParams,
    ModelParams,
    OptimizationParams,
    PhotoParams,
    PipelineParams,
    RenderParams,
    RunParams,
    saved_options,
)
from scene.folder import MODELS
from scene.formats.ply import count_in
from utils.files import DataError, atomic_write, read_json
from utils.terminal import say

GROUPS = (ModelParams, PipelineParams, OptimizationParams, FieldParams, PhotoParams, RunParams, RenderParams)
OF_THE_RUN = {"seed", "start_checkpoint", "deterministic", "ply"}  # its other flags do not change the result
NO_SETTING = {"model_path", "data_device", "debug"}
SETTINGS = {f.name for group in GROUPS[:5] for f in fields(group)} - NO_SETTING | OF_THE_RUN
BANDS = {f"PSNR {band}": ".2f" for band in ("far", "middle", "near")}
FORMATS = {"PSNR": ".3f", "SSIM": ".4f", "LPIPS": ".4f"} | BANDS
FORMATS |= {"views": "d", "Gaussians": ",d", "MB": ".1f", "training s": ".1f", "ms a view": ".3g"}

Cell = str | int | float | bool | None  # None: not known


def _cell(value: Any) -> Cell:
    return " ".join(map(str, value)) if isinstance(value, list) else value


DEFAULTS = {
    f.name: _cell(f.default if f.default_factory is MISSING else f.default_factory())
    for group in GROUPS
    for f in fields(group)
    if f.name in SETTINGS
}


class Row(NamedTuple):
    model: str
    method: str
    settings: dict[str, Cell]
    scores: dict[str, Cell]


def compare(models: list[Path]) -> list[list[Cell]]:
    """The header and a row per scored method of these models, which metrics.py has just scored."""
    rows = [row for model in models for row in _rows(model)]
    head = ["model"]
    several = any(row.model == other.model for row, other in zip(rows, rows[1:]))
    if several or any(row.method != _model_of(row.method) for row in rows):
        head.append("method")
    changed = [name for name in DEFAULTS if _differs([row.settings.get(name) for row in rows], name)]
    if len({row.settings.get("device") for row in rows}) > 1:
        changed.append("device")
    table: list[list[Cell]] = [[*head, *changed, *FORMATS]]
    for row in rows:
        named = [row.model, row.method][: len(head)]
        scores = [row.scores.get(name) for name in FORMATS]
        table.append([*named, *(row.settings.get(name) for name in changed), *scores])
    return _with_short_paths(table)


def to_markdown(table: list[list[Cell]]) -> str:
    """Columns of one width, so that it can be read as it is."""
    head, *rows = table
    lines = [head, *([shown(cell, str(name)) for name, cell in zip(head, row)] for row in rows)]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def write(table: list[list[Cell]], path: Path) -> None:
    """CSV has all digits, Markdown as many as are shown."""
    if path.suffix == ".md":
        text = to_markdown(table) + "\n"
    else:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(table)
        text = file.getvalue()
    with atomic_write(path) as target:
        target.write(text.encode("utf-8"))


def _rows(folder: Path) -> list[Row]:
    """Of a model, or of a folder with the pictures of another data set or of a file."""
    parent = folder.resolve().parent
    is_part = not (folder / "point_cloud").is_dir() and (parent / "point_cloud").is_dir()
    model = parent if is_part else folder
    settings: dict[str, Cell] = {"ply": ""}
    settings |= _settings(model) | (_settings(folder) if is_part else {})
    run = _json(model / "summary.json")
    settings["device"] = str(run["device"]) if "device" in run else None
    results, per_view = _json(folder / "results.json"), _json(folder / "per_view.json")
    rows = []
    for method, means in results.items():
        last = _model_of(method) == f"ours_{run.get('iterations')}"
        scores = means | {
            "views": sum(value is not None for value in per_view[method]["PSNR"].values()),
            "Gaussians": count_in(file := _rendered_file(model, method, settings)),
            "MB": file.stat().st_size / 1e6 if file.is_file() else None,
            "training s": run.get("optimization_seconds") if last else None,
            "ms a view": milliseconds(folder / "test" / method),
        }
        rows.append(Row(str(folder), method, settings, scores))
    return rows


def milliseconds(pictures: Path) -> float | None:
    """A view of this folder of pictures took so long to render."""
    seconds = _json(pictures / "seconds.json").get("a view")
    return None if seconds is None else 1000 * seconds


def _settings(folder: Path) -> dict[str, Cell]:
    """What decides the result, as far as the folder tells."""
    try:
        return {name: _cell(value) for name, value in saved_options(folder, GROUPS).items()}
    except ConfigError as error:
        say(f"{error}; the table is without its settings")
        return {}


def _rendered_file(model: Path, method: str, settings: dict[str, Cell]) -> Path:
    if settings.get("ply"):
        return Path(str(settings["ply"]))
    saved = _model_of(method).replace("ours_", "iteration_")
    files = [model / "point_cloud" / saved / name for name in MODELS]
    return next((file for file in files if file.is_file()), files[0])


def _model_of(method: str) -> str:
    """ours_7000 of ours_7000_refined_colors, whose test views were fitted."""
    return method.removesuffix("_colors").removesuffix("_refined").removesuffix("_aligned")


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DataError:  # a run that was killed, or one of the original, has no summary
        return {}


def _differs(values: list[Cell], name: str) -> bool:
    """Folders that do not tell are older than the setting, or of the original."""
    return len({DEFAULTS[name] if value is None else value for value in values}) > 1


def _with_short_paths(table: list[list[Cell]]) -> list[list[Cell]]:
    """A data set or a file is called by its last name where no other one has it."""
    for column in (table[0].index(name) for name in ("source_path", "ply") if name in table[0]):
        paths = {str(row[column]) for row in table[1:] if row[column]}
        if len({Path(path).name for path in paths}) == len(paths):
            for row in table[1:]:
                row[column] = Path(str(row[column])).name if row[column] else row[column]
    return table


def shown(cell: Cell, column: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "on" if cell else "off"
    if column in FORMATS and isinstance(cell, int | float):
        return format(cell, FORMATS[column])
    return " ".join(str(cell).replace("|", "\\|").split())
