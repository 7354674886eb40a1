"""One model folder, several runs: when checkpoints are written, which ones stay, and from which one a run
that was cut off goes on."""

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from arguments import CONFIG_FILE, ConfigError, RunParams
from scene import saved_iterations
from scene.gaussian_model import GaussianModel
from strategies.adc import AdaptiveDensityControl
from training import checkpoint
from training.queue import ViewQueue
from training.report import READ_EVERY, Told
from utils.files import DataError

KEPT = 2  # checkpoints that nobody asked for by number
SECONDS_BETWEEN = 300.0  # where --checkpoint_every does not say otherwise
MODELS = "point_cloud/iteration_*/point_cloud.ply"
SUMMARY = "summary.json"
LOCK = ".training"
TORN = (".*.[0-9]*.tmp", "point_cloud/iteration_*/.*.[0-9]*.tmp")  # what a killed process was writing
WRITTEN = (
    "chkpnt*.pth", MODELS, "events.out.tfevents.*", "train.log", SUMMARY,
    "exposure.json", "point_cloud/iteration_*/exposure.json",
    # what render.py, metrics.py and tools.contact_sheet made of it, and would tell of a model that is gone
    *(f"{views}/ours_*/{files}" for views in ("train", "test")
      for files in ("renders/[0-9]*.png", "gt/[0-9]*.png", "masks/[0-9]*.png", "names.json")),
    "results.json", "per_view.json", "contact_sheet.png",
)  # fmt: skip


class Checkpoints:
    """The checkpoints of a model folder."""

    def __init__(
        self,
        folder: Path,
        run: RunParams,
        gaussians: GaussianModel,
        density: AdaptiveDensityControl,
        queue: ViewQueue,
        told: Told,
    ):
        self._folder, self._run = folder, run
        self._state = gaussians, density, queue, told
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
        path = self._folder / f"chkpnt{iteration}.pth"
        checkpoint.save(path, iteration, *self._state)
        passing = [i for i in found(self._folder) if i < iteration and not self._asked_for(i)]
        for old in passing[KEPT - 1 :]:
            (self._folder / f"chkpnt{old}.pth").unlink(missing_ok=True)
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
            last = next(iter(found(self._folder)), None)
            how = f"iteration {last} is saved, and {how_to_resume(self._folder)} goes on from it"
            raise DataError(f"{error}. {'There is no checkpoint' if last is None else how}") from None

    def load(self, iterations: int) -> tuple[int, list[str]]:
        """Go on from where this run says; returns the iteration that was, and what to tell the user.

        --resume takes the newest checkpoint of the folder that can be read and is before the last iteration:
        what may be missing after that one is made again.
        """
        notes, candidates = [], {}
        if self._run.resume:
            candidates = {i: path for i, path in found(self._folder).items() if i < iterations}
        for number, path in candidates.items():
            try:
                done = checkpoint.load(path, *self._state)
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
            done = checkpoint.load(self._run.start_checkpoint, *self._state, same_run=False)
            if done >= iterations:
                raise ConfigError(
                    f"iterations must be more than the {done} of the checkpoint, got {iterations}"
                )
            return done, [f"Starting from {self._run.start_checkpoint}"]
        return 0, ["There is no checkpoint to resume from: starting over"] if self._run.resume else []


def found(folder: Path) -> dict[int, Path]:
    """Iteration -> checkpoint, the newest first."""
    numbers = [path.stem.removeprefix("chkpnt") for path in folder.glob("chkpnt*.pth")]
    newest_first = sorted((int(n) for n in numbers if n.isascii() and n.isdecimal()), reverse=True)
    return {n: folder / f"chkpnt{n}.pth" for n in newest_first}


def finished(folder: Path) -> int:
    """Number of iterations of the run that ended here; 0 if none did.

    Of a run of the original one sees only the models that it saved; the last of them is taken for its end.
    """
    if not (folder / CONFIG_FILE).is_file():
        return max(saved_iterations(folder), default=0)
    try:
        return int(json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["iterations"])
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


def check_folder(folder: Path, run: RunParams, iterations: int) -> None:
    """What an earlier run left is neither mixed with another one's results nor lost by accident."""
    if run.start_checkpoint and not Path(run.start_checkpoint).is_file():
        raise ConfigError(f"{run.start_checkpoint}: there is no such checkpoint")
    if run.overwrite:
        return
    ended = finished(folder)
    if run.resume:
        if 0 < ended < iterations and not found(folder) and not run.start_checkpoint:
            model = folder / "point_cloud" / f"iteration_{ended}" / "point_cloud.ply"
            raise ConfigError(
                f"{folder} has no checkpoint to resume from, only the model of a run that ended at {ended}; "
                f"{how_to_resume(folder)} --iterations {iterations} --start_checkpoint "
                f"{shlex.quote(str(model))} goes on from that"
            )
        return
    own_start = run.start_checkpoint and Path(run.start_checkpoint).resolve().is_relative_to(folder.resolve())
    if not own_start and (found(folder) or any(folder.glob(MODELS))):
        raise ConfigError(
            f"{folder} has the results of an earlier run: --resume goes on with it, --overwrite starts over, "
            "-m names another folder"
        )


def clear(folder: Path, patterns: tuple[str, ...] = WRITTEN) -> None:
    """Remove what an earlier run left, and nothing else; folders, too, as viewers look for the last one."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
        with suppress(OSError):  # not empty yet
            for parent in path.relative_to(folder).parents[:-1]:
                (folder / parent).rmdir()


def how_to_resume(folder: Path) -> str:
    return f"python train.py -m {shlex.quote(str(folder))} --resume"
