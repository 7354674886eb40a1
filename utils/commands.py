"""How a command ends: with an exit code, and a line instead of a traceback for what the user can mend."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils import terminal
from utils.memory import in_short, out_of_memory

SIGNALS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not under Windows
if HANGUP:
    SIGNALS[HANGUP] = "hung up"


class Stopped(KeyboardInterrupt):
    """A signal ended the work."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run(name: str, work: Callable[[], object]) -> int:
    """Do the work of the command `name`; returns its exit code, 128 + n for signal n, as shells have it."""
    with terminal.spared():
        try:
            with _handled_by(_stop):
                work()
        except BaseException as error:
            if (reason := in_a_line(error)) is None:
                raise
            stopped = isinstance(error, KeyboardInterrupt)
            print("\n" * stopped + f"{name}: {terminal.plain(reason)}", file=sys.stderr)
            return 128 + _number(error) if stopped else 1
    return 0


def in_a_line(error: BaseException) -> str | None:
    """Why the work ended, for the user; None of a mistake of ours, which needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return SIGNALS[_number(error)]
    if isinstance(error, OSError) or getattr(error, "for_the_user", False):
        return str(error)
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
        return in_short(error)
    return None


def _number(stop: KeyboardInterrupt) -> int:
    return getattr(stop, "number", signal.SIGINT)


class Patience:
    """Lets what must not be cut in two end first: inside its block, a signal is remembered in `asked`.

    A second signal, or one inside of at_once(), raises Stopped as usual. SIGHUP is never the second: a shell
    sends it once more to what it has started, and systemd after SIGTERM.
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
        again = self.asked and number != HANGUP
        self.asked = self.asked or number
        if again or not self._waits:
            raise Stopped(number)


def _stop(number: int, frame) -> None:
    if number == HANGUP:
        signal.signal(number, signal.SIG_IGN)  # the one that the shell sends, too, while we clean up
    raise Stopped(number)


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    """Only a main thread gets signals; elsewhere this does nothing. nohup ignores SIGHUP, and so do we."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {HANGUP} if HANGUP and signal.getsignal(HANGUP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
