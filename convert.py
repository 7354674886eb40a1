"""From photos or a video to a data set: find out where each photo was taken from.

    python convert.py -s capture            photos in capture/input, or in capture itself
    python convert.py -s walk.mp4           the sharpest frames of a video; the data set is walk/

Steps: upright photos in a format that COLMAP reads; features; pairs; reconstruction; undistortion. The data
set is images/ and sparse/0 in that folder. What is between is in distorted/; originals are not touched.
"""

import contextlib
import shlex
import shutil
import sqlite3
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arguments import ConvertParams, parse_convert
from capture import photos as capture_photos
from capture import video
from capture.engines import MAX_FEATURES, Engine, Executable
from capture.photos import REPORT, Photo
from scene.layout import draw_layout
from scene.lens import MODELS
from scene.readers import colmap, read_dataset
from utils import commands
from utils.files import DataError, open_image, some, write_json
from utils.memory import budget, workers
from utils.terminal import progress, say

FEATURE_SIZES = (1600, 1000)  # longer side of photos while features are looked for; more place no better
FEATURE_BYTES_PER_PIXEL = 400  # while features are looked for; 310 measured at 3200x1800
UNDISTORT_BYTES_PER_PIXEL = 24
EXHAUSTIVE_UP_TO = 300  # photos; the number of pairs grows with its square
RESIZED = (2, 4, 8)
FOCALS = (1.2, 0.75, 1.0)  # one for each try, as a part of the longer side; the first is COLMAP's own guess
GOOD_PAIR, MIN_SHARED = 30, 0.1  # matches of a pair; points that it must share, as a part of them
FAILED, FEW = 0.25, 0.6  # of the photos placed: less is a failure, or worth a warning
MAX_FOLDED = 0.05  # of the pairs may not; a good model has hardly any, a folded one a fifth
ADVICE = (
    "What helps: more overlap between neighbors, no blur, no plain walls filling the picture; --camera "
    "OPENCV_FISHEYE for strong distortion; other pairs by --matcher"
)
MAX_IMAGES = 2**31 - 1  # COLMAP's number of a pair is the first image's number times this plus the second's


@dataclass
class Capture:
    """Where things are."""

    source: Path  # photos
    folder: Path  # the data set to be

    @property
    def work(self) -> Path:
        return self.folder / "distorted"

    @property
    def prepared(self) -> Path:
        return self.work / "photos"

    @property
    def models(self) -> Path:
        return self.work / "sparse"

    @property
    def log(self) -> Path:
        return self.work / "colmap.log"


def convert(params: ConvertParams) -> None:
    if params.matcher == "vocab_tree" and not params.vocab_tree:
        raise DataError("--matcher vocab_tree needs --vocab_tree, a file that COLMAP's documentation names")
    capture, is_video = find_capture(Path(params.source_path), params.frames, params.skip_matching)
    for name in ("images", "sparse"):
        if (capture.folder / name).exists() and not capture.work.exists():
            raise DataError(
                f"{capture.folder / name} was not made by convert.py, which would replace it; move it away, "
                f"and photos to start from into {capture.folder / 'input'}"
            )
    capture.work.mkdir(parents=True, exist_ok=True)
    engine = make_engine(params, capture)
    say(f"Engine: {engine.name}")
    if params.skip_matching:
        photos, bad = None, []
    else:
        capture.log.unlink(missing_ok=True)
        paths = capture_photos.find(capture.source, below=capture.source != capture.folder)
        if len(paths) < 2:
            raise DataError(f"{capture.source}: needs two photos or more, found {len(paths)}")
        start = time.monotonic()
        photos, bad = capture_photos.prepare(capture.source, paths, capture.prepared)
        engine.took["Preparing photos"] = time.monotonic() - start
        reconstruct(params, capture, engine, photos, is_video)
    model = best_model(capture.models)
    if model is None:
        raise DataError(f"{capture.models}: has no reconstruction to undistort; run without --skip_matching")
    if photos:
        check_placed(capture, len(colmap.read_model(model)[1]), len(photos))
    undistort(capture, engine, model)
    if params.resize:
        resize(capture.folder)
    report(capture, photos, bad, engine.took)


def check_placed(capture: Capture, placed: int, count: int) -> None:
    """Two of twenty are no data set."""
    if placed < FAILED * count:
        raise DataError(
            f"{capture.source}: only {placed} of {count} photos could be placed, so there is no data set. "
            f"{ADVICE}. --skip_matching makes one of those few all the same"
        )


def find_capture(source: Path, frames: int, skip_matching: bool) -> tuple[Capture, bool]:
    """Where the photos are. Takes them out of a video, if it is one."""
    if source.is_file():
        if source.suffix.lower() not in video.ENDINGS:
            raise DataError(
                f"{source}: must be a folder of photos or a video, ending in {', '.join(video.ENDINGS)}"
            )
        folder = source.with_suffix("")
        if not skip_matching:
            video.extract_frames(source, folder / "input", frames)
        return Capture(folder / "input", folder), True
    if not source.is_dir():
        raise DataError(f"{source}: is not there")
    if (source / "input").is_dir():
        return Capture(source / "input", source), False
    if any(p.suffix.lower() in capture_photos.ENDINGS for p in source.iterdir()):
        return Capture(source, source), False
    raise DataError(f"{source}: has no photos; put them into {source / 'input'}")


