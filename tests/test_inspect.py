"""python -m scene.inspect: what it says about a data set, and its picture."""

import numpy as np
from PIL import Image, ImageFilter

from scene import inspect, layout
from scene.points import PointCloud
from scene.readers import read_dataset
from tests import test_data_blender as blender
from tests import tiny_scenes
from tests.test_scene import ring
from tests.test_undistortion import make_scene


def inspected(folder, capsys, *options) -> str:
    picture = folder.parent / "layout.png"
    assert inspect.main([str(folder), "-o", str(picture), *options]) == 0
    assert np.asarray(Image.open(picture)).std() > 3
    return capsys.readouterr().out


def test_what_it_says(tmp_path, capsys):
    folder = ring(tmp_path / "data")
    (folder / "images" / "v3.png").unlink()
    said = inspected(folder, capsys)
    assert f"COLMAP data set {folder}" in said
    assert "images   8: 8x6" in said
    # fx 20, fy 24, c = (7, 5) in 16 x 12: 2 atan(8 / 20) = 43.6 degrees; (7 - 8) / 16 = -6.3 %
    assert "cameras  16x12, 43.6 x 28.1 degrees, principal point off by -6.2 % and -8.3 %" in said
    assert "with --eval: 7 train, 1 test (by name, one in 8 (--llffhold 8))" in said
    # Train cameras are at x = 1 2 4 5 6 7 8, the mean is 33/7: 8 - 33/7 is less than 33/7 - 1 = 26/7.
    assert "extent   4.086" in said
    assert "points   2 from" in said
    assert "Warning: 1 of 9 images are not there" in said


def test_sharpness_of_photos(tmp_path, capsys):
    folder = tiny_scenes.colmap_scene(tmp_path / "data")
    photo = folder / "images" / "shot 05.png"
    Image.open(photo).filter(ImageFilter.GaussianBlur(2)).save(photo)
    assert "photos below" not in inspected(folder, capsys)
    said = inspected(folder, capsys, "--sharpness").splitlines()
    head = next(k for k, line in enumerate(said) if "photos below" in line)
    assert "1 photos below 0.5" in said[head]
    ratings = [line.split(maxsplit=1) for line in said[head + 1 : head + 9]]
    assert ratings[0][1] == "shot 05.png" and float(ratings[0][0]) < 0.5
    assert [float(rating) for rating, _ in ratings] == sorted(float(rating) for rating, _ in ratings)


def test_warnings(tmp_path, capsys):
    folder = ring(tmp_path / "data", count=3)
    lines = [f"{i} 1 0 0 0 5 5 5 1 v{i - 1}.png\n\n" for i in (1, 2, 3)]
    (folder / "sparse" / "0" / "images.txt").write_text("".join(lines))
    (folder / "sparse" / "0" / "points3D.txt").write_text("1 0 0 -40 255 0 51 0.5\n2 1 0 -50 0 0 0 0.5\n")
    said = inspected(folder, capsys)
    assert "Warning: all cameras are in one place" in said
    assert "Warning: no camera sees 100 % of the points" in said


def test_lenses_and_formats(tmp_path, capsys):
    said = inspected(make_scene(tmp_path / "lens"), capsys)
    assert "OPENCV, undistorted to " in said and "16x12, 43.6 x 28.1 degrees" in said
    said = inspected(blender.make_scene(tmp_path / "blender"), capsys)
    assert "Blender data set" in said and "points   none: those to start from are random" in said
    assert "1 train, 1 test (the data set's own split)" in said


def test_mistakes_are_told(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "nowhere")]) == 1
    assert "scene.inspect: " in capsys.readouterr().err
    folder = ring(tmp_path / "data", count=3)
    assert (
        inspect.main([str(folder), "-o", str(tmp_path / "a.txt")]) == 1 and not (tmp_path / "a.txt").exists()
    )
    assert "must end in .png or .jpg" in capsys.readouterr().err


def test_the_picture_goes_to_the_folder_or_file_that_is_told(tmp_path, monkeypatch, capsys):
    folder = ring(tmp_path / "data", count=3)
    (tmp_path / "there.d").mkdir()
    monkeypatch.chdir(tmp_path)
    for output, picture in [
        (["-o", "there.d"], "there.d/data_layout.png"),
        (["-o", "made/of two/"], "made/of two/data_layout.png"),
        (["-o", "made/with/name.jpg"], "made/with/name.jpg"),
        ([], "data_layout.png"),
    ]:
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert inspect.main([str(folder), *output]) == 0
        assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {tmp_path / picture}
        assert f"layout   {picture}" in capsys.readouterr().out


def test_the_picture_shows_cameras_and_points_where_they_are(tmp_path):
    """Cameras in a row along x look along z; a red point is before the first, a green one before the last."""
    views = read_dataset(ring(tmp_path / "data")).views
    xyz, rgb = (
        np.float32([[0, 0, 6], [8, 0, 6]]).repeat(9, 0),
        np.float32([[1, 0, 0], [0, 1, 0]]).repeat(9, 0),
    )
    xyz += np.random.default_rng(0).uniform(-0.05, 0.05, xyz.shape).astype(np.float32)
    picture = np.asarray(layout.draw_layout(views, views[-1:], PointCloud(xyz, rgb)))[
        :, : layout.PANEL
    ].astype(int)
    places = {}
    for name, color in [
        ("red", (200, 0, 0)),
        ("green", (0, 200, 0)),
        ("train", layout.TRAIN),
        ("test", layout.TEST),
    ]:
        rows, columns = np.nonzero(np.abs(picture - color).max(axis=2) == 0)
        places[name] = columns.mean(), rows.mean()
    assert abs(places["red"][0] - places["green"][0]) > 0.6 * layout.PANEL
    assert abs(places["test"][0] - places["green"][0]) < 20 < abs(places["test"][0] - places["red"][0])
    assert places["red"][1] < places["train"][1] - 100, "what is ahead is above"
