"""Ways of a camera through a scene: fitted to the cameras of a data set, through keys, or from a file.

A file is nerfstudio's camera_path.json. Its matrices lead from OpenGL's camera (y up, z back) to the world of
the data set; nerfstudio itself writes those of a world of its own, unless it was told not to move the scene.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.files import DataError, read_json, write_json

OPENGL = np.diag([1.0, -1.0, -1.0])  # its camera axes in ours, and back
UP = np.array([0.0, -1.0, 0.0])  # y points down
DENSE = 64  # samples between two keys, for even speed
TURNS = 2  # of a spiral
MOST_KEYS = 200  # of a way through cameras
MOST_FRAMES = 100_000
WIDEST_FOV = 175.0  # degrees


@dataclass(frozen=True)
class Pose:
    place: np.ndarray  # [3]
    turn: np.ndarray  # [3, 3] camera to world; x right, y down, z forward
    fov: float  # vertical, in radians

    @property
    def world_to_camera(self) -> np.ndarray:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = self.turn.T, -self.turn.T @ self.place
        return matrix


@dataclass
class CameraPath:
    poses: list[Pose]  # a frame each
    width: int
    height: int
    fps: float
    loop: bool = False
    keys: list[Pose] = field(default_factory=list)

    def intrinsics(self, pose: Pose) -> np.ndarray:
        focal = 0.5 * self.height / math.tan(0.5 * pose.fov)
        return np.array([[focal, 0, self.width / 2], [0, focal, self.height / 2], [0, 0, 1]])


def of_cameras(path: Path) -> tuple[list[Pose], tuple[int, int]]:
    """The poses in a model's cameras.json, and the size of the first one's picture."""
    poses, size = [], (0, 0)
    for number, entry in enumerate(read_json(path, list)):
        try:
            place, turn = (np.array(entry[key], np.float64) for key in ("position", "rotation"))
            width, height, fy = (float(entry[key]) for key in ("width", "height", "fy"))
            if not (1 <= width < math.inf and 1 <= height < math.inf and 0 < fy < math.inf):
                raise ValueError("its size and focal length must be positive")
            fov = 2 * math.atan(height / (2 * fy))
            poses.append(Pose(_finite(place.reshape(3)), _checked(turn.reshape(3, 3)), fov))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: camera {number} is not one ({error})") from None
        size = size if len(poses) > 1 else (int(width), int(height))
    if not poses:
        raise DataError(f"{path}: has no cameras")
    return poses, size


def around(means: np.ndarray) -> list[Pose]:
    """Poses on a circle around splats that come without cameras."""
    middle = np.median(means, axis=0)
    radius = 2.5 * float(np.median(np.linalg.norm(means - middle, axis=1))) or 1.0
    angles = np.arange(8) * math.tau / 8
    places = middle + radius * np.stack([np.sin(angles), np.full(8, -0.3), -np.cos(angles)], 1)
    return [Pose(place, looking(middle - place, UP), math.radians(50)) for place in places]


def automatic(kind: str, poses: list[Pose], count: int) -> tuple[list[Pose], list[Pose], bool]:
    """Frames, the keys that they lead through if there are any, and whether the end meets the beginning."""
    if kind == "still":
        return [poses[0]] * count, [], True
    if kind == "orbit":
        return orbit(poses, count), [], True
    if kind == "spiral":
        return spiral(poses, count), [], True
    poses = [poses[i] for i in np.linspace(0, len(poses) - 1, min(len(poses), MOST_KEYS)).astype(int)]
    keys = [poses[i] for i in tour(poses)]
    return through(keys, count, loop=True), keys, True


# Fitted to cameras


def looking(forward: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The turn [3, 3] of a camera that looks forward with its head up."""
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    if np.linalg.norm(right) < 1e-6 * np.linalg.norm(up):  # straight up or down
        right = np.cross(forward, np.roll(up, 1))
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], axis=1)


def focus(poses: list[Pose]) -> np.ndarray:
    """The point that is closest to all axes of view; in front of cameras that are parallel."""
    places, ahead = np.array([p.place for p in poses]), np.array([p.turn[:, 2] for p in poses])
    across = np.eye(3) - ahead[:, :, None] * ahead[:, None, :]
    total = across.mean(0)
    values, axes = np.linalg.eigh(total)
    middle = places.mean(0)
    offset = axes.T @ (np.einsum("nij,nj->i", across, places) / len(poses) - total @ middle)
    offset = np.where(values > 1e-3, offset / np.maximum(values, 1e-3), 0)
    point = middle + axes @ offset
    if values[0] <= 1e-3 or ((point - places) * ahead).sum(1).mean() <= 0:
        spread = np.linalg.norm(places - middle, axis=1).max()
        point = middle + 4 * (spread or 1.0) * ahead.mean(0)
    return point