def make_engine(params: ConvertParams, capture: Capture) -> Engine:
    common = capture.prepared, capture.work / "database.db", capture.log, not params.no_gpu
    return Executable(params.colmap_executable, *common) if params.colmap_executable else Engine(*common)


def reconstruct(
    params: ConvertParams, capture: Capture, engine: Engine, photos: list[Photo], is_video: bool
) -> None:
    for old in capture.work.glob("database.db*"):  # with what SQLite keeps beside it
        old.unlink()
    groups: dict[tuple, list[str]] = {}
    for photo in photos:
        groups.setdefault(photo.camera, []).append(photo.name)
    threads, size = feature_limits(photos)
    say(f"Cameras: {len(groups)} ({params.camera}), by size, make and focal length of the photos")
    say(f"Features: up to {MAX_FEATURES:,} of each photo, looked for at up to {size} pixels")
    engine.features(list(groups.values()), params.camera, threads, size)

    matcher = params.matcher
    if matcher == "auto":
        matcher = choose_matcher(len(photos), is_video, bool(params.vocab_tree))
    pairs = len(photos) * (len(photos) - 1) // 2 if matcher == "exhaustive" else 14 * len(photos)
    say(f"Matcher: {matcher}, about {pairs:,} pairs")
    engine.match(matcher, params.vocab_tree, pairs)
    find_poses(params, capture, engine, len(photos))


def feature_limits(photos: list[Photo]) -> tuple[int, int]:
    """Threads, and the longer side to which photos are reduced for them, so that memory is enough."""
    shape = max(
        width * height / max(width, height) ** 2 for width, height in (photo.size for photo in photos)
    )
    longest = max(max(photo.size) for photo in photos)
    full = min(longest, FEATURE_SIZES[0])
    sizes = [full] + [size for size in FEATURE_SIZES if size < full]
    fitting = [size for size in sizes if FEATURE_BYTES_PER_PIXEL * shape * size**2 <= budget()]
    size = fitting[0] if fitting else sizes[-1]
    if size < full:
        say(f"Memory is scarce: features are looked for in photos reduced to {size} pixels")
    return workers(FEATURE_BYTES_PER_PIXEL * shape * size**2), size


def choose_matcher(count: int, is_video: bool, vocab_tree: bool) -> str:
    """Neighbors in time for a video, every pair for a few photos, the most similar ones for many."""
    if is_video:
        return "sequential"
    if count <= EXHAUSTIVE_UP_TO:
        return "exhaustive"
    if vocab_tree:
        return "vocab_tree"
    say(
        f"{count} photos make {count * (count - 1) // 2:,} pairs, which takes long. If they were taken one "
        "beside the other and are named in that order, --matcher sequential is faster; else --vocab_tree"
    )
    return "exhaustive"


def find_poses(params: ConvertParams, capture: Capture, engine: Engine, count: int) -> None:
    """The reconstruction. One that began with a wrong focal length or an unlucky pair can be folded: photos
    that match do not see the same points. Then it is tried again from another focal length, for cameras
    whose photos do not tell it, and another pair. The best is kept, in distorted/sparse."""
    tries = {}
    for seed, focal in enumerate(FOCALS):
        models = capture.work / f"try_{seed}"
        shutil.rmtree(models, ignore_errors=True)
        if seed:
            set_unknown_focals(engine.database, params.camera, focal)
        engine.reconstruct(params.mapper, count, models, seed)
        model = best_model(models)
        if model is None:
            continue
        folded = contradictions(engine.database, colmap.read_tracks(model / "images.bin"))
        tries[models] = len(colmap.read_model(model)[1]) * (1 - folded)
        if folded <= MAX_FOLDED or params.mapper == "global":
            break
        say(f"{100 * folded:.0f} % of the matching pairs contradict the reconstruction; trying again")
    if not tries:
        raise DataError(
            f"{capture.source}: no reconstruction came out. Photos need to overlap by more than half, be "
            "sharp, and be taken from different places; turning on the spot is not enough"
        )
    shutil.rmtree(capture.models, ignore_errors=True)
    shutil.move(max(tries, key=tries.__getitem__), capture.models)
    for models in capture.work.glob("try_*"):
        shutil.rmtree(models)


def set_unknown_focals(database: Path, camera: str, factor: float) -> None:
    """What cameras start from if EXIF told nothing."""
    focals = MODELS[camera][1]
    with contextlib.closing(sqlite3.connect(database)) as db:
        rows = db.execute("SELECT camera_id, width, height, params FROM cameras WHERE prior_focal_length = 0")
        for number, width, height, params in rows.fetchall():
            values = np.frombuffer(params, "<f8").copy()
            values[:focals] = factor * max(width, height)
            db.execute("UPDATE cameras SET params = ? WHERE camera_id = ?", (values.tobytes(), number))
        db.commit()


