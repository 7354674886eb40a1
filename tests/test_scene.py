"""From a data set folder to cameras: sizes, pixels, split, masks, depth, files of the model folder."""

import json
import random
import re
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arguments import ModelParams
from capture.depth_scale import read_map
from scene import Scene
from scene.images import DECODED, load_image, training_size
from scene.points import nearest_to_axes, points_in_view
from scene.readers.views import View
from tests import test_data_blender as blender
from tests import test_data_colmap as colmap
from utils.files import DataError
from utils.image import read_image

CPU = torch.device("cpu")


def ring(folder, count=9, size=(8, 6)):
    """COLMAP: `count` cameras on the x axis, one unit apart, all looking along +z; image i is gray 10 i."""
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    (folder / "images").mkdir()
    (model / "cameras.txt").write_text("1 PINHOLE 16 12 20 24 7 5\n")
    lines = []
    for i in reversed(range(count)):
        lines += [f"{i + 1} 1 0 0 0 {-i} 0 0 1 v{i}.png", ""]
        Image.new("RGB", size, (10 * i, 10 * i, 10 * i)).save(folder / "images" / f"v{i}.png")
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("1 0 0 4 255 0 51 0.5\n2 1 0 5 0 0 0 0.5\n")
    return folder


def names(cameras):
    return [camera.name for camera in cameras]


def load(folder, training=False, **options):
    model = ModelParams(source_path=str(folder), model_path=str(folder.parent / "model"), **options)
    scene = Scene(model, CPU, for_training=training, quiet=True)
    if training:
        scene.write_inputs()
    return scene


# Sizes


@pytest.mark.parametrize(
    "size, resolution, expected",
    [
        ((1000, 750), 1, (1000, 750)),
        ((1000, 750), 2, (500, 375)),
        ((1000, 750), 4, (250, 188)),  # 187.5 rounds to the even neighbor, as Python rounds
        ((1000, 750), 8, (125, 94)),
        ((1600, 1067), -1, (1600, 1067)),
        ((1601, 1067), -1, (1599, 1066)),  # 1601 / (1601 / 1600) is 1599.99.. in floating point, cut off
        ((5187, 3361), -1, (1600, 1036)),  # 1036.75, cut off
        ((1000, 750), 400, (400, 300)),
        ((1000, 751), 400, (400, 300)),  # 300.4
    ],
)
def test_training_size(size, resolution, expected):
    assert training_size(*size, resolution) == expected


def test_training_size_has_no_zero():
    with pytest.raises(DataError, match="resolution must be -1 or positive, got 0"):
        training_size(8, 6, 0)


def test_intrinsics_follow_the_size_of_the_image(tmp_path):
    """The camera is 16x12, the files 8x6 (as with images_2), -r 2 makes 4x3: every length is a quarter."""
    camera = load(ring(tmp_path / "data"), resolution=2).train_cameras[0]
    assert (camera.width, camera.height, camera.original_width, camera.original_height) == (4, 3, 16, 12)
    assert camera.image().shape == (3, 3, 4)
    torch.testing.assert_close(camera.K, torch.tensor([[5.0, 0, 1.75], [0, 6.0, 1.25], [0, 0, 1]]))
    assert camera.fovx == pytest.approx(2 * np.arctan(16 / 40)) and camera.fovy == pytest.approx(
        2 * np.arctan(0.25)
    )


# Pixels


def test_transparency_is_composited_over_the_background(tmp_path):
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, 0] = 200, 100, 50, 255  # opaque
    rgba[0, 1] = 200, 100, 50, 0  # invisible: its color must not count
    rgba[0, 2] = 200, 100, 50, 51  # a fifth
    rgba[0, 3] = 255, 0, 128, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    white = load_image(tmp_path / "a.png", (4, 1), white_background=True)[:, 0].T
    black = load_image(tmp_path / "a.png", (4, 1), white_background=False)[:, 0].T
    assert black.dtype == torch.uint8
    # 255 * 0.8 + 0.2 * (200, 100, 50) = (244, 224, 214); 128/255 * (255, 0, 128) + 127 = (255, 127, 191.25)
    assert white.tolist() == [[200, 100, 50], [255, 255, 255], [244, 224, 214], [255, 127, 191]]
    assert black.tolist() == [[200, 100, 50], [0, 0, 0], [40, 20, 10], [128, 0, 64]]


