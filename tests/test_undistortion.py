"""Photos of lenses that distort, from data set to cameras: right pixels, kept in the model folder."""

import json
import os

import numpy as np
import torch
from PIL import Image

from arguments import ModelParams
from scene import Scene
from scene.lens import Lens, undistort, undistorted_size
from tests.test_lens import pattern

CPU = torch.device("cpu")
LENS = Lens("OPENCV", 160, 120, 150.0, 155.0, 90.0, 50.0, (0.1, -0.3, 0.01, -0.02))


def make_scene(folder, size=(160, 120), mode="RGB"):
    """Two cameras in one model, the second without distortion and of another size; the photo is a known
    picture. In a folder below images/."""
    (folder / "sparse" / "0").mkdir(parents=True)
    (folder / "images" / "left").mkdir(parents=True)
    numbers = " ".join(map(str, (LENS.fx, LENS.fy, LENS.cx, LENS.cy, *LENS.coefficients)))
    cameras = f"1 OPENCV 160 120 {numbers}\n2 PINHOLE 16 12 20 24 7 5\n"
    (folder / "sparse" / "0" / "cameras.txt").write_text(cameras)
    poses = "1 1 0 0 0 0 0 0 1 left/a.png\n\n2 1 0 0 0 1 0 0 2 b.png\n\n"
    (folder / "sparse" / "0" / "images.txt").write_text(poses)
    (folder / "sparse" / "0" / "points3D.txt").write_text("1 0 0 4 255 0 51 0.5\n2 1 0 5 0 0 0 0.5\n")
    Image.fromarray(photo(size)).convert(mode).save(folder / "images" / "left" / "a.png")
    Image.new("RGB", (16, 12), (10, 20, 30)).save(folder / "images" / "b.png")
    return folder


def photo(size=(160, 120)):
    row, column = np.mgrid[: size[1], : size[0]] + 0.5
    return np.uint8(pattern(column, row, *size) + 0.5)


def cameras(folder, training=True, **options):
    model = ModelParams(source_path=str(folder), model_path=str(folder.parent / "model"), **options)
    scene = Scene(model, CPU, for_training=training, quiet=True)
    return sorted(scene.train_cameras, key=lambda camera: camera.name, reverse=True)


def test_cameras_without_distortion(tmp_path):
    a, b = cameras(make_scene(tmp_path / "data"))
    frame = LENS.pinhole()
    assert (a.name, a.width, a.height) == ("left/a.png", frame.width, frame.height)
    torch.testing.assert_close(a.K, torch.tensor(frame.matrix).float())
    np.testing.assert_array_equal(a.image().permute(1, 2, 0), undistort(photo(), LENS))
    assert (b.width, b.height) == (16, 12) and b.image()[:, 0, 0].tolist() == [10, 20, 30]
    # A point of the world is where the lens saw it: the pixel of the pinhole shows the same color.
    point = np.array([0.3, -0.1, 2.0])
    u, v = LENS.project(point[0] / point[2], point[1] / point[2])
    column, row, _ = (a.K.double().numpy() @ point) / point[2]
    seen = a.image()[:, int(row), int(column)].double().numpy()
    here = LENS.project((int(column) + 0.5 - frame.cx) / frame.fx, (int(row) + 0.5 - frame.cy) / frame.fy)
    assert np.hypot(here[0] - u, here[1] - v) < 1.5
    assert np.abs(seen - pattern(*here, 160, 120)).max() < 1.5


def test_smaller_files_and_smaller_training_sizes(tmp_path):
    """The file is half as large as the camera, -r 2 halves it again."""
    (a, _) = cameras(make_scene(tmp_path / "data", size=(80, 60)), resolution=2)
    width, height = undistorted_size(LENS, (80, 60))
    frame = LENS.pinhole()
    assert (a.width, a.height) == (round(width / 2), round(height / 2))
    assert (a.original_width, a.original_height) == (frame.width, frame.height)
    scale = np.diag([a.width / frame.width, a.height / frame.height, 1])
    torch.testing.assert_close(a.K.double(), torch.tensor(scale @ frame.matrix), rtol=1e-6, atol=1e-4)


