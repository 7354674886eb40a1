"""The table of colors in the host's memory, for scene/offload.py.

A row has the spherical harmonics of a Gaussian and Adam's two moments of each. The memory is pinned: the
device reads and writes it through the bus, so no thread of the host takes part. What has been moved is
written while the next rows are read: the bus does both at once.

Adam also moves what has no gradient, by its moments, and most rows are not in view. They wait: a row knows
the step that it is up to date with. After k missed steps the moments are m b1^k and v b2^k, so what was
missed adds up to m / sqrt(v) times a sum that is the same for all rows that wait since the same step. The
sum is kept for each step, and a row makes up for it when it is fetched. It is what a step each would do,
but for rounding.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scene.gaussian_model import ADAM_EPS, MOMENTS

ON_HOST = ("sh_dc", "sh_rest")
LONGEST = 256  # steps after which a row that waits has come to rest: 0.9^256 is 2e-12
PIECE = 2**18  # rows that pass through the device's scratch memory at a time


class Fetched(NamedTuple):
    """Rows of the table, on the device and up to date: by name [parameter, first moment, second moment]."""

    rows: Tensor  # [V]
    values: dict[str, list[Tensor]]


class Colors:
    """The table: a row is the parameters sh_dc and sh_rest, then their first moments, then their second."""

    def __init__(self, table: Tensor, moved_at: Tensor, clock: "Clock"):
        self._table = table  # [N, 3 * width] on the host
        self._here = _as_seen_from(moved_at.device, table)
        self._moved_at = moved_at  # [N] int32 on the device: the step that each row is up to date with
        self.clock = clock
        self.sum = torch.zeros((), device=moved_at.device)  # of all numbers written: not finite if one is not
        self._behind = True  # rows may be waiting
        self._writing: torch.cuda.Event | None = None  # until then
        self._writer = torch.cuda.Stream(moved_at.device) if moved_at.device.type == "cuda" else None

    @classmethod
    def of(cls, values: dict[str, list[Tensor]], device: torch.device, step: int) -> "Colors":
        count, width = len(values["sh_dc"][0]), sum(value[0][0].numel() for value in values.values())
        table = _on_host(count, 3 * width, device)
        for (name, i), columns in _columns(width).items():
            table[:, columns] = values[name][i].detach().flatten(1)
        moved_at = torch.full((count,), step, dtype=torch.int32, device=device)
        return cls(table, moved_at, Clock(step, device))

    @property
    def _width(self) -> int:
        return self._table.shape[1] // 3

    def on_host(self) -> dict[str, list[Tensor]]:
        """Views of the table, by name: parameter and moments."""
        views: dict[str, list[Tensor]] = {name: [] for name in ON_HOST}
        for (name, _), columns in _columns(self._width).items():
            views[name].append(_shaped(name, self._table[:, columns]))
        return views

    def fetch(self, rows: Tensor) -> Fetched:
        return self._read(rows) if self._writer else self._read_apart(rows)

    def _read(self, rows: Tensor) -> Fetched:
        """In native calls. What is being written is read when that is done."""
        shapes = {"sh_dc": (1, 3), "sh_rest": (self._width // 3 - 1, 3)}
        empty = partial(self.sum.new_empty, len(rows))
        values = {name: [empty(*shape) for _ in range(3)] for name, shape in shapes.items()}
        columns = [values[name][i] for name, i in _columns(self._width)]
        written = self._writing is None or self._writing.query()
        for just_moved in (None,) if written else (False, True):
            if just_moved and self._writing:
                torch.cuda.current_stream(rows.device).wait_event(self._writing)
            torch.ops.tilesplat.fetch_rows(
                self._here, rows, self._moved_at, *self.clock.tables(), ADAM_EPS, just_moved, columns
            )
        return Fetched(rows, values)

    def _read_apart(self, rows: Tensor) -> Fetched:
        places = _columns(self._width)
        flat = {key: self.sum.new_empty(len(rows), c.stop - c.start) for key, c in places.items()}
        for begin in range(0, len(rows), PIECE):
            piece = rows[begin : begin + PIECE]
            numbers = self._here.index_select(0, piece)
            self.clock.catch_up(numbers, self._moved_at[piece])
            for key, columns in places.items():
                flat[key][begin : begin + PIECE] = numbers[:, columns]
        return Fetched(rows, {name: [_shaped(name, flat[name, i]) for i in range(3)] for name in ON_HOST})

    def store(self, fetched: Fetched, wanted: Tensor) -> None:
        """Write back the rows in the mask `wanted` [V]; they are up to date with the last step."""
        columns = [fetched.values[name][i] for name, i in _columns(self._width)]
        rows = fetched.rows
        self._moved_at[rows] = self._moved_at[rows].where(~wanted, self.clock.step)
        self.sum += sum(values.sum() for values in columns)
        self._behind = True
        if self._writer:
            return self._write(rows, wanted, columns)
        for places in wanted.nonzero()[:, 0].split(PIECE):
            numbers = torch.cat([values[places].flatten(1) for values in columns], 1)
            self._here.index_copy_(0, rows[places], numbers)

    def _write(self, rows: Tensor, wanted: Tensor, values: list[Tensor]) -> None:
        """Beside what the device does next."""
        assert self._writer
        self._writer.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self._writer):
            torch.ops.tilesplat.store_rows(self._here, rows, wanted, values)
        for tensor in (rows, wanted, *values):
            tensor.record_stream(self._writer)
        self._writing = torch.cuda.Event()
        self._writing.record(self._writer)

    def catch_up(self, rows: Tensor | None = None) -> None:
        """Let these rows, or all, make up for the steps they missed; the host may read them then."""
        if self._behind or rows is not None:
            late = self._moved_at != self.clock.step
            late = late.nonzero()[:, 0] if rows is None else rows[late[rows]]
            for piece in late.split(PIECE):
                self.store(self.fetch(piece), torch.ones_like(piece, dtype=torch.bool))
            self._behind = rows is not None
            self.wait()

    def wait(self) -> None:
        """Until the device has written what is under way."""
        if self._moved_at.device.type == "cuda":
            torch.cuda.synchronize(self._moved_at.device)

    def reindexed(self, index: Tensor, fresh: Tensor | None) -> "Colors":
        """Row k is what row index[k] is here; rows in the mask `fresh` have zero moments."""
        table = _on_host(len(index), self._table.shape[1], index.device)
        if fresh is not None:  # their parents' moments are still to be made use of
            self.catch_up(index[fresh].unique())
        self.wait()
        torch.index_select(self._table, 0, index.cpu(), out=table)
        moved_at = self._moved_at[index]
        if fresh is not None:
            table[:, self._width :].masked_fill_(fresh.cpu()[:, None], 0)
            moved_at.masked_fill_(fresh, self.clock.step)
        return Colors(table, moved_at, self.clock)

    def state_dict(self) -> dict:
        return {"moved_at": self._moved_at, **self.clock.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._moved_at.copy_(state["moved_at"])
        self.clock.load_state_dict(state)


class Clock:
    """What rows have missed since each step: the sum over the steps after it of
    rate * b1^k / sqrt(b2^k) * sqrt(1 - b2^j) / (1 - b1^j), for step j, the k-th since then. And how far the
    moments have decayed: the logarithms of b1 and b2, summed over the steps so far."""

    def __init__(self, step: int, device: torch.device):
        self.step = self._first = step  # of Adam
        self._sums = torch.zeros(1024, len(ON_HOST), dtype=torch.float64, device=device)
        self._decays = torch.zeros_like(self._sums)

    def tick(self, rates: list[float], betas: tuple[float, float]) -> None:
        """A step with these learning rates."""
        self.step += 1
        now, bias = self.step - self._first, [1 - beta**self.step for beta in betas]
        if now == len(self._sums):
            self._sums, self._decays = (_twice_as_long(values) for values in (self._sums, self._decays))
        self._decays[now] = self._decays[now - 1]
        for column, beta in enumerate(betas):
            self._decays[now, column] += math.log(beta)
        begin = max(now - LONGEST, 0)
        avg, square = (self._decays[now] - self._decays[begin:now]).unbind(1)
        share = (avg - square / 2).exp()
        for column, rate in enumerate(rates):
            self._sums[begin:now, column].add_(share, alpha=rate * math.sqrt(bias[1]) / bias[0])

    def tables(self) -> tuple[int, int, Tensor, Tensor]:
        """What fetch_rows takes."""
        return self._first, self.step - self._first, self._sums, self._decays

    def state_dict(self) -> dict:
        known = self.step - self._first + 1
        return {"first": self._first, "sums": self._sums[:known], "decays": self._decays[:known]}

    def load_state_dict(self, state: dict) -> None:
        self._first, self.step = state["first"], state["first"] + len(state["sums"]) - 1
        self._sums, self._decays = (
            _twice_as_long(state[key].to(self._sums.device)) for key in ("sums", "decays")
        )

    def catch_up(self, numbers: Tensor, moved_at: Tensor) -> None:
        """Rows of the table [n, 3 * width], up to date with these steps [n], in place."""
        since, now = (moved_at - self._first).long(), self.step - self._first
        sums = self._sums[since].to(numbers.dtype)
        decays = (self._decays[now] - self._decays[since]).exp().to(numbers.dtype)
        params, avgs, squares = numbers.split(numbers.shape[1] // 3, 1)
        drift = avgs / squares.sqrt().add_(ADAM_EPS)
        params[:, :3] -= sums[:, :1] * drift[:, :3]
        params[:, 3:] -= drift[:, 3:].mul_(sums[:, 1:])
        avgs *= decays[:, :1]
        squares *= decays[:, 1:]


def _twice_as_long(values: Tensor) -> Tensor:
    return torch.cat([values, torch.zeros_like(values)])


@torch.no_grad()
def up_to_date(state: dict) -> dict:
    """The state of a model, as state_dict() has it, in which no row waits."""
    if "behind" not in state:
        return state
    params, moments = ({n: dict(state[key])[n] for n in ON_HOST} for key in ("params", "moments"))
    values = {n: [params[n], *(moments[n][key] for key in MOMENTS)] for n in ON_HOST}
    colors = Colors.of(values, torch.device("cpu"), 0)
    colors.load_state_dict(state["behind"])
    colors.catch_up()
    now = colors.on_host()
    return state | {
        "params": state["params"] | {n: now[n][0] for n in ON_HOST},
        "moments": state["moments"] | {n: moments[n] | dict(zip(MOMENTS, now[n][1:])) for n in ON_HOST},
    }


def _as_seen_from(device: torch.device, table: Tensor) -> Tensor:
    """The same memory as a tensor of the device, which reads and writes it through the bus."""
    if device.type != "cuda" or not len(table):
        return table.to(device)
    here = torch.as_tensor(_Pinned(table), device=device)
    assert here.data_ptr() == table.data_ptr(), "PyTorch has made a copy of the host's memory"
    return here


class _Pinned:
    """What PyTorch asks of arrays of other libraries on a GPU."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor  # lives as long as what is made of it
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "version": 3,
        }


def _on_host(count: int, width: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(count, width, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        gigabytes = 4 * count * width / 2**30
        raise MemoryError(f"the host has no {gigabytes:.1f} GiB for colors and their moments") from error


def _columns(width: int) -> dict[tuple[str, int], slice]:
    """From left to right: where the parameter (0) and the moments (1, 2) of sh_dc and sh_rest are."""
    parts = (("sh_dc", 0, 3), ("sh_rest", 3, width))
    return {(n, i): slice(i * width + first, i * width + end) for i in range(3) for n, first, end in parts}


def _shaped(name: str, columns: Tensor) -> Tensor:
    return (
        columns.unflatten(1, (1, 3)) if name == "sh_dc" else columns.unflatten(1, (columns.shape[1] // 3, 3))
    )