def test_compositing_rounds_to_the_nearest_level(tmp_path):
    """Every value with every alpha."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    Image.fromarray(np.stack([value] * 3 + [alpha], -1).astype(np.uint8)).save(tmp_path / "a.png")
    for background in (0, 255):
        exact = (value * alpha + background * (255 - alpha)) / 255
        ours = load_image(tmp_path / "a.png", (256, 256), background == 255)[0].numpy()
        np.testing.assert_array_equal(ours, np.rint(exact))


def test_resizing_is_pillows_bicubic_after_compositing(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ours = load_image(tmp_path / "a.png", (8, 6), False)
    pillows = np.asarray(Image.fromarray(pixels).resize((8, 6)))  # bicubic is its default
    assert ours.float().std() > 10
    np.testing.assert_array_equal(ours.permute(1, 2, 0), pillows)


@pytest.mark.parametrize(
    "mode, value", [("L", 77), ("I;16", 77 * 257), ("P", 77), ("LA", (77, 255)), ("1", 1)]
)
def test_other_image_modes(tmp_path, mode, value):
    image = Image.new(mode, (4, 3), value)
    if mode == "P":
        image.putpalette([i for i in range(256) for _ in range(3)])
    image.save(tmp_path / "a.png")
    expected = 255 if mode == "1" else 77
    assert (load_image(tmp_path / "a.png", (4, 3), True) == expected).all()


def test_floating_point_photos_are_refused(tmp_path):
    """Pillow would make them black."""
    Image.new("F", (4, 3), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: holds floating-point numbers"):
        load_image(tmp_path / "a.tif", (4, 3), True)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_broken_images_are_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"a.{ending}: cannot be read as an image"):
        load_image(path, (8, 8), False)


def test_a_broken_image_ends_the_loading(tmp_path):
    folder = ring(tmp_path / "data", count=40)
    path = folder / "images" / "v7.png"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(DataError, match="v7.png"):
        load(folder, training=True)


def test_every_camera_has_its_own_pixels(tmp_path):
    for training in (False, True):
        scene = load(ring(tmp_path / f"data{training}"), training)
        for camera in scene.train_cameras:
            assert (camera.image() == 10 * int(camera.name[1])).all()
            camera.prefetch()
            assert (camera.image() == 10 * int(camera.name[1])).all()


# Split


def test_everything_trains_without_eval(tmp_path):
    scene = load(ring(tmp_path / "data"))
    assert names(scene.train_cameras) == [f"v{i}.png" for i in range(9)] and scene.test_cameras == []


def test_every_eighth_view_is_held_out_or_every_nth(tmp_path):
    folder = ring(tmp_path / "data 360")  # the name of the folder has no say
    scene = load(folder, eval=True)
    assert names(scene.test_cameras) == ["v0.png", "v8.png"] and len(scene.train_cameras) == 7
    assert all(camera.is_test for camera in scene.test_cameras)
    assert not any(camera.is_test for camera in scene.train_cameras)
    assert names(load(folder, eval=True, llffhold=3).test_cameras) == ["v0.png", "v3.png", "v6.png"]
    assert load(folder, eval=True, llffhold=0).test_cameras == []
    with pytest.raises(DataError, match="no view is left to train on"):
        load(folder, eval=True, llffhold=1)


def test_lists_in_the_data_set(tmp_path, capsys):
    folder = ring(tmp_path / "data")
    (folder / "sparse" / "0" / "test.txt").write_text("v2.png\nimages/v5\n\nv3\n")
    scene = load(folder, eval=True)
    assert names(scene.test_cameras) == ["v2.png", "v3.png", "v5.png"] and len(scene.train_cameras) == 6
    (folder / "train.txt").write_bytes(b"\xef\xbb\xbfv0.png\r\nv1.png\r\n")  # as Notepad saves it
    scene = load(folder, eval=True)
    assert names(scene.train_cameras) == ["v0.png", "v1.png"] and len(scene.test_cameras) == 3
    (folder / "sparse" / "0" / "test.txt").unlink()
    Scene(ModelParams(source_path=str(folder), model_path="m", eval=True), CPU, for_training=False)
    assert f"Split: 2 train, 7 test ({folder / 'train.txt'})" in capsys.readouterr().out
    (folder / "train.txt").write_text("v0.png\nv77.png\n")
    with pytest.raises(DataError, match=r"train.txt: names v77.png, which the data set does not have"):
        load(folder, eval=True)


def test_blender_brings_its_own_split(tmp_path):
    folder = blender.make_scene(tmp_path / "data")
    assert [len(load(folder).train_cameras), len(load(folder, eval=True).train_cameras)] == [2, 1]
    assert str(load(folder, eval=True).test_cameras[0].photo.decode.args[0]).endswith("test/r_0.png")


def test_halves_of_test_views(tmp_path):
    scene = load(ring(tmp_path / "data", size=(7, 6)), eval=True, train_test_exp=True)
    assert names(scene.train_cameras) == [f"v{i}.png" for i in range(9)], "test views train, too"
    assert names(scene.test_cameras) == ["v0.png", "v8.png"]
    for camera in scene.train_cameras:
        if not camera.is_test:
            assert camera.mask() is None
        else:
            assert camera.mask().tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 6
    for camera in scene.test_cameras:
        assert camera.mask().tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 6
    assert scene.exposure_names == [f"v{i}.png" for i in range(9)]
    assert load(tmp_path / "data", eval=True).train_cameras[0].mask() is None


# Extent, order, points


def test_extent_is_of_the_train_cameras(tmp_path):
    folder = ring(tmp_path / "data")
    # x = 0..8: the mean is 4, the largest distance 4. Without views 0 and 8: 1..7, distance 3.
    assert load(folder).extent == pytest.approx(4.4)
    assert load(folder, eval=True).extent == pytest.approx(3.3)
    assert load(folder, eval=True, train_test_exp=True).extent == pytest.approx(4.4)


def test_training_shuffles_as_the_original_does(tmp_path):
    scene = load(ring(tmp_path / "data"), training=True, eval=True, llffhold=3)
    random.seed(0)
    train, test = ["v1", "v2", "v4", "v5", "v7", "v8"], ["v0", "v3", "v6"]
    random.shuffle(train)
    random.shuffle(test)
    assert [camera.name[:2] for camera in scene.train_cameras] == train
    assert [camera.name[:2] for camera in scene.test_cameras] == test


def test_random_points(tmp_path):
    scene = load(ring(tmp_path / "data"), random_init=1000)
    assert len(scene.points) == 1000
    # The two points are at (0, 0, 4) and (1, 0, 5); one hundredth is left out at each end.
    np.testing.assert_allclose(scene.points.xyz.min(axis=0), [0.01, 0, 4.01], atol=0.01)
    np.testing.assert_allclose(scene.points.xyz.max(axis=0), [0.99, 0, 4.99], atol=0.01)
    (tmp_path / "data" / "sparse" / "0" / "points3D.txt").write_text("")
    points = load(tmp_path / "data", random_init=50).points
    assert len(points) == 50 and points.xyz[:, 2].min() > 0, "in front of the cameras"


def inwards(count):
    """Views from a ring of radius 5 around (1, 2, 3), 8 x 6 pixels."""
    views = []
    for angle in np.arange(count) * 2 * np.pi / count:
        forward = np.array([np.cos(angle), 0, np.sin(angle)])
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([np.cross([0, 1, 0], forward), [0, 1, 0], forward])
        matrix[:3, 3] = -matrix[:3, :3] @ (np.array([1, 2, 3]) - 5 * forward)
        views.append(View(f"{angle}", None, matrix, np.array([[10, 0, 4], [0, 10, 3], [0, 0, 1.0]]), 8, 6))
    return views


def test_what_the_cameras_look_at():
    views = inwards(8)
    centers, axes = (np.array([part(v) for v in views]) for part in (View.center.fget, viewing_direction))
    np.testing.assert_allclose(nearest_to_axes(centers, axes), [1, 2, 3], atol=1e-6)


def viewing_direction(view):
    return view.world_to_camera[2, :3]


def test_random_points_fill_what_the_cameras_see():
    """Two cameras face each other at x = -4 and 6; points are from half as far as x = 1 to 5 times so."""
    x, y, z = points_in_view(inwards(2), 100_000, seed=0).xyz.T - np.float32([[1], [2], [3]])
    assert np.abs(x).max() == pytest.approx(20, rel=0.01)
    # Uniform in 1 / depth between 1 / 2.5 and 1 / 25; between the cameras' near ends depths are up to 7.5.
    assert np.mean(np.abs(x) < 2.5) == pytest.approx((1 / 2.5 - 1 / 7.5) / (1 / 2.5 - 1 / 25), abs=0.01)
    farthest = np.abs(x) + 5  # depth, seen from the other end
    assert np.abs(y / farthest).max() == pytest.approx(0.3, rel=0.01)
    assert np.abs(z / farthest).max() == pytest.approx(0.4, rel=0.01)


# Depth


def test_inverse_depth(tmp_path):
    folder = ring(tmp_path / "data", count=2, size=(4, 2))
    (folder / "depths").mkdir()
    values = np.uint16([[0, 16384, 32768, 65535], [8192] * 4])
    for name in ("v0.png", "v1.png"):
        Image.fromarray(values).save(folder / "depths" / name)
    params = {
        "v0": {"scale": 2.0, "offset": -0.1},
        "v1": {"scale": 100.0, "offset": 0.0},
        "v2": {"scale": 2, "offset": 0},
    }
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))

    def in_training(**options):
        cameras = load(folder, training=True, **options).train_cameras
        return sorted(cameras, key=lambda camera: camera.name)

    first, second = in_training(depths="depths")
    depth, mask = first.inv_depth()
    expected = torch.tensor([[-0.1, 0.4, 0.9, 2 * 65535 / 65536 - 0.1], [0.15] * 4])
    torch.testing.assert_close(depth, expected)
    assert mask.shape == depth.shape and (mask == 1).all()
    assert second.inv_depth() is None, "50 times the median scale"
    assert in_training()[0].inv_depth() is None
    assert load(folder, depths="depths").train_cameras[0].inv_depth() is None, "rendering has no use for them"

    # Halved without smoothing: bilinear between the four pixels around each new center.
    small = in_training(depths="depths", resolution=2)[0].inv_depth()[0]
    quarter = expected.reshape(2, 2, 2).mean(dim=(0, 2))[None]
    torch.testing.assert_close(small, quarter)


def test_depth_maps_that_deserve_a_word(tmp_path, capsys):
    folder = ring(tmp_path / "data", count=4)
    (folder / "depths").mkdir()
    params = {"v0": {"scale": 1, "offset": 0}, "v2": {"scale": 1.5, "offset": 0}}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))
    with pytest.raises(DataError, match=r"4 of 4 depth maps are not there: .*depths/v0.png"):
        load(folder, training=True, depths="depths")
    for name in ("v0.png", "v1.png"):
        Image.new("RGB", (8, 6), (128, 128, 128)).save(folder / "depths" / name)
    Image.new("I;16", (8, 6), 1000).save(folder / "depths" / "v2.png")
    model = ModelParams(source_path=str(folder), model_path=str(tmp_path / "model"), depths="depths")
    scene = Scene(model, CPU)
    said = capsys.readouterr().out
    assert (
        "Depth maps: 1 of 4 used (8 bits), 1 of 4 used (16 bits), scales 1 to 1.5, 1 without parameters, "
        f"1 not there ({folder / 'depths' / 'v3.png'})" in said
    )
    assert "Warning: 2 depth maps have 8 bits" in said
    [depth] = [camera.inv_depth()[0] for camera in scene.train_cameras if camera.name == "v0.png"]
    torch.testing.assert_close(depth, torch.full((6, 8), 128 / 65536))
    Image.new("I;16", (6, 8), 1000).save(folder / "depths" / "v2.png")
    message = r"1 depth maps do not have the shape of their photos: v2.png \(6x8, photo 8x6\)"
    with pytest.raises(DataError, match=message):
        Scene(model, CPU)


def test_depth_params_beside_a_read_only_data_set(tmp_path):
    """The nearest to the run counts: model folder, among the maps, beside the reconstruction."""
    folder, maps = ring(tmp_path / "data", count=2), tmp_path / "maps"
    maps.mkdir()
    for name in ("v0.png", "v1.png"):
        Image.fromarray(np.full((6, 8), 16384, np.uint16)).save(maps / name)
    places = (folder / "sparse" / "0", maps, tmp_path / "model")
    with pytest.raises(DataError) as missing:
        load(folder, training=True, depths=str(maps))
    assert all(str(place / "depth_params.json") in str(missing.value) for place in places)
    for scale, place in enumerate(places, start=1):
        params = {name: {"scale": scale, "offset": 0} for name in ("v0", "v1")}
        place.mkdir(exist_ok=True)
        (place / "depth_params.json").write_text(json.dumps(params))
        camera = load(folder, training=True, depths=str(maps)).train_cameras[0]
        torch.testing.assert_close(camera.inv_depth()[0], torch.full((6, 8), 0.25 * scale))


# The model folder


def test_model_folder(tmp_path):
    folder = ring(tmp_path / "data", count=4)
    load(folder, training=True, eval=True, llffhold=2)
    assert json.loads((tmp_path / "model" / "split.json").read_text()) == {
        "by": "by name, one in 2 (--llffhold 2)", "train": ["v1.png", "v3.png"], "test": ["v0.png", "v2.png"],
    }  # fmt: skip
    entries = json.loads((tmp_path / "model" / "cameras.json").read_text())
    assert [entry["img_name"] for entry in entries] == ["v0.png", "v2.png", "v1.png", "v3.png"], "test first"
    assert [entry["id"] for entry in entries] == [0, 1, 2, 3]
    assert entries[3] == {
        "id": 3, "img_name": "v3.png", "width": 16, "height": 12, "position": [3.0, 0.0, 0.0],
        "rotation": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], "fy": 24.0, "fx": 20.0,
    }  # fmt: skip
    header, _, body = (tmp_path / "model" / "input.ply").read_bytes().partition(b"end_header\n")
    assert header.decode().split("\n")[:-1] == [
        "ply", "format binary_little_endian 1.0", "element vertex 2",
        *(f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz")),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
    ]  # fmt: skip
    row = np.dtype([("xyzn", "<f4", 6), ("rgb", "u1", 3)])
    first, second = np.frombuffer(body, row)
    assert first["xyzn"].tolist() == [0, 0, 4, 0, 0, 0] and first["rgb"].tolist() == [255, 0, 51]
    assert second["xyzn"].tolist() == [1, 0, 5, 0, 0, 0]


def test_a_point_cloud_of_the_data_set_is_copied_byte_for_byte(tmp_path):
    from scene.formats.ply import write_points
    from scene.points import PointCloud

    folder = ring(tmp_path / "data", count=2)
    path = folder / "sparse" / "0" / "points3D.ply"
    write_points(path, PointCloud(np.float32([[1, 2, 3]]), np.float32([[0, 1, 0]])))
    load(folder, training=True)
    assert (tmp_path / "model" / "input.ply").read_bytes() == path.read_bytes()


def test_rotations_in_cameras_json_are_camera_to_world(tmp_path):
    folder = colmap.make_scene(tmp_path / "data")
    load(folder, training=True)
    entry = json.loads((tmp_path / "model" / "cameras.json").read_text())[1]
    assert entry["img_name"] == "z.png"
    np.testing.assert_allclose(entry["rotation"], [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(entry["position"], [-2, 1, -3], atol=1e-12)


def test_data_sets_are_not_written_to(tmp_path):
    folder = ring(tmp_path / "data")

    def listing():
        return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}

    before = listing()
    for path in before:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        load(folder, training=True, eval=True)
        assert listing() == before
    finally:
        for path in before:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_photos_of_another_shape_are_refused(tmp_path):
    folder = ring(tmp_path / "data", count=2, size=(6, 8))
    message = r"2 of 2 photos do not have the shape of their cameras.*v0.png \(6x8, camera 16x12\)"
    with pytest.raises(DataError, match=message):
        load(folder)
    ring(tmp_path / "rounded", count=2, size=(3, 2))  # 16x12, reduced by 6: off by less than a pixel
    assert load(tmp_path / "rounded").train_cameras[0].image().shape == (3, 2, 3)


QUADRANTS = np.kron(np.uint8([[0, 80], [160, 240]]), np.ones((6, 8), np.uint8))  # of a 16x12 camera


def lying(number, pixels=QUADRANTS):
    """A picture as a camera stores it that EXIF says is held like this, and the EXIF data."""
    turns = {5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}
    tags = Image.Exif()
    tags[0x0112] = number
    return Image.fromarray(np.ascontiguousarray(turns[number](pixels))), tags


@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_photos_on_their_side_are_turned(tmp_path, capsys, number):
    """And so are their masks and depth maps, which have no EXIF data, or are upright already."""
    folder = ring(tmp_path / "data", count=3, size=(16, 12))
    for part in ("masks", "depths"):
        (folder / part).mkdir()
    for name in ("v0", "v1"):
        photo, tags = lying(number)
        photo.convert("RGB").save(folder / "images" / f"{name}.png", exif=tags)
    white, depth = 255 * (QUADRANTS > 100).astype(np.uint8), QUADRANTS.astype(np.uint16) * 256
    lying(number, white)[0].save(folder / "masks" / "v0.png")
    lying(number, depth)[0].save(folder / "depths" / "v0.png")
    for name in ("v1", "v2"):
        Image.fromarray(white).save(folder / "masks" / f"{name}.png")
        Image.fromarray(depth).save(folder / "depths" / f"{name}.png")
    params = {name: {"scale": 1, "offset": 0} for name in ("v0", "v1", "v2")}
    (folder / "depths" / "depth_params.json").write_text(json.dumps(params))
    model = ModelParams(
        source_path=str(folder),
        model_path=str(tmp_path / "m"),
        depths="depths",
        masks="masks",
        mask_mode="ignore",
    )
    for camera in sorted(Scene(model, CPU).train_cameras, key=lambda camera: camera.name)[:2]:
        assert (camera.width, camera.height) == (16, 12)
        np.testing.assert_array_equal(camera.image()[0], QUADRANTS)
        np.testing.assert_array_equal(camera.counts(), QUADRANTS > 100)
        np.testing.assert_allclose(camera.inv_depth()[0], QUADRANTS / 256, atol=1e-6)
    assert "2 photos lie on their side and are turned, as their EXIF data say" in capsys.readouterr().out


def test_photos_on_their_side_that_fit_stay(tmp_path):
    """What was found from the stored pixels, as COLMAP does, whatever EXIF says."""
    folder = ring(tmp_path / "data", count=1, size=(16, 12))
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(QUADRANTS).convert("RGB").save(folder / "images" / "v0.png", exif=tags)
    np.testing.assert_array_equal(load(folder).train_cameras[0].image()[0], QUADRANTS)


def test_undistorted_copies_of_photos_on_their_side(tmp_path):
    """The lens's picture is the turned one, and a copy that was made without turning is not used."""
    folder = ring(tmp_path / "data", count=1, size=(16, 12))
    (folder / "sparse" / "0" / "cameras.txt").write_text("1 SIMPLE_RADIAL 16 12 20 8 6 0.1\n")
    path = folder / "images" / "v0.png"
    Image.fromarray(QUADRANTS).convert("RGB").save(path)
    expected = load(folder, training=True).train_cameras[0].image()
    photo, tags = lying(6)
    photo.convert("RGB").save(path, exif=tags)
    for _ in range(2):  # the second from the copy
        assert (load(folder, training=True).train_cameras[0].image() == expected).all()