def surroundings(poses: list[Pose], size: tuple[int, int]) -> np.ndarray:
    """Points [5 P, 3] whose hull is what cameras around an object have in view: where they are, and the
    corners of their pictures as far away as what they look at."""
    center, points = focus(poses), []
    for pose in poses:
        depth = np.linalg.norm(center - pose.place)
        y = math.tan(0.5 * pose.fov)
        x = y * size[0] / size[1]
        corners = np.array([[0, 0, 0], [x, y, 1], [-x, y, 1], [x, -y, 1], [-x, -y, 1]]) * depth
        points.append(pose.place + corners @ pose.turn.T)
    return np.concatenate(points)


def mean_up(poses: list[Pose]) -> np.ndarray:
    up = -np.mean([p.turn[:, 1] for p in poses], axis=0)
    return up / np.linalg.norm(up) if np.linalg.norm(up) > 1e-3 else UP


def orbit(poses: list[Pose], count: int) -> list[Pose]:
    """Around the focus on an ellipse as wide as the cameras are, at their mean height; even speed."""
    center, up = focus(poses), mean_up(poses)
    away = np.array([p.place for p in poses]) - center
    height = float((away @ up).mean())
    flat = away - (away @ up)[:, None] * up
    spreads, axes = np.linalg.eigh(flat.T @ flat / len(poses))
    a, b = axes[:, 2] * math.sqrt(2 * spreads[2]), axes[:, 1] * math.sqrt(2 * spreads[1])
    if spreads[1] < 0.05 * spreads[2]:  # cameras in a line: a circle
        b = np.cross(up, a)
    angles = np.linspace(0, math.tau, 64 * DENSE + 1)
    line = np.cos(angles)[:, None] * a + np.sin(angles)[:, None] * b
    even = _even(np.linalg.norm(np.diff(line, axis=0), axis=1), count, loop=True)
    angles = np.interp(even, np.arange(len(angles)), angles)
    offsets = np.cos(angles)[:, None] * a + np.sin(angles)[:, None] * b + height * up
    if np.ptp(away, axis=0).max() < 1e-6 * np.abs(away).max():
        raise DataError("all cameras are in one place: there is nothing to orbit; use --path still")
    fov = float(np.median([p.fov for p in poses]))
    return [Pose(center + offset, looking(-offset, up), fov) for offset in offsets]


def spiral(poses: list[Pose], count: int) -> list[Pose]:
    """For cameras that look the same way: winding around the middle of them, all the time at the focus."""
    center, up = focus(poses), mean_up(poses)
    middle = np.mean([p.place for p in poses], axis=0)
    axes = looking(center - middle, up)
    reach = np.percentile(np.abs((np.array([p.place for p in poses]) - middle) @ axes), 90, axis=0)
    angles = np.arange(count) * math.tau / count
    swing = np.stack([np.cos(TURNS * angles), np.sin(TURNS * angles), np.sin(angles)], 1) * reach
    fov = float(np.median([p.fov for p in poses]))
    places = middle + swing @ axes.T
    return [Pose(place, looking(center - place, up), fov) for place in places]


def tour(poses: list[Pose]) -> list[int]:
    """A short way through all cameras and back: always to the nearest, then without its crossings."""
    places = np.array([p.place for p in poses])
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    way, left = [0], set(range(1, len(poses)))
    while left:
        way.append(min(left, key=lambda i: distance[way[-1], i]))
        left.remove(way[-1])
    while len(way) > 3:
        order = np.array(way)
        after = np.roll(order, -1)
        steps = distance[order, after]
        gain = steps[:, None] + steps[None] - distance[np.ix_(order, order)] - distance[np.ix_(after, after)]
        np.fill_diagonal(gain, 0)
        i, j = sorted(map(int, np.unravel_index(gain.argmax(), gain.shape)))
        if not gain[i, j] > 1e-9 * steps.sum():
            break
        way[i + 1 : j + 1] = way[i + 1 : j + 1][::-1]
    return way


# Through keys