def best_model(models: Path) -> Path | None:
    """The model with the most photos: where not all of them hang together there are several."""
    found = {
        folder: len(colmap.read_model(folder)[1])
        for folder in sorted(models.glob("*"))
        if (folder / "images.bin").is_file()
    }
    return max(found, key=found.__getitem__, default=None)


def contradictions(database: Path, tracks: dict[str, np.ndarray]) -> float:
    """Which part of the pairs that match well, and are both in the model, hardly share a point of it."""
    if not database.is_file():
        return 0.0
    try:
        with contextlib.closing(sqlite3.connect(database)) as db:
            names = dict(db.execute("SELECT image_id, name FROM images"))
            query = "SELECT pair_id, rows FROM two_view_geometries WHERE rows >= ?"
            pairs = db.execute(query, (GOOD_PAIR,)).fetchall()
    except sqlite3.Error as error:
        raise DataError(f"{database}: cannot be read as a database of COLMAP ({error})") from None
    against = []
    for pair, matches in pairs:
        first, second = (names.get(number) for number in divmod(pair, MAX_IMAGES))
        if first in tracks and second in tracks:
            shared = np.intersect1d(tracks[first], tracks[second])
            against.append(len(shared) < MIN_SHARED * matches)
    return float(np.mean(against)) if against else 0.0


def undistort(capture: Capture, engine: Engine, model: Path) -> None:
    """images/ and sparse/0 of the data set; what was there is replaced."""
    cameras, poses = colmap.read_model(model)
    fresh = capture.work / "undistorted"
    shutil.rmtree(fresh, ignore_errors=True)
    largest = max(camera.width * camera.height for camera in cameras.values())
    engine.undistort(model, fresh, workers(UNDISTORT_BYTES_PER_PIXEL * largest), len(poses))
    for old in (capture.folder / "images", capture.folder / "sparse"):
        shutil.rmtree(old, ignore_errors=True)
    (capture.folder / "sparse").mkdir()
    shutil.move(fresh / "images", capture.folder / "images")
    shutil.move(fresh / "sparse", capture.folder / "sparse" / "0")
    shutil.rmtree(fresh)


def resize(folder: Path) -> None:
    """images_2, images_4 and images_8, as train.py -i wants them."""
    paths = capture_photos.find(folder / "images")
    for path in progress(paths, "Making smaller copies"):
        with open_image(path) as image:
            image.load()
            for factor in RESIZED:
                small = folder / f"images_{factor}" / path.relative_to(folder / "images")
                small.parent.mkdir(parents=True, exist_ok=True)
                size = tuple(max(round(side / factor), 1) for side in image.size)
                image.resize(size, Image.Resampling.LANCZOS).save(small, quality=capture_photos.QUALITY)


def report(capture: Capture, photos: list[Photo] | None, bad: list[str], took: dict[str, float]) -> None:
    """What came out, in words, as report.json and as a picture."""
    dataset = read_dataset(capture.folder)
    model = capture.folder / "sparse" / "0"
    points, errors, lengths = colmap.read_points_bin(model / "points3D.bin")
    registered = {view.name for view in dataset.views}
    names = {photo.name for photo in photos} if photos else registered
    lost = sorted(names - registered)
    folded = contradictions(capture.work / "database.db", colmap.read_tracks(model / "images.bin"))
    numbers = {
        "photos": len(names) + len(bad),
        "registered": len(registered),
        "not registered": lost,
        "left out": bad,
        "matching pairs that contradict": round(folded, 3),
        "points": len(points),
        "reprojection error in pixels": round(float(errors.mean()), 3) if len(errors) else None,
        "photos per point": round(float(lengths.mean()), 2) if len(lengths) else None,
        "seconds": {step: round(seconds, 1) for step, seconds in took.items()},
    }
    write_json(capture.folder / "report.json", numbers, indent=1)
    draw_layout(dataset.views, [], points).save(capture.folder / REPORT)
    say(
        f"Registered {len(registered)} of {numbers['photos']} photos; {len(points):,} points, each seen by "
        f"{numbers['photos per point']} photos, {numbers['reprojection error in pixels']} pixels off"
    )
    if folded > MAX_FOLDED:
        say(
            f"Warning: {100 * folded:.0f} % of the matching pairs contradict this reconstruction. Either it "
            "is folded, or things that look alike were taken for each other; look at the picture"
        )
    for message in bad[:5]:
        say(f"Left out: {message}")
    if lost:
        say(f"Not registered: {some(lost, 8)}")
    if len(registered) < FEW * len(names):
        say(f"Warning: only {len(registered)} of {len(names)} photos could be placed")
    if len(lost) > 0.1 * len(names):
        say(ADVICE)
    say("Seconds: " + ", ".join(f"{step.lower()} {seconds:.0f}" for step, seconds in took.items()))
    say(f"Cameras and points: {capture.folder / REPORT}")
    say(f"Next: python train.py -s {shlex.quote(str(capture.folder))}")


def main(argv: list[str] | None = None) -> int:
    params = parse_convert(argv)
    return commands.run("convert.py", lambda: convert(params))


if __name__ == "__main__":
    sys.exit(main())
