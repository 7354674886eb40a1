"""Inverse depth maps, <depths>/<name without ending>.png, and what aligns them with the scene."""

from pathlib import Path

import numpy as np

from scene.readers.views import DepthMap, View, same_shape
from utils.files import DataError, image_header, is_file, read_json, some

DIVISOR = 65536.0  # inverse depth maps are 16-bit PNGs
PARAMS = "depth_params.json"
BITS = {"1": 1, "F": 32}  # by Pillow's mode; I and I;16 have 16, the others 8


class DepthMaps:
    """Aligned by the depth_params.json of the model folder `derived`, else by that among them, else by that
    beside the reconstruction, in `model`."""

    def __init__(self, folder: Path, model: Path, derived: Path | None):
        self.folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder}: the depth folder is not there")
        places = [place / PARAMS for place in (derived, folder, model) if place]
        found = next((path for path in places if is_file(path)), None)
        if found is None:
            raise DataError(
                f"{PARAMS}: is not there, but depth maps (-d) need it; looked for "
                f"{', '.join(map(str, places))}. python -m capture.depth_scale makes it for COLMAP data"
            )
        self.path = found
        self.params = read_json(self.path)
        positive = [scale for scale, _ in map(self._scale_offset, self.params) if scale > 0]
        self.median = float(np.median(positive)) if positive else 0.0

    def _scale_offset(self, stem: str) -> tuple[float, float]:
        try:
            scale, offset = float(self.params[stem]["scale"]), float(self.params[stem]["offset"])
        except (KeyError, TypeError, ValueError, OverflowError):
            scale = offset = float("nan")
        if not np.isfinite([scale, offset]).all():
            raise DataError(f"{self.path}: {stem} must have a number as scale and as offset")
        return scale, offset

    def of(self, name: str) -> DepthMap:
        stem = name.rsplit(".", 1)[0]
        depth = DepthMap(self.folder / f"{stem}.png", DIVISOR)
        if stem not in self.params:
            depth.reliable, depth.doubt = False, "without parameters"
            return depth
        depth.scale, depth.offset = self._scale_offset(stem)
        if not 0.2 * self.median <= depth.scale <= 5 * self.median or depth.scale <= 0:
            depth.reliable, depth.doubt = False, "unreliable"
        return depth


def check_depths(views: list[View]) -> list[str]:
    """Look at each view's map, drop those that are not there, and say in a line what will be used.

    Only headers are read. A folder without any of the maps is an error.
    """
    missing, doubts, used, coarse, odd = [], {}, {}, [], []
    for view in views:
        assert view.depth is not None
        if not is_file(view.depth.path):
            missing.append(str(view.depth.path))
            view.depth = None
            continue
        (width, height), mode = image_header(view.depth.path)
        if not same_shape(view.size_of(view.depth.path), view.camera_size):
            photo_width, photo_height = view.size_of(view.image_path)
            odd.append(f"{view.depth.path.name} ({width}x{height}, photo {photo_width}x{photo_height})")
        bits = 16 if mode.startswith("I") else BITS.get(mode, 8)
        if bits < 16:
            coarse.append(view.depth.path.name)
        if view.depth.reliable:
            used[bits] = used.get(bits, 0) + 1
        else:
            doubts[view.depth.doubt] = doubts.get(view.depth.doubt, 0) + 1
    if odd:
        raise DataError(f"{len(odd)} depth maps do not have the shape of their photos: {some(odd, 3)}")
    if len(missing) == len(views):
        raise DataError(f"{len(missing)} of {len(views)} depth maps are not there: {some(missing)}")
    parts = [f"{count} of {len(views)} used ({bits} bits)" for bits, count in sorted(used.items())] or [
        "none used"
    ]
    scales = sorted(view.depth.scale for view in views if view.depth and view.depth.reliable)
    if scales and scales[-1] > 0:
        parts[-1] += f", scales {scales[0]:.3g} to {scales[-1]:.3g}"
    parts += [f"{count} {doubt}" for doubt, count in sorted(doubts.items())]
    if missing:
        parts.append(f"{len(missing)} not there ({some(missing, 3)})")
    notes = ["Depth maps: " + ", ".join(parts)]
    if coarse:
        notes.append(f"Warning: {len(coarse)} depth maps have 8 bits, so coarse steps: {some(coarse, 3)}")
    return notes