def through(keys: list[Pose], count: int, loop: bool = False) -> list[Pose]:
    """A smooth way through the keys, with even speed: centripetal Catmull-Rom splines for the places, squad
    for the turns, lenses even in the logarithm of the focal length."""
    if len(keys) == 1:
        return keys * count
    places, quats = np.array([k.place for k in keys]), np.array([_quaternion(k.turn) for k in keys])
    focals = np.log([1 / math.tan(0.5 * k.fov) for k in keys])
    segments = len(keys) if loop else len(keys) - 1
    u = np.linspace(0, segments, segments * DENSE + 1)
    line, turns = _places(places, u, loop), _turns(quats, u, loop)
    moves = np.linalg.norm(np.diff(line, axis=0), axis=1)
    angles = 2 * np.arccos(np.clip(np.abs((turns[1:] * turns[:-1]).sum(1)), 0, 1))
    paces = [part / part.sum() for part in (moves, angles) if part.sum() > 1e-9]
    if not paces:  # the keys are all the same
        return keys[:1] * count
    pace = np.sum(paces, axis=0)
    u = np.interp(_even(pace, count, loop), np.arange(len(u)), u)
    wrapped = np.append(focals, focals[0]) if loop else focals
    fovs = 2 * np.arctan(np.exp(-np.interp(u, np.arange(len(wrapped)), wrapped)))
    rows = zip(_places(places, u, loop), _turns(quats, u, loop), fovs)
    return [Pose(place, _matrix(quat), float(fov)) for place, quat, fov in rows]


def _even(lengths: np.ndarray, count: int, loop: bool) -> np.ndarray:
    """Where on a line of short pieces `count` points with equal distances are. The last one of a loop would
    be the first again, and stays away."""
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    return np.interp(np.linspace(0, along[-1], count, endpoint=not loop), along, np.arange(len(along)))


