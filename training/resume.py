"""One model folder, several runs: when checkpoints are written, which ones stay, and from which one a run
that was cut off goes on."""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from arguments import ConfigError, RunParams
from scene.folder import MODELS as MODEL_FILES
from scene.folder import ModelFolder
from training import checkpoint
from training.checkpoint import Part
from training.report import READ_EVERY
from utils.files import DataError

KEPT = 2  # checkpoints that nobody asked for by number
SECONDS_BETWEEN = 300.0  # where --checkpoint_every does not say otherwise
MODELS = tuple(f"point_cloud/iteration_*/{name}" for name in MODEL_FILES)
LOCK = ".training"
TORN = (".*.[0-9]*.tmp", "point_cloud/iteration_*/.*.[0-9]*.tmp")  # what a killed process was writing
WRITTEN = (
    "chkpnt*.pth", *MODELS, "events.out.tfevents.*", "train.log", "summary.json",
    "exposure.json", "point_cloud/iteration_*/exposure.json",
    # what render.py, metrics.py and tools.contact_sheet made of it, and would tell of a model that is gone
    *(f"{views}/ours_*/{files}" for views in ("train", "test")
      for files in ("renders/[0-9]*.png", "gt/[0-9]*.png", "masks/[0-9]*.png", "names.json")),
    "results.json", "per_view.json", "contact_sheet.png",
)  # fmt: skip


class Checkpoints:
    """The checkpoints of a model folder."""

    def __init__(self, folder: ModelFolder, run: RunParams, parts: dict[str, Part], device: torch.device):
        self._folder, self._run = folder, run
        self._parts, self._device = parts, device
        self._last = time.monotonic()

    def due(self, iteration: int) -> bool:
        """By the clock only where no loss waits to be shown: curves then go on as if nothing had happened."""
        if iteration in self._run.checkpoint_iterations:
            return True
        if self._run.checkpoint_every > 0:
            return iteration % self._run.checkpoint_every == 0
        late = time.monotonic() - self._last > SECONDS_BETWEEN
        return self._run.checkpoint_every == 0 and late and iteration % READ_EVERY == 0

    def write(self, iteration: int) -> Path:
        path = self._folder.checkpoint(iteration)
        checkpoint.save(path, iteration, self._parts, self._device)
        passing = [i for i in self._folder.checkpoints() if i < iteration and not self._asked_for(i)]
        for old in passing[KEPT - 1 :]:
            self._folder.checkpoint(old).unlink(missing_ok=True)
        self._last = time.monotonic()
        return path

    def _asked_for(self, iteration: int) -> bool:
        return iteration in self._run.checkpoint_iterations

    @contextmanager
    def advice(self) -> Iterator[None]:
        """When the run ends with an error: how to go on."""
        try:
            yield
        except (DataError, OSError) as error:
            last = next(iter(self._folder.checkpoints()), None)
            how = f"iteration {last} is saved, and {how_to_resume(self._folder)} goes on from it"
            raise DataError(f"{error}. {'There is no checkpoint' if last is None else how}") from None

    def load(self, iterations: int, loaded: Callable[[], None]) -> tuple[int, list[str]]:
        """Go on from where this run says; returns the iteration that was, and what to tell the user.

        --resume takes the newest checkpoint of the folder that can be read and is before the last iteration:
        what may be missing after that one is made again.
        """
        candidates, notes = {}, []
        if self._run.resume:
            candidates = {i: path for i, path in self._folder.checkpoints().items() if i < iterations}
        for number, path in candidates.items():
            try:
                done = self._read(path, loaded)
                if done != number:
                    raise DataError(f"{path}: is the checkpoint of iteration {done}")
            except DataError as error:
                notes.append(f"{error}; trying the one before")
                continue
            return done, [*notes, f"Resuming from {path}"]
        if candidates:
            raise DataError(
                f"{self._folder}: none of its {len(candidates)} checkpoints can be read, the first being "
                f"{notes[0].removesuffix('; trying the one before')}; -m names another folder, --overwrite "
                "starts over"
            )
        if self._run.start_checkpoint:
            done = self._read(Path(self._run.start_checkpoint), loaded, same_run=False)
            if done >= iterations:
                raise ConfigError(
                    f"iterations must be more than the {done} of the checkpoint, got {iterations}"
                )
            return done, [f"Starting from {self._run.start_checkpoint}"]
        return 0, ["There is no checkpoint to resume from: starting over"] if self._run.resume else []

    def _read(self, path: Path, loaded: Callable[[], None], same_run: bool = True) -> int:
        done = checkpoint.load(path, self._parts, self._device, same_run)
        try:
            loaded()
        except ValueError as error:
            raise DataError(f"{path}: does not fit this run: {error}") from None
        return done


def finished(folder: ModelFolder) -> int:
    """Number of iterations of the run that ended here; 0 if none did.

    Of a run of the original one sees only the models that it saved; the last of them is taken for its end.
    """
    if not folder.config.is_file():
        return max(folder.saved_iterations(), default=0)
    try:
        return int(json.loads(folder.summary.read_text(encoding="utf-8"))["iterations"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return 0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two processes that train into one folder would spoil each other's work: the second is refused."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; -m names another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / LOCK, "w") as file:
            _lock(file)
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing came of it


def _lock(file: IO) -> None:
    """Until the file is closed, or the process ends however it may."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder = Path(file.name).parent
        raise ConfigError(f"{folder}: another process is training into it; -m names another folder") from None
    except (ImportError, OSError):  # Windows, and file systems that cannot
        pass


def check_folder(folder: ModelFolder, run: RunParams, iterations: int) -> None:
    """What an earlier run left is neither mixed with another one's results nor lost by accident."""
    if run.start_checkpoint and not Path(run.start_checkpoint).is_file():
        raise ConfigError(f"{run.start_checkpoint}: there is no such checkpoint")
    if run.overwrite:
        return
    ended = finished(folder)
    if run.resume:
        if 0 < ended < iterations and not folder.checkpoints() and not run.start_checkpoint:
            raise ConfigError(
                f"{folder} has no checkpoint to resume from, only the model of a run that ended at {ended}; "
                f"{how_to_resume(folder)} --iterations {iterations} --start_checkpoint "
                f"{shlex.quote(str(folder.ply(ended)))} goes on from that"
            )
        return
    start, home = run.start_checkpoint, folder.path.resolve()
    own_start = start and Path(start).resolve().is_relative_to(home)
    if not own_start and (folder.checkpoints() or folder.saved_iterations()):
        raise ConfigError(
            f"{folder} has the results of an earlier run: --resume goes on with it, --overwrite starts over, "
            "-m names another folder"
        )


def clear(folder: ModelFolder, patterns: tuple[str, ...] = WRITTEN) -> None:
    """Remove what an earlier run left, and nothing else; folders, too, as viewers look for the last one."""
    for path in [path for pattern in patterns for path in folder.path.glob(pattern)]:
        path.unlink()
        with suppress(OSError):  # not empty yet
            for parent in path.relative_to(folder.path).parents[:-1]:
                (folder.path / parent).rmdir()


def how_to_resume(folder: ModelFolder) -> str:
    return f"python train.py -m {shlex.quote(str(folder))} --resume"
