"""Camera paths: fitted to known cameras, through keys, and nerfstudio's file."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scene import paths
from scene.paths import CameraPath, Pose
from utils.files import DataError


def ring(count: int = 12, radius: float = 4.0, height: float = -1.0, seed: int | None = None) -> list[Pose]:
    """Around (1, 2, 3), looking there; in a random order if there is a seed."""
    center = np.array([1.0, 2.0, 3.0])
    angles = np.arange(count) * math.tau / count
    if seed is not None:
        angles = np.random.default_rng(seed).permutation(angles)
    offsets = [np.array([radius * math.sin(a), height, -radius * math.cos(a)]) for a in angles]
    return [Pose(center + o, paths.looking(-o, paths.UP), 0.8) for o in offsets]


def assert_rotations(poses: list[Pose]) -> None:
    for pose in poses:
        np.testing.assert_allclose(pose.turn @ pose.turn.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(pose.turn) > 0


def steps(poses: list[Pose], loop: bool = False) -> np.ndarray:
    places = np.array([p.place for p in poses])
    return np.linalg.norm(np.diff(np.concatenate([places, places[:1]]) if loop else places, axis=0), axis=1)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.acos(min(1.0, max(-1.0, (np.trace(a.T @ b) - 1) / 2)))


def test_focus_is_where_all_look():
    np.testing.assert_allclose(paths.focus(ring()), [1, 2, 3], atol=1e-9)
    side_by_side = [Pose(np.array([x, 0.0, 0.0]), np.eye(3), 0.8) for x in (-1.0, 0.0, 1.0)]
    assert paths.focus(side_by_side)[2] > 1  # parallel: somewhere ahead


def test_orbit_stays_on_the_ring_of_the_cameras():
    poses = paths.orbit(ring(), 40)
    assert_rotations(poses)
    for pose in poses:
        away = pose.place - [1, 2, 3]
        assert math.hypot(away[0], away[2]) == pytest.approx(4.0, rel=1e-6) and away[1] == pytest.approx(-1)
        np.testing.assert_allclose(pose.turn[:, 2], -away / np.linalg.norm(away), atol=1e-9)
        assert pose.turn[1, 1] > 0, "head up"
    np.testing.assert_allclose(steps(poses, loop=True), 2 * 4 * math.sin(math.pi / 40), rtol=1e-3)


def test_orbit_is_as_even_on_an_ellipse():
    wide = [Pose(p.place * [2, 1, 1], paths.looking([1, 2, 3] - p.place, paths.UP), 0.8) for p in ring()]
    moved = steps(paths.orbit(wide, 60), loop=True)
    assert moved.max() < 1.02 * moved.min()


def test_orbit_of_one_place_is_refused():
    here = [Pose(np.zeros(3), paths.looking(np.array(f), paths.UP), 0.8) for f in ([1.0, 0, 0], [0, 0, 1.0])]
    with pytest.raises(DataError, match="nothing to orbit"):
        paths.orbit(here, 10)


def test_tour_goes_around_the_ring_whatever_the_order():
    poses = ring(17, seed=3)
    way = [poses[i] for i in paths.tour(poses)]
    np.testing.assert_allclose(steps(way, loop=True), 2 * 4 * math.sin(math.pi / 17), rtol=1e-9)
    assert paths.tour(poses[:1]) == [0] and sorted(paths.tour(poses[:2])) == [0, 1]


@pytest.mark.parametrize("loop", [False, True])
def test_the_way_leads_through_its_keys(loop):
    rng = np.random.default_rng(0)
    quats = rng.normal(size=(5, 4))
    turns = [paths._matrix(q / np.linalg.norm(q)) for q in quats]
    keys = [Pose(rng.normal(size=3), t, 0.5 + 0.1 * k) for k, t in enumerate(turns)]
    u = np.arange(5.0)
    places = paths._places(np.array([k.place for k in keys]), u, loop)
    np.testing.assert_allclose(places, [k.place for k in keys], atol=1e-12)
    way = paths.through(keys, 400, loop)
    assert_rotations(way)
    assert len(way) == 400
    for key in keys:
        nearest = min(way, key=lambda pose: np.linalg.norm(pose.place - key.place))
        assert np.linalg.norm(nearest.place - key.place) < 0.05
        assert angle(nearest.turn, key.turn) < 0.1
    jumps = [angle(a.turn, b.turn) for a, b in zip(way, way[1:])]
    assert max(jumps) < 0.2, "smooth: no sign of a quaternion flips"
    if not loop:
        np.testing.assert_allclose(way[-1].place, keys[-1].place, atol=1e-9)
        assert way[-1].fov == pytest.approx(keys[-1].fov)


def test_even_speed_however_the_keys_lie():
    keys = [Pose(np.array([x, 0.0, 0.0]), np.eye(3), 0.8) for x in (0.0, 1.0, 1.1, 4.0)]
    moved = steps(paths.through(keys, 100))
    np.testing.assert_allclose(moved, 4 / 99, rtol=0.02)


def test_a_turn_on_the_spot_is_even_too():
    keys = [Pose(np.zeros(3), paths.looking(np.array([math.sin(a), 0, math.cos(a)]), paths.UP), 0.8)
            for a in (0.0, 0.2, 1.0)]  # fmt: skip
    way = paths.through(keys, 50)
    jumps = np.array([angle(a.turn, b.turn) for a, b in zip(way, way[1:])])
    np.testing.assert_allclose(jumps, 1.0 / 49, rtol=0.05)


def test_keys_that_are_all_the_same_stand_still():
    assert len(paths.through(ring()[:1] * 3, 7)) == 7


def test_spiral_looks_at_one_point():
    rng = np.random.default_rng(1)
    poses = []
    for _ in range(9):
        place = np.array([*rng.uniform(-1, 1, 2), 0.0])
        poses.append(Pose(place, paths.looking(np.array([0, 0, 10.0]) - place, paths.UP), 0.7))
    way = paths.spiral(poses, 30)
    assert_rotations(way)
    for pose in way:
        toward = np.array([0, 0, 10.0]) - pose.place
        np.testing.assert_allclose(pose.turn[:, 2], toward / np.linalg.norm(toward), atol=1e-6)
        assert np.abs(pose.place).max() < 1.1


def test_what_is_written_is_read_again(tmp_path):
    keys = ring(5)
    way = CameraPath(paths.through(keys, 11, loop=True), 64, 48, 29.97, True, keys)
    paths.write(tmp_path / "a.json", way)
    back = paths.read(tmp_path / "a.json")
    assert (back.width, back.height, back.fps, back.loop) == (64, 48, 29.97, True)
    for mine, read in zip([*way.poses, *way.keys], [*back.poses, *back.keys], strict=True):
        np.testing.assert_allclose(read.place, mine.place, atol=0)
        np.testing.assert_allclose(read.turn, mine.turn, atol=1e-15)
        assert read.fov == pytest.approx(mine.fov, rel=1e-14)


NERFSTUDIO = {  # as its viewer writes it
    "default_fov": 50.0,
    "default_transition_sec": 2.0,
    "keyframes": [
        {"matrix": "[]", "fov": 50.0, "aspect": 1.7778, "override_transition_enabled": False,
         "override_transition_sec": None},
    ],
    "camera_type": "perspective",
    "render_height": 1080,
    "render_width": 1920,
    "fps": 30.0,
    "seconds": 4.0,
    "is_cycle": False,
    "smoothness_value": 0.0,
    "camera_path": [
        {"camera_to_world": [1, 0, 0, 5, 0, 0, -1, 6, 0, 1, 0, 7, 0, 0, 0, 1], "fov": 90.0, "aspect": 1.7778},
    ],
}  # fmt: skip


def test_nerfstudios_file(tmp_path):
    """Worked by hand: the camera is at (5, 6, 7); its OpenGL axes are x, z and -y of the world, so that it
    looks along +y and its down is -z. 90 degrees vertically are a focal length of half the height."""
    about = NERFSTUDIO | {"keyframes": []}
    (tmp_path / "a.json").write_text(json.dumps(about))
    way = paths.read(tmp_path / "a.json")
    (pose,) = way.poses
    np.testing.assert_allclose(pose.place, [5, 6, 7])
    np.testing.assert_allclose(pose.turn, [[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    np.testing.assert_allclose(way.intrinsics(pose), [[540, 0, 960], [0, 540, 540], [0, 0, 1]])
    np.testing.assert_allclose(pose.world_to_camera @ [5, 16, 7, 1], [0, 0, 10, 1], atol=1e-12)


FAR = [1, 0, 0, math.inf, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"camera_type": "equirectangular"}, "camera_type must be perspective"),
        ({"camera_path": [], "keyframes": []}, "both are empty"),
        ({"keyframes": [], "render_width": "wide"}, "render_width must be a number"),
        ({}, "keyframes 0 is no camera"),
        ({"keyframes": [], "camera_path": [{"camera_to_world": [2.0] * 16}]}, "its matrix is no rotation"),
        ({"keyframes": [], "camera_path": [{"camera_to_world": [1, 0]}]}, "camera_path 0 is no camera"),
        ({"keyframes": [], "camera_path": [{"camera_to_world": FAR}]}, "its place must be finite"),
        ({"keyframes": [], "camera_path": 7}, "camera_path 0 is no camera"),
    ],
)
def test_files_that_are_no_paths(tmp_path, change, said):
    (tmp_path / "a.json").write_text(json.dumps(NERFSTUDIO | change))
    with pytest.raises(DataError, match=said):
        paths.read(tmp_path / "a.json")


ODD = [
    None,
    True,
    "x",
    -1,
    1e400,
    float("nan"),
    [],
    {},
    [[]],
    [None] * 16,
    [1e308] * 16,
    [0.0] * 16,
    "9" * 400,
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_in_a_line_or_read(data):
    """Some values are something else: a path whose numbers are finite, or an error that names the file."""
    about = json.loads(json.dumps(NERFSTUDIO | {"keyframes": NERFSTUDIO["camera_path"]}))
    frame = about["camera_path"][0]
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from([about, frame]))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(st.sampled_from(ODD))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "camera_path.json")
        path.write_text(json.dumps(about))
        try:
            way = paths.read(path)
        except DataError as error:
            assert str(path) in str(error)
            return
    for pose in way.poses:
        assert np.isfinite(pose.world_to_camera).all() and np.isfinite(way.intrinsics(pose)).all()


@pytest.mark.parametrize(
    "entry",
    [
        {},
        7,
        {"fy": 0.0},
        {"fy": math.nan},
        {"width": "x"},
        {"position": [1, 2, math.inf]},
        {"rotation": [[1.0]]},
    ],
)
def test_cameras_that_are_none(tmp_path, entry):
    good = {"position": [1, 2, 3], "rotation": np.eye(3).tolist(), "width": 4, "height": 3, "fy": 5.0}
    (tmp_path / "cameras.json").write_text(json.dumps([good]))
    assert paths.of_cameras(tmp_path / "cameras.json")[1] == (4, 3)
    bad = good | entry if isinstance(entry, dict) and entry else entry
    (tmp_path / "cameras.json").write_text(json.dumps([good, bad]))
    with pytest.raises(DataError, match="cameras.json: camera 1 is not one"):
        paths.of_cameras(tmp_path / "cameras.json")


def test_keys_without_frames(tmp_path):
    way = CameraPath(ring(4), 64, 48, 10.0, True, ring(4))
    paths.write(tmp_path / "a.json", way)
    about = json.loads((tmp_path / "a.json").read_text()) | {"camera_path": [], "seconds": 2.5}
    (tmp_path / "a.json").write_text(json.dumps(about))
    assert len(paths.read(tmp_path / "a.json").poses) == 25
    assert len(paths.read(tmp_path / "a.json", seconds=0.7).poses) == 7


def test_circle_around_bare_splats():
    poses = paths.around(np.random.default_rng(0).normal(size=(500, 3)) + [5, 0, 0])
    np.testing.assert_allclose(paths.focus(poses), [5, 0, 0], atol=0.3)
