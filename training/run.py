"""A run around a method: its folder, lock, log, clock, signals, checkpoints and how it ends.

train() in train.py tells the story; here is what keeps hours of it from being lost.
"""

import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distributed
from arguments import ConfigError, Options, pick_device
from gaussian_renderer.network_gui import Request, Viewer
from scene.folder import ModelFolder
from scene.points import numpy_seed
from training import resume
from training.health import CHECK_EVERY
from training.method import Method
from training.queue import spread
from training.report import (
    READ_EVERY,
    Report,
    RunHistory,
    Stopwatch,
    Summary,
    failures_in_log,
    peak_memory,
)
from utils import commands
from utils.files import write_json
from utils.memory import grow_in_place, out_of_memory
from utils.schedules import reaches
from utils.terminal import say


class Run:
    """Use it as a context; then iterations() is the loop."""

    summary: Summary | None = None  # of a run that went to its end

    def __init__(self, options: Options):
        self.options = options
        self.folder = ModelFolder(options.model.model_path)
        self.history = RunHistory()
        self._views = 1  # of the last step
        self._started = time.perf_counter()
        self._notes: list[str] = []  # lines for the log until there is one
        self._log: Callable[..., None] = lambda *lines: self._notes.extend(lines)

    def __enter__(self) -> "Run":
        run = self.options.run
        with ExitStack() as stack:
            self._join(stack)
            if self.ranks.first:
                stack.enter_context(resume.alone_in(self.folder.path))
                stack.enter_context(failures_in_log(self.folder))
            grow_in_place()
            self.device = pick_device(device_of_rank(run.device))
            seed_everything(run.seed)
            if run.deterministic and self.device.type == "cuda":
                fix_the_order_of_sums()
            if self.ranks.first:
                resume.check_folder(self.folder, run, self.options.opt.iterations)
            self.ranks.meet("start")
            self._open = stack.pop_all()
        return self

    def _join(self, stack: ExitStack) -> None:
        """The other processes, if torchrun has started several: the first of them writes and talks."""
        run = self.options.run
        self.ranks = distributed.join(gpu=device_of_rank(run.device) != "cpu")
        stack.push(lambda kind, error, trace: self.ranks.end(error))
        if not self.ranks.alone:
            run.disable_viewer = True
            run.quiet |= not self.ranks.first

    def __exit__(self, *error) -> bool | None:
        return self._open.__exit__(*error)

    def finished(self) -> bool:
        """Is there nothing left to resume?"""
        done = self.options.run.resume and resume.finished(self.folder) >= self.options.opt.iterations
        if done and self.ranks.first:
            say(f"{self.folder} is finished; with more --iterations it goes on")
        return done

    def say(self, *lines: str) -> None:
        """Lines for the log."""
        self._log(*lines)

    # The loop

    def iterations(self, trainer: Method) -> Iterator[int]:
        """The numbers of the iterations that are left, from 1 if there is nothing to resume. An iteration is
        a view; of a step of several, it is the last one's number."""
        done = self._begin(trainer)
        last, viewer = self.options.opt.iterations, self._start_viewer()
        signals = self._open.enter_context(commands.Patience())
        while done < last:
            if viewer:
                with suppress(commands.Stopped), signals.at_once():
                    viewer.serve(partial(self._view, trainer), stats=partial(self._stats, done, trainer))
            if asked := self._asked(signals, done):
                self._stop_early(trainer, done, asked)
            self._views = trainer.views = min(trainer.views_per_step, last - done)
            done += trainer.views
            yield done
        for note in trainer.closing_notes():
            self.say(note)
        self.summary = self._summarize(last, trainer)
        self._report.finish(self.summary, self.folder if self.ranks.first else None)
        if viewer:
            with signals.at_once():  # for as long as the viewer wants to stay
                viewer.serve(partial(self._view, trainer), True, partial(self._stats, last, trainer))
            viewer.close()

    def _asked(self, signals: commands.Patience, done: int) -> int:
        """The signal by which the run is asked to end; one that came to any process, now and then."""
        own = signals.asked or 0
        if self.ranks.alone:
            return own
        return self.ranks.most(own) if reaches(READ_EVERY, done, self._views) else 0

    def _begin(self, trainer: Method) -> int:
        """Go on from a checkpoint if there is one to go on from; returns the iteration that was."""
        self.options = trainer.options  # iterations may follow from the photos
        opt, run = self.options.opt, self.options.run
        parts = trainer.parts() | {"history": self.history}
        data = trainer.scene.fingerprint
        self._checkpoints = resume.Checkpoints(self.folder, run, parts, self.device, data)
        done, notes = self._checkpoints.load(opt.iterations, trainer.loaded)
        if not done and not run.start_checkpoint:
            trainer.start()
        self._notes += notes
        self._started -= self.history.seconds + self.history.left_out  # of the processes before this one
        self.ranks.meet("begin")  # all have read what they go on from
        if self.ranks.first:
            self._write_inputs(trainer)
        folder = self.folder if self.ranks.first else None
        self._report = Report(folder, done + 1, opt.iterations, self.device, run.quiet, self.history)
        self._report.unit = trainer.unit
        self._open.enter_context(closing(self._report))
        if self.ranks.first:
            self._open.enter_context(self._checkpoints.advice())
        self._log = self._report.log
        for note in [*trainer.scene.warnings, *self._notes]:
            self.say(note)
        self.say(
            f"Training from iteration {done + 1} on {self.device}: {len(trainer.scene.train_cameras)} train "
            f"and {len(trainer.scene.test_cameras)} test views, {trainer.describe()}"
        )
        self._watch = Stopwatch(self.device, self.history)
        self._shown: deque = deque(maxlen=3 * READ_EVERY)  # (iteration, view): losses arrive late
        return done

    def _write_inputs(self, trainer: Method) -> None:
        run = self.options.run
        resume.clear(self.folder, run.overwrite)
        stored = trainer.options._replace(run=replace(run, resume=False, overwrite=False))
        self.folder.write_options(stored)
        trainer.scene.write_inputs()

    def _start_viewer(self) -> Viewer | None:
        run = self.options.run
        if run.disable_viewer:
            return None
        viewer = Viewer(run.ip, run.port, self.options.model.source_path, self.say, self.device)
        if viewer.address:  # for view.py
            with self._report.spare_the_run():
                write_json(self.folder.viewer, {"ip": viewer.address[0], "port": viewer.address[1]})
            self._open.callback(self.folder.viewer.unlink, missing_ok=True)
            if run.view:
                self._open.enter_context(_page_of(self.folder))
        return viewer

    def _stats(self, iteration: int, trainer: Method) -> dict:
        """For a viewer that asks."""
        return {
            "iteration": iteration,
            "iterations": self.options.opt.iterations,
            "gaussians": len(trainer),
            "losses": self.history.smooth,
            "model_path": str(self.folder.path.absolute()),
        }

    def _view(self, trainer: Method, request: Request) -> Tensor:
        """What a viewer asks for, from a camera in the data set's coordinates."""
        assert request.camera is not None
        trainer.scene.enter(request.camera)
        return trainer.viewed(request.camera, request)

    def report(self, iteration: int, losses: dict[str, Tensor], trainer: Method) -> None:
        """Losses arrive on the host some iterations later; one that is not finite is looked into then."""
        self._shown.append((iteration, trainer.last_view))
        bad = self._report.step(iteration, losses, len(trainer))
        if bad:
            view = dict(self._shown).get(bad[0], "?")
            trainer.check(f"iteration {bad[0]}, view {view}, loss {bad[1]}", known_bad=True)
        elif reaches(CHECK_EVERY, iteration, self._views):
            trainer.check(f"iteration {iteration}")

    def evaluate_and_save(self, iteration: int, trainer: Method) -> None:
        """When it is time."""
        run, last = self.options.run, iteration == self.options.opt.iterations
        if self._asked_for(run.test_iterations, iteration) or last:
            with self._watch.leave_out():
                self._evaluate(iteration, trainer)
        self._saved = len(trainer)
        if self._asked_for(run.save_iterations, iteration) or last:
            with self._watch.leave_out(), nullcontext() if last else self._report.spare_the_run():
                trainer.check(f"iteration {iteration}")
                self._model = trainer.save(self.folder, iteration)

    def _asked_for(self, numbers: list[int], iteration: int) -> bool:
        """Is one of these numbers that of a view of this step?"""
        return any(iteration - self._views < number <= iteration for number in numbers)

    def checkpoint(self, iteration: int, trainer: Method) -> None:
        """When it is due."""
        due = self._checkpoints.due(iteration, self._views)
        if reaches(READ_EVERY, iteration, self._views):  # by the clock of any process
            due = self.ranks.any(due)
        if due:
            with self._watch.leave_out(), self._report.spare_the_run():
                trainer.check(f"iteration {iteration}")
                self._report.flush()
                self._checkpoints.write(iteration)

    def _evaluate(self, iteration: int, trainer: Method) -> None:
        """All test views, and five train views."""
        sets = {"test": trainer.scene.test_cameras, "train": spread(trainer.scene.train_cameras)}
        try:
            with self.ranks.together():
                self._report.evaluate(iteration, sets, trainer.pairs, trainer.histograms(), len(trainer))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.say(f"out of memory: iteration {iteration} is not evaluated in full")

    def _stop_early(self, trainer: Method, iteration: int, signal: int) -> None:
        """Somebody asked the run to end after this iteration: leave what it takes to go on."""
        trainer.check(f"iteration {iteration}")
        self._report.flush()
        with self._watch.leave_out():
            path = self._checkpoints.write(iteration)
        trainer.save(self.folder, iteration)
        self.say(
            f"Stopped after iteration {iteration}; the model and {path} are saved. To go on:",
            f"  {resume.how_to_resume(self.folder)}",
        )
        raise commands.Stopped(signal)

    def _summarize(self, iterations: int, trainer: Method) -> Summary:
        cpu, times = f"{torch.get_num_threads()} CPU threads", ""
        if not self.ranks.alone:
            times = f"{self.ranks.count} x "
        return Summary(
            iterations=iterations,
            gaussians=self._saved,
            unit=trainer.unit,
            scores=self.history.scores,
            optimization_seconds=self._watch.seconds(),
            evaluation_and_saving_seconds=self._watch.left_out,
            total_seconds=time.perf_counter() - self._started,
            peak_memory_bytes=self.ranks.most(peak_memory(self.device)),
            device=times + (torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu),
            model_path=str(self.folder),
            point_cloud=str(self._model),
        )


@contextmanager
def _page_of(folder: ModelFolder) -> Iterator[None]:
    """view.py in a process of its own, for as long as the run takes."""
    command = [sys.executable, str(Path(__file__).parents[1] / "view.py"), "-m", str(folder), "--open"]
    process = subprocess.Popen([*command, "--port", "0", "--device", "cpu"])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def device_of_rank(name: str) -> str:
    """Each process of torchrun has a GPU of its own."""
    if not distributed.started_by_torchrun():
        return name
    if name not in ("", "cpu", "cuda"):
        raise ConfigError(f"device must be cuda or cpu with several processes, got {name!r}")
    gpu = name == "cuda" or (not name and torch.cuda.is_available())
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(numpy_seed(seed))
    torch.manual_seed(seed)


def fix_the_order_of_sums() -> None:
    """The same bits from run to run on a GPU as well, in PyTorch's operators and in ours."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True)
