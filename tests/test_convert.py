"""convert.py: photos of all kinds, frames of a video, how COLMAP is called, and the whole way."""

import base64
import json
import shlex
import shutil
import sqlite3
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert
from arguments import ConvertParams
from capture import photos, video
from capture.engines import Engine, Executable, run
from scene.readers import colmap as colmap_reader
from scene.readers import read_dataset
from tests import test_data_colmap as colmap
from utils import memory
from utils.files import DataError

# 48 x 32 pixels, red is 5 x, green 7 y, blue 60; made for this test.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJp"
    "bG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAFsAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAAB"
    "AAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEA"
    "AQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAA"
    "FGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAAAv///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhp"
    "cG1hAAAAAAAAAAEAAQWBAgMFhAAAAGNtZGF0AAAAVygBrxOA9TPn6811px7G5osCj2wSapJ8QxN1+M2AmrIKI+hOy9sfBvUKVY82vPU+"
    "knjdB3ETsgTjWviCcSZcc9hCvuWnsZ4Yr0rXDCc2XncomSE2lewv4A=="
)


def gradient(width=48, height=32) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.uint8(np.stack([x * 5, y * 7, 0 * x + 60], -1)))


def exif(orientation=1, focal=28, model="Phone") -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x0110] = orientation, model
    tags.get_ifd(0x8769)[0xA405] = focal  # in millimeters of 35 mm film
    return tags


def prepared(folder: Path) -> tuple[dict, list[str]]:
    good, bad = photos.prepare(folder / "in", photos.find(folder / "in"), folder / "out")
    return {photo.name: photo for photo in good}, bad


# Photos


def test_good_photos_are_the_same_files(tmp_path):
    (tmp_path / "in" / "sub dir").mkdir(parents=True)
    gradient().save(tmp_path / "in" / "a é.JPG", exif=exif())
    gradient().save(tmp_path / "in" / "sub dir" / "b.png")
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.jpg").write_bytes(b"of an earlier run")
    good, bad = prepared(tmp_path)
    assert list(good) == ["a é.JPG", "sub dir/b.png"] and not bad
    for name in good:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
        assert good[name].size == (48, 32)
    assert not (tmp_path / "out" / "old.jpg").exists()


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_photos_on_their_side_are_turned_upright_and_keep_their_focal_length(tmp_path, orientation, turn):
    (tmp_path / "in").mkdir()
    gradient().save(tmp_path / "in" / "a.jpg", exif=exif(orientation), quality=95, subsampling=0)
    before = (tmp_path / "in" / "a.jpg").read_bytes()
    good, _ = prepared(tmp_path)
    with Image.open(tmp_path / "out" / "a.jpg") as image:
        assert image.getexif()[0x0112] == 1 and image.getexif().get_ifd(0x8769)[0xA405] == 28
        assert good["a.jpg"].size == image.size == ((48, 32) if turn == 2 else (32, 48))
        upright = np.rot90(np.asarray(gradient()), turn)
        assert np.abs(np.asarray(image).astype(int) - upright).max() <= 6
    assert (tmp_path / "in" / "a.jpg").read_bytes() == before, "the original is untouched"


def test_formats_that_colmap_does_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    gradient().save(tmp_path / "in" / "a.tiff", exif=exif())
    gradient().save(tmp_path / "in" / "a.jpg")  # its name is taken, then
    gradient().convert("RGBA").save(tmp_path / "in" / "b.png")
    Image.fromarray(np.uint16(np.asarray(gradient())[..., 0]) * 256).save(tmp_path / "in" / "c.tif")
    gradient().convert("CMYK").save(tmp_path / "in" / "d.jpg")
    good, bad = prepared(tmp_path)
    assert sorted(good) == ["a.jpg", "a.tiff.jpg", "b.png", "c.jpg", "d.jpg"] and not bad
    for name in ("a.tiff.jpg", "b.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.mode == "RGB"
            assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient())).max() <= 6
    with Image.open(tmp_path / "out" / "c.jpg") as image:
        gray = np.asarray(gradient())[..., :1].astype(int)
        assert np.abs(np.asarray(image).astype(int) - gray).max() <= 4


