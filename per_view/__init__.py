"""What a photo adds to the picture of the scene: trained along with it, and kept or dropped afterwards.

A module of your own is a subclass of PerView in a file here, and a line in attached(). It may move the camera
(poses), show the scene from several places and mix the pictures (blur), or change the colors (exposure).
Modules compose from the photo inwards, in the order of attached(): the first one's picture() has the last
word, and the last one's cameras() are those that the Gaussians are rendered from.
"""

from pathlib import Path

import torch

from arguments import ModelParams, Options
from per_view.affine import Affine
from per_view.bilateral import Bilateral
from per_view.defocus import Defocus
from per_view.exposure import Exposure
from per_view.kernel import Kernel
from per_view.module import PerView
from per_view.motion import Motion
from per_view.poses import Poses
from per_view.ppisp import Ppisp
from per_view.shown import Pair, Shown
from scene import Scene
from scene.folder import ModelFolder
from utils.files import DataError, read_json

__all__ = [
    "Affine",
    "Bilateral",
    "Defocus",
    "Exposure",
    "Kernel",
    "Motion",
    "Pair",
    "PerView",
    "Poses",
    "Ppisp",
    "Shown",
    "attached",
    "saved",
]
BLURS = {"motion": Motion, "defocus": Defocus, "kernel": Kernel}
APPEARANCES = {"exposure": Affine, "ppisp": Ppisp, "bilateral": Bilateral}


def attached(options: Options, scene: Scene) -> list[PerView]:
    """The modules of a run with these options, from the photo inwards."""
    views, device = scene.exposure_names, scene.background.device  # names of the train photos
    modules: list[PerView] = []
    if options.model.train_test_exp:
        modules.append(Exposure(views, device, options.opt))
    elif options.views.appearance in APPEARANCES:
        modules.append(APPEARANCES[options.views.appearance].attached(options, scene))
    if options.views.poses:
        modules.append(Poses.attached(options, scene))
    if options.views.blur in BLURS:
        modules.append(BLURS[options.views.blur].attached(options, scene))
    return modules


def saved(model: ModelParams, ply: Path, folder: ModelFolder | None, device: torch.device) -> list[PerView]:
    """The modules that rendered views need, as they were saved with the model in this file."""
    poses, blur = (ply.with_name(name) for name in ("poses.json", "blur.json"))
    found = _saved_colors(model, ply, folder, device)
    found += [Poses.read(poses, device)] if poses.is_file() else []
    if blur.is_file():
        found.append(_kind(blur).read(blur, device))
    return found


def _saved_colors(
    model: ModelParams, ply: Path, folder: ModelFolder | None, device: torch.device
) -> list[PerView]:
    about, grids = ply.with_name("appearance.json"), ply.with_name("appearance.pth")
    if model.train_test_exp:
        return [Exposure.load(ply, folder, device)]
    if grids.is_file():
        return [Bilateral.read(grids, device)]
    if not about.is_file():
        return []
    kind = read_json(about).get("appearance")
    if kind not in ("exposure", "ppisp"):
        raise DataError(f"{about}: appearance must be exposure or ppisp, got {str(kind)[:50]!r}")
    if kind == "ppisp":
        return [Ppisp.read(about, device)]
    return [Exposure.load(ply, folder, device, median=True)]


def _kind(path: Path) -> type[Motion] | type[Defocus] | type[Kernel]:
    kind = read_json(path).get("blur")
    if kind not in BLURS:
        raise DataError(f"{path}: blur must be motion, defocus or kernel, got {str(kind)[:50]!r}")
    return BLURS[kind]
