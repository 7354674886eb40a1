"""Blender data sets, compared with numbers worked by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arguments import ModelParams
from scene import Scene
from scene.images import load_inverse_depth
from scene.readers import read_dataset
from scene.split import split_views
from utils.files import DataError

# The camera stands at (0, -4, 1) and looks along +y with z up: Blender's axes are right, up, backward.
POSE = [[1, 0, 0, 0], [0, 0, -1, -4], [0, 1, 0, 1], [0, 0, 0, 1]]


def make_scene(folder: Path, splits=("train", "test"), ending: str = "") -> Path:
    for split in splits:
        (folder / split).mkdir(parents=True)
        Image.new("RGBA", (8, 6)).save(folder / split / "r_0.png")
        frames = [{"file_path": f"./{split}/r_0{ending}", "transform_matrix": POSE, "rotation": 0.1}]
        meta = {"camera_angle_x": 2 * math.atan(0.5), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("ending", ["", ".png"])
def test_views(tmp_path, ending):
    dataset = read_dataset(make_scene(tmp_path, ending=ending))
    train, test = dataset.views
    assert (train.held_out, test.held_out) == (False, True)
    assert train.name == "r_0" and train.image_path == tmp_path / "train" / "r_0.png"
    # tan(fov / 2) = 1/2 = (8 / 2) / focal: the focal length is 8, vertically too.
    np.testing.assert_allclose(train.intrinsics, [[8, 0, 4], [0, 8, 3], [0, 0, 1]])
    np.testing.assert_allclose(train.center, [0, -4, 1], atol=1e-12)
    ahead = train.world_to_camera @ [0, 2, 1, 1]  # 6 ahead, in the middle
    np.testing.assert_allclose(ahead, [0, 0, 6, 1], atol=1e-12)
    above_right = train.world_to_camera @ [1, 0, 3, 1]  # camera y points down
    np.testing.assert_allclose(above_right, [1, -2, 4, 1], atol=1e-12)


def test_frames_with_their_own_cameras(tmp_path):
    path = make_scene(tmp_path) / "transforms_train.json"
    meta = json.loads(path.read_text())
    meta["frames"][0] |= {"fl_x": 9, "fl_y": 11, "cx": 3, "cy": 2.5}
    path.write_text(json.dumps(meta))
    train, test = read_dataset(tmp_path).views
    np.testing.assert_allclose(train.intrinsics, [[9, 0, 3], [0, 11, 2.5], [0, 0, 1]])
    np.testing.assert_allclose(test.intrinsics, [[8, 0, 4], [0, 8, 3], [0, 0, 1]])


def test_missing_images_are_left_out_on_request(tmp_path):
    make_scene(tmp_path)
    (tmp_path / "test" / "r_0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are not there: .*r_0.png; --skip_missing leaves"):
        read_dataset(tmp_path)
    assert [view.held_out for view in read_dataset(tmp_path, skip_missing=True).views] == [False]


def test_without_a_test_file_views_are_held_out_by_number(tmp_path):
    path = make_scene(tmp_path / "data", splits=("train",)) / "transforms_train.json"
    for name in ("r_1.PNG", "r_2.JPG"):  # as cameras name them; file_path has no ending
        Image.new("RGB", (8, 6)).save(tmp_path / "data" / "train" / name)
    frames = [{"file_path": f"train/r_{i}", "transform_matrix": POSE} for i in range(3)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": frames}))
    train, test, reason = split_views(read_dataset(tmp_path / "data"), True, 2)
    assert ([view.name for view in train], [view.name for view in test]) == (["r_1"], ["r_0", "r_2"])
    assert "--llffhold 2" in reason


def test_without_points_the_start_is_the_originals(tmp_path):
    folder = make_scene(tmp_path, splits=("train",))
    assert read_dataset(folder).read_points() is None
    model = ModelParams(source_path=str(folder), model_path=str(tmp_path / "model"))
    points = Scene(model, torch.device("cpu"), for_training=False, quiet=True).points
    np.random.seed(0)  # the original draws from numpy's global generator, seeded so
    np.testing.assert_array_equal(points.xyz, np.float32(np.random.random((100_000, 3)) * 2.6 - 1.3))
    np.testing.assert_allclose(points.rgb, 127 / 255)


def test_depth_maps(tmp_path):
    make_scene(tmp_path, splits=("train",))
    (tmp_path / "depth").mkdir()
    Image.new("I;16", (8, 6), 256).save(tmp_path / "depth" / "r_0.png")
    depth = read_dataset(tmp_path, depths="depth").views[0].depth
    assert depth.path == tmp_path / "depth" / "r_0.png" and depth.reliable
    assert (load_inverse_depth(depth, (8, 6)) == 0.5).all(), "256 / 512, and nothing to align it by"


def test_points_beside_the_transforms(tmp_path):
    from scene.formats.ply import write_points
    from scene.points import PointCloud

    make_scene(tmp_path)
    write_points(tmp_path / "points3d.ply", PointCloud(np.float32([[1, 2, 3]]), np.float32([[1, 0, 0.2]])))
    points, origin = read_dataset(tmp_path).read_points()
    assert origin.endswith("points3d.ply")
    np.testing.assert_allclose(points.xyz, [[1, 2, 3]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"camera_angle_x": None}, "frame 0 needs a number as camera_angle_x"),
        ({"camera_angle_x": 4.0}, "camera_angle_x must be between 0 and pi, got 4.0"),
        ({"frames": 3}, "a list as frames"),
        ({"frames": []}, "the data set has no images"),
        ({"frames": [{"file_path": "train/r_0"}]}, "frame 0 needs file_path and a 4x4 transform_matrix"),
        ({"frames": ["x"]}, "frame 0 needs file_path and a 4x4 transform_matrix"),
        ({"frames": [{"file_path": "train/r_0", "transform_matrix": [[1, 2], [3, 4]]}]}, "frame 0 needs"),
        ({"frames": [{"file_path": "train/r_0", "transform_matrix": [[0] * 4] * 4}]}, "frame 0 needs"),
        (
            {"frames": [{"file_path": "train/r_9", "transform_matrix": POSE}]},
            r"1 of 1 images are not there: .*r_9.png",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    path = make_scene(tmp_path, splits=("train",)) / "transforms_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)


def test_files_that_are_not_what_they_seem(tmp_path):
    make_scene(tmp_path)
    (tmp_path / "train" / "r_0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"r_0.png: cannot be read as an image"):
        read_dataset(tmp_path)
    (tmp_path / "transforms_train.json").write_text("{")
    with pytest.raises(DataError, match=r"transforms_train.json: cannot be read as JSON"):
        read_dataset(tmp_path)
