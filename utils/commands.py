"""How a command ends: with an exit code, and a line instead of a traceback for what the user can mend."""

import sys
from collections.abc import Callable

from arguments import ConfigError
from scene.files import DataError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(name: str, work: Callable[[], None]) -> int:
    """Do the work of the command `name`; returns its exit code."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, DataError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0
