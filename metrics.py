"""Score rendered test views: PSNR, SSIM and LPIPS against the ground truth beside them.

    python metrics.py -m output/x [output/y ...] [--table table.md table.csv]

Reads the 8-bit PNG files that render.py wrote into <model>/test/<method>/{renders,gt} and writes results.json
(means) and per_view.json into the model folder. PSNR is over the whole picture, then averaged over views;
SSIM has an 11x11 Gaussian window of sigma 1.5 with zero padding; LPIPS is version 0.1 on pictures in [0, 1],
as the original has it. Where render.py wrote masks/, PSNR and SSIM are means over the pixels that count, and
LPIPS compares pictures that are black in the others. PSNR is also given for the upper, middle and lower
third of the pictures: in most photos what is far, in between and near. Several models end in one table: the
settings in which they differ, scores, number of Gaussians, size of the file, training time
(training/table.py).
"""

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from diff_gaussian_rasterization import ssim
from torch import Tensor

from arguments import CONFIG_FILE, MetricsParams, parse_metrics, pick_device
from training import table
from utils import commands, lpips
from utils.files import DataError, is_file, write_json
from utils.image import photo_names, psnr, read_image, ssim_where, to_float
from utils.terminal import progress, say

Scores = dict[str, dict[str, float | None]]  # metric -> picture file -> value
BANDS = ("far", "middle", "near")  # thirds of a picture, from the top
READ_AHEAD = 4  # pairs decoded while one is being scored


def score_models(params: MetricsParams) -> None:
    device = pick_device(params.device)
    distance = _find_lpips(params, device)
    scored, errors = [], []
    for model in params.model_paths:
        try:
            score_model(Path(model), distance, device)
            scored.append(Path(model))
        except (DataError, OSError) as error:  # the others are scored all the same
            errors.append(str(error))
    if len(scored) > 1 or (scored and params.table):
        _compare(scored, params)
    if whole := [str(model) for model in scored if (model / "point_cloud").is_dir()]:
        say(f"Next: {shlex.join(['python', 'report.py', '-m', *whole])}")
    if errors:
        raise DataError("; ".join(errors))


def _compare(models: list[Path], params: MetricsParams) -> None:
    """One table of all models, on the screen and in files."""
    rows = table.compare(models)
    say("", *table.to_markdown(rows).split("\n"))
    for path in params.table:
        table.write(rows, Path(path))
        say(f"Table: {path}")


def score_model(model: Path, distance: Callable | None, device: torch.device) -> None:
    """Score every method under <model>/test, write both reports, print the table."""
    test = model / "test"
    if not test.is_dir():
        raise DataError(f"{test} must be a folder of rendered test views, got none; {_advice(model)}")
    methods = sorted(folder for folder in test.iterdir() if folder.is_dir())
    if not methods:
        raise DataError(f"{test} must hold a folder per method (ours_<iteration>), got an empty folder")

    results, per_view = {}, {}
    for method in methods:
        scores = _score_method(method, distance, device)
        per_view[method.name] = scores
        results[method.name] = {metric: _mean(values) for metric, values in scores.items()}
    write_json(model / "results.json", results, indent=1)
    write_json(model / "per_view.json", per_view, indent=1)
    say(*_table(model, per_view, results))


def _advice(model: Path) -> str:
    """What to do about a folder without rendered test views."""
    elsewhere = [str(test.parent) for test in sorted(model.glob("*on_*/test"))]
    if elsewhere:
        return f"run metrics.py -m {shlex.join(elsewhere)}, where those of other data sets are"
    if is_file(model / CONFIG_FILE) and not (model / "point_cloud").exists():
        return "run render.py again with --eval, which holds test views out"
    how = f"run render.py -m {shlex.quote(str(model))} first"
    return f"{how} (of a model that was trained with --eval)"