# What may be a photo, and how much of it


def test_only_pictures_are_opened(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    folder = ring(tmp_path / "data", count=2)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\nshowpage\n%%EOF\n"
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **more: started.append(args))
    for path in (folder / "images" / "v0.png", tmp_path / "a.png"):
        path.write_bytes(eps)
    with pytest.raises(DataError, match=r"v0.png: cannot be read as an image"):
        load(folder, training=True)
    for read in (lambda path: load_image(path, (16, 12), False), read_image, read_map):
        with pytest.raises((DataError, OSError), match="a.png"):
            read(tmp_path / "a.png")
    assert not started


def test_every_picture_of_others_is_opened_by_format():
    """No Image.open without the formats that are meant."""
    root = Path(__file__).parents[1]
    for path in root.rglob("*.py"):
        if not {".venv", "tests", "submodules"} & set(path.relative_to(root).parts):
            calls = re.findall(r"Image\.open\([^\n]*", path.read_text())
            assert all("formats=" in call for call in calls), path


def test_pictures_that_do_not_fit_into_memory_are_refused_before_one_is_decoded(tmp_path, monkeypatch):
    folder = ring(tmp_path / "data", count=9, size=(16, 12))
    decoded = []
    monkeypatch.setattr("scene.images._read", lambda path: decoded.append(path))
    monkeypatch.setattr("scene.images.available", lambda: 9 * 3 * 16 * 12)  # nothing for the decoding
    message = r"the 9 pictures take .* GB of memory and .* GB are free: make them smaller \(-r 2,"
    with pytest.raises(DataError, match=message):
        load(folder, training=True)
    assert not decoded
    monkeypatch.undo()
    for free in (None, 9 * 3 * 16 * 12 + DECODED * 16 * 12):  # unknown; just enough
        monkeypatch.setattr("scene.images.available", lambda free=free: free)
        assert len(load(folder, training=True).train_cameras) == 9
    load(folder)  # rendering decodes one at a time


