"""What a run tells while it goes and leaves when it ends: progress bar, text log, TensorBoard, summary.

Nothing here makes the host wait for the device in an ordinary iteration. Losses stay on the device; every
READ_EVERY iterations they are sent for, and shown when they have arrived.
"""

import contextlib
import math
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import distributed
from arguments import ConfigError
from scene.folder import ModelFolder
from utils import commands
from utils.files import DataError, open_own, write_json
from utils.image import masked_mean, psnr, psnr_by_channel, psnr_of_one_color, to_float, to_uint8
from utils.memory import out_of_memory
from utils.schedules import reaches
from utils.terminal import plain, progress

READ_EVERY = 10
COUNT_EVERY = 100  # iterations from one point of the curves of count and memory to the next
CURVES = {"loss": "total_loss", "l1": "l1_loss"}  # the original's names of curves
SMOOTHING = 0.4  # weight of the newest loss in the average that is shown
PICTURES = 5  # views of each set that go to TensorBoard
JPEG_QUALITY = 90
LOOK = "python -m scene.inspect shows how the cameras and points of a data set lie"
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Log:
    """Lines to the terminal and to <folder>/train.log. Quiet: to the file only. Without a folder: to none."""

    def __init__(self, folder: ModelFolder | None, quiet: bool = False):
        self._quiet, self._file = quiet, None
        if folder is None:
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            handle = open_own(folder.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._file = open(handle, "a", encoding="utf-8")  # noqa: SIM115
        except (OSError, DataError) as error:
            self(f"no log file: {error}; training goes on")

    def __call__(self, *lines: str) -> None:
        text = "\n".join(map(plain, lines))
        with contextlib.suppress(OSError):  # a full disk
            if self._file:
                self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
                self._file.flush()
        if not self._quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()


@contextmanager
def failures_in_log(folder: ModelFolder) -> Iterator[None]:
    """Why a run ended is in its log, too, for whoever comes back in the morning. A run that was refused, or
    interrupted before it began, changes nothing."""
    before = _changed(folder.log)
    try:
        yield
    except BaseException as error:
        reason = commands.in_a_line(error)
        lines = traceback.format_exc().splitlines() if reason is None else [reason]
        begun = _changed(folder.log) != before
        if begun or not isinstance(error, KeyboardInterrupt | ConfigError | DataError):
            log = Log(folder, quiet=True)
            log(f"Ended: {lines[0]}", *lines[1:])
            log.close()
        raise


def _changed(path: Path) -> int | None:
    """When, in nanoseconds; None if there is no such file."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


class Deferred:
    """Values of device tensors, some iterations later and without waiting for the device."""

    def __init__(self, device: torch.device, collected: list[tuple[int, dict[str, Tensor]]] | None = None):
        self._device = device
        self._collected = [] if collected is None else collected  # (iteration, scalars on the device)
        self._travelling: tuple[list[tuple[int, list[str]]], Tensor, torch.cuda.Event | None] | None = None

    def put(self, iteration: int, values: dict[str, Tensor]) -> None:
        self._collected.append((iteration, values))

    def send(self) -> None:
        """Start the copy to the host of all that was put."""
        if not self._collected:
            return
        names = [(iteration, list(row)) for iteration, row in self._collected]
        values = torch.stack([v.to(self._device) for _, row in self._collected for v in row.values()])
        self._collected.clear()
        arrived = None
        if self._device.type == "cuda":
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))  # it may not be the current device's
        self._travelling = (names, values, arrived)

    def receive(self) -> list[tuple[int, dict[str, float]]]:
        """What the last send() carried: (iteration, values) each. Empty if there was none."""
        if self._travelling is None:
            return []
        names, values, arrived = self._travelling
        self._travelling = None
        if arrived is not None:
            arrived.synchronize()  # it was recorded READ_EVERY iterations ago
        numbers = iter(distributed.current().mean(values.tolist()))
        return [(iteration, {name: next(numbers) for name in row}) for iteration, row in names]


class Stopwatch:
    """Seconds of device and host work, without the stretches that are left out and counted apart."""

    def __init__(self, device: torch.device, history: "RunHistory | None" = None):
        self._device = device
        self._history = history or RunHistory()
        self._start = time.perf_counter() - self._history.seconds - self._history.left_out

    @property
    def left_out(self) -> float:
        return self._history.left_out

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """Evaluation and saving: not part of the optimization."""
        self._history.seconds = self.seconds()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._finish_device()
            self._history.left_out += time.perf_counter() - start

    def seconds(self) -> float:
        self._finish_device()
        return time.perf_counter() - self._start - self.left_out

    def _finish_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass
class Scores:
    """Means over a set of views."""

    views: int
    l1: float
    psnr: float  # over the whole picture, as metrics.py
    psnr_by_channel: float  # as the original's train.py prints it


@dataclass
class RunHistory:
    """What a run has reported so far. A run that is continued goes on from there."""

    scores: dict[str, dict[int, Scores]] = field(default_factory=dict)  # set of views -> iteration -> scores
    smooth: dict[str, float] = field(default_factory=dict)  # averages of the losses, as shown
    waiting: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)  # losses not shown yet
    seconds: float = 0.0  # of optimization, as of when the stopwatch was last held
    left_out: float = 0.0

    def state_dict(self) -> dict:
        """Plain values."""
        mean = distributed.current().mean
        rows = ((i, list(row), mean([float(v) for v in row.values()])) for i, row in self.waiting)
        waiting = [[iteration, dict(zip(names, numbers))] for iteration, names, numbers in rows]
        scores = {name: {i: asdict(s) for i, s in rows.items()} for name, rows in self.scores.items()}
        return {
            "scores": scores,
            "smooth": self.smooth,
            "waiting": waiting,
            "seconds": self.seconds,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: dict) -> None:
        self.scores = {
            str(name): {int(i): Scores(**scores) for i, scores in by_iteration.items()}
            for name, by_iteration in state["scores"].items()
        }
        self.smooth = {str(name): float(value) for name, value in state["smooth"].items()}
        self.waiting[:] = [
            (int(i), {str(name): torch.tensor(float(v)) for name, v in row.items()})
            for i, row in state["waiting"]
        ]
        self.seconds, self.left_out = float(state["seconds"]), float(state["left_out"])


def score(pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Scores | None:
    """Scores of pictures [3, H, W], unquantized but clamped to [0, 1], against their ground truth, where the
    mask [H, W] is 1 (None: everywhere). None without pairs."""
    rows = []
    for image, truth, mask in pairs:
        if mask is not None and not mask.any():
            continue  # nothing of this photo counts
        image, truth = image.clamp(0.0, 1.0), to_float(truth)
        l1 = masked_mean((image - truth).abs(), mask).mean()
        rows.append(torch.stack([l1, psnr(image, truth, mask), psnr_by_channel(image, truth, mask)]))
    return Scores(len(rows), *torch.stack(rows).double().mean(dim=0).tolist()) if rows else None


class Report:
    """All that is written during training, to `folder`."""

    unit = "Gaussians"  # what is counted

    def __init__(
        self,
        folder: ModelFolder | None,  # None: nothing is written
        first: int,  # iteration, counted from 1
        last: int,
        device: torch.device,
        quiet: bool = False,
        history: RunHistory | None = None,  # by the run that is continued
    ):
        self.log = Log(folder, quiet)
        self.history = history or RunHistory()
        self._board = _tensorboard(folder.path, first, self.log) if folder else None
        self._device = device
        self._deferred = Deferred(device, self.history.waiting)
        self._bar = progress(desc="Training", total=last, initial=first - 1, disable=quiet)
        self._last = last
        self._now = first - 1, 0  # iteration, number of Gaussians
        self._bad: tuple[int, float] | None = None  # the first loss that was not finite, until it is told
        self._since = time.perf_counter(), first - 1
        self._counted = 0  # the last iteration whose count is among the curves
        self._empty = False
        self._doubts: dict[str, str] = {}  # set of views -> what is wrong with its last scores

    def step(self, iteration: int, losses: dict[str, Tensor], count: int) -> tuple[int, float] | None:
        """Once per iteration: scalars on the device, "loss" being what was minimized.

        Returns the first of the iterations read back now whose loss is not finite, and that loss.
        """
        self._deferred.put(iteration, {name: value.detach() for name, value in losses.items()})
        views = iteration - self._now[0]
        self._now = iteration, count
        if not count and not self._empty:
            self._empty = True
            self.log(f"Warning: iteration {iteration}: no Gaussian is left. {LOOK}")
        if reaches(COUNT_EVERY, iteration, views) or iteration == self._last:
            self._board_count(iteration, count)
        if reaches(READ_EVERY, iteration, views) or iteration == self._last:
            self._show(self._deferred.receive())
            self._deferred.send()
            if iteration == self._last or self._device.type == "cpu":
                self._show(self._deferred.receive())
            bad, self._bad = self._bad, None
            return bad
        return None

    def _show(self, arrived: list[tuple[int, dict[str, float]]]) -> None:
        iteration, count = self._now
        infinite = ((i, row["loss"]) for i, row in arrived if not math.isfinite(row["loss"]))
        self._bad = self._bad or next(infinite, None)
        arrived = [row for row in arrived if any(row[1].values())]  # all zero: a step that was not taken
        smooth = self.history.smooth
        for _, values in arrived:
            for name in {**smooth, **values}:  # from zero, as the original; zero where there is none
                old, new = smooth.get(name, 0.0), values.get(name, 0.0)
                smooth[name] = SMOOTHING * new + (1.0 - SMOOTHING) * old
        if smooth:
            shown = {name: f"{value:.5f}" for name, value in smooth.items() if name != "l1"}
            shown |= {self.unit.lower(): f"{count:,}", "memory": _megabytes(memory_in_use(self._device))}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(iteration - self._bar.n)
        if self._board and arrived:
            self._board_losses(arrived)

    def _board_losses(self, arrived: list[tuple[int, dict[str, float]]]) -> None:
        step = arrived[-1][0]
        now, before = (time.perf_counter(), arrived[-1][0]), self._since
        milliseconds = 1000.0 * (now[0] - before[0]) / max(now[1] - before[1], 1)
        self._since = now
        for name in dict.fromkeys(name for _, row in arrived for name in row):
            values = torch.tensor([row[name] for _, row in arrived if name in row])
            self._draw(
                "add_scalar", f"train_loss_patches/{CURVES.get(name, name)}", values.mean().item(), step
            )
        self._draw("add_scalar", "iter_time", milliseconds, step)

    def _board_count(self, iteration: int, count: int) -> None:
        if self._board and iteration != self._counted:
            self._counted = iteration
            self._draw("add_scalar", "total_points", count, iteration)
            self._draw("add_scalar", "memory", memory_in_use(self._device) / 1e6, iteration)

    def evaluate(
        self,
        iteration: int,
        sets: dict[str, list],
        render_pairs: Callable[[list], Iterable],
        histograms: dict[str, Tensor],
        count: int,
    ) -> None:
        """Score each named set of cameras. render_pairs(cameras) yields (picture, ground truth, mask)."""
        for name, cameras in sets.items():
            first_time = not self.history.scores.get(name)
            one_color: list[Tensor] = []
            pairs = self._with_pictures(iteration, name, cameras, render_pairs, first_time, one_color)
            scores = score(pairs)
            if scores is None:
                continue
            self.history.scores.setdefault(name, {})[iteration] = scores
            self.log(
                f"[{iteration:>6}] {name:>5}: PSNR {scores.psnr:.3f} dB "
                f"(mean of channels {scores.psnr_by_channel:.3f}), L1 {scores.l1:.5f}, "
                f"{scores.views} views, {count:,} {self.unit}"
            )
            self._doubt(name, scores.psnr, torch.stack(one_color).nanmean().item())
            self._draw("add_scalar", f"{name}/loss_viewpoint - l1_loss", scores.l1, iteration)
            self._draw("add_scalar", f"{name}/loss_viewpoint - psnr", scores.psnr_by_channel, iteration)
        self._board_count(iteration, count)
        for name, values in histograms.items():
            if values.numel():
                self._draw("add_histogram", name, values, iteration)
        self._draw("flush")  # here, not beside training: writing a picture keeps Python busy
        self._since = time.perf_counter(), iteration

    def _doubt(self, name: str, found: float, one_color: float) -> None:
        """Is the model of any use? `one_color`: what pictures of one color each would reach, in dB."""
        self._doubts.pop(name, None)
        if not found >= one_color:
            self._doubts[name] = (
                f"Warning: {name} views have {found:.2f} dB, and pictures of one color each would have "
                f"{one_color:.2f}: the model shows nothing of them. {LOOK}"
            )
            self.log(self._doubts[name])

    def _with_pictures(self, iteration, name, cameras, render_pairs, first_time, one_color):
        for index, (camera, (image, truth, mask)) in enumerate(zip(cameras, render_pairs(cameras))):
            one_color.append(psnr_of_one_color(to_float(truth), mask))
            if self._board and index < PICTURES:
                tag = f"{name}_view_{camera.name}"
                self._draw_picture(f"{tag}/render", image, iteration)
                if first_time:
                    self._draw_picture(f"{tag}/ground_truth", truth, iteration)
            yield image, truth, mask

    def _draw_picture(self, tag: str, image: Tensor, step: int) -> None:
        """As add_image(), but not as PNG: TensorBoard sums up every byte in Python, 6 MB a second."""
        file, pixels = BytesIO(), to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()
        with contextlib.suppress(OSError):  # wider or higher than a JPEG file can be
            Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            height, width = pixels.shape[:2]
            self._draw("add_summary", _picture(tag, height, width, file.getvalue()), step)

    def _draw(self, method: str, *arguments) -> None:
        """TensorBoard, if it is there. What fails in it, as on a full disk, ends the curves, not the run."""
        try:
            if self._board:
                where = self._board.file_writer if method == "add_summary" else self._board
                getattr(where, method)(*arguments)
        except Exception as error:
            self._board = None
            self.log(f"no more TensorBoard events: {error}")

    def finish(self, summary: "Summary", folder: ModelFolder | None) -> None:
        """The last words, also as <folder>/summary.json."""
        self._bar.close()
        empty = [] if summary.gaussians else [f"Warning: the model has no Gaussians. {LOOK}"]
        summary.warnings = empty + list(self._doubts.values())
        if folder:
            write_json(folder.summary, asdict(summary), indent=1)
        self.log(*summary.lines())

    @contextmanager
    def spare_the_run(self) -> Iterator[None]:
        """What cannot be written, because the disk or memory is full, is told; training goes on."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError) as error:
            if not isinstance(error, OSError) and not out_of_memory(error):
                raise
            self.log(f"not written: {error}; training goes on")

    def flush(self) -> None:
        """Let what was told so far survive the death of this process."""
        self._show(self._deferred.receive())
        self._draw("flush")

    def close(self) -> None:
        self._bar.close()
        self._draw("close")
        self.log.close()


@dataclass
class Summary:
    """How a run ended. `scores` as in Scores, by set of views and iteration."""

    iterations: int
    gaussians: int
    scores: dict[str, dict[int, Scores]]
    optimization_seconds: float  # densification, optimizer, transfers included
    evaluation_and_saving_seconds: float
    total_seconds: float  # with loading
    peak_memory_bytes: int
    device: str
    model_path: str
    point_cloud: str  # the file of the model
    unit: str = "Gaussians"  # of the count above
    warnings: list[str] = field(default_factory=list)  # reasons to look twice at the model

    def lines(self) -> list[str]:
        lines = [f"Done: {self.iterations:,} iterations, {self.gaussians:,} {self.unit} on {self.device}"]
        for name, by_iteration in self.scores.items():
            last = max(by_iteration)
            scores = by_iteration[last]
            lines.append(f"  PSNR {name:<6} {scores.psnr:.3f} dB at {last:,} ({scores.views} views)")
        lines += [f"  {warning}" for warning in self.warnings]
        model = shlex.quote(self.model_path)
        return [
            *lines,
            f"  time        {self.optimization_seconds:.1f} s optimization, "
            f"{self.evaluation_and_saving_seconds:.1f} s evaluation and saving, "
            f"{self.total_seconds:.1f} s in all",
            f"  peak memory {_megabytes(self.peak_memory_bytes)}",
            f"  model       {self.point_cloud}",
            f"  look        python view.py -m {model}",
            f"  next        python render.py -m {model}",
        ]


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated by torch on a GPU; else resident in this process (its peak, where that is all one can
    ask)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(device)
    return pages * PAGE


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on the GPU; else the most this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _picture(tag: str, height: int, width: int, file: bytes):
    """What TensorBoard takes for a picture."""
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2  # protobuf makes its classes when it is imported
    picture = proto.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
    return proto.Summary(value=[proto.Summary.Value(tag=tag, image=picture)])


def _tensorboard(folder: Path, first: int, log: Callable[[str], None]):
    """Events of an earlier run from step `first` on are not shown any more."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log("tensorboard is not installed: no TensorBoard events will be written")
        return None
    threading.excepthook = _thread_failed
    try:
        return SummaryWriter(str(folder), purge_step=first)
    except Exception as error:  # no room, or no file of that name possible
        log(f"no TensorBoard events: {error}; training goes on")
        return None


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps its error for who writes next, and a line tells it: no traceback, too."""
    if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(failure)
