"""COLMAP models: the same tiny one in binary and in text, compared with numbers worked by hand."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scene.lens import MODELS, Lens
from scene.readers import read_dataset
from scene.readers.colmap import read_features, read_positions
from utils.files import DataError

HALF = 0.5**0.5
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5f70bf18a0860070\nsize 1234\n"

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

    points, origin, _ = dataset.points()
    assert Path(origin).stem == "points3D"
    np.testing.assert_array_equal(points.xyz, np.float32([[1, -2, 0.25], [0.5, 0, -1]]))
    np.testing.assert_allclose(points.rgb, [[1, 0, 0.2], [0, 0.4, 1]], atol=1e-7)
    assert points.xyz.dtype == points.rgb.dtype == np.float32


@pytest.mark.parametrize("spacing", ["\n\n", "\n\n\n", None])
def test_lines_of_images_txt(tmp_path, spacing):
    """Blank lines anywhere, or (None) no lines of features at all: no image is lost, none is made up."""
    path = make_scene(tmp_path, write_text) / "sparse" / "0" / "images.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    if spacing is None:
        lines = [line for line in lines if line.endswith(".png")]
    path.write_text((spacing or "\n").join(lines), encoding="utf-8")
    a, z = read_dataset(tmp_path).views
    assert (a.name, z.name) == ("sub dir/a é.png", "z.png")
    np.testing.assert_allclose(z.center, [-2, 1, -3], atol=1e-15)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_other_programs(tmp_path, encoding):
    model = make_scene(tmp_path, write_text) / "sparse" / "0"
    for name in ("cameras.txt", "images.txt", "points3D.txt"):
        (model / name).write_bytes((model / name).read_text(encoding="utf-8").encode(encoding))
    dataset = read_dataset(tmp_path)
    assert [view.name for view in dataset.views] == ["sub dir/a é.png", "z.png"]
    assert len(dataset.read_points()[0]) == 2


@pytest.mark.parametrize("write", [write_binary, write_text])
def test_features(tmp_path, write):
    model = make_scene(tmp_path, write) / "sparse" / "0"
    features = read_features(model)
    assert features["z.png"]["xy"].tolist() == [[1, 2], [3, 4]]
    assert features["z.png"]["point"].tolist() == [11, -1]
    assert len(features["sub dir/a é.png"]) == 0
    ids, xyz = read_positions(model)
    assert ids.tolist() == [11, 12] and xyz.tolist() == [[1, -2, 0.25], [0.5, 0, -1]]


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
    os.utime(model / "points3D.ply")
    for content, cause in ((POINTER, "is only Git LFS's pointer"), (b"x", "cannot be read as PLY")):
        (model / "points3D.ply").write_bytes(content)
        dataset = read_dataset(tmp_path)
        points, origin = dataset.read_points()
        assert len(points) == 2 and origin.endswith("points3D.bin")
        assert cause in dataset.notes[-1] and dataset.notes[-1].endswith("of points3D.bin are used")
    (model / "points3D.bin").write_bytes(POINTER)
    with pytest.raises(DataError, match="points3D.bin: is only Git LFS"):
        read_dataset(tmp_path).read_points()
    (model / "points3D.ply").unlink()
    with pytest.raises(DataError, match="points3D.bin: is only Git LFS's pointer to the file; .* git lfs"):
        read_dataset(tmp_path).read_points()
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


# Several reconstructions


def write_model(folder: Path, model: str, names: list[str], form: str = "txt") -> None:
    """Cameras on the x axis; the number of the model is their y."""
    place = folder / model
    place.mkdir(parents=True)
    y = int(place.name) if place.name.isdecimal() else 0
    if form == "txt":
        (place / "cameras.txt").write_text("1 PINHOLE 8 6 10 12 4 3\n")
        lines = [f"{i} 1 0 0 0 {-i} {-y} 0 1 {name}\n\n" for i, name in enumerate(names)]
        (place / "images.txt").write_text("".join(lines))
    else:
        (place / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 1, 1, 8, 6, 10, 12, 4, 3))
        images = struct.pack("<Q", len(names))
        for i, name in enumerate(names):
            images += struct.pack("<I7dI", i, 1, 0, 0, 0, -i, -y, 0, 1) + name.encode() + b"\0" + bytes(8)
        (place / "images.bin").write_bytes(images)
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6)).save(folder / "images" / name)


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"{i:02d}.png" for i in range(first, first + count)]


@pytest.mark.parametrize("form", ["txt", "bin"])
def test_the_largest_of_several_reconstructions(tmp_path, form):
    write_model(tmp_path, "sparse/0", numbered(3, 23), form)
    write_model(tmp_path, "sparse/1", numbered(23), form)
    write_model(tmp_path, "sparse/10", numbered(2), form)
    dataset = read_dataset(tmp_path)
    assert len(dataset.views) == 23 and {view.center[1] for view in dataset.views} == {1}
    assert dataset.split_folders == [tmp_path, tmp_path / "sparse" / "1"]
    warning, counted = dataset.notes
    assert warning == (
        "Warning: 3 reconstructions: sparse/1 has the most photos, 23, and is used; not sparse/0 (3), "
        "sparse/10 (2)"
    )
    names = "23.png, 24.png, 25.png"
    assert counted == f"Photos: 3 of 26 photos in {tmp_path}/images have no pose and are not used: {names}"


def test_the_first_of_equal_reconstructions(tmp_path):
    """And no other if it is the larger one, whatever state they are in."""
    write_model(tmp_path, "sparse/0", numbered(3))
    write_model(tmp_path, "sparse/1", numbered(3))
    assert {view.center[1] for view in read_dataset(tmp_path).views} == {0}
    assert read_dataset(tmp_path).notes[0].startswith("2 reconstructions: sparse/0 has")
    (tmp_path / "sparse" / "1" / "images.txt").write_text("no numbers\n")
    assert {view.center[1] for view in read_dataset(tmp_path).views} == {0}
    (tmp_path / "sparse" / "1" / "images.txt").unlink()
    assert "sparse/1 (0)" in read_dataset(tmp_path).notes[0]
    (tmp_path / "sparse" / "0" / "images.txt").unlink()
    with pytest.raises(DataError, match="sparse/0: needs cameras and images"):
        read_dataset(tmp_path)


def test_a_reconstruction_that_is_not_number_0(tmp_path):
    write_model(tmp_path, "sparse/2", numbered(3))
    dataset = read_dataset(tmp_path)
    assert {view.center[1] for view in dataset.views} == {2} and len(dataset.notes) == 1


def test_the_place_that_nerfstudio_has(tmp_path):
    """colmap/sparse/0, unless there is another data set, which is what was read before."""
    write_model(tmp_path, "colmap/sparse/0", numbered(3))
    dataset = read_dataset(tmp_path)
    assert dataset.format == "COLMAP" and len(dataset.views) == 3
    frame = {"file_path": "images/00.png", "transform_matrix": np.eye(4).tolist()}
    (tmp_path / "transforms.json").write_text(json.dumps({"fl_x": 10, "w": 8, "h": 6, "frames": [frame]}))
    assert read_dataset(tmp_path).format == "transforms.json"
