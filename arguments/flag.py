"""A flag: a field of a dataclass."""

from dataclasses import field
from typing import Any


def arg(
    default: Any,
    help: str,
    short: str = "",
    choices: tuple = (),
    minimum: float | None = None,
    const: Any = None,
):
    """A dataclass field that is also a flag. `const`: the value when the flag is given without one."""
    metadata = {"help": help, "short": short, "choices": choices, "minimum": minimum, "const": const}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
