"""Where Gaussians come and go while training: one file for each strategy.

`--strategy name` takes strategies/name.py and calls its make(options, extent, say). A strategy of your own is
such a file, or a module whose name has a dot. strategy.py says what it may do; rows.py and scores.py have
what strategies share.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from arguments import ConfigError, Options
from strategies.strategy import Strategy

SHARED = {"strategy", "rows", "scores"}  # files here that are not strategies


def make(options: Options, extent: float, say: Callable[[str], None]) -> Strategy:
    """The strategy of a run. extent: radius of the scene; say: takes lines for the log."""
    return _module(options.opt.strategy).make(options, extent, say)


def _module(name: str) -> ModuleType:
    if "." not in name and name not in names():
        raise ConfigError(f"strategy must be one of {', '.join(names())}, or a module, got {name}")
    try:
        return importlib.import_module(name if "." in name else f"strategies.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"strategy must be one of {', '.join(names())}, or a module, got {name}") from None


def names() -> list[str]:
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - SHARED)
