"""Several processes that train one model, one for each GPU: torchrun --nproc_per_node 4 train.py ...

torch.distributed connects them, with NCCL between GPUs and gloo between CPUs; the code is the same. Rank r of
W processes holds the rows r, r + W, r + 2 W, ... of the Gaussians, their moments and their statistics, and
draws the views r, r + W, ... of a step. All else (order of views, random numbers, what is learned for each
photo) every process has, and keeps equal. docs/scale.md says when it pays.
"""

from distributed.ranks import ALONE, Elsewhere, Ranks, current, join, started_by_torchrun
from distributed.rows import Move, exchange, exchanged, from_all

__all__ = [
    "ALONE",
    "Elsewhere",
    "Move",
    "Ranks",
    "current",
    "exchange",
    "exchanged",
    "from_all",
    "join",
    "started_by_torchrun",
]
