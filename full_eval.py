"""A table over scenes and methods: trains, renders and scores what is missing, prints and writes it.

    python full_eval.py -m360 data/360 -tat data/tandt -db data/db
    python full_eval.py --scenes data/lego:-w data/fox --methods gaussians dvgo --presets published mcmc
    python full_eval.py --matrix table.json

Each row is a run of train.py, render.py, metrics.py and report.py in a folder of its own below --output_path,
with --eval. Beside the folder are its log and a .json with the command and, when it has ended, the scores.
Say the same command again after an interruption, and it goes on where it was. As many runs go side by side
as there are GPUs. The table is in table.md and table.csv of --output_path; report.html has it, too, with a
view of each scene and links to the reports of the runs.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from arguments import PRESETS as TRAIN_PRESETS
from arguments import ConfigError, number
from arguments.flag import LAST_SEED
from benchmarks.published import PUBLISHED, SETS
from scene.folder import ModelFolder
from tools import contact_sheet
from training import resume, table
from utils import commands
from utils.files import DataError, read_json, write_json
from utils.image import photo_names
from utils.terminal import say
from viewer import report

ROOT = Path(__file__).resolve().parent
SHORT = {"mipnerf360": "-m360", "tanksandtemples": "-tat", "deepblending": "-db"}  # the original's flags
PRESETS = {name: f"--preset {name}" for name in TRAIN_PRESETS} | {"published": ""}
PRESETS |= {"mcmc": "--strategy mcmc", "improved": "--strategy improved"}
USUAL: dict[str, Any] = {
    "scenes": [], "methods": ["gaussians"], "presets": ["published"], "settings": ["="], "seeds": [0],
    "flags": "", "output_path": "eval",
}  # fmt: skip
LOOK_EVERY = 0.2  # seconds
HEAD = ["PSNR", "SSIM", "LPIPS", "views", "size", "MB", "training s", "ms a view", "peak MB"]
SCORES = HEAD[:3]


@dataclass
class Job:
    """A row of the table."""

    data_set: str  # of SETS, or ""
    scene: str
    method: str
    preset: str
    setting: str
    seed: int
    source: str
    flags: list[str]
    folder: Path
    row: dict[str, Any] = field(default_factory=dict)  # when it has ended
    error: str = ""

    @property
    def name(self) -> str:
        words = self.scene, self.method, self.preset, self.setting, f"seed {self.seed}"
        return " ".join(filter(None, words))

    @property
    def record(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def train_flags(self) -> list[str]:
        return ["-s", self.source, "--eval", "--method", self.method, "--seed", str(self.seed), *self.flags]

    def commands(self) -> Iterator[list[str]]:
        """What is left to do, one after another; each is asked for when the one before has ended well."""
        folder = str(self.folder)
        on = ["--resume"] if ModelFolder(folder).config.is_file() else []
        yield ["train.py", *self.train_flags(), "-m", folder, "--disable_viewer", "--quiet", *on]
        yield ["render.py", "-m", folder, "--skip_train", "--quiet"]
        yield ["metrics.py", "-m", folder]
        yield ["report.py", "-m", folder]

    def read(self) -> None:
        """What an earlier call left of it."""
        if not self.record.is_file():
            return
        before = read_json(self.record)
        if before.get("flags") != self.train_flags():
            raise DataError(
                f"{self.record}: was trained with other flags, {shlex.join(before.get('flags') or [])}; "
                "name another --output_path or setting, or remove it and its folder"
            )
        self.row = before.get("row") or {}

    def write(self) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record, {"flags": self.train_flags(), "row": self.row}, indent=1)

    def finish(self) -> None:
        run = read_json(self.folder / "summary.json")
        method = f"ours_{run['iterations']}"
        views = read_json(self.folder / "per_view.json")[method]["PSNR"]
        self.row = dict(read_json(self.folder / "results.json")[method]) | {
            "views": sum(value is not None for value in views.values()),
            "size": f"{run['gaussians']:,} {run['unit']}",
            "MB": Path(run["point_cloud"]).stat().st_size / 1e6,
            "training s": run["optimization_seconds"],
            "ms a view": table.milliseconds(self.folder / "test" / method),
            "peak MB": run["peak_memory_bytes"] >> 20,
        }
        self.write()


# What to run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("full_eval.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--matrix", type=Path, help="JSON file with any of the options below, by their names")
    for name, data_set in SETS.items():
        short = [SHORT[name]] if name in SHORT else []
        parser.add_argument(*short, f"--{name}", help=f"folder with the scenes of {data_set.title}")
    many = {"nargs": "+", "default": None}
    parser.add_argument("--scenes", **many, help="further data sets: path, or path:flags as in data/lego:-w")
    parser.add_argument("--methods", **many, help="gaussians, nerf, dvgo or a module; default: gaussians")
    parser.add_argument(
        "--presets", **many, help=f"of gaussians: {', '.join(PRESETS)}, or name=flags; default: published"
    )
    parser.add_argument("--settings", **many, help="name=flags of train.py, for all methods; = has none")
    parser.add_argument("--seeds", **many, type=number(int, 0, LAST_SEED), help="default: 0")
    parser.add_argument("--flags", default=None, help="of train.py, for all runs, as one word")
    parser.add_argument("--output_path", "-o", default=None, help="default: eval")
    options = parser.parse_args(argv)
    try:
        _with_matrix(options)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    return options


def _with_matrix(options: argparse.Namespace) -> None:
    """What the command line does not say is as the file has it, else as it always is."""
    values = read_json(options.matrix) if options.matrix else {}
    known = set(vars(options)) - {"matrix"}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{options.matrix}: {unknown[0]} is not an option; {', '.join(sorted(known))} are")
    for name, value in values.items():
        words = value if isinstance(USUAL.get(name), list) else [value]
        kind = int if name == "seeds" else str
        if not isinstance(words, list) or not all(type(word) is kind for word in words):
            raise ConfigError(f"{options.matrix}: {name} must be as on the command line, got {value}")
    for name in known:
        if getattr(options, name) is None:
            setattr(options, name, values.get(name, USUAL.get(name)))


def jobs(options: argparse.Namespace) -> list[Job]:
    every = [
        job_of(options, data_set, source, flags, *choice)
        for data_set, source, flags in scenes(options)
        for choice in choices(options)
    ]
    if not every:
        raise ConfigError("there is nothing to run: name data sets, such as --scenes data/fox")
    names = [job.folder for job in every]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two rows have the folder {twice}; scenes and settings need different names")
    return every


def choices(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int, str]]:
    """Method, preset, setting, seed, and the flags of preset and setting. Presets are for Gaussians."""
    presets = dict(named(text, PRESETS) for text in options.presets)
    settings = dict(named(text, {}) for text in options.settings)
    for method, setting, seed in product(options.methods, settings, options.seeds):
        for preset in presets if method == "gaussians" else [""]:
            flags = f"{presets.get(preset, '')} {settings[setting]} {options.flags}"
            yield method, "" if preset == "published" else preset, setting, seed, flags


def job_of(
    options: argparse.Namespace, data_set: str, source: str, flags: list[str],
    method: str, preset: str, setting: str, seed: int, more: str,
) -> Job:  # fmt: skip
    scene = Path(source).name
    words = filter(None, (data_set, scene, method, preset, setting, f"seed{seed}"))
    folder = Path(options.output_path, re.sub(r"[^\w.-]+", "-", "_".join(words)))
    return Job(data_set, scene, method, preset, setting, seed, source, [*flags, *shlex.split(more)], folder)


def named(text: str, known: dict[str, str]) -> tuple[str, str]:
    """name=flags, or the name of what is known."""
    name, equals, flags = text.partition("=")
    if not equals and name not in known:
        raise ConfigError(f"must be name=flags{''.join(f' or {word}' for word in known)}, got {text}")
    return (name, flags) if equals else (name, known[name])


def scenes(options: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Data set of SETS, folder, flags."""
    for name, data_set in SETS.items():
        if (home := getattr(options, name)) is None:
            continue
        here = [scene for scene in data_set.scenes if Path(home, scene).is_dir()]
        if not here:
            some = next(iter(data_set.scenes))
            raise DataError(f"{home}: must have scenes of {data_set.title}, such as {some}")
        if missing := sorted(set(data_set.scenes) - set(here)):
            say(f"{home} does not have {', '.join(missing)}")
        for scene in here:
            yield name, os.path.abspath(Path(home, scene)), shlex.split(data_set.scenes[scene])
    for text in options.scenes:
        path, _, flags = text.partition(":")
        if not Path(path).is_dir():
            raise DataError(f"{path}: must be the folder of a data set")
        yield "", os.path.abspath(path), shlex.split(flags)


