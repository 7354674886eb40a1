"""Folders that no reader takes: what they seem to be, and what makes a data set of them."""

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from scene.readers.photos import ENDINGS
from utils.files import some

PHOTOS = (*ENDINGS, ".heic", ".heif")
VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
MOST_FOLDERS = 200  # that are looked into

NERFSTUDIO = "ns-process-data {} of nerfstudio makes a transforms.json, which can be read"


def next_step(folder: Path, is_data_set: Callable[[Path], bool]) -> str:
    """What to do next, to be put behind a message; nothing if there is no telling."""
    if folder.is_file():
        return _of_a_file(folder)
    for look in (_part_of_colmap, _own_model, _other_program):
        if advice := look(folder):
            return f"; {advice}"
    inner = [str(path) for path in _folders(folder) if is_data_set(path)]
    if inner:
        return f"; there is a data set in {some(inner, 3)}: name that with -s"
    advice = _photos(folder)
    return f"; {advice}" if advice else ""


def _of_a_file(path: Path) -> str:
    ending = path.suffix.lower()
    if ending in VIDEOS:
        return f": it is a video. {_convert(path)} makes a data set of its frames"
    if ending in ARCHIVES:
        return ": it is an archive. Unpack it and name the folder"
    return f": it is a file. Name the folder, such as {shlex.quote(str(path.parent))}"


def _part_of_colmap(folder: Path) -> str:
    if not _has(folder, "cameras.bin", "cameras.txt"):
        return ""
    top = folder.absolute().parent
    if folder.absolute().name.isdecimal():
        top = top.parent
    return (
        "this is the reconstruction alone: name the folder that has it as sparse/0, and the photos as "
        f"images, such as {shlex.quote(str(top))}"
    )


def _own_model(folder: Path) -> str:
    if _has(folder, "point_cloud", "cfg_args"):
        return "this is a model folder, the -m of a run; -s names the photos that it was trained on"
    if _has(folder, "nerfstudio_models", "dataparser_transforms.json"):
        return "this is a model that nerfstudio has trained; its config.yml names the data set (data)"
    return ""


def _other_program(folder: Path) -> str:
    if _has(folder, "keyframes", "mesh_info.json"):
        return f"this looks like Polycam's raw export: {NERFSTUDIO.format('polycam')}"
    if _has(folder, "EXR_RGBD", "rgbd"):
        return f"this looks like an export of Record3D: {NERFSTUDIO.format('record3d')}"
    if _has(folder, "opensfm", "odm_report", "odm_orthophoto", "reconstruction.json"):
        return (
            f"this looks like OpenDroneMap or OpenSfM: {NERFSTUDIO.format('odm')}; "
            "OpenSfM's own export_colmap makes a COLMAP model for sparse/0"
        )
    if list(folder.glob("*.sens")) or (_has(folder, "pose", "poses") and _has(folder, "color", "intrinsic")):
        return (
            "this looks like ScanNet: extract color, pose and intrinsic from the .sens file with its "
            "SensReader, and write a transforms.json: file_path color/0.jpg, and as transform_matrix that of "
            "pose/0.txt with its second and third columns negated; fl_x, fl_y, cx and cy are in intrinsic"
        )
    if list(folder.glob("*.psx")) or any(b"<chunk" in _start(path) for path in folder.glob("*.xml")):
        return (
            "this looks like Metashape: export its cameras as COLMAP, into sparse/0 beside images; or, "
            f"with its cameras as XML, {NERFSTUDIO.format('metashape')}"
        )
    if any(b"#name" in _start(path).lower() for path in folder.glob("*.csv")):
        return (
            "this looks like RealityCapture: export its registration as COLMAP, into sparse/0 beside images; "
            f"or, with its camera parameters as CSV, {NERFSTUDIO.format('realitycapture')}"
        )
    return ""


def _photos(folder: Path) -> str:
    if _has(folder, "distorted"):
        return f"convert.py has not finished here; run {_convert(folder)} again"
    for place in (folder, folder / "input"):
        if photos := _with_ending(place, PHOTOS):
            return _only_photos(place, photos, _convert(folder))
    if photos := _with_ending(folder / "images", PHOTOS):
        return _only_photos(folder / "images", photos, f"after renaming images to input, {_convert(folder)}")
    if videos := _with_ending(folder, VIDEOS):
        return f"there is a video: {_convert(videos[0])} makes a data set of its frames"
    for place in _folders(folder):
        if photos := _with_ending(place, PHOTOS):
            return _only_photos(place, photos, _convert(place))
    return ""


def _only_photos(place: Path, photos: list[Path], command: str) -> str:
    return (
        f"there are {len(photos)} photos in {place}, but nothing says where they were taken from: "
        f"{command} finds out"
    )


def _convert(path: Path) -> str:
    return f"python convert.py -s {shlex.quote(str(path))}"


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def _with_ending(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file())


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _folders(folder: Path) -> Iterator[Path]:
    """Those in it and, one step deeper, in those; not too many."""
    found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    level = sorted(found)[:MOST_FOLDERS]
    yield from level
    for inner in level:
        yield from sorted(path for path in inner.glob("*/"))[: MOST_FOLDERS // len(level)]
