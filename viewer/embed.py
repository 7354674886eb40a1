"""A model as one HTML file that shows it: the page with the splats inside, in the numbers of an SPZ file."""

import base64
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scene import edit
from scene.formats import QUALITIES, arrays, spz
from scene.gaussian_model import GaussianModel
from utils.files import DataError, atomic_write
from utils.geometry import morton_codes
from viewer.page import GZIP, around, page

BASE64 = 4 / 3
TRIES = 6  # to meet the size
SAMPLE = 20_000  # splats, by which it is estimated
MARGIN = 1.2  # that an estimate may be too high
ENOUGH = 400  # pixels of a side of a view, to tell how much of it each splat is
Score = Callable[[], Tensor | None]  # what the views show of each splat [N], or nobody knows


class Embedded(NamedTuple):
    payload: bytes
    splats: int
    lost: str  # of the model, in words; empty if nothing


def write_page(
    gaussians: GaussianModel,
    path: Path,
    view: dict,
    quality: str,
    megabytes: float,
    score: Score = lambda: None,
) -> tuple[int, str]:
    """Returns how many splats are in it, and in words what did not fit."""
    view = around(view, gaussians)
    bare = len(page(path.stem, GZIP, view))
    payload, count, lost = embedded(gaussians, path, quality, megabytes * 1e6 - bare, score)
    text = page(path.stem, payload, view).encode("utf-8")
    with atomic_write(path, len(text)) as file:
        file.write(text)
    return count, lost


@contextmanager
def inside(path: Path) -> Iterator[Path]:
    """The splats of such a page, as a file."""
    found = re.search(r'id="payload">([^<]+)', path.read_text(encoding="utf-8"))
    if not found:
        raise DataError(f"{path}: must be a page with splats inside")
    with tempfile.TemporaryDirectory() as folder:
        splats = Path(folder, "inside.spz")
        splats.write_bytes(base64.b64decode(found[1]))
        yield splats


def embedded(
    gaussians: GaussianModel, path: Path, quality: str, most: float, score: Score = lambda: None
) -> Embedded:
    """The splats for a page, in at most so many characters: first SH loses bits, then the splats that show
    least stay away."""
    order = morton_codes(gaussians.means.detach()).argsort()  # neighbors compress
    model = edit.rows(gaussians, order)
    for coarser in QUALITIES[QUALITIES.index(quality) :: -1]:
        if _estimated(model, path, coarser) > MARGIN * most:
            continue
        payload = spz.packed(arrays.from_model(model, path), path, coarser)
        if len(payload) * BASE64 <= most:
            lost = "" if coarser == quality else f"SH as with --quality {coarser}"
            return Embedded(payload, len(model), lost)
    kept, size, payload = model, _estimated(model, path, QUALITIES[0]), b""
    shown = None if (found := score()) is None else found[order]
    for _ in range(TRIES):
        share = min(1.0, max(0.98 * most / size, 1 / len(kept)))
        chosen = edit.most_visible(kept, share, shown)
        kept, shown = edit.rows(kept, chosen), None if shown is None else shown[chosen]
        payload = spz.packed(arrays.from_model(kept, path), path, QUALITIES[0])
        size = len(payload) * BASE64
        if size <= most:
            break
    which = "the largest and most opaque ones" if shown is None else "those that the train views show most of"
    some = f"{len(kept):,} of {len(model):,} splats, {which}"
    return Embedded(payload, len(kept), f"SH as with --quality {QUALITIES[0]}, and {some}")


def _estimated(model: GaussianModel, path: Path, quality: str) -> float:
    """How long the payload would be, from some of the splats."""
    some = edit.rows(model, torch.arange(0, len(model), max(1, len(model) // SAMPLE)))
    payload = spz.packed(arrays.from_model(some, path), path, quality)
    return len(payload) * BASE64 * len(model) / len(some)
