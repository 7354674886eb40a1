"""How a command ends: with an exit code, and a line instead of a traceback for what the user can mend."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.memory import in_short, out_of_memory

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(KeyboardInterrupt):
    """A signal ended the work."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run(name: str, work: Callable[[], None]) -> int:
    """Do the work of the command `name`; returns its exit code, 128 + n for signal n, as shells have it."""
    try:
        with _handled_by(_stop):
            work()
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        print(f"\n{name}: {SIGNALS[number]}", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not getattr(error, "for_the_user", False):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: {in_short(error)}", file=sys.stderr)
        return 1
    return 0


class Patience:
    """Lets what must not be cut in two end first: inside its block, a signal is remembered in `asked`.

    A second signal, or one inside of at_once(), raises Stopped as usual.
    """

    def __init__(self):
        self.asked: int | None = None  # number of the signal
        self._waits = True

    def __enter__(self) -> "Patience":
        self._handled = _handled_by(self._remember)
        self._handled.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handled.__exit__(*error)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        if self.asked:
            raise Stopped(self.asked)
        self._waits = False
        try:
            yield
        finally:
            self._waits = True

    def _remember(self, number: int, frame) -> None:
        again, self.asked = self.asked, number
        if again or not self._waits:
            raise Stopped(number)


def _stop(number: int, frame) -> None:
    raise Stopped(number)


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    """Only a main thread gets signals; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
