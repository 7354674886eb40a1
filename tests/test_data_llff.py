"""LLFF data sets, compared with numbers worked by hand."""

import numpy as np
import pytest
from PIL import Image

from scene.points import points_in_view
from scene.readers import read_dataset
from utils.files import DataError

# The camera stands at (0, -4, 1) and looks along +y with z up: the axes are down, right, backwards.
AXES = np.array([[0, 1, 0], [0, 0, -1], [-1, 0, 0]])


def rows(count=3):
    """Cameras one unit apart along x; photos of 80 x 60 with a focal length of 100; depths 2 to 10."""
    matrices = [np.column_stack([AXES, [i, -4, 1], [60, 80, 100]]) for i in range(count)]
    return np.array([[*matrix.ravel(), 2, 10] for matrix in matrices], float)


def make_scene(folder, images="images_8", count=3, size=(10, 8)):
    (folder / images).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size).save(folder / images / f"image{i:03d}.png")
    np.save(folder / "poses_bounds.npy", rows(count))
    return folder


def test_views(tmp_path):
    dataset = read_dataset(make_scene(tmp_path))
    assert dataset.notes == [
        f"Images: from {tmp_path / 'images_8'}, as {tmp_path / 'images'} is not there",
        f"Photos: all 3 in {tmp_path / 'images_8'} have a pose",
    ]
    view = dataset.views[1]
    assert view.name == "image001.png" and (view.width, view.height) == (80, 60)
    np.testing.assert_allclose(view.intrinsics, [[100, 0, 40], [0, 100, 30], [0, 0, 1]])
    np.testing.assert_allclose(view.center, [1, -4, 1], atol=1e-12)
    np.testing.assert_allclose(view.world_to_camera @ [1, 2, 1, 1], [0, 0, 6, 1], atol=1e-12)  # ahead
    np.testing.assert_allclose(view.world_to_camera @ [2, 0, 3, 1], [1, -2, 4, 1], atol=1e-12)  # right, above


def test_which_folder(tmp_path):
    make_scene(tmp_path)
    make_scene(tmp_path, "images_4", size=(20, 15))
    make_scene(tmp_path, "images_16")
    assert read_dataset(tmp_path).views[0].image_path.parent.name == "images_4"
    assert read_dataset(tmp_path, images="images_16").views[0].image_path.parent.name == "images_16"
    with pytest.raises(
        DataError, match="images_2: the image folder is not there; there is images_16, images_4"
    ):
        read_dataset(tmp_path, images="images_2")
    make_scene(tmp_path, "images")
    assert read_dataset(tmp_path).views[0].image_path.parent.name == "images" and not any(
        "Images" in note for note in read_dataset(tmp_path).notes
    )


def test_points_fill_what_the_cameras_see(tmp_path):
    dataset = read_dataset(make_scene(tmp_path))
    assert dataset.read_points() is None
    xyz = points_in_view(dataset.views, 100_000, seed=0).xyz
    depth = xyz[:, 1] + 4
    assert len(xyz) == 100_000 and 2 <= depth.min() < 2.001 and 9.9 < depth.max() <= 10
    # Uniform in 1/depth between 1/2 and 1/10: the median is at 0.3. Half the picture is 0.3 of depth high.
    assert np.median(1 / depth) == pytest.approx(0.3, abs=0.003)
    assert np.abs((xyz[:, 2] - 1) / depth).max() == pytest.approx(0.3, abs=1e-3)
    seen = [(np.abs(xyz[:, 0] - i) / depth < 0.4001) for i in range(3)]
    assert np.any(seen, axis=0).all() and not np.all(seen, axis=0).all()
    np.testing.assert_array_equal(xyz, points_in_view(dataset.views, 100_000, seed=0).xyz)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 16)), r"must be an array of finite numbers \[views, 17\], got \[3, 16\]"),
        (np.full((3, 17), np.nan), "must be an array of finite numbers"),
        (np.array([{}]), "cannot be read as a NumPy array"),
        (np.array(["a"] * 17), "cannot be read as a NumPy array"),
        (rows(4), "has 4 poses, but .*images_8 has 3 photos"),
        (rows() * 2, "row 0: the first three columns of the matrix are no rotation"),
        (rows() * ([1, -1, 1, 1, 1] * 3 + [1, 1]), "row 0 is mirrored .* negate one axis"),
        (rows() * ([1] * 16 + [0.1]), "row 0: depths must be 0 < nearest < farthest, got 2 and 1"),
        (rows() * ([1] * 14 + [0, 1, 1]), "row 0 has impossible parameters"),
        (rows() * ([1] * 9 + [1e30] + [1] * 7), "row 0 has the impossible size 1000000000 x 60"),
    ],
)
def test_mistakes_are_named(tmp_path, array, message):
    make_scene(tmp_path)
    np.save(tmp_path / "poses_bounds.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)