def _score_method(method: Path, distance: Callable | None, device: torch.device) -> Scores:
    names = _picture_names(method)
    scores: Scores = {"SSIM": {}, "PSNR": {}, "LPIPS": {}, **{f"PSNR {band}": {} for band in BANDS}}
    pairs = _read_pairs(method, names)
    for name, (render, truth, mask) in progress(
        zip(names, pairs), desc=f"Scoring {method.name}", total=len(names)
    ):
        if render.shape != truth.shape:
            sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (truth, render)]
            raise DataError(
                f"{method}/renders/{name} must be {sizes[0]} like its ground truth, got {sizes[1]}"
            )
        if mask is not None and mask.shape != truth.shape:
            size = f"{truth.shape[2]}x{truth.shape[1]}"
            raise DataError(f"{method}/masks/{name} must be {size} like its ground truth")
        render, truth = to_float(render.to(device)), to_float(truth.to(device))
        if mask is None:
            scores["SSIM"][name] = ssim(render[None], truth[None]).item()
        elif not (mask := (mask[0].to(device) > 127).float()).any():
            for values in scores.values():
                values[name] = None
            continue  # nothing of this photo counts
        else:
            render, truth = render * mask, truth * mask
            scores["SSIM"][name] = ssim_where(render, truth, mask).item()
        scores["PSNR"][name] = psnr(render, truth, mask).item()
        scores["LPIPS"][name] = distance(render, truth).item() if distance else None
        for band, value in zip(BANDS, _psnr_of_bands(render, truth, mask)):
            scores[f"PSNR {band}"][name] = value
    return scores


def _psnr_of_bands(render: Tensor, truth: Tensor, mask: Tensor | None) -> list[float | None]:
    """None for a third that has no pixel that counts."""
    ends = [round(part * truth.shape[1] / len(BANDS)) for part in range(len(BANDS) + 1)]
    values: list[float | None] = []
    for rows in map(slice, ends, ends[1:]):
        counted = None if mask is None else mask[rows]
        empty = rows.start == rows.stop or (counted is not None and not counted.any())
        values.append(None if empty else psnr(render[:, rows], truth[:, rows], counted).item())
    return values


def _picture_names(method: Path) -> list[str]:
    renders, truths = ({path.name for path in (method / part).glob("*.png")} for part in ("renders", "gt"))
    if not renders:
        raise DataError(f"{method}/renders must hold PNG files, got none; run render.py again")
    if renders != truths:
        odd = sorted(renders ^ truths)
        raise DataError(
            f"{method}: renders and gt must hold the same files, but {odd[0]} is only in one of them"
        )
    return sorted(renders)


def _read_pairs(method: Path, names: list[str]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Render, ground truth and mask, in order, a few decoded ahead, never a whole scene in memory."""

    def read(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = method / "masks" / name
        pair = read_image(method / "renders" / name), read_image(method / "gt" / name)
        return *pair, read_image(mask) if mask.is_file() else None

    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as pool:
        rest = iter(names)
        waiting = [pool.submit(read, name) for name in islice(rest, READ_AHEAD)]
        while waiting:
            pair = waiting.pop(0).result()
            waiting += [pool.submit(read, name) for name in islice(rest, 1)]
            yield pair


def _mean(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None


def _table(model: Path, per_view: dict[str, Scores], results: dict) -> list[str]:
    """One line per method, and the view that came out worst, by the name of its photograph."""
    bands = "".join(f"{band:>8}" for band in BANDS)
    lines = [f"{model}", f"  {'method':<16}{'views':>6}{'PSNR':>9}{'SSIM':>9}{'LPIPS':>9}{bands}  worst view"]
    for method, means in results.items():
        psnrs = {name: value for name, value in per_view[method]["PSNR"].items() if value is not None}
        if not psnrs:
            raise DataError(f"{model / 'test' / method}/masks must have a white pixel, but are all black")
        worst = min(psnrs, key=lambda name: psnrs[name] if not math.isnan(psnrs[name]) else -math.inf)
        shown = [f"{means[m]:9.{digits}f}" if means[m] is not None else f"{'-':>9}"
                 for m, digits in (("PSNR", 3), ("SSIM", 4), ("LPIPS", 4))]  # fmt: skip
        of_bands = [means[f"PSNR {band}"] for band in BANDS]
        shown += [f"{'-':>8}" if value is None else f"{value:8.2f}" for value in of_bands]
        name = photo_names(model / "test" / method).get(worst, worst)
        lines.append(f"  {method:<16}{len(psnrs):>6}{''.join(shown)}  {name} ({psnrs[worst]:.2f} dB)")
    return lines


def _find_lpips(params: MetricsParams, device: torch.device) -> lpips.LPIPS | None:
    """None, and a message, where the weights cannot be had: the other metrics do not wait for them."""
    if params.lpips == "none":
        return None
    try:
        distance = lpips.load(params.lpips, params.lpips_weights, device)
    except lpips.WeightsMissing as message:
        say(*str(message).splitlines())
        return None
    say(f"LPIPS: {params.lpips}, version 0.1, pictures in [0, 1] (the original's convention)")
    return distance


def main(argv: list[str] | None = None) -> int:
    params = parse_metrics(argv)
    return commands.run("metrics.py", lambda: score_models(params))


if __name__ == "__main__":
    sys.exit(main())
