"""A flag: a field of a dataclass."""

from dataclasses import field
from typing import Any

MOST = 2**31 - 1  # steps, Gaussians
LARGE = 1e9  # rates, weights and thresholds; float32 has room for their products
WIDEST = 1 << 16  # pixels
MOST_FRAMES = 100_000  # of a video
MOST_POINTS = 100_000_000  # that are made up
LAST_SEED = 2**63 - 1
LAST_PORT = 65_535


def arg(
    default: Any,
    help: str,
    short: str = "",
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    const: Any = None,
) -> Any:
    """A dataclass field that is also a flag. A number, and each of a list of them, is from minimum to
    maximum, which is MOST for integers and LARGE for others unless it is given. `const`: the value when the
    flag is given without one."""
    if minimum is not None and maximum is None:
        maximum = LARGE if isinstance(default, float) else MOST
    metadata = {"help": help, "short": short, "choices": choices, "const": const}
    metadata |= {"minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
