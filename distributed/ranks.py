"""The processes of a run, and what they agree on.

A process that waits for another one which has failed would wait for ever. So before they exchange anything
they meet: each says that it is ready, or why it is not, and then all go on or all fail.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import board
from distributed.board import Board
from utils.files import DataError
from utils.memory import out_of_memory

READY, NO_MEMORY, FAILED = range(3)
NUMBERS = 8  # that a process may tell at a meeting, and one more for each process
PATIENCE = 10.0  # seconds for the others to come and hear that this process has failed


class Elsewhere(DataError):
    """Another process has failed, and the run with it."""


class Ranks:
    """All processes of a run, as one of them sees them. Without torchrun there is one."""

    def __init__(self, rank: int = 0, count: int = 1, host: Any = None, gpu: bool = False):
        self.rank, self.count, self._gpu = rank, count, gpu
        self._host = host  # for numbers on the host, which do not wait for a GPU
        width = 2 + NUMBERS + count
        busy = board.BUSY if gpu else 0.0
        self._board = Board(rank, count, width, host, busy) if host and board.possible() else None
        self._over = False  # one has failed, and all know
        self._first_tells = False  # the first has failed like this one

    @property
    def first(self) -> bool:
        """The process that writes files and talks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self._host is None

    def meet(self, place: str, *numbers: int) -> list[list[int]]:
        """Wait until all are here; returns the numbers of each. Raises if one of them has failed."""
        return [list(numbers)] if self.alone else self._meet(READY, place, numbers)

    def _meet(self, state: int, place: str, numbers: tuple[int, ...]) -> list[list[int]]:
        record = self._record(state, crc32(place.encode()), *numbers)
        records = self._gathered(record)
        if records[:, 0].any():
            self._raise_for(records[:, 0].tolist(), place)
        if (records[:, 1] != record[1]).any():
            raise _agreed(RuntimeError(f"processes are out of step: one of them is not at {place!r}"))
        return records[:, 2 : 2 + len(numbers)].tolist()

    def _record(self, *numbers: int) -> np.ndarray:
        record = np.zeros(2 + NUMBERS + self.count, np.int64)
        record[: len(numbers)] = numbers
        return record

    def _gathered(self, record: np.ndarray, patience: float | None = None) -> np.ndarray:
        try:
            if self._board:
                return self._board.exchange(record, patience)
            records = torch.empty(self.count, len(record), dtype=torch.int64)
            own = torch.from_numpy(record)
            work = dist.all_gather_into_tensor(records.view(-1), own, group=self._host, async_op=True)
            if work is not None:
                work.wait(*([timedelta(seconds=patience)] if patience else []))
            return records.numpy()
        except RuntimeError as error:
            self._over = True
            raise _agreed(Elsewhere(f"another process has ended ({_first_line(error)})")) from None

    def _raise_for(self, states: list[int], place: str) -> None:
        if FAILED in states:
            self._over = True
            raise _agreed(Elsewhere(self._reason(states)))
        if NO_MEMORY in states:
            rank = states.index(NO_MEMORY)
            raise _agreed(torch.OutOfMemoryError(f"out of memory on rank {rank} ({place})"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in this block in one process fails in all: at their next meeting, with its reason."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> None:
        """This process has failed, and the others do not know it yet."""
        if self.alone or self._over or getattr(error, "agreed", False):
            return
        state = NO_MEMORY if out_of_memory(error) else FAILED
        with suppress(Elsewhere):  # the others may be gone
            states = self._gathered(self._record(state), PATIENCE)[:, 0].tolist()
            self._reason(states, str(error) or type(error).__name__)
            self._first_tells = states[0] == FAILED
        self._over |= state == FAILED
        _agreed(error)

    def _reason(self, states: list[int], own: str = "") -> str:
        """Why the first process that has failed did so, which it tells."""
        if FAILED not in states:
            return ""
        rank, reason = states.index(FAILED), [own]
        with suppress(RuntimeError):
            dist.broadcast_object_list(reason, rank, group=self._host, device=torch.device("cpu"))
        return f"rank {rank}: {reason[0]}"

    def end(self, error: BaseException | None) -> None:
        """Leave; after an error, not before the others know. Only the process that has failed says why, and
        the first."""
        if error is not None:
            self.tell(error)
        self.leave(failed=error is not None)
        if not self.first and (self._first_tells or isinstance(error, Elsewhere)):
            raise SystemExit(128 + getattr(error, "number", 2) if isinstance(error, KeyboardInterrupt) else 1)

    def most(self, number: int) -> int:
        """The largest of the numbers of all."""
        return max(number for (number,) in self.meet("most", number))

    def any(self, condition: bool) -> bool:
        return bool(self.most(int(condition)))

    def mean(self, numbers: list[float]) -> list[float]:
        """Of each of these numbers, the mean over all processes."""
        if self.alone:
            return numbers
        found: list[float] = []
        for first in range(0, len(numbers), NUMBERS):
            own = np.array(numbers[first : first + NUMBERS], np.float64)
            rows = self.meet("mean", *own.view(np.int64).tolist())
            found += np.array(rows, np.int64).view(np.float64).mean(0).tolist()
        return found

    def expect_same(self, what: str, *numbers: int) -> None:
        """Of what every process works out by itself, and all must have alike."""
        if len(set(map(tuple, self.meet(what, *numbers)))) > 1:
            self._over = self._first_tells = True
            raise _agreed(DataError(f"processes do not agree on {what}; the last checkpoint is from before"))

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, own: Tensor) -> Tensor:
        """The vectors [n] of all processes, [W, n]."""
        found = own.new_empty(self.count, *own.shape)
        dist.all_gather_into_tensor(found.view(-1), own.detach().contiguous())
        return found

    def from_one(self, rank: int, own: Tensor, shape: torch.Size) -> Tensor:
        """What that process has; the others have something else, of the same type."""
        if self.alone:
            return own
        found = own.contiguous() if rank == self.rank else own.new_empty(shape)
        self.meet("from one")
        dist.broadcast(found, rank)
        return found

    def leave(self, failed: bool) -> None:
        """The end. Whoever has failed does not wait for what is under way on a GPU."""
        global _current
        _current = ALONE
        if self.alone:
            return
        if not failed or not self._gpu:
            dist.destroy_process_group()
        elif abort := getattr(dist.distributed_c10d, "_abort_process_group", None):
            with suppress(RuntimeError):
                abort()


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """The processes of this run."""
    return _current


def started_by_torchrun() -> bool:
    """Are there several processes?"""
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join(gpu: bool, **where) -> Ranks:
    """Find the other processes, if torchrun has started several. `where`: as of init_process_group()."""
    global _current
    if not where and not started_by_torchrun():
        _current = ALONE
        return ALONE
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # no diary of exchanges, which costs time in each
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **where)
    host = dist.new_group(backend="gloo")
    _current = Ranks(dist.get_rank(), dist.get_world_size(), host, gpu)
    return _current


def _agreed(error):
    """All processes know of it."""
    error.agreed = True
    return error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