def _four(values: np.ndarray, u: np.ndarray, loop: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """The key before, the two around and the one after each u, and how far u is between the two. Beyond the
    ends of an open way the keys go on as they began."""
    n = len(values)
    i = np.clip(np.floor(u).astype(int), 0, (n if loop else n - 1) - 1)
    if not loop:
        values = np.concatenate([2 * values[:1] - values[1:2], values, 2 * values[-1:] - values[-2:-1]])
        return [values[i + k] for k in range(4)], (u - i)[:, None]
    return [values[(i + k - 1) % n] for k in range(4)], (u - i)[:, None]


def _places(places: np.ndarray, u: np.ndarray, loop: bool) -> np.ndarray:
    p, s = _four(places, u, loop)
    t = [np.sqrt(np.linalg.norm(b - a, axis=1, keepdims=True)) for a, b in zip(p, p[1:])]
    t = [np.maximum(step, 1e-9) for step in t]

    def slope(a, b, c, before, after):
        return t[1] * ((b - a) / before - (c - a) / (before + after) + (c - b) / after)

    begin, end = slope(p[0], p[1], p[2], t[0], t[1]), slope(p[1], p[2], p[3], t[1], t[2])
    s2, s3 = s * s, s * s * s
    return (
        (2 * s3 - 3 * s2 + 1) * p[1] + (s3 - 2 * s2 + s) * begin + (3 * s2 - 2 * s3) * p[2] + (s3 - s2) * end
    )


def _turns(quats: np.ndarray, u: np.ndarray, loop: bool) -> np.ndarray:
    """Squad: between two keys, the one before and the one after bend the way (Shoemake 1987)."""
    if not loop:  # the ends rest
        u, quats = u + 1, np.concatenate([quats[:1], quats, quats[-1:]])
    n = len(quats)
    i = np.clip(np.floor(u).astype(int), 0, (n if loop else n - 2) - 1)
    a, b, c, d = (quats[(i + k - 1) % n] for k in range(4))
    a, c = _same_side(a, b), _same_side(c, b)
    d, s = _same_side(d, c), (u - i)[:, None]
    bend_b, bend_c = _bend(a, b, c), _bend(b, c, d)
    return _slerp(_slerp(b, c, s), _slerp(bend_b, bend_c, s), 2 * s * (1 - s))


def _bend(before: np.ndarray, at: np.ndarray, after: np.ndarray) -> np.ndarray:
    back = at * [1, -1, -1, -1]
    return _product(at, _exp(-0.25 * (_log(_product(back, before)) + _log(_product(back, after)))))


# Quaternions (w, x, y, z), of length 1, in rows


def _same_side(q: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where((q * other).sum(1, keepdims=True) < 0, -q, q)


def _slerp(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The shorter way if both are on one side."""
    angle = np.arccos(np.clip((a * b).sum(1, keepdims=True), -1, 1))
    near = angle < 1e-6
    safe = np.where(near, 1.0, angle)
    mixed = (np.sin((1 - s) * safe) * a + np.sin(s * safe) * b) / np.sin(safe)
    mixed = np.where(near, (1 - s) * a + s * b, mixed)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w, v, x, y = a[:, :1], a[:, 1:], b[:, :1], b[:, 1:]
    return np.concatenate([w * x - (v * y).sum(1, keepdims=True), w * y + x * v + np.cross(v, y)], axis=1)


def _log(q: np.ndarray) -> np.ndarray:
    """Half the angle times the axis, [N, 3]."""
    length = np.linalg.norm(q[:, 1:], axis=1, keepdims=True)
    return q[:, 1:] * np.arctan2(length, q[:, :1]) / np.maximum(length, 1e-12)


def _exp(v: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(v, axis=1, keepdims=True)
    return np.concatenate([np.cos(angle), v * np.sinc(angle / np.pi)], axis=1)


def _quaternion(turn: np.ndarray) -> np.ndarray:
    """Of a rotation matrix: the eigenvector that all of Shepperd's four cases come from."""
    (a, b, c), (d, e, f), (g, h, i) = turn
    matrix = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ]
    )
    return np.linalg.eigh(matrix)[1][:, 3]


def _matrix(quat: np.ndarray) -> np.ndarray:
    w, x, y, z = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


# Files


def read(path: Path, seconds: float | None = None, fps: float | None = None) -> CameraPath:
    """camera_path.json. Its frames as they are; where it has keys only, or should last as long as this, a
    smooth way through the keys."""
    data = read_json(path)
    kind = data.get("camera_type", "perspective")
    if kind != "perspective":
        raise DataError(f"{path}: camera_type must be perspective, got {str(kind)[:40]}")
    width, height = (_number(data, path, f"render_{side}", 1, 1 << 16) for side in ("width", "height"))
    fps = fps or _number(data, path, "fps", 0.01, 1000, 24.0)
    loop = bool(data.get("is_cycle", False))
    frames = _poses(data, path, "camera_path", "camera_to_world")
    keys = _poses(data, path, "keyframes", "matrix")
    if not frames and not keys:
        raise DataError(f"{path}: must have a camera_path or keyframes, but both are empty")
    if seconds or not frames:
        seconds = seconds or _number(data, path, "seconds", 0, MOST_FRAMES, 10.0)
        frames = through(keys or frames, frame_count(seconds, fps), loop)
    return CameraPath(frames, int(width), int(height), fps, loop, keys)


def frame_count(seconds: float, fps: float) -> int:
    count = max(1, round(seconds * fps))
    if count > MOST_FRAMES:
        raise DataError(f"a film must have at most {MOST_FRAMES:,} frames, got {count:,}")
    return count


def _poses(data: dict, path: Path, name: str, matrix: str) -> list[Pose]:
    rows = data.get(name) or []
    poses = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            values = np.array(row[matrix], np.float64).reshape(4, 4)
            fov = float(row.get("fov", data.get("default_fov", 50.0)))
            if not 0 < fov <= WIDEST_FOV:
                raise ValueError(f"fov must be from 0 to {WIDEST_FOV:g} degrees, got {fov:g}")
            poses.append(Pose(_finite(values[:3, 3]), _checked(values[:3, :3]) @ OPENGL, math.radians(fov)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: {name} {number} is no camera ({error})") from None
    return poses


def _checked(turn: np.ndarray) -> np.ndarray:
    if not (np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3 and np.linalg.det(turn) > 0):
        raise ValueError("its matrix is no rotation")
    return turn


def _finite(place: np.ndarray) -> np.ndarray:
    if not np.isfinite(place).all():
        raise ValueError("its place must be finite")
    return place


def _number(data: dict, path: Path, name: str, least: float, most: float, default: float = math.nan) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise DataError(f"{path}: {name} must be a number from {least:g} to {most:g}, got {str(value)[:40]}")
    return float(value)


def write(path: Path, way: CameraPath) -> None:
    """As camera_path.json."""
    fov = math.degrees(way.poses[0].fov)
    seconds = len(way.poses) / way.fps
    keys = [_entry("matrix", key, way) for key in way.keys or way.poses[:1]]
    for key in keys:
        key |= {"override_transition_enabled": False, "override_transition_sec": None}
    head = {
        "camera_type": "perspective",
        "render_height": way.height,
        "render_width": way.width,
        "fps": way.fps,
        "seconds": seconds,
        "is_cycle": way.loop,
        "smoothness_value": 0.0,
        "default_fov": fov,
        "default_transition_sec": seconds / max(len(keys), 1),
    }
    frames = [_entry("camera_to_world", pose, way) for pose in way.poses]
    write_json(path, head | {"keyframes": keys, "camera_path": frames})


def _entry(name: str, pose: Pose, way: CameraPath) -> dict:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = pose.turn @ OPENGL, pose.place
    return {name: matrix.ravel().tolist(), "fov": math.degrees(pose.fov), "aspect": way.width / way.height}