def empty_png(path, width, height):
    """A few bytes that say they are a picture of this size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    folder = ring(tmp_path / "data", count=2)
    empty_png(folder / "images" / "v1.png", 40_000, 30_000)
    with pytest.raises(DataError, match=r"v1.png: cannot be read as an image .*exceeds limit of 500000000"):
        load(folder)
    empty_png(folder / "images" / "v1.png", 16_000, 12_000)  # 200 million, as telephones take
    assert len(load(folder, resolution=8).train_cameras) == 2


def test_photos_that_are_listed_twice_are_named(tmp_path, capsys):
    folder = ring(tmp_path / "data", count=3, size=(16, 12))
    Image.new("RGB", (16, 12)).save(folder / "images" / "V1.png")
    with open(folder / "sparse" / "0" / "images.txt", "a") as file:
        file.write("7 1 0 0 0 5 0 0 1 v0.png\n\n8 1 0 0 0 6 0 0 1 V1.png\n\n")
    Scene(ModelParams(source_path=str(folder), model_path="m"), CPU, for_training=False)
    said = capsys.readouterr().out
    assert (
        "4 views share photos, or names but for upper and lower case: V1.png, v0.png, v0.png, v1.png" in said
    )


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("data_device", ["cuda", "cpu"])
def test_pictures_on_the_device_or_fetched_from_pinned_memory(tmp_path, data_device):
    folder = ring(tmp_path / "data", count=9, size=(1600, 1200))
    model = ModelParams(source_path=str(folder), model_path=str(tmp_path / "m"), data_device=data_device)
    cameras = Scene(model, torch.device("cuda"), quiet=True).train_cameras
    kept = [camera.photo._kept for camera in cameras]
    assert all(picture.is_cuda if data_device == "cuda" else picture.is_pinned() for picture in kept)
    for _ in range(20):  # the next picture is under way while this one is looked at
        for camera, following in zip(cameras, cameras[1:] + cameras[:1]):
            following.prefetch()
            image = camera.image()
            assert image.is_cuda and image.dtype == torch.uint8
            busy = torch.randn(1000, 1000, device="cuda")
            for _ in range(10):
                busy = busy @ busy / 1000
            assert (image == 10 * int(camera.name[1])).all()
