"""One model folder, several runs: when checkpoints are written, which ones stay, and from which one a run
that was cut off goes on."""

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import distributed
from arguments import ConfigError, RunParams
from scene.fingerprint import Fingerprint
from scene.folder import ModelFolder
from training import checkpoint
from training.checkpoint import Part
from training.report import READ_EVERY
from utils.files import DataError, open_own
from utils.schedules import reaches
from utils.terminal import say

KEPT = 2  # checkpoints that nobody asked for by number
SECONDS_BETWEEN = 300.0  # where --checkpoint_every does not say otherwise
LOCK = ".training"
LOCK_ATTEMPTS = 1000
N = "(0|[1-9][0-9]*)"  # a number as we write it
INPUTS = re.compile(r"config\.json|cfg_args|split\.json|cameras\.json|input\.ply")
RESULTS = re.compile(
    rf"chkpnt{N}\.pth|summary\.json|train\.log|events\.out\.tfevents\.[0-9]{{10}}\..+|"
    rf"exposure\.json|point_cloud/iteration_{N}/"
    r"(point_cloud\.ply|field\.pth|(blur|appearance)\.pth|(exposure|appearance|poses|blur|cameras)\.json)"
)
# What render.py, metrics.py and tools.contact_sheet made of them, and would tell of a model that is gone.
VIEWS = re.compile(
    rf"(on_[^/]+/)?((train|test)/ours_{N}(_sharp|_aligned|_refined)?(_colors)?/"
    r"((names|seconds)\.json|(renders|gt|masks)/[0-9]{5,}\.png)|"
    r"results\.json|per_view\.json|(contact|blur)_sheet\.png)|on_[^/]+/config\.json"
)
PLACES = ("*", "point_cloud/iteration_*/*", "t*/ours_*/*", "t*/ours_*/*/*")
PLACES += tuple(f"on_*/{place}" for place in ("*", "t*/ours_*/*", "t*/ours_*/*/*"))
TORN = re.compile(r"\.(.+)\.[0-9]+\.tmp")  # what a killed process was writing


class Checkpoints:
    """The checkpoints of a model folder."""

    def __init__(
        self,
        folder: ModelFolder,
        run: RunParams,
        parts: dict[str, Part],
        device: torch.device,
        data: Fingerprint | None = None,  # of the data set
    ):
        self._folder, self._run = folder, run
        self._parts, self._device, self._data = parts, device, data
        self._last = time.monotonic()

    def due(self, iteration: int, views: int = 1) -> bool:
        """After a step of so many views. By the clock only where no loss waits to be shown: curves then go on
        as if nothing had happened."""
        if any(iteration - views < asked <= iteration for asked in self._run.checkpoint_iterations):
            return True
        if self._run.checkpoint_every > 0:
            return reaches(self._run.checkpoint_every, iteration, views)
        late = time.monotonic() - self._last > SECONDS_BETWEEN
        return self._run.checkpoint_every == 0 and late and reaches(READ_EVERY, iteration, views)

    def write(self, iteration: int) -> Path:
        path = self._folder.checkpoint(iteration)
        checkpoint.save(path, iteration, self._parts, self._device, self._data)
        passing = [i for i in self._folder.checkpoints() if i < iteration and not self._asked_for(i)]
        for old in passing[KEPT - 1 :] if distributed.current().first else ():
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
        done = checkpoint.load(path, self._parts, self._device, self._data, same_run)
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
    except (OSError, ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return 0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two processes that train into one folder would spoil each other's work: the second is refused."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; -m names another folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        handle = _lock(folder)
        try:
            yield
        finally:
            _unlock(handle, folder / LOCK)
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()  # if nothing came of it


def is_busy(folder: Path) -> bool:
    """Is a process training into it?"""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        _locked(handle, folder)
    except ConfigError:
        return True
    os.close(handle)
    return False


def _lock(folder: Path) -> int:
    """A descriptor of the lock file, locked until it is closed or the process ends however it may.

    Whoever removes the file holds its lock. A lock on a file that was removed meanwhile is worth nothing:
    then there is a new file, or none, and it begins again.
    """
    for _ in range(LOCK_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except (FileNotFoundError, FileExistsError):
            if folder.is_symlink():
                raise
            continue  # the folder was empty, and is gone
        if _locked(handle, folder) and _is_at(handle, folder / LOCK):
            return handle
        os.close(handle)
    raise ConfigError(f"{folder}: other processes keep training into it; -m names another folder")


def _locked(handle: int, folder: Path) -> bool:
    """Raises if another process has the lock. Where there are no locks, everybody has it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{folder}: another process is training into it; -m names another folder") from None
    except ImportError:  # Windows
        pass
    except OSError as error:
        say(f"{folder} cannot be locked ({error}): see that no other run trains into it")
    return True


def _is_at(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def _unlock(handle: int, path: Path) -> None:
    """The file goes while it is locked: who has opened it by now finds that it is not there any more."""
    if _is_at(handle, path):
        with suppress(OSError):
            path.unlink()
    os.close(handle)


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


def clear(folder: ModelFolder, overwrite: bool) -> None:
    """Remove what a killed run was writing; to overwrite, the results of an earlier run as well, and nothing
    else. Folders, too, as viewers look for the last one."""
    for path in [path for place in PLACES for path in folder.path.glob(place)]:
        if not _to_remove(path, folder.path, overwrite) or not (path.is_file() or path.is_symlink()):
            continue
        path.unlink()
        with suppress(OSError):  # not empty yet
            for parent in path.relative_to(folder.path).parents[:-1]:
                (folder.path / parent).rmdir()


def _to_remove(path: Path, folder: Path, overwrite: bool) -> bool:
    torn = TORN.fullmatch(path.name)
    name = (path.with_name(torn[1]) if torn else path).relative_to(folder).as_posix()
    if RESULTS.fullmatch(name):
        return bool(torn) or overwrite
    return bool(torn and INPUTS.fullmatch(name)) or bool(overwrite and VIEWS.fullmatch(name))


def how_to_resume(folder: ModelFolder) -> str:
    ranks = distributed.current()
    start = "python" if ranks.alone else f"torchrun --nproc_per_node {ranks.count}"
    return f"{start} train.py -m {shlex.quote(str(folder))} --resume"
