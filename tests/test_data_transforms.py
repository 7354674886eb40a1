"""transforms.json of nerfstudio and instant-ngp, compared with numbers worked by hand."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from scene.formats.ply import write_points
from scene.lens import Lens
from scene.points import PointCloud
from scene.readers import read_dataset
from scene.split import split_views
from utils.files import DataError

# The camera stands at (0, -4, 1) and looks along +y with z up: the axes are right, up, backwards.
POSE = [[1, 0, 0, 0], [0, 0, -1, -4], [0, 1, 0, 1], [0, 0, 0, 1]]
NAMES = ("b.png", "a.png", "c.png")


def make_scene(folder, names=NAMES, **meta):
    (folder / "images").mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 6)).save(folder / "images" / name)
    frames = [{"file_path": f"./images/{name}", "transform_matrix": POSE} for name in names]
    write(folder, {"fl_x": 10, "fl_y": 12.0, "cx": 3.5, "cy": 2.5, "w": 8, "h": 6.0, "frames": frames} | meta)
    return folder


def write(folder, meta):
    (folder / "transforms.json").write_text(json.dumps(meta))


def change(folder, frame=None, **meta):
    """Change numbers for all frames, and those of the frame of a.png."""
    old = json.loads((folder / "transforms.json").read_text()) | meta
    old["frames"][1] |= frame or {}
    write(folder, {name: value for name, value in old.items() if value is not None})


def test_views(tmp_path):
    dataset = read_dataset(make_scene(tmp_path))
    assert [view.name for view in dataset.views] == ["a.png", "b.png", "c.png"], "sorted by name"
    view = dataset.views[0]
    assert view.image_path == tmp_path / "images" / "a.png" and view.lens is None and view.held_out is None
    np.testing.assert_allclose(view.intrinsics, [[10, 0, 3.5], [0, 12, 2.5], [0, 0, 1]])
    assert (view.width, view.height) == (8, 6)
    np.testing.assert_allclose(view.center, [0, -4, 1], atol=1e-12)
    np.testing.assert_allclose(view.world_to_camera @ [0, 2, 1, 1], [0, 0, 6, 1], atol=1e-12)  # ahead
    np.testing.assert_allclose(view.world_to_camera @ [1, 0, 3, 1], [1, -2, 4, 1], atol=1e-12)  # right, above


def test_numbers_of_a_frame_come_before_those_of_all(tmp_path):
    make_scene(tmp_path)
    change(tmp_path, frame={"fl_x": 20, "cx": 1, "k1": 0.01, "transform_matrix": POSE[:3]})
    a, b, _ = read_dataset(tmp_path).views
    assert a.lens == Lens("OPENCV", 8, 6, 20, 12, 1, 2.5, (0.01, 0, 0, 0, 0, 0)) and b.lens is None
    assert a.intrinsics[0, 0] == 20 and b.intrinsics[0, 0] == 10
    np.testing.assert_allclose(a.center, b.center)  # three rows of a matrix are enough


def test_angles_and_sizes_where_there_are_no_pixels(tmp_path):
    make_scene(tmp_path, fl_x=None, fl_y=None, cx=None, cy=None, w=None, h=None)
    change(tmp_path, camera_angle_x=2 * math.atan(0.5))  # the size is the file's: f = 4 / tan
    view = read_dataset(tmp_path).views[0]
    np.testing.assert_allclose(view.intrinsics, [[8, 0, 4], [0, 8, 3], [0, 0, 1]])
    change(tmp_path, camera_angle_y=2 * math.atan(0.3))  # 3 / 0.3
    np.testing.assert_allclose(read_dataset(tmp_path).views[0].intrinsics[1, 1], 10)
    change(tmp_path, frame={"camera_angle_x": 2 * math.atan(0.25)}, fl_x=100)
    assert [view.intrinsics[0, 0] for view in read_dataset(tmp_path).views] == pytest.approx([16, 100, 100])


@pytest.mark.parametrize(
    "meta, lens",
    [
        (
            {"k1": 0.1, "k2": 0.02, "p1": 0.003, "p2": 0.004, "k3": 0.005},
            ("OPENCV", (0.1, 0.02, 0.003, 0.004, 0.005, 0)),
        ),
        ({"camera_model": "PINHOLE", "k1": 0.1}, ("OPENCV", (0.1, 0, 0, 0, 0, 0))),
        ({"camera_model": "OPENCV_FISHEYE", "k4": 0.1}, ("OPENCV_FISHEYE", (0, 0, 0, 0.1))),
        ({"is_fisheye": True, "k1": 0.1}, ("OPENCV_FISHEYE", (0.1, 0, 0, 0))),
        ({"camera_model": "FULL_OPENCV", "k6": 0.1}, ("FULL_OPENCV", (0, 0, 0, 0, 0, 0, 0, 0.1))),
    ],
)
def test_lenses(tmp_path, meta, lens):
    view = read_dataset(make_scene(tmp_path, **meta)).views[0]
    assert (view.lens.model, view.lens.coefficients) == lens


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_other_programs(tmp_path, encoding):
    make_scene(tmp_path)
    text = (tmp_path / "transforms.json").read_text()
    (tmp_path / "transforms.json").write_bytes(text.encode(encoding))
    assert len(read_dataset(tmp_path).views) == 3
    (tmp_path / "test.txt").write_bytes("b.png\n".encode("utf-16"))
    assert split_views(read_dataset(tmp_path), True, 8)[1][0].name == "b.png"


def test_numbers_in_quotes(tmp_path):
    make_scene(tmp_path, w="8", h=" 6 ", fl_x="10.0", fl_y="1.2e1", is_fisheye="False")
    change(tmp_path, frame={"transform_matrix": [[str(x) for x in row] for row in POSE]})
    a, b, _ = read_dataset(tmp_path).views
    np.testing.assert_allclose(a.intrinsics, [[10, 0, 3.5], [0, 12, 2.5], [0, 0, 1]])
    assert (a.width, a.height, a.lens) == (8, 6, None)
    np.testing.assert_array_equal(a.world_to_camera, b.world_to_camera)
    change(tmp_path, w="")
    with pytest.raises(DataError, match="frame 0: w must be a number, got ''"):
        read_dataset(tmp_path)


def test_endings_folders_and_masks(tmp_path):
    make_scene(tmp_path)
    (tmp_path / "images_2").mkdir()
    for name in NAMES:
        Image.new("RGB", (4, 3)).save(tmp_path / "images_2" / name)
    change(tmp_path, frame={"file_path": "images\\a", "mask_path": "masks/a.png"})
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 6)).save(tmp_path / "masks" / "a.png")
    view = read_dataset(tmp_path).views[0]
    assert view.image_path == tmp_path / "images" / "a.png" and view.mask_path == tmp_path / "masks" / "a.png"
    assert read_dataset(tmp_path, images="images_2").views[0].image_path == tmp_path / "images_2" / "a.png"
    change(tmp_path, frame={"file_path": str(tmp_path / "images" / "a.png")})
    assert read_dataset(tmp_path).views[0].name == "a.png"


def test_split_lists(tmp_path):
    make_scene(tmp_path, test_filenames=["./images/c.png"])
    assert [view.held_out for view in read_dataset(tmp_path).views] == [False, False, True]
    change(tmp_path, train_filenames=["images/a.png"], val_filenames=["images/b.png"])
    assert [view.held_out for view in read_dataset(tmp_path).views] == [False, True, True]
    change(tmp_path, train_filenames=None, test_filenames=None)
    assert [view.held_out for view in read_dataset(tmp_path).views] == [False, True, False]
    change(tmp_path, val_filenames=[])
    assert [view.held_out for view in read_dataset(tmp_path).views] == [None] * 3


def test_points(tmp_path):
    make_scene(tmp_path, ply_file_path="cloud.ply")
    with pytest.raises(DataError, match=r"cloud.ply: the point cloud is not there"):
        read_dataset(tmp_path).read_points()
    write_points(tmp_path / "cloud.ply", PointCloud(np.float32([[1, 2, 3]]), np.float32([[1, 0, 0.2]])))
    points, origin = read_dataset(tmp_path).read_points()
    assert points.xyz.tolist() == [[1, 2, 3]] and origin == str(tmp_path / "cloud.ply")
    change(tmp_path, ply_file_path=None)
    assert read_dataset(tmp_path).read_points() is None


def test_missing_images_are_left_out_on_request(tmp_path):
    make_scene(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not there: .*a.png; --skip_missing leaves"):
        read_dataset(tmp_path)
    assert [view.name for view in read_dataset(tmp_path, skip_missing=True).views] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    "meta, frame, message",
    [
        ({"frames": 3}, {}, "must have a list as frames"),
        ({"fl_x": "x"}, {}, "frame 0: fl_x must be a number, got 'x'"),
        ({"fl_x": None, "fl_y": None}, {}, "needs a number as camera_angle_x or as fl_x"),
        ({"fl_x": -1}, {}, "has impossible parameters"),
        ({"k1": 1e300}, {}, "frame 0: k1 must be a number, got 1e.300"),
        ({"k1": -1e6}, {}, "frame 0: OPENCV with the coefficients .* leaves"),
        ({"w": 0}, {}, "impossible size 0 x 6"),
        (
            {"camera_model": "EQUIRECTANGULAR"},
            {},
            "frame 0 has the camera_model 'EQUIRECTANGULAR'; known are",
        ),
        ({"camera_model": ["x"]}, {}, "frame 0 has the camera_model"),
        ({"train_filenames": 7}, {}, "train_filenames must be a list"),
        ({}, {"file_path": 7}, "frame 1 needs file_path"),
        ({}, {"file_path": "a\0b"}, "frame 1 needs file_path"),
        ({}, {"transform_matrix": [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]]}, "frame 1 .* is a rotation"),
        ({}, {"transform_matrix": [[math.nan] * 4] * 4}, "frame 1 needs"),
        (
            {},
            {"transform_matrix": [[-1, 0, 0, 0], *POSE[1:]]},
            "frame 1: transform_matrix is mirrored .* negate one axis",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, meta, frame, message):
    make_scene(tmp_path)
    if "frames" in meta:
        write(tmp_path, meta)
    else:
        change(tmp_path, frame=frame, **meta)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)
