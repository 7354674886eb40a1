"""COLMAP models: the same tiny one in binary and in text, compared with numbers worked by hand."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scene.lens import MODELS, Lens
from scene.readers import read_dataset
from utils.files import DataError

HALF = 0.5**0.5

# id: model id, model name, width, height, parameters
CAMERAS = {
    7: (1, "PINHOLE", 8, 6, (10.0, 12.0, 3.5, 2.5)),
    9: (0, "SIMPLE_PINHOLE", 4, 4, (5.0, 2.0, 2.0)),
}
# id, quaternion (w, x, y, z), translation, camera, name, features
IMAGES = [
    (3, (HALF, 0, 0, HALF), (1.0, 2.0, 3.0), 7, "z.png", [(1.0, 2.0, 11), (3.0, 4.0, -1)]),
    (4, (2.0, 0, 0, 0), (0.0, 0.0, 5.0), 9, "sub dir/a é.png", []),  # length 2: to be normalized
]
# id, position, color, error, track
POINTS = [
    (11, (1.0, -2.0, 0.25), (255, 0, 51), 0.5, [(3, 0), (4, 1)]),
    (12, (0.5, 0.0, -1.0), (0, 102, 255), 1.5, []),
]


def write_binary(model: Path) -> None:
    cameras = struct.pack("<Q", len(CAMERAS))
    for camera_id, (model_id, _, width, height, params) in CAMERAS.items():
        cameras += struct.pack(f"<IiQQ{len(params)}d", camera_id, model_id, width, height, *params)
    images = struct.pack("<Q", len(IMAGES))
    for image_id, quat, translation, camera_id, name, features in IMAGES:
        images += struct.pack("<I7dI", image_id, *quat, *translation, camera_id) + name.encode() + b"\0"
        images += struct.pack("<Q", len(features)) + b"".join(struct.pack("<ddq", *f) for f in features)
    points = struct.pack("<Q", len(POINTS))
    for point_id, xyz, rgb, error, track in POINTS:
        points += struct.pack("<Q3d3BdQ", point_id, *xyz, *rgb, error, len(track))
        points += b"".join(struct.pack("<II", *seen) for seen in track)
    for name, data in {"cameras": cameras, "images": images, "points3D": points}.items():
        (model / f"{name}.bin").write_bytes(data)


def write_text(model: Path) -> None:
    def words(*values):
        return " ".join(repr(v) if isinstance(v, float) else str(v) for v in values)

    cameras = ["# Camera list with one line of data per camera:"]
    cameras += [words(i, name, w, h, *params) for i, (_, name, w, h, params) in CAMERAS.items()]
    images = ["# Image list with two lines of data per image:"]
    for image_id, quat, translation, camera_id, name, features in IMAGES:
        images += [words(image_id, *quat, *translation, camera_id, name)]
        images += [words(*(value for feature in features for value in feature))]
    points = ["# 3D point list"]
    for point_id, xyz, rgb, error, track in POINTS:
        points += [words(point_id, *xyz, *rgb, error, *(value for seen in track for value in seen))]
    for name, lines in {"cameras": cameras, "images": images, "points3D": points}.items():
        (model / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_scene(folder: Path, write=write_binary, model: str = "sparse/0") -> Path:
    (folder / model).mkdir(parents=True)
    write(folder / model)
    for _, _, _, camera_id, name, _ in IMAGES:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", CAMERAS[camera_id][2:4]).save(path)
    return folder


@pytest.mark.parametrize("write", [write_binary, write_text])
@pytest.mark.parametrize("model", ["sparse/0", "sparse"])
def test_both_forms_and_places(tmp_path, write, model):
    make_scene(tmp_path, write, model)
    for extra in ("project.ini", "frames.bin", "rigs.bin"):  # what current COLMAP writes beside
        (tmp_path / model / extra).write_bytes(b"whatever")
    dataset = read_dataset(tmp_path)
    a, z = dataset.views  # by name
    assert (a.name, z.name) == ("sub dir/a é.png", "z.png")
    assert a.image_path == tmp_path / "images" / "sub dir" / "a é.png"

    np.testing.assert_allclose(z.intrinsics, [[10, 0, 3.5], [0, 12, 2.5], [0, 0, 1]])
    np.testing.assert_allclose(a.intrinsics, [[5, 0, 2], [0, 5, 2], [0, 0, 1]])
    assert (z.width, z.height, a.width, a.height) == (8, 6, 4, 4)

    # A quarter turn about z, then (1, 2, 3): x -> y, y -> -x. The center is -Rᵀ t = -(2, -1, 3).
    turned = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(z.world_to_camera, turned, atol=1e-15)
    np.testing.assert_allclose(z.center, [-2, 1, -3], atol=1e-15)
    np.testing.assert_allclose(a.world_to_camera[:3, :3], np.eye(3), atol=1e-15)

    points, origin = dataset.read_points()
    assert Path(origin).stem == "points3D"
    np.testing.assert_array_equal(points.xyz, np.float32([[1, -2, 0.25], [0.5, 0, -1]]))
    np.testing.assert_allclose(points.rgb, [[1, 0, 0.2], [0, 0.4, 1]], atol=1e-7)
    assert points.xyz.dtype == points.rgb.dtype == np.float32


def test_points_as_ply_are_used_unless_they_are_older(tmp_path):
    import os

    from scene.formats.ply import write_points
    from scene.points import PointCloud

    model = make_scene(tmp_path) / "sparse" / "0"
    write_points(model / "points3D.ply", PointCloud(np.float32([[9, 8, 7]]), np.float32([[0, 1, 0.2]])))
    os.utime(model / "points3D.bin", (1_000, 1_000))
    points, origin = read_dataset(tmp_path).read_points()
    assert origin.endswith("points3D.ply")
    np.testing.assert_allclose(points.xyz, [[9, 8, 7]])
    np.testing.assert_allclose(points.rgb, [[0, 1, 0.2]], atol=1e-7)

    os.utime(model / "points3D.ply", (500, 500))
    assert read_dataset(tmp_path).read_points()[1].endswith("points3D.bin")
    (model / "points3D.ply").unlink()
    (model / "points3D.bin").unlink()
    assert read_dataset(tmp_path).read_points() is None


def test_depth_parameters(tmp_path):
    model = make_scene(tmp_path) / "sparse" / "0"
    for name in ("z.png", "sub dir/a é.png"):
        (tmp_path / "depths" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("I;16", (8, 6)).save(tmp_path / "depths" / name)
    params = {"z": {"scale": 2.0, "offset": 0.5}, "other": {"scale": 2.2, "offset": 0}}
    (model / "depth_params.json").write_text(json.dumps(params))
    a, z = read_dataset(tmp_path, depths="depths").views
    assert z.depth.reliable and (z.depth.scale, z.depth.offset, z.depth.divisor) == (2.0, 0.5, 65536)
    assert not a.depth.reliable, "no parameters, so nothing says how its units relate to the scene's"

    # The median of the positive scales is 2; a fifth of it and five times it are the limits.
    for scale, reliable in [
        (0.41, True),
        (0.39, False),
        (9.9, True),
        (10.1, False),
        (0.0, False),
        (-1, False),
    ]:
        positive = {str(i): {"scale": 2.0, "offset": 0} for i in range(5)} | {
            "none": {"scale": 0, "offset": 0}
        }
        params = positive | {"z": {"scale": scale, "offset": 0}}
        (model / "depth_params.json").write_text(json.dumps(params))
        assert read_dataset(tmp_path, depths="depths").views[1].depth.reliable is reliable, scale

    (model / "depth_params.json").write_text('{"z": {"scale": "x"}}')
    with pytest.raises(DataError, match=r"depth_params.json: z must have a number as scale"):
        read_dataset(tmp_path, depths="depths")
    (model / "depth_params.json").unlink()
    with pytest.raises(DataError, match=r"depth_params.json: is not there"):
        read_dataset(tmp_path, depths="depths")
    with pytest.raises(DataError, match=r"maps: the depth folder is not there"):
        read_dataset(tmp_path, depths="maps")


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match="the data set folder is not there"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"could not recognize the scene type. Looked for .*sparse.*transforms_train"
    ):
        read_dataset(tmp_path)
    make_scene(tmp_path)
    with pytest.raises(
        DataError, match=r"images_4: the image folder is not there; there is images, choose with -i"
    ):
        read_dataset(tmp_path, "images_4")
    (tmp_path / "images" / "z.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are not there: .*z.png"):
        read_dataset(tmp_path)
    (tmp_path / "sparse" / "0" / "images.bin").unlink()
    with pytest.raises(
        DataError, match=r"needs cameras and images, both as .bin or both as .txt; found cameras.bin"
    ):
        read_dataset(tmp_path)
    (tmp_path / "sparse" / "0" / "cameras.bin").unlink()
    with pytest.raises(DataError, match=r"neither it nor its folder 0 has cameras.bin"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_binary_files_cut_anywhere(tmp_path, name):
    """Every shorter file is refused with its name; none is read as something else."""
    path = make_scene(tmp_path) / "sparse" / "0" / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=name):
            read_dataset(tmp_path).read_points()
    path.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    with pytest.raises(DataError, match=rf"{name}: says 9223372036854775808"):
        read_dataset(tmp_path).read_points()


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("cameras.txt", "PINHOLE 8", "PINHOLES 8", "line 2 has the unknown camera model PINHOLES"),
        ("cameras.txt", " 2.5", "", "line 2: PINHOLE has 4 parameters, got 3"),
        ("cameras.txt", "7 PIN", "x PIN", "line 2 must be: id model width height parameters"),
        ("cameras.txt", "8 6", "0 6", "camera 7 has the impossible size 0 x 6"),
        ("cameras.txt", "10.0", "nan", "camera 7 has impossible parameters"),
        (
            "cameras.txt",
            "7 PINHOLE",
            "8 PINHOLE",
            "images.txt: image 'z.png' has camera 7; the cameras are 8, 9",
        ),
        ("images.txt", "3 0.7", "3 q0.7", "line 2 must be: id qw qx qy qz tx ty tz camera name"),
        ("images.txt", "2.0 0 0 0", "0 0 0 0", "has no valid pose"),
        ("images.txt", "1.0 2.0 3.0", "1e300 2 3", "the camera of z.png is at an impossible place"),
        ("images.txt", "2.0 0 0 0", "1e300 1e300 0 0", "has no valid pose"),
        ("points3D.txt", "255 0 51", "255 0", "line 2 must be: id x y z red green blue"),
    ],
)
def test_text_files_with_mistakes(tmp_path, name, old, new, message):
    path = make_scene(tmp_path, write_text) / "sparse" / "0" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    if name == "points3D.txt" and new == "255 0":
        path.write_text("#\n11 1.0 -2.0 0.25 255 0\n")
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path).read_points()


def test_camera_models_that_distort(tmp_path):
    cameras = make_scene(tmp_path, write_text) / "sparse" / "0" / "cameras.txt"
    second = "9 SIMPLE_PINHOLE 4 4 5.0 2.0 2.0\n"
    cameras.write_text("7 OPENCV 8 6 10 12 3.5 2.5 0.1 0 0 0\n" + second)
    a, z = read_dataset(tmp_path).views
    assert z.lens == Lens("OPENCV", 8, 6, 10, 12, 3.5, 2.5, (0.1, 0, 0, 0)) and a.lens is None
    pinhole = z.lens.pinhole()
    np.testing.assert_array_equal(z.intrinsics, pinhole.matrix)
    assert (z.width, z.height) == (pinhole.width, pinhole.height)
    cameras.write_text("7 OPENCV_FISHEYE 8 6 10 12 3.5 2.5 0 0 0 0\n" + second)
    assert read_dataset(tmp_path).views[1].lens.model == "OPENCV_FISHEYE"
    cameras.write_text("7 SIMPLE_RADIAL 8 6 10 3.5 2.5 -1e6\n" + second)
    with pytest.raises(DataError, match=r"camera 7: SIMPLE_RADIAL with the coefficients -1e.06 leaves"):
        read_dataset(tmp_path)
    cameras.write_text("7 EQUIRECTANGULAR 8 6 8 6\n" + second)
    with pytest.raises(DataError, match=r"line 1 is EQUIRECTANGULAR, which no pinhole can show"):
        read_dataset(tmp_path)
    cameras.write_text("7 OPENCV 8 6 10 12 3.5 2.5 0 0 0 0\n" + second)  # a pinhole by another name
    view = read_dataset(tmp_path).views[1]
    np.testing.assert_allclose(view.intrinsics, [[10, 0, 3.5], [0, 12, 2.5], [0, 0, 1]])
    cameras.write_text("7 SIMPLE_RADIAL 8 6 10 3.5 2.5 0\n" + second)
    view = read_dataset(tmp_path).views[1]
    np.testing.assert_allclose(view.intrinsics, [[10, 0, 3.5], [0, 10, 2.5], [0, 0, 1]])


def test_files_and_models_of_colmap_itself(tmp_path):
    """Every camera model as pycolmap writes it, in both forms."""
    pycolmap = pytest.importorskip("pycolmap")
    reconstruction = pycolmap.Reconstruction()
    models = [name for name in MODELS if name in pycolmap.CameraModelId.__members__]
    for number, model in enumerate(models, start=1):
        camera = pycolmap.Camera.create_from_model_name(number, model, 90.0, 100, 80)
        reconstruction.add_camera_with_trivial_rig(camera)
        image = pycolmap.Image(name=f"{number:02d}.png", camera_id=number, image_id=number)
        reconstruction.add_image_with_trivial_frame(
            image, pycolmap.Rigid3d(pycolmap.Rotation3d(), [number, 0, 0])
        )
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    for number in range(1, len(models) + 1):
        Image.new("RGB", (100, 80)).save(tmp_path / "images" / f"{number:02d}.png")
    for write in (reconstruction.write_text, reconstruction.write_binary):
        write(tmp_path / "sparse" / "0")
        views = read_dataset(tmp_path).views
        assert len(views) == len(models) > 10
        for number, (model, view) in enumerate(zip(models, views), start=1):
            np.testing.assert_allclose(view.center, [-number, 0, 0], atol=1e-12)
            assert view.intrinsics[0, 0] == 90 and (view.lens is None or view.lens.model == model)


def test_missing_images_are_left_out_on_request(tmp_path):
    make_scene(tmp_path)
    (tmp_path / "images" / "z.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are not there: .*z.png; --skip_missing leaves"):
        read_dataset(tmp_path)
    dataset = read_dataset(tmp_path, skip_missing=True)
    assert [view.name for view in dataset.views] == ["sub dir/a é.png"]
    assert "1 of 2 images are not there; with" in dataset.notes[0] and "z.png" in dataset.notes[0]
    (tmp_path / "images" / "sub dir" / "a é.png").unlink()
    with pytest.raises(DataError, match=r"2 of 2 images are not there"):
        read_dataset(tmp_path, skip_missing=True)
