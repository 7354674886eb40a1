"""Text on its way out of the process.

Names of files come from others: what would not be seen as it is, or would move the cursor, is escaped. And
that nobody can read what is said, because a terminal was closed or a disk is full, is no reason to end.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress

from tqdm import tqdm

SECONDS_BETWEEN = 30.0  # lines about the progress, where there is no terminal for a bar
NOT_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, direction of writing, not decodable, new lines


def plain(text: object) -> str:
    r"""One line, as it is but for what no printer prints: a new line becomes \n."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in NOT_SHOWN else c for c in text
    )


def say(*lines: object) -> None:
    """To standard output, at once."""
    print(*map(plain, lines), sep="\n", flush=True)


@contextmanager
def spared() -> Iterator[None]:
    """Inside, standard output and error may go away: what is said then is lost, nothing else."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Spared(before[0]), _Spared(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _settle(stream)


class _Spared:
    """A stream that no write or flush fails on. What cannot be encoded is escaped."""

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115
        with suppress(AttributeError, OSError, ValueError):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _settle(stream) -> None:
    """Python writes what is left when it ends, and has an exit code of its own if it cannot."""
    try:
        if stream:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class Progress:
    """A tqdm whose bar is a line now and then, for standard error that is a file or a pipe."""

    def __init__(
        self,
        items: Iterable = (),
        desc: str = "",
        total: int | None = None,
        initial: int = 0,
        disable: bool = False,
    ):
        self._items, self._desc, self._disable = items, desc, disable
        self._total = len(items) if total is None and isinstance(items, Sized) and items else total
        self._postfix = ""
        self.n = self._first = initial
        self._began = self._said = time.monotonic()

    def __iter__(self) -> Iterator:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN and not self._disable:
            self._said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def _line(self, now: float) -> str:
        line = f"{self._desc}: {self.n:,}"
        if self._total:
            left = (now - self._began) * (self._total - self.n) / max(self.n - self._first, 1)
            line += f" of {self._total:,}, {tqdm.format_interval(left)} left"
        return line + self._postfix

    def close(self) -> None:
        """The last line was enough."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def progress(
    items: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    initial: int = 0,
    disable: bool = False,
) -> tqdm | Progress:
    """How far something is: a bar on a terminal; elsewhere a line every SECONDS_BETWEEN seconds."""
    if sys.stderr.isatty():
        return tqdm(
            items, plain(desc), total, initial=initial, disable=disable, smoothing=0.1, mininterval=0.2
        )
    return Progress(() if items is None else items, plain(desc), total, initial, disable)
