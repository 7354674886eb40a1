"""Files of splats, by the ending of their name. A new format is a module with read() and write(), and a row
in FORMATS."""

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from scene.formats import arrays, compressed_ply, gltf, sog, spz, usd
from scene.formats import splat as dot_splat
from scene.formats.arrays import Splats
from scene.formats.ply import load_ply, read_elements, save_ply
from scene.frame import OF_DATA, Similarity
from scene.gaussian_model import GaussianModel
from utils.files import DataError

QUALITIES = tuple(spz.SH_BITS)


class Format(NamedTuple):
    read: Callable[[Path], Splats]
    write: Callable[..., None] | None  # (splats, path) and those of the options below that `takes` names
    takes: tuple[str, ...] = ()
    loses: str = ""  # what of a model the file cannot hold


FORMATS = {
    ".compressed.ply": Format(compressed_ply.read, compressed_ply.write),
    ".spz": Format(spz.read, spz.write, takes=("quality", "version")),
    ".sog": Format(sog.read, sog.write),
    "meta.json": Format(sog.read, None),
    ".glb": Format(gltf.read, gltf.write),
    ".usdc": Format(usd.read, usd.write, loses="the mark of --antialiasing"),
    ".usda": Format(usd.read, usd.write, loses="the mark of --antialiasing"),
    ".splat": Format(dot_splat.read, dot_splat.write, loses="SH and the mark of --antialiasing"),
}
ENDINGS = (*FORMATS, ".ply")


def ending(path: Path) -> str:
    """Which of ENDINGS the name has."""
    name = Path(path).name.lower()
    for known in ENDINGS:
        if name.endswith(known):
            return known
    raise DataError(f"{path}: must end in one of {', '.join(ENDINGS)}")


def is_one(path: str | PathLike) -> bool:
    """Is it a file of splats, by its name?"""
    return Path(path).name.lower().endswith(ENDINGS)


def check_writable(path: Path) -> None:
    kind = ending(path)
    if kind in FORMATS and not FORMATS[kind].write:
        raise DataError(f"{path}: {kind} can only be read")


def loses(path: Path) -> str:
    """What of a model a file of this name cannot hold, in words."""
    kind = ending(path)
    return FORMATS[kind].loses if kind in FORMATS else ""


def read(path: Path, device: torch.device | str = "cpu", frame: Similarity = OF_DATA) -> GaussianModel:
    """A model from a file of any format, in this frame. PLY files are told apart by what they hold: many
    compressed ones end in .ply, too."""
    path = Path(path)
    kind = ending(path)
    try:
        if kind.endswith(".ply") and not compressed_ply.holds(read_elements(path)):
            return load_ply(path, device, frame)
        reader = FORMATS.get(kind, FORMATS[".compressed.ply"]).read
        splats = reader(path)
        if not frame.trivial:
            splats = replace(
                splats, means=frame.enter(splats.means), log_scales=splats.log_scales - frame.log_unit
            )
        return arrays.to_model(splats, path, device)
    except MemoryError as error:
        raise DataError(f"{path}: is too large for the memory that is free ({error})") from None


def write(gaussians: GaussianModel, path: Path, **options) -> None:
    """A model to a file of the format that its name ends in. Options, of which each format takes its own:
    quality, one of QUALITIES; version, of SPZ."""
    path = Path(path)
    kind = ending(path)
    if kind == ".ply":
        save_ply(gaussians, path, antialiasing=gaussians.antialiased)
        return
    check_writable(path)
    chosen = FORMATS[kind]
    assert chosen.write
    taken = {name: value for name, value in options.items() if name in chosen.takes}
    chosen.write(arrays.from_model(gaussians, path), path, **taken)
