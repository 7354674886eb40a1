"""Where Gaussians come and go while training: one file for each strategy.

`--strategy name` takes strategies/name.py and calls its make(options, extent, say). A strategy of your own is
such a file; strategy.py says what it may do; rows.py and scores.py have what strategies share.
"""

import importlib
import pkgutil
from collections.abc import Callable

from arguments import ConfigError, Options
from strategies.strategy import Strategy

SHARED = {"strategy", "rows", "scores"}  # files here that are not strategies


def make(options: Options, extent: float, say: Callable[[str], None]) -> Strategy:
    """The strategy of a run. extent: radius of the scene; say: takes lines for the log."""
    name, known = options.opt.strategy, names()
    if name not in known:
        raise ConfigError(f"strategy must be one of {', '.join(known)}, got {name}")
    return importlib.import_module(f"strategies.{name}").make(options, extent, say)


def names() -> list[str]:
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - SHARED)
