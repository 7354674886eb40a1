"""The sample scene keeps its word: cameras, depth, masks, exposures, blur, RGBA, and the files written."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from sample_scene import Options, orbit, photograph, write_blender, write_colmap
from sample_scene.__main__ import main
from sample_scene.dataset import BLENDER_SCALE, quaternion, world

SMALL = dict(width=96, height=72, views=9, points=400, quality=0.3)


@pytest.fixture(scope="module")
def scene():
    return photograph(Options(**SMALL))


def project(camera, points):
    """Pixel coordinates [N, 2] and depths [N], by the textbook."""
    p = points @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    pixels = p @ camera.K.T
    return pixels[:, :2] / pixels[:, 2:], p[:, 2]


def lift(view, rows, columns):
    """World points of pixel centers, from the depth map."""
    camera, z = view.camera, view.depth[rows, columns].astype(float)
    rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))]) * z
    in_camera = (np.linalg.inv(camera.K) @ rays).T
    return (in_camera - camera.world_to_camera[:3, 3]) @ camera.world_to_camera[:3, :3]


def test_pictures_have_content_and_are_repeatable(scene):
    views, points = scene
    assert all(view.image.std() > 30 for view in views), "a flat picture would pass most tests"
    assert len(points.xyz) == SMALL["points"]
    again, _ = photograph(Options(**{**SMALL, "views": 2}))
    assert np.array_equal(again[1].image, views[1].image)
    assert not np.array_equal(views[0].image, views[1].image)


def test_depth_and_poses_agree_between_views(scene):
    """A point seen by one camera is, for another, at the depth of its map or hidden."""
    views, _ = scene
    rows, columns = (a.ravel() for a in np.mgrid[4:68:3, 4:92:3])
    agree = behind = front = 0
    for a in views:
        others = [view for view in views if view is not a]
        b = min(others, key=lambda view: np.linalg.norm(view.camera.center - a.camera.center))
        solid = np.isfinite(a.depth[rows, columns]) & (a.depth[rows, columns] < 12)
        pixels, z = project(b.camera, lift(a, rows[solid], columns[solid]))
        inside = (z > 0.1) & (pixels > 1).all(1) & (pixels < [95, 71]).all(1)
        column, row = pixels[inside].astype(int).T
        there, z = b.depth[row, column], z[inside]
        agree += np.sum(np.abs(there / z - 1) < 0.03)
        behind += np.sum(there <= z * 0.97)
        front += np.sum(there >= z * 1.03)
    assert agree > 1000
    assert agree > 0.55 * (agree + behind + front), f"{agree} agree, {behind} hidden, {front} floating"
    assert front < 0.08 * agree, "points that the other view sees through; silhouettes allow a few"


def test_rays_from_afar_end_on_surfaces_with_unit_normals():
    """Thin rods are the hard case: float32 has about a millimeter to offer at ten meters."""
    rng, hits = np.random.default_rng(0), 0
    for shape in world(SMALL["quality"]).shapes:
        if not np.isfinite(shape.bound) or shape.bound > 5:
            continue  # the ground and the hills
        toward = rng.standard_normal((3, 300)).astype(np.float32)
        toward /= np.linalg.norm(toward, axis=0)
        aim = shape.center + 0.3 * shape.bound * rng.uniform(-1, 1, (3, 300)).astype(np.float32)
        o, d = aim - 10 * toward, toward
        t = shape.hit(o, d)
        hit = np.isfinite(t)
        normal = shape.normal(o[:, hit] + t[hit] * d[:, hit])
        assert np.allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-3), shape
        assert (np.sum(normal * d[:, hit], axis=0) < 0.05).mean() > 0.97, f"seen from inside: {shape}"
        assert not shape.hit(o, -d)[~shape.near(o, -d)].min(initial=np.inf) < np.inf, (
            "near() must keep all hits"
        )
        hits += hit.sum()
    assert hits > 3000


def test_points_project_to_their_keypoints_and_colors(scene):
    views, points = scene
    misses, color_errors = [], []
    for view, (index, keypoints) in zip(views, points.tracks):
        pixels, z = project(view.camera, points.xyz[index])
        assert (z > 0).all()
        misses.append(np.linalg.norm(pixels - keypoints, axis=1))
        column, row = pixels.astype(int).T
        color_errors.append(
            np.abs(view.image[row, column, :3].astype(float) - points.rgb[index]).mean(axis=1)
        )
    misses = np.concatenate(misses)
    assert len(misses) > 400 and 0.1 < misses.mean() < 0.8, "keypoints carry 0.3 px of noise per axis"
    assert np.median(np.concatenate(color_errors)) < 12


def test_colmap_binary_and_text_say_the_same(scene, tmp_path):
    views, points = scene
    write_colmap(tmp_path / "bin", views, points, depths=True, masks=True)
    write_colmap(tmp_path / "txt", views, points, text=True)
    sparse = tmp_path / "bin" / "sparse" / "0"
    count, _, model, width, height, fx, _, cx, cy = struct.unpack(
        "<QiiQQ4d", (sparse / "cameras.bin").read_bytes()
    )
    assert (count, model, width, height, cx, cy) == (1, 1, 96, 72, 48.0, 36.0)
    line = (tmp_path / "txt/sparse/0/cameras.txt").read_text().splitlines()[1].split()
    assert line[:4] == ["1", "PINHOLE", "96", "72"] and float(line[4]) == fx

    data = (sparse / "images.bin").read_bytes()
    assert struct.unpack_from("<Q", data)[0] == len(views)
    pose = struct.unpack_from("<i7di", data, 8)
    text = (tmp_path / "txt/sparse/0/images.txt").read_text().splitlines()[1].split()
    assert np.allclose(pose[1:8], [float(value) for value in text[1:8]], atol=1e-15)
    assert text[9] == "view_000.png" and (tmp_path / "bin/images/view_000.png").exists()
    assert struct.unpack_from("<Q", (sparse / "points3D.bin").read_bytes())[0] == len(points.xyz)
    assert np.array_equal(np.array(Image.open(tmp_path / "bin/images/view_003.png")), views[3].image)


@pytest.mark.parametrize("index", range(8))
def test_quaternions_are_those_of_the_poses(index):
    rotation = orbit(8, 40, 30)[index].world_to_camera[:3, :3]
    w, x, y, z = quaternion(rotation)
    back = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    assert np.allclose(back, rotation, atol=1e-12)


def test_depth_files_decode_to_inverse_depth(scene, tmp_path):
    views, points = scene
    write_colmap(tmp_path, views, points, depths=True)
    parameters = json.loads((tmp_path / "sparse/0/depth_params.json").read_text())
    scales = {p["scale"] for p in parameters.values()}
    assert len(scales) == len(views), "each view has its own scale, or a reader that mixes them up would pass"
    for view in views[:3]:
        picture = Image.open(tmp_path / "depths" / f"{view.camera.name}.png")
        values = np.array(picture)
        assert values.max() > 20_000, "16 bits are used"
        p = parameters[view.camera.name]
        error = np.abs(values / 65536 * p["scale"] + p["offset"] - 1 / view.depth)
        assert error.max() < 0.6 * p["scale"] / 65536


def test_exposures_are_the_color_changes_that_were_applied(scene, tmp_path):
    views, points = scene
    changed, _ = photograph(Options(**{**SMALL, "views": 3, "exposures": 0.3}))
    for plain, view in zip(views, changed):
        assert np.abs(view.exposure[:, :3] - np.eye(3)).max() > 0.02
        expected = plain.image / 255 @ view.exposure[:, :3].T + view.exposure[:, 3]
        inside = (expected > 0.02) & (expected < 0.98)
        assert inside.mean() > 0.5
        assert np.abs(view.image / 255 - expected)[inside].max() < 0.004 * 1.5
    write_colmap(tmp_path, changed, points._replace(tracks=points.tracks[:3]))
    assert len(json.loads((tmp_path / "true_exposures.json").read_text())) == 3


def test_masks_hide_the_distractor_and_nothing_else(scene):
    views, _ = scene
    disturbed, _ = photograph(Options(**{**SMALL, "views": 5, "distractor": True}))
    found = 0
    for plain, view in zip(views, disturbed):
        assert np.array_equal(plain.image[view.mask], view.image[view.mask])
        if not view.mask.all():
            found += 1
            assert np.abs(plain.image[~view.mask].astype(int) - view.image[~view.mask]).mean() > 10
    assert found >= 4


@pytest.mark.parametrize("kind", ["motion", "defocus"])
def test_blur_softens_training_views_and_spares_test_views(kind):
    size = {**SMALL, "width": 240, "height": 180, "views": 2}
    sharp, _ = photograph(Options(**size))
    blurred, _ = photograph(Options(**{**size, "blur": kind, "blur_samples": 5}))
    assert np.array_equal(blurred[0].image, sharp[0].image), "view 0 is a test view"

    def detail(image):
        return np.abs(np.diff(image[..., :3].astype(float), axis=1)).mean()

    assert detail(blurred[1].image) < 0.9 * detail(sharp[1].image)
    assert np.abs(blurred[1].image.astype(float).mean() - sharp[1].image.mean()) < 3, "blur keeps the light"


def test_true_poses_are_told_where_the_data_set_does_not(tmp_path):
    size = {**SMALL, "views": 5}
    plain, points = photograph(Options(**size))
    moved, _ = photograph(Options(**size, blur="motion", blur_samples=3, pose_noise=0.5))
    errors = []
    for view, other in zip(plain, moved):
        true = np.array(other.truth["world_to_camera"])
        assert np.array_equal(true, view.camera.world_to_camera)
        error = other.camera.world_to_camera @ np.linalg.inv(true)
        assert np.array_equal(view.image, other.image) == other.is_test
        if other.is_test:
            assert np.allclose(error, np.eye(4)) and "exposed_from" not in other.truth
            continue
        errors.append(np.degrees(np.arccos((np.trace(error[:3, :3]) - 1) / 2)))
        assert np.allclose(other.truth["exposed_from"][1], true), "the middle of the path"
    assert 0.2 < np.mean(errors) < 2
    write_colmap(tmp_path, moved, points)
    assert json.loads((tmp_path / "true_poses.json").read_text())["view_001.png"] == moved[1].truth
    write_colmap(tmp_path / "plain", plain, points)
    assert not (tmp_path / "plain" / "true_poses.json").exists()


def test_blur_names_are_checked():
    with pytest.raises(ValueError, match='"none", "motion" or "defocus", got "fog"'):
        photograph(Options(**{**SMALL, "views": 2, "blur": "fog"}))


def test_blender_form_has_the_same_cameras(tmp_path):
    views, points = photograph(Options(**{**SMALL, "alpha": True}))
    write_blender(tmp_path, views)
    meta = json.loads((tmp_path / "transforms_train.json").read_text())
    test = json.loads((tmp_path / "transforms_test.json").read_text())
    assert (len(meta["frames"]), len(test["frames"])) == (7, 2)
    frame, view = meta["frames"][0], views[1]
    image = np.array(Image.open(tmp_path / (frame["file_path"] + ".png")))
    assert np.array_equal(image, view.image)
    alpha = image[..., 3]
    assert (
        0.15 < (alpha == 255).mean() < 0.9
        and (alpha == 0).mean() > 0.05
        and ((alpha > 0) & (alpha < 255)).any()
    )

    # an OpenGL camera: x right, y up, looks along -z
    pose = np.array(frame["transform_matrix"])
    xyz = points.xyz * BLENDER_SCALE
    p = (xyz - pose[:3, 3]) @ pose[:3, :3]
    focal = 0.5 * 96 / np.tan(meta["camera_angle_x"] / 2)
    pixels = np.stack([48 + focal * p[:, 0] / -p[:, 2], 36 - focal * p[:, 1] / -p[:, 2]], axis=1)
    assert np.allclose(pixels, project(view.camera, points.xyz)[0], atol=1e-6)


def test_principal_point_moves_the_picture():
    plain, _ = photograph(Options(**{**SMALL, "views": 2}))
    moved, _ = photograph(Options(**{**SMALL, "views": 2, "principal": (53.0, 34.0)}))
    a, b = plain[1].depth[2:, :-5], moved[1].depth[:-2, 5:]  # 5 to the right, 2 up
    same = np.isfinite(a) & np.isfinite(b)
    assert same.mean() > 0.3 and np.abs(a[same] - b[same]).max() < 1e-3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--views", "0"], "--views: must be at least 1, got 0"),
        (["--format", "blender", "--depths"], "--depths is for --format colmap"),
    ],
)
def test_what_cannot_be_photographed(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "scene"), *flags])
    assert message in capsys.readouterr().err