def test_heic(tmp_path):
    pytest.importorskip("pi_heif")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "IMG_1.HEIC").write_bytes(HEIC)
    good, bad = prepared(tmp_path)
    assert list(good) == ["IMG_1.jpg"] and not bad
    with Image.open(tmp_path / "out" / "IMG_1.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient())).mean() < 5


def test_without_the_package_heic_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "IMG_1.HEIC").write_bytes(HEIC)
    with pytest.raises(DataError, match=r"1 photos are HEIC \(IMG_1.HEIC\).*make setup-capture"):
        prepared(tmp_path)


def test_photos_of_one_kind_share_a_camera(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size, tags in [
        ("a", (48, 32), exif()), ("b", (48, 32), exif()), ("zoomed", (48, 32), exif(focal=50)),
        ("other", (48, 32), exif(model="Camera")), ("turned", (48, 32), exif(6)), ("small", (24, 16), exif()),
    ]:  # fmt: skip
        gradient(*size).save(tmp_path / "in" / f"{name}.jpg", exif=tags, comment=name)
    good, _ = prepared(tmp_path)
    cameras = {name: photo.camera for name, photo in good.items()}
    assert cameras["a.jpg"] == cameras["b.jpg"] and len(set(cameras.values())) == 5


def test_broken_photos_are_left_out_and_told(tmp_path):
    (tmp_path / "in").mkdir()
    gradient().save(tmp_path / "in" / "good.jpg")
    for name in ("cut.jpg", "cut.tif"):
        gradient(300, 300).save(tmp_path / "in" / name)
        data = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(data[: len(data) // 2])
    (tmp_path / "in" / "text.png").write_text("no picture")
    good, bad = prepared(tmp_path)
    assert list(good) == ["good.jpg"] and len(bad) == 3
    assert all("cannot be read as an image" in message for message in bad)
    (tmp_path / "in" / "good.jpg").unlink()
    with pytest.raises(DataError, match=r"no photo can be read: .*cut.jpg"):
        prepared(tmp_path)


def test_memory_bounds_what_is_done_at_once(monkeypatch):
    assert 0 < memory.available() < 1 << 50
    monkeypatch.setattr("utils.memory.available", lambda: 10 << 30)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert [memory.workers(n << 30) for n in (1, 3, 7)] == [6, 2, 1] and memory.workers(1) == 16
    photo = photos.Photo("a.jpg", (8000, 6000), ())
    assert convert.feature_limits([photo])[1] == 1600
    monkeypatch.setattr("utils.memory.available", lambda: 1 << 30)
    threads, size = convert.feature_limits([photo])
    assert size == 1000 and threads * 0.75 * 1000**2 * convert.FEATURE_BYTES_PER_PIXEL <= memory.budget()
    assert convert.feature_limits([photos.Photo("a.jpg", (640, 480), ())])[1] == 640
    monkeypatch.setattr("utils.memory.available", lambda: 10 << 30)
    assert convert.feature_limits([photos.Photo("a.jpg", (900, 1500), ())])[1] == 1500


def test_what_a_container_allows(tmp_path, monkeypatch):
    """Files that the system keeps in memory give way."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    machine = memory.available()
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 200\nactive_file 50\n")
    (tmp_path / "memory.current").write_text("950\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available() == 1000 - 950 + 200 + 50


def test_a_photo_that_is_there_twice_is_left_out_and_told(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, comment in (("a.jpg", "x"), ("b.jpg", "y"), ("sub/a.JPG", "x")):
        gradient().save(tmp_path / "in" / name, "JPEG", comment=comment)
    good, bad = prepared(tmp_path)
    assert list(good) == ["a.jpg", "b.jpg"]
    assert bad == [f"{tmp_path / 'in' / 'sub' / 'a.JPG'}: is the same photo as {tmp_path / 'in' / 'a.jpg'}"]


def test_names_that_differ_in_case_alone_are_not_made(tmp_path):
    """A disk that takes A for a would have one file for both."""
    (tmp_path / "in").mkdir()
    gradient().save(tmp_path / "in" / "a.JPG")
    gradient(50, 32).save(tmp_path / "in" / "A.tif")
    assert sorted(prepared(tmp_path)[0]) == ["A.tif.jpg", "a.JPG"]


def test_postscript_is_no_photo(tmp_path, monkeypatch):
    """Whatever it is called: Pillow would start Ghostscript."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **more: started.append(args))
    (tmp_path / "in").mkdir()
    gradient().save(tmp_path / "in" / "a.jpg")
    gradient().save(tmp_path / "in" / "b.tif", "EPS")
    good, bad = prepared(tmp_path)
    assert list(good) == ["a.jpg"] and "b.tif: cannot be read as an image" in bad[0] and not started


# Video


def test_the_sharpest_frames_of_a_video(tmp_path):
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    sharp = random.integers(0, 256, (120, 160, 3), np.uint8)
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    writer = cv2.VideoWriter(str(tmp_path / "walk é.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (160, 120))
    expected = [3, 17, 25, 39]  # one in each ten frames
    for number in range(40):
        frame = (sharp if number in expected else blurred).copy()
        frame[:20] = number * 6  # says which frame it is
        writer.write(frame)
    writer.release()
    paths = video.extract_frames(tmp_path / "walk é.avi", tmp_path / "frames", 4)
    assert [path.name for path in paths] == [f"frame_{i:05d}.jpg" for i in range(1, 5)]
    numbers = [round(np.asarray(Image.open(path))[:16].mean() / 6) for path in paths]
    assert numbers == expected
    assert len(video.extract_frames(tmp_path / "walk é.avi", tmp_path / "frames", 1000)) == 40, (
        "all there are"
    )
    assert len(video.extract_frames(tmp_path / "walk é.avi", tmp_path / "frames", 7)) == 7


def test_sharpness_is_the_variance_of_the_laplacian():
    frame = np.zeros((5, 5, 3), np.uint8)
    frame[2, 2] = 9  # the Laplacian in the inner 3 x 3 pixels: -36 in the middle, 9 beside, 0 in the corners
    assert video.sharpness(frame) == pytest.approx((36**2 + 4 * 81) / 9)
    assert video.sharpness(np.full((1280, 2560, 3), 7, np.uint8)) == 0


def test_what_is_no_video(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    (tmp_path / "a.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(DataError, match=r"a.mp4: cannot be read as a video"):
        video.extract_frames(tmp_path / "a.mp4", tmp_path / "frames", 10)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match=r"opencv-python-headless.*make setup-capture"):
        video.extract_frames(tmp_path / "a.mp4", tmp_path / "frames", 10)


# COLMAP

HELP_OLD = """COLMAP 3.8 -- Structure-from-Motion
--random_seed arg (=0)
--SiftExtraction.use_gpu arg (=1)  --SiftExtraction.num_threads  --SiftExtraction.max_image_size
--SiftMatching.use_gpu"""
HELP_NEW = """COLMAP 3.13.0 -- Structure-from-Motion
--FeatureExtraction.use_gpu arg (=1)  --FeatureExtraction.num_threads  --FeatureExtraction.max_image_size
--SiftExtraction.max_num_features  --Mapper.random_seed arg  --FeatureMatching.use_gpu
--jpeg_quality  --num_threads"""


@pytest.fixture
def calls(tmp_path):
    """A program that calls itself COLMAP, and the words that it was called with."""

    def make(text: str):
        program, log = tmp_path / "my colmap", tmp_path / "calls"
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"if sys.argv[-1] in ('-h', 'help'): print({text!r}); sys.exit()\n"
            f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        places = (tmp_path / "photos é", tmp_path / "db", tmp_path / "log", False)
        engine = Executable(str(program), *places)
        return engine, lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return make


@pytest.mark.parametrize(
    "text, version, extraction, matching",
    [
        (HELP_OLD, "COLMAP 3.8", "SiftExtraction", "SiftMatching"),
        (HELP_NEW, "COLMAP 3.13.0", "FeatureExtraction", "FeatureMatching"),
    ],
)
def test_options_are_right_for_the_version(tmp_path, calls, text, version, extraction, matching):
    engine, called = calls(text)
    assert engine.name == version
    engine.features([["a b.jpg"], ["c.jpg"]], "OPENCV", 2, 1600)
    engine.match("exhaustive", "", 1)
    engine.reconstruct("incremental", 2, tmp_path / "sparse", 7)
    engine.undistort(tmp_path / "sparse" / "0", tmp_path / "undistorted", 3, 2)
    assert list(engine.took) == ["Finding features", "Matching pairs", "Registering photos", "Undistorting"]
    assert min(engine.took.values()) > 0
    first, second, match, mapper, undistorter = called()
    assert first[0] == "feature_extractor" and first == second
    assert first[first.index("--image_path") + 1] == str(tmp_path / "photos é")
    assert ("4096" in first) == (text == HELP_NEW), "of 3.8 our stand-in's help does not name it"
    for name, value in [("use_gpu", "0"), ("num_threads", "2"), ("max_image_size", "1600")]:
        assert first[first.index(f"--{extraction}.{name}") + 1] == value
    assert first[first.index("--ImageReader.camera_model") + 1] == "OPENCV"
    assert first[first.index("--ImageReader.single_camera") + 1] == "1"
    assert match == [
        "exhaustive_matcher",
        "--database_path",
        str(tmp_path / "db"),
        f"--{matching}.use_gpu",
        "0",
    ]
    seed = "--random_seed" if text == HELP_OLD else "--Mapper.random_seed"
    assert mapper[mapper.index(seed) + 1] == "7"
    assert mapper[0] == "mapper" and mapper[-2:] == ["--Mapper.ba_global_function_tolerance", "1e-06"]
    assert ("--jpeg_quality" in undistorter) == ("--num_threads" in undistorter) == (text == HELP_NEW)


def test_matchers(calls):
    engine, called = calls(HELP_OLD)
    engine.match("sequential", "tree.bin", 1)
    engine.match("vocab_tree", "tree.bin", 1)
    sequential, by_tree = called()
    assert sequential[0] == "sequential_matcher" and "--SequentialMatching.loop_detection" in sequential
    assert by_tree[0] == "vocab_tree_matcher" and by_tree[-1] == "tree.bin"
    assert convert.choose_matcher(1000, True, False) == "sequential"
    assert convert.choose_matcher(300, False, True) == "exhaustive"
    assert convert.choose_matcher(301, False, True) == "vocab_tree"
    assert convert.choose_matcher(301, False, False) == "exhaustive"


def test_what_goes_wrong_is_told(tmp_path, monkeypatch, calls):
    with pytest.raises(DataError, match="nowhere: cannot be run as COLMAP"):
        Executable(str(tmp_path / "nowhere"), None, None, None, False)
    with pytest.raises(DataError, match="does not answer `help` as COLMAP does"):
        calls("something else")
    words = [sys.executable, "-c", "import sys; print('first'); sys.exit('no such camera')"]
    with pytest.raises(
        DataError, match=r"mapper ended with 1; its last words, in .*log:\s+first\s+no such camera"
    ):
        run(words, "mapper", tmp_path / "log", "Registering", 3, lambda: 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"pycolmap is not installed: `make setup-capture`.*--colmap_executable"
    ):
        Engine(None, None, None, False)


def test_progress_is_read_from_log_and_database(tmp_path, calls):
    engine, _ = calls(HELP_OLD)
    engine.log.write_text(
        "Registering image #9 (50)\n\n$ colmap mapper\nRegistering image #12 (3)\n=> "
        "Registering frame #14 (num_reg_frames=4)\n"
    )
    assert engine._registered() == 4
    assert engine._rows("keypoints")() == 0
    with sqlite3.connect(engine.database) as db:
        db.execute("CREATE TABLE keypoints (id INTEGER)")
        db.execute("INSERT INTO keypoints VALUES (1), (2)")
    assert engine._rows("keypoints")() == 2


# Folded reconstructions


def pair_database(path: Path, pairs: dict[tuple[int, int], int]) -> Path:
    """A database of four photos, with the number of matches of some pairs."""
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE images (image_id INTEGER, name TEXT)")
        db.execute("CREATE TABLE two_view_geometries (pair_id INTEGER, rows INTEGER)")
        db.executemany("INSERT INTO images VALUES (?, ?)", [(i, f"{i}.jpg") for i in range(1, 5)])
        rows = [(first * 2147483647 + second, matches) for (first, second), matches in pairs.items()]
        db.executemany("INSERT INTO two_view_geometries VALUES (?, ?)", rows)
    return path


def test_pairs_that_match_but_share_no_points(tmp_path):
    pairs = {(1, 2): 100, (2, 3): 100, (1, 3): 100, (3, 4): 100, (1, 4): 29}
    database = pair_database(tmp_path / "db", pairs)
    seen = {"1.jpg": range(50), "2.jpg": range(40, 90), "3.jpg": range(81, 120)}  # 4.jpg is not in the model
    tracks = {name: np.array(points) for name, points in seen.items()}
    # Shared: 10 of (1, 2), which is just enough, 9 of (2, 3), none of (1, 3).
    assert convert.contradictions(database, tracks) == pytest.approx(2 / 3)
    assert convert.contradictions(database, {}) == 0
    assert convert.contradictions(tmp_path / "none", tracks) == 0 and not (tmp_path / "none").exists()
    database.write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match="db: cannot be read as a database of COLMAP"):
        convert.contradictions(database, tracks)


def test_focal_lengths_that_photos_do_not_tell(tmp_path):
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("CREATE TABLE cameras (camera_id, width, height, params, prior_focal_length)")
        params = np.array([120, 120, 50, 40, 0.1, 0, 0, 0], "<f8").tobytes()
        db.execute("INSERT INTO cameras VALUES (1, 100, 80, ?, 0), (2, 100, 80, ?, 1)", (params, params))
    convert.set_unknown_focals(tmp_path / "db", "OPENCV", 0.75)
    with sqlite3.connect(tmp_path / "db") as db:
        unknown, told = (np.frombuffer(row[0]) for row in db.execute("SELECT params FROM cameras"))
    assert unknown.tolist() == [75, 75, 50, 40, 0.1, 0, 0, 0] and told[0] == 120


def test_a_folded_reconstruction_is_tried_again(tmp_path, monkeypatch, capsys):
    """The second of three tries is the best, though none is good."""

    class Folding:
        database = tmp_path / "db"

        def reconstruct(self, mapper, count, models, seed):
            models.mkdir()
            scene = colmap.make_scene(tmp_path / f"scene {len(list(tmp_path.iterdir()))}")
            (scene / "sparse" / "0").rename(models / "0")
            (models / "0" / "seed").write_text(str(seed))

    capture = convert.Capture(tmp_path, tmp_path / "data")
    capture.work.mkdir(parents=True)
    folded = iter([0.5, 0.2, 0.9])
    monkeypatch.setattr(convert, "contradictions", lambda database, tracks: next(folded))
    focals = []
    monkeypatch.setattr(convert, "set_unknown_focals", lambda database, camera, focal: focals.append(focal))
    convert.find_poses(ConvertParams(), capture, Folding(), 2)
    assert (capture.models / "0" / "seed").read_text() == "1" and focals == [0.75, 1.0]
    assert not list(capture.work.glob("try_*"))
    said = capsys.readouterr().out
    assert "50 % of the matching pairs contradict the reconstruction; trying again" in said

    monkeypatch.setattr(convert, "contradictions", lambda database, tracks: 0.01)
    convert.find_poses(ConvertParams(), capture, Folding(), 2)
    assert (capture.models / "0" / "seed").read_text() == "0", "good at once"

    class Failing(Folding):
        def reconstruct(self, mapper, count, models, seed):
            models.mkdir()

    with pytest.raises(DataError, match="no reconstruction came out. Photos need to overlap"):
        convert.find_poses(ConvertParams(), capture, Failing(), 2)


@pytest.mark.parametrize("placed, count, fails", [(2, 20, 1), (4, 20, 1), (5, 20, 0), (2, 2, 0)])
def test_too_few_photos_placed_is_a_failure(tmp_path, capsys, monkeypatch, placed, count, fails):
    """It says what helps, and leaves the data set of an earlier run alone."""

    class Placing(Engine):
        def _check(self):
            return "an engine"

        def features(self, *arguments): ...

        match = features

        def reconstruct(self, mapper, count, models, seed):
            models.mkdir()
            colmap.make_scene(tmp_path / "scene")
            (tmp_path / "scene" / "sparse" / "0").rename(models / "0")

        def undistort(self, *arguments):
            raise DataError("as far as undistortion")

    for number in range(count):
        gradient(48 + number, 32).save(tmp_path / f"{number}.jpg")
    read = colmap_reader.read_model
    monkeypatch.setattr(
        colmap_reader, "read_model", lambda path: (read(path)[0], (read(path)[1] * placed)[:placed])
    )
    monkeypatch.setattr(convert, "Engine", Placing)
    monkeypatch.setattr(convert, "contradictions", lambda database, tracks: 0)
    monkeypatch.setattr(colmap_reader, "read_tracks", lambda path: {})
    assert convert.main(["-s", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert ("as far as undistortion" in told) != fails
    assert (f"only {placed} of {count} photos could be placed" in told) == fails
    assert ("more overlap between neighbors" in told) == fails


def placed_report(folder, capsys, photos):
    """What is said of a data set of two views if there were so many photos."""
    if not (folder / "data").exists():
        colmap.make_scene(folder / "data")
        (folder / "data" / "distorted").mkdir()
    names = [view.name for view in read_dataset(folder / "data").views]
    names += [f"lost{number}.jpg" for number in range(photos - len(names))]
    took = {"Preparing photos": 1.25, "Matching pairs": 75.0}
    capture = convert.Capture(folder / "data", folder / "data")
    convert.report(capture, [photos_of(name) for name in names], [], took)
    return capsys.readouterr().out


def photos_of(name):
    return photos.Photo(name, (16, 12), ())


def test_the_report_warns_of_few_photos_and_tells_what_took_how_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(colmap_reader, "read_tracks", lambda path: {})
    cloud = colmap_reader.PointCloud(np.zeros((1, 3)), np.zeros((1, 3)))
    monkeypatch.setattr(colmap_reader, "read_points_bin", lambda path: (cloud, np.ones(1), np.ones(1)))
    views = len(read_dataset(colmap.make_scene(tmp_path / "data")).views)
    (tmp_path / "data" / "distorted").mkdir()
    said = placed_report(tmp_path, capsys, 2 * views)
    assert f"Warning: only {views} of {2 * views} photos could be placed" in said
    assert "Seconds: preparing photos 1, matching pairs 75" in said
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["seconds"] == {"Preparing photos": 1.2, "Matching pairs": 75.0}
    assert "Warning: only" not in placed_report(tmp_path, capsys, views)


# The command


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "source_path is empty"),
        (["-s", "x", "--frames", "1"], "frames must be at least 2"),
        (["-s", "x", "--camera", "LEICA"], "camera must be one of SIMPLE_PINHOLE"),
    ],
)
def test_flags_are_checked(words, message, capsys):
    with pytest.raises(SystemExit):
        convert.main(words)
    assert message in capsys.readouterr().err


def test_where_photos_are_looked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Engine, "_check", lambda engine: "an engine")
    assert convert.main(["-s", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is not there" in capsys.readouterr().err
    assert convert.main(["-s", str(tmp_path)]) == 1
    assert f"put them into {tmp_path / 'input'}" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("x")
    assert convert.main(["-s", str(tmp_path / "a.txt")]) == 1
    assert "must be a folder of photos or a video" in capsys.readouterr().err
    gradient().save(tmp_path / "a.jpg")
    capture, is_video = convert.find_capture(tmp_path, 10, False)
    assert (capture.source, capture.folder, is_video) == (tmp_path, tmp_path, False)
    gradient().save(tmp_path / "report.png")  # of an earlier run, as are those in folders
    (tmp_path / "images").mkdir()
    gradient().save(tmp_path / "images" / "a.jpg")
    assert convert.main(["-s", str(tmp_path)]) == 1
    assert f"{tmp_path / 'images'} was not made by convert.py" in capsys.readouterr().err
    assert (tmp_path / "images" / "a.jpg").exists()
    capture.work.mkdir()  # now it was
    assert convert.main(["-s", str(tmp_path)]) == 1
    assert "needs two photos or more, found 1" in capsys.readouterr().err
    assert convert.main(["-s", str(tmp_path), "--matcher", "vocab_tree"]) == 1
    assert "--matcher vocab_tree needs --vocab_tree" in capsys.readouterr().err
    (tmp_path / "input").mkdir()
    capture, _ = convert.find_capture(tmp_path, 10, False)
    assert (capture.source, capture.folder) == (tmp_path / "input", tmp_path)


WIDTH, HEIGHT, FOCAL = 320, 240, 300.0


def corner(views: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """World to camera [4, 4] and photo of a walk past the corner of a room with speckled walls."""
    random = np.random.default_rng(0)
    walls = []  # normal, distance; the two directions in the wall; its speckles
    for normal, distance in (((0, 0, 1), 4.0), ((-1, 0, 0), 2.0), ((0, 1, 0), 1.2)):
        octaves = [
            random.random((n, n, 3)).repeat(1024 // n, 0).repeat(1024 // n, 1) for n in (32, 64, 128, 256)
        ]
        axes = np.eye(3)[np.array(normal) == 0]
        walls.append((np.array(normal, float), distance, axes, np.mean(octaves, axis=0)))
    y, x = (np.mgrid[:HEIGHT, :WIDTH] + 0.5 - np.array([HEIGHT / 2, WIDTH / 2])[:, None, None]) / FOCAL
    taken = []
    for t in np.linspace(0, 1, views):
        matrix = look_at(
            np.array([2.5 * t - 0.5, -0.5 * np.sin(3 * t), 0.8 * t - 0.5]), np.array([-0.6, 0.2, 3])
        )
        rays = np.stack([x, y, np.ones_like(x)], -1) @ matrix[:3, :3]
        center = -matrix[:3, :3].T @ matrix[:3, 3]
        photo, nearest = np.zeros((HEIGHT, WIDTH, 3)), np.full((HEIGHT, WIDTH), np.inf)
        for normal, distance, axes, speckles in walls:
            depth = (distance - center @ normal) / (rays @ normal)
            closer = (depth > 0) & (depth < nearest)
            place = ((center + rays[closer] * depth[closer, None]) @ axes.T * 120 + 512).astype(int) % 1024
            photo[closer], nearest[closer] = speckles[place[:, 0], place[:, 1]], depth[closer]
        taken.append((matrix, np.uint8(255 * photo)))
    return taken


def look_at(center: np.ndarray, target: np.ndarray) -> np.ndarray:
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross([0, 1.0, 0], forward)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    matrix[:3, 3] = -matrix[:3, :3] @ center
    return matrix


@pytest.fixture(scope="session")
def captured(tmp_path_factory) -> tuple[dict, Path]:
    """Where photos were taken, and the data set that convert.py makes of them. One of them is torn."""
    pytest.importorskip("pycolmap")
    folder = tmp_path_factory.mktemp("capture") / "my walk é"
    (folder / "input" / "sub").mkdir(parents=True)
    centers = {}
    for number, (matrix, photo) in enumerate(corner(14)):
        name = f"sub/{number:02d}.jpg" if number % 2 else f"{number:02d}.jpg"
        Image.fromarray(photo).save(folder / "input" / name, quality=95)
        centers[name] = -matrix[:3, :3].T @ matrix[:3, 3]
    (folder / "input" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    assert convert.main(["-s", str(folder), "--resize", "--no_gpu", "--camera", "SIMPLE_RADIAL"]) == 0
    return centers, folder


@pytest.mark.slow
def test_cameras_are_found(captured):
    """Up to a similarity, the cameras are where they were."""
    centers, folder = captured
    views = read_dataset(folder).views
    assert len(views) >= 12, "all photos or all but two"
    a, b = np.array([view.center for view in views]), np.array([centers[view.name] for view in views])
    moved = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, vt = np.linalg.svd(moved[0].T @ moved[1])
    rotation = vt.T @ np.diag([1, 1, np.sign(np.linalg.det(vt.T @ u.T))]) @ u.T
    scale = s.sum() / (moved[0] ** 2).sum()
    off = np.linalg.norm(scale * moved[0] @ rotation.T - moved[1], axis=1)
    assert off.max() < 0.02 * np.linalg.norm(moved[1], axis=1).max()
    assert all(view.lens is None for view in views), "undistorted"
    for view in views:
        assert view.intrinsics[0, 0] == pytest.approx(FOCAL, rel=0.02)


@pytest.mark.slow
def test_what_convert_leaves(captured):
    _, folder = captured
    report = json.loads((folder / "report.json").read_text())
    assert report["photos"] == 15 and report["registered"] >= 12 and report["points"] > 300
    assert report["matching pairs that contradict"] < 0.02
    assert 0.1 < report["reprojection error in pixels"] < 1.5 and "torn.jpg" in report["left out"][0]
    assert np.asarray(Image.open(folder / "report.png")).std() > 5
    first = folder / "images" / "00.jpg"
    with Image.open(first) as image, Image.open(folder / "images_4" / first.name) as small:
        assert small.size == (round(image.width / 4), round(image.height / 4))
    assert (folder / "input" / "torn.jpg").exists() and not (folder / "distorted" / "undistorted").exists()


@pytest.mark.slow
def test_skip_matching_only_undistorts(captured, monkeypatch, capsys):
    _, folder = captured
    for step in ("features", "match", "reconstruct"):
        monkeypatch.setattr(Engine, step, None)
    shutil.rmtree(folder / "images")
    assert convert.main(["-s", str(folder), "--skip_matching"]) == 0
    assert len(read_dataset(folder).views) >= 12
    next_command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(next_command) == ["Next:", "python", "train.py", "-s", str(folder)]