# Running it


class Slot:
    """One device, and the job that has it."""

    def __init__(self, gpu: str | None):
        self.gpu = gpu
        self.job: Job | None = None
        self._process: subprocess.Popen | None = None  # None: a run that an earlier call left is waited for

    def take(self, job: Job) -> None:
        self.job, self._rest = job, job.commands()
        job.write()
        self._process = None
        if resume.is_busy(job.folder):
            say(f"{job.name}: the run that an earlier call started is still at it; waiting for it to end")
        else:
            self._start()

    def _start(self) -> None:
        assert self.job is not None
        say(f"{self.job.name}: starts{f' on GPU {self.gpu}' if self.gpu is not None else ''}")
        self._next()

    def _next(self) -> None:
        job = self.job
        assert job is not None
        if (command := next(self._rest, None)) is None:
            job.finish()
            say(f"{job.name}: {job.row['PSNR']:.3f} dB")
            self.job = None
            return
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu is not None else {})
        with open(job.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def look(self) -> None:
        """Go on if the process has ended."""
        if self.job is not None and self._process is None and not resume.is_busy(self.job.folder):
            return self._start()
        if self.job is None or self._process is None or (code := self._process.poll()) is None:
            return
        if code == 0:
            return self._next()
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").split("\n")
        self.job.error = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        say(f"{self.job.name}: failed: {self.job.error}")
        self.job = None

    def stop(self) -> None:
        """It writes a checkpoint first."""
        if self.job is not None and self._process is not None:
            self._process.terminate()
            self._process.wait()


def gpus() -> list[str | None]:
    """Names for CUDA_VISIBLE_DEVICES; of a machine without a GPU, one None."""
    count = torch.cuda.device_count()
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return list(allowed[:count] or map(str, range(count))) or [None]


def run(waiting: list[Job]) -> None:
    slots = [Slot(gpu) for gpu in gpus()]
    try:
        while waiting or any(slot.job for slot in slots):
            for slot in slots:
                slot.look()
                if slot.job is None and waiting:
                    slot.take(waiting.pop(0))
            time.sleep(LOOK_EVERY)
    finally:
        for slot in slots:
            slot.stop()


# The table


def rows(done: list[Job]) -> list[list[table.Cell]]:
    varied = [name for name in ("preset", "setting", "seed") if len({getattr(job, name) for job in done}) > 1]
    columns = ["scene", "method", *varied]
    lines: list[list[table.Cell]] = [[*columns, *HEAD, *(f"published {name}" for name in SCORES)]]
    for job in done:
        plain = not job.preset and not job.setting
        known = PUBLISHED.get((job.data_set, job.scene, job.method)) if plain else None
        cells = [getattr(job, name) for name in columns] + [job.row.get(name) for name in HEAD]
        lines.append([*cells, *(known or [None] * 3)])
    for (data_set, method), scores in means(done).items():
        cells = [f"mean of {SETS[data_set].title}", method, *[""] * len(varied), *scores]
        known = PUBLISHED.get((data_set, "mean", method)) or [None] * 3
        lines.append([*cells, *[None] * (len(HEAD) - len(scores)), *known])
    if all(cell is None for line in lines[1:] for cell in line[-len(SCORES) :]):
        lines = [line[: -len(SCORES)] for line in lines]
    return lines


def means(done: list[Job]) -> dict[tuple[str, str], list[float | None]]:
    """Of the data sets that are there as a whole, as published: data set and method -> scores."""
    found = {}
    for data_set, method in dict.fromkeys((job.data_set, job.method) for job in done if job.data_set):
        one = [
            job for job in done
            if (job.data_set, job.method, job.preset, job.setting) == (data_set, method, "", "")
        ]  # fmt: skip
        if {job.scene for job in one if job.row} == set(SETS[data_set].scenes):
            found[data_set, method] = [mean([job.row.get(name) for job in one]) for name in SCORES]
    return found


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def write_table(done: list[Job], folder: Path) -> None:
    lines = rows(done)
    print(f"\n{table.to_markdown(lines)}")
    for data_set in dict.fromkeys(job.data_set for job in done if job.data_set):
        print(f"\nPublished scores of {SETS[data_set].title}: {SETS[data_set].views}.")
    for name in ("table.md", "table.csv"):
        table.write(lines, folder / name)
        print(f"Table: {folder / name}")


def write_page(done: list[Job], folder: Path, command: str) -> None:
    pages = [ModelFolder(job.folder).report for job in done]
    links = [os.path.relpath(page, folder) if page.is_file() else "" for page in pages]
    runs = [job for job in done if job.row]
    scenes = [
        [run for run in runs if run.source == source] for source in dict.fromkeys(j.source for j in runs)
    ]
    views = [side_by_side(scene) for scene in scenes]
    report.write_table(rows(done), links, views, folder / "report.html", command)
    print(f"Report: {folder / 'report.html'}")


def side_by_side(runs: list[Job]) -> report.Beside:
    """The view of a scene that its first run shows worst: the photo, and what all runs make of it."""
    first = contact_sheet.newest(runs[0].folder)
    psnrs = read_json(runs[0].folder / "per_view.json")[first.name]["PSNR"]
    worst = min((file for file in psnrs if psnrs[file] is not None), key=psnrs.__getitem__)
    name, shown = photo_names(first).get(worst, worst), []
    for job in runs:
        method = contact_sheet.newest(job.folder)
        files = [file for file, photo in photo_names(method).items() if photo == name]
        for row in (contact_sheet.read_row(method, file) for file in files):
            shown = shown or [("photo", row.truth)]
            shown.append((f"{job.name.removeprefix(job.scene).strip()}: {row.scores()[0]}", row.render))
    return report.Beside(f"{runs[0].scene}, {name}", shown)


def evaluate(options: argparse.Namespace, command: str) -> None:
    every = jobs(options)
    for job in every:
        job.read()
    waiting = [job for job in every if not job.row]
    say(f"{len(every)} runs, {len(waiting)} to do")
    run(waiting)
    write_table(every, Path(options.output_path))
    write_page(every, Path(options.output_path), command)
    if failed := [job for job in every if job.error]:
        raise DataError(f"{len(failed)} of {len(every)} runs failed, the first: see {failed[0].log}")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    command = shlex.join(["python", "full_eval.py", *(sys.argv[1:] if argv is None else argv)])
    return commands.run("full_eval.py", lambda: evaluate(options, command))


if __name__ == "__main__":
    sys.exit(main())