def test_undistorted_photos_are_kept_and_made_again_when_stale(tmp_path, monkeypatch):
    folder = make_scene(tmp_path / "data")
    first = cameras(folder)[0].image()
    kept = tmp_path / "model" / "undistorted" / "images" / "left" / "a.png.png"
    assert [p for p in (tmp_path / "model" / "undistorted").rglob("*.png")] == [kept]

    with monkeypatch.context() as patch:  # nothing is undistorted a second time
        patch.setattr("scene.images.undistort", None)
        assert (cameras(folder, training=False)[0].image() == first).all()

    for spoil in (
        lambda: kept.write_bytes(kept.read_bytes()[:-100]),
        lambda: Image.new("RGB", (5, 5)).save(kept),
        lambda: kept.unlink(),
    ):
        spoil()
        assert (cameras(folder)[0].image() == first).all()

    path = folder / "images" / "left" / "a.png"
    Image.fromarray(255 - photo()).save(path)
    os.utime(path, (1_000, 1_000))
    changed = cameras(folder)[0].image()
    assert (changed.int() + first.int() - 255).abs().max() <= 1


def test_photos_from_elsewhere_are_kept_in_the_model_folder(tmp_path):
    """transforms.json may name photos beside the data set, or anywhere; nothing is written there."""
    folder, lens = tmp_path / "data" / "one", dict(fl_x=LENS.fx, k1=LENS.coefficients[0])
    places = [tmp_path / "data" / "photos" / "a.png", tmp_path / "elsewhere" / "a.png"]
    for path in places:
        path.parent.mkdir(parents=True)
        Image.fromarray(photo()).save(path)
    folder.mkdir()
    names = ["../photos/a.png", str(places[1])]
    frames = [{"file_path": name, "transform_matrix": np.eye(4).tolist()} for name in names]
    (folder / "transforms.json").write_text(json.dumps(lens | {"frames": frames}))
    cameras(folder, random_init=10, allow_outside_paths=True)
    kept = tmp_path / "data" / "model" / "undistorted"
    assert len(list(kept.rglob("a.png.png"))) == 2
    assert {path for path in tmp_path.rglob("*.png") if not path.is_relative_to(kept)} == set(places)


def test_transparent_photos_stay_transparent(tmp_path):
    """Invisible pixels are white here, and lend none of it to the others over a black background."""
    folder = make_scene(tmp_path / "data", mode="RGBA")
    path = folder / "images" / "left" / "a.png"
    pixels = np.full((120, 160, 4), 255, np.uint8)
    pixels[:, :80] = 40, 80, 120, 255
    pixels[:, 80:, 3] = 0
    Image.fromarray(pixels).save(path)
    black = cameras(folder)[0].image().int()
    white = cameras(folder, white_background=True)[0].image().int()
    assert (
        black[2].max() <= 136  # at the edge the bicubic weights overshoot by a tenth
        and (black[2] > 118).float().mean() > 0.4
        and (black[2] == 0).float().mean() > 0.4
    )
    assert (white[2] >= 119).all() and (white[2] == 255).float().mean() > 0.4


def test_depth_maps_are_undistorted_like_the_photo(tmp_path):
    folder = make_scene(tmp_path / "data")
    (folder / "depths" / "left").mkdir(parents=True)
    values = (photo()[..., 0].astype(np.uint16)) * 200
    Image.fromarray(values).save(folder / "depths" / "left" / "a.png")
    (folder / "sparse" / "0" / "depth_params.json").write_text('{"left/a": {"scale": 1, "offset": 0}}')
    depth, _ = cameras(folder, depths="depths")[0].inv_depth()
    expected = undistort(values[..., None].astype(np.float32), LENS)[..., 0] / 65536
    np.testing.assert_allclose(depth, expected, rtol=1e-6)
