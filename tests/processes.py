"""Functions that run in several processes connected by gloo, as torchrun would start them."""

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

import distributed
from distributed import Ranks

SECONDS = 120
PORTS = 24  # runs that a group of processes may take one after the other, and some
_ports: list[int] = []  # that are left
PRELOADED = ["torch", "torch.distributed", "train", "training.trainer", "tests.tiny_scenes"]


def results_of(count: int, function: Callable, *arguments) -> list:
    """What function(*arguments) returns in each of them, or its exception."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ports = free_ports()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(ports, rank, count, pipe[1], function, arguments), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    try:
        return [_received(end) for end, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def free_ports() -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(PORTS)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def in_turn(jobs: dict[str, tuple]) -> dict:
    """What functions return, by name, that join the other processes by themselves."""
    found = {}
    for name, (function, *arguments) in jobs.items():
        found[name] = function(*arguments)
        if _ports:
            os.environ["MASTER_PORT"] = str(_ports.pop())
    return found


def _received(pipe):
    try:
        assert pipe.poll(SECONDS), "a process does not end"
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return RuntimeError("the process has ended without a result")


def _run(ports: list[int], rank: int, count: int, pipe, function: Callable, arguments: tuple) -> None:
    """What is not joined() yet is started as by torchrun."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports.pop()), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
    }  # fmt: skip
    _ports[:] = ports
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = RuntimeError(f"{type(error).__name__}: {error}")
    buffer = io.BytesIO()
    torch.save(result, buffer)  # whole: tensors of a pipe live in the process that sent them
    pipe.send_bytes(buffer.getvalue())


@contextmanager
def joined(gpu: bool = False) -> Iterator[Ranks]:
    """Also of one process."""
    ranks = distributed.join(gpu, init_method="env://")
    failed: BaseException | None = None
    try:
        yield ranks
    except BaseException as error:
        failed = error
        raise
    finally:
        if failed:
            ranks.tell(failed)
        ranks.leave(failed=bool(failed))


def in_processes(count: int, function: Callable, *arguments) -> list:
    """The same, where all must succeed."""
    found = results_of(count, function, *arguments)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found
