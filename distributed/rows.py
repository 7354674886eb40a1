"""Rows that are dealt to processes like cards: row i is held by process i mod W, there in place i // W.

Alone, every function here returns what it is given.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.ranks import Ranks

PIECE = 1 << 20  # rows that one process sends at a time to where a whole tensor is put together


def own(ranks: Ranks, values: Tensor) -> Tensor:
    """Of all rows, those that this process holds."""
    return values if ranks.alone else values[ranks.rank :: ranks.count].contiguous()


def held(ranks: Ranks, total: int) -> int:
    """How many rows this process holds."""
    return len(range(ranks.rank, total, ranks.count))


def own_of(ranks: Ranks, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of these rows [K] and their values [K, ...] those of this process, and their places in it."""
    if ranks.alone:
        return rows, values
    mine = (rows % ranks.count == ranks.rank).nonzero()[:, 0]
    return rows[mine] // ranks.count, values[mine]


def from_all(ranks: Ranks, values: Tensor, total: int) -> Tensor:
    """All rows [total, ...] of a tensor, of which each process has its own [n, ...]."""
    if ranks.alone:
        return values
    most, kind = -(-total // ranks.count), values.dtype
    padded = values.new_zeros(most, *values.shape[1:], dtype=torch.uint8 if kind == torch.bool else kind)
    padded[: len(values)] = values
    found = padded.new_empty(ranks.count * most, *values.shape[1:])
    ranks.meet("rows of all")
    dist.all_gather_into_tensor(found, padded)
    found = found.unflatten(0, (ranks.count, most)).transpose(0, 1).flatten(0, 1)[:total]
    return found.to(kind)


def on_first(ranks: Ranks, values: Tensor, total: int) -> Tensor:
    """The same on the host, piece by piece: in the first process; in the others it is empty."""
    if ranks.alone:
        return values
    whole = torch.empty(total if ranks.first else 0, *values.shape[1:], dtype=values.dtype)
    for start in range(0, -(-total // ranks.count), PIECE):
        stop = min(start + PIECE, -(-total // ranks.count))
        count = min(stop * ranks.count, total) - start * ranks.count
        piece = from_all(ranks, values[start:stop], count)
        if ranks.first:
            whole[start * ranks.count :][:count] = piece.cpu()
    return whole


def exchanged(ranks: Ranks, sent: Tensor, counts: list[int], expected: list[int]) -> Tensor:
    """counts[r] of the rows go to process r, one block after the other; expected[r] rows come from it."""
    received = sent.new_empty(sum(expected), *sent.shape[1:])
    ranks.meet("exchange")
    exchange(received, sent, counts, expected)
    return received


def exchange(received: Tensor, sent: Tensor, counts: list[int], expected: list[int]) -> None:
    """The same where there is room already, and all have met."""
    dist.all_to_all_single(received, sent.contiguous(), expected, counts)


class Move:
    """Rows that move between processes: row k of all will be what row index[k] was."""

    def __init__(self, ranks: Ranks, index: Tensor):
        self.alone, self.index, self._ranks = ranks.alone, index, ranks
        self.count = held(ranks, len(index))
        if ranks.alone:
            return
        ranks.expect_same("rows", len(index), int(index.sum()))
        owner = index % ranks.count
        mine = (owner == ranks.rank).nonzero()[:, 0]
        goes_to = mine % ranks.count
        self._sent = (index[mine] // ranks.count)[goes_to.argsort(stable=True)]
        comes_from = owner[ranks.rank :: ranks.count]
        self._places = comes_from.argsort(stable=True)
        self._counts, self._expected = (
            torch.bincount(way, minlength=ranks.count).tolist() for way in (goes_to, comes_from)
        )

    def __call__(self, values: Tensor) -> Tensor:
        received = exchanged(self._ranks, values[self._sent], self._counts, self._expected)
        return torch.empty_like(received).index_copy_(0, self._places, received)
