"""Photos as structure from motion wants them: upright, 8 bits, in formats that COLMAP reads.

What is so already is linked, byte for byte; the rest (photos on their side, HEIC, TIFF) becomes JPEG, with
its EXIF data, as COLMAP takes the focal length from there. At most a few photos are in memory at a time.
"""

import hashlib
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from utils.files import BAD_IMAGE, DataError, atomic_write, open_image, some
from utils.memory import workers
from utils.terminal import progress

AS_THEY_ARE = {".jpg", ".jpeg", ".png"}
TO_CONVERT = {".tif", ".tiff", ".webp", ".bmp"}
HEIF = {".heic", ".heif"}
ENDINGS = AS_THEY_ARE | TO_CONVERT | HEIF
REPORT = "report.png"  # our own picture, which is no photo
QUALITY = 95
UPRIGHT = (None, 1)  # EXIF orientations
BYTES_PER_PIXEL = 12  # while a photo is converted


@dataclass(frozen=True)
class Photo:
    name: str  # path below the photo folder, with forward slashes
    size: tuple[int, int]  # width, height; upright
    camera: tuple  # photos of which this is equal share a camera


def find(folder: Path, below: bool = True) -> list[Path]:
    """All photos in the folder and, if `below`, in its sub-folders, by name."""
    paths = folder.rglob("*") if below else (p for p in folder.iterdir() if p.name != REPORT)
    return sorted(p for p in paths if p.suffix.lower() in ENDINGS and p.is_file())


def prepare(folder: Path, paths: list[Path], out: Path) -> tuple[list[Photo], list[str]]:
    """Put the photos into `out`, which is emptied first. Returns them, and what is wrong with the others."""
    if any(path.suffix.lower() in HEIF for path in paths):
        _open_heif(paths)
    if out.exists():
        shutil.rmtree(out)
    names, originals = _names(folder, paths), _originals(paths)

    def one(path: Path) -> Photo | str:
        if path in originals:
            return f"{path}: is the same photo as {originals[path]}"
        try:
            return _prepare(path, names[path], out)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(workers(BYTES_PER_PIXEL * max(map(_pixels, paths)))) as pool:
        results = list(progress(pool.map(one, paths), "Preparing photos", len(paths)))
    good = [result for result in results if isinstance(result, Photo)]
    bad = [result for result in results if isinstance(result, str)]
    if not good:
        raise DataError(f"{folder}: no photo can be read: {some(bad, 3)}")
    return good, bad


def _pixels(path: Path) -> int:
    try:
        with open_image(path, *_more(path)) as image:
            width, height = image.size
    except BAD_IMAGE:
        return 0  # will be told when it is read
    return width * height


def _originals(paths: list[Path]) -> dict[Path, Path]:
    """Of each photo that is there several times, byte for byte, the first. Reads only files of equal size."""
    sizes = Counter(path.stat().st_size for path in paths)
    first, again = {}, {}
    for path in paths:
        if sizes[path.stat().st_size] > 1:
            content = hashlib.sha256(path.read_bytes()).digest()
            if first.setdefault(content, path) != path:
                again[path] = first[content]
    return again


def _more(path: Path) -> tuple[str, ...]:
    """The format that only those ask for who have the package for it."""
    return ("HEIF",) if path.suffix.lower() in HEIF else ()


def _names(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """What each photo will be called: as it is, or ending in .jpg if it has to be converted."""
    taken, names = {path.relative_to(folder).as_posix().lower() for path in paths}, {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in AS_THEY_ARE:
            jpeg = path.relative_to(folder).with_suffix(".jpg").as_posix()
            name = jpeg if jpeg.lower() not in taken else f"{name}.jpg"
            taken.add(name.lower())
        names[path] = name
    return names


def _prepare(path: Path, name: str, out: Path) -> Photo:
    target = out / name
    try:
        with open_image(path, *_more(path)) as image:
            exif = image.getexif()
            upright = exif.get(ExifTags.Base.Orientation) in UPRIGHT
            if upright and path.suffix.lower() in AS_THEY_ARE and image.mode in ("RGB", "L"):
                image.load()  # a photo that is cut off is found here, not by COLMAP
                size = image.size
                _link(path, target)
            else:
                size = _convert(image, exif, target)
    except BAD_IMAGE as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None
    return Photo(name, size, (size, *_taken_with(exif)))


def _convert(image: Image.Image, exif: Image.Exif, target: Path) -> tuple[int, int]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray
        image = image.point(lambda value: value / 256).convert("L")
    exif[ExifTags.Base.Orientation] = 1
    form = "PNG" if target.suffix.lower() == ".png" else "JPEG"
    with atomic_write(target) as file:
        image.convert("RGB").save(file, form, quality=QUALITY, subsampling=0, exif=exif.tobytes())
    return image.size


def _taken_with(exif: Image.Exif) -> tuple:
    """Camera and zoom, as far as EXIF says."""
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    focal = [inner.get(tag) for tag in (ExifTags.Base.FocalLength, ExifTags.Base.FocalLengthIn35mmFilm)]
    return tuple(
        str(value) for value in (exif.get(ExifTags.Base.Make), exif.get(ExifTags.Base.Model), *focal)
    )


def _link(path: Path, target: Path) -> None:
    """A second name for the file, where the file system can do that; else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def _open_heif(paths: list[Path]) -> None:
    try:
        from pi_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        heic = [path.name for path in paths if path.suffix.lower() in HEIF]
        raise DataError(
            f"{len(heic)} photos are HEIC ({some(heic, 3)}): reading those needs the package pi-heif; "
            "`make setup-capture` installs it"
        ) from None
    register_heif_opener()
