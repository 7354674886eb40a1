"""From pictures to a data set: COLMAP or Blender folders, with everything that a test may want to know.

views, points = photograph(Options(views=8, width=96, height=72))   # in memory, exact
write_colmap("somewhere", views, points)                            # images/ + sparse/0
write_blender("elsewhere", views)                                   # transforms_{train,test}.json + RGBA
"""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .shapes import Ellipsoid
from .tracer import SKY_DISTANCE, Camera, World, orbit

HOLD = 8  # views 0, 8, 16, ... are for testing, as train.py --eval holds out
PINHOLE = 1  # COLMAP's number of the model with fx, fy, cx, cy


@dataclass(frozen=True)
class Options:
    width: int = 400
    height: int = 300
    views: int = 60
    points: int = 20_000
    field_of_view: float = 52.0  # horizontal, degrees
    principal: tuple | None = None  # principal point in pixels, if not the center
    alpha: bool = False  # RGBA: the terrace and what stands on it; sky and meadow transparent
    exposures: float = 0.0  # size of a random color change of each view, as a factor
    distractor: bool = False  # a pink ball that is somewhere else in each view; masks cut it out
    blur: str = "none"  # "motion" or "defocus"; test views stay sharp
    blur_samples: int = 7  # sharp pictures averaged into a blurred one
    pose_noise: float = 0.0  # error of the poses of training views: degrees, and % of the cameras' spread
    quality: float = 1.0  # resolution of the shadow maps; 0.3 is enough for tests
    seed: int = 0


class View(NamedTuple):
    camera: Camera
    image: np.ndarray  # [H, W, 3 or 4] uint8
    depth: np.ndarray  # [H, W] float32 distance along the optical axis; inf in the sky
    mask: np.ndarray  # [H, W] bool; False where a distractor is
    exposure: np.ndarray  # [3, 4] the color change that was applied: color -> A[:, :3] @ color + A[:, 3]
    is_test: bool
    truth: dict  # what the data set does not tell: "world_to_camera" if wrong, "exposed_from" if blurred


class Points(NamedTuple):
    xyz: np.ndarray  # [N, 3]
    rgb: np.ndarray  # [N, 3] uint8
    tracks: list  # one per view: (index of the point [k], its pixel coordinates [k, 2])


# --- taking the pictures ------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def world(quality: float) -> World:
    return World(quality)


def photograph(options: Options = Options(), workers: int = 1, progress=None) -> tuple[list[View], Points]:
    """Render all views and sample the point cloud. The same options give the same data."""
    cameras = orbit(
        options.views, options.width, options.height, options.field_of_view, options.principal, options.seed
    )
    jobs = [(options, index, camera) for index, camera in enumerate(cameras)]
    if workers > 1:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core, one thread each
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            done = pool.map(_take, jobs)
            results = list(progress(done) if progress else done)
    else:
        results = [_take(job) for job in (progress(jobs) if progress else jobs)]
    views, samples = zip(*results)
    points = _point_cloud(options, views, samples)
    return _misplaced(views, options) if options.pose_noise else list(views), points


def _take(job):
    """One view, and the surface points that it contributes to the point cloud."""
    options, index, camera = job
    scene = world(options.quality)
    rng = np.random.default_rng([options.seed, index])
    exposure = _exposure(options.exposures, rng)
    hidden = np.zeros((camera.height, camera.width), bool)
    is_test = index % HOLD == 0

    sharp = scene.picture(camera, options.alpha)
    image = sharp.image
    truth = {}
    if options.blur != "none" and not is_test:
        poses = blurred_poses(camera, options, rng)
        truth["exposed_from"] = [pose.world_to_camera.tolist() for pose in poses]
        image = np.mean([scene.picture(pose, options.alpha).image for pose in poses], axis=0)
    samples = _surface_points(camera, sharp, options, rng)
    if options.distractor:
        image, hidden = _add_distractor(camera, image, sharp.depth, rng)

    color = np.clip(image[..., :3] @ exposure[:, :3].T + exposure[:, 3], 0, 1)
    image = np.concatenate([color, image[..., 3:]], axis=2)
    image = (image * 255 + 0.5).astype(np.uint8)
    return View(camera, image, sharp.depth.astype(np.float32), ~hidden, exposure, is_test, truth), samples


def _misplaced(views, options: Options) -> list[View]:
    """The training views with the wrong poses that the data set will have."""
    centers = np.array([view.camera.center for view in views])
    spread = 1.1 * np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()
    rng, moved = np.random.default_rng([options.seed, len(views)]), []
    for view in views:
        turn, shift = rng.standard_normal((2, 3)) * options.pose_noise
        true, error = view.camera.world_to_camera, np.eye(4)
        if not view.is_test:
            error[:3, :3], error[:3, 3] = _rotation(np.radians(turn)), spread * shift / 100
        camera = replace(view.camera, world_to_camera=error @ true)
        moved.append(view._replace(camera=camera, truth=view.truth | {"world_to_camera": true.tolist()}))
    return moved


def _exposure(size: float, rng) -> np.ndarray:
    gain = np.exp(size * rng.uniform(-1, 1)) * (1 + 0.3 * size * rng.uniform(-1, 1, 3))
    offset = 0.05 * size * rng.uniform(-1, 1, 3)
    return np.concatenate([np.diag(gain), offset[:, None]], axis=1)


def blurred_poses(camera: Camera, options: Options, rng) -> list[Camera]:
    """The sharp cameras whose pictures, averaged, make the blurred one.

    Motion: a short straight drift with a turn of the camera during the exposure. Defocus: the camera moves
    over the aperture while it keeps looking at the point in focus, 5 m ahead on the axis.
    """
    poses, n = [], options.blur_samples
    drift, turn = rng.uniform(-0.04, 0.04, 3), rng.uniform(-0.006, 0.006, 3)
    for k in range(n):
        if options.blur == "motion":
            s = 2 * k / max(n - 1, 1) - 1
            shift, spin = s * drift, s * turn
        elif options.blur == "defocus":
            angle, radius = 2.39996 * k, 0.08 * np.sqrt((k + 0.5) / n)
            shift = np.array([radius * np.cos(angle), radius * np.sin(angle), 0])
            spin = np.array([-shift[1] / 5, shift[0] / 5, 0])
        else:
            raise ValueError(f'blur must be "none", "motion" or "defocus", got "{options.blur}"')
        move = np.eye(4)
        move[:3, :3] = _rotation(spin)
        move[:3, 3] = move[:3, :3] @ -shift
        poses.append(replace(camera, world_to_camera=move @ camera.world_to_camera))
    return poses


def _rotation(v) -> np.ndarray:
    """Rodrigues: the rotation by |v| about v, [3, 3]."""
    angle = np.linalg.norm(v)
    if angle == 0:
        return np.eye(3)
    x, y, z = v / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _add_distractor(camera: Camera, image, depth, rng):
    """Paint a shaded ball over the picture, where nothing is nearer."""
    ball = Ellipsoid((*rng.uniform(-1.6, 1.6, 2), rng.uniform(0.4, 1.0)), None, radii=0.3)
    rows, columns = np.mgrid[0 : camera.height, 0 : camera.width]
    o, d, cosine = camera.rays(columns.ravel() + 0.5, rows.ravel() + 0.5)
    t = ball.hit(o, d)
    hidden = (t * cosine).reshape(depth.shape) < depth
    seen = hidden.ravel()
    light = 0.6 + 0.4 * ball.normal(o + t[seen] * d[:, seen])[2]
    image = image.copy()
    image[hidden, :3] = light[:, None] * np.array([0.95, 0.25, 0.65])
    if image.shape[2] == 4:
        image[hidden, 3] = 1
    return image, hidden


# --- the point cloud ----------------------------------------------------------------------------------------


def _surface_points(camera: Camera, picture, options: Options, rng):
    """Random pixels, lifted to 3D with the noise that structure from motion would leave: (xyz, rgb)."""
    count = int(np.ceil(2.2 * options.points / options.views))
    gray = picture.image[..., :3].mean(axis=2)
    interest = 0.04 + np.hypot(*np.gradient(gray))  # features are found where there is something to see
    pixels = rng.choice(gray.size, count, p=(interest / interest.sum()).ravel())
    rows, columns = np.divmod(pixels, camera.width)
    z, image = picture.depth[rows, columns], picture.image[rows, columns]
    empty = np.isinf(z)
    keep = image[:, 3] > 0.5 if options.alpha else np.ones(count, bool)
    z = np.where(empty, SKY_DISTANCE, np.minimum(z, SKY_DISTANCE))
    x = (columns + 0.5 - camera.K[0, 2]) / camera.K[0, 0]
    y = (rows + 0.5 - camera.K[1, 2]) / camera.K[1, 1]
    in_camera = (
        np.stack([x, y, np.ones(count)], axis=1) * (z * (1 + 0.002 * rng.standard_normal(count)))[:, None]
    )
    rotation, shift = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    rgb = np.clip(image[:, :3] * 255 + 4 * rng.standard_normal((count, 3)), 0, 255)
    return ((in_camera - shift) @ rotation)[keep], rgb[keep].astype(np.uint8)


def _point_cloud(options: Options, views, samples) -> Points:
    """Merge the samples; keep points that at least two views see; note where each view sees them."""
    xyz, rgb = (np.concatenate(part) for part in zip(*samples))
    rng = np.random.default_rng(options.seed + 1)
    seen = [_visible(view, xyz) for view in views]
    often = np.sum([found for found, _ in seen], axis=0) >= min(2, len(views))
    chosen = np.sort(rng.permutation(np.flatnonzero(often))[: options.points])
    tracks = []
    for found, pixels in seen:
        index = np.flatnonzero(found[chosen] & (rng.random(len(chosen)) < 0.35))  # not all is matched
        tracks.append((index, pixels[chosen[index]] + 0.3 * rng.standard_normal((len(index), 2))))
    return Points(xyz[chosen], rgb[chosen], tracks)


def _visible(view: View, xyz):
    """(which points a view sees: in the frame and not behind a surface, their pixel coordinates [N, 2])."""
    camera = view.camera
    p = xyz @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    z = np.maximum(p[:, 2], 1e-6)
    pixels = p[:, :2] / z[:, None] * camera.K[[0, 1], [0, 1]] + camera.K[:2, 2]
    inside = (p[:, 2] > 0.05) & (pixels >= 0).all(1) & (pixels < [camera.width, camera.height]).all(1)
    column, row = np.where(inside[:, None], pixels, 0).astype(int).T
    surface = np.minimum(view.depth[row, column], SKY_DISTANCE * 1.2)
    return inside & (z < 1.03 * surface) & (z > 0.95 * np.minimum(surface, 0.8 * SKY_DISTANCE)), pixels


# --- COLMAP form --------------------------------------------------------------------------------------------


def write_colmap(folder, views: list[View], points: Points, *, text=False, depths=False, masks=False) -> None:
    """images/ and sparse/0 (binary, or text); depths/ + depth_params.json and masks/ if asked for."""
    folder = Path(folder)
    sparse = folder / "sparse" / "0"
    for path in (folder / "images", sparse):
        path.mkdir(parents=True, exist_ok=True)
    names = [f"{view.camera.name}.png" for view in views]
    for name, view in zip(names, views):
        Image.fromarray(view.image).save(folder / "images" / name, compress_level=3)
    (_write_text if text else _write_binary)(sparse, names, views, points)
    if depths:
        write_depths(folder, views)
    if masks:
        (folder / "masks").mkdir(exist_ok=True)
        for name, view in zip(names, views):
            Image.fromarray(view.mask.astype(np.uint8) * 255).save(folder / "masks" / name)
    if any(not np.array_equal(view.exposure, np.eye(3, 4)) for view in views):
        truth = {name: view.exposure.tolist() for name, view in zip(names, views)}
        (folder / "true_exposures.json").write_text(json.dumps(truth, indent=1))
    if any(view.truth for view in views):
        truth = {name: view.truth for name, view in zip(names, views) if view.truth}
        (folder / "true_poses.json").write_text(json.dumps(truth))


def write_depths(folder, views: list[View]) -> None:
    """16-bit inverse depth, as a network for depth from one image gives it: right up to scale and offset.

    1 / z = value / 65536 * scale + offset, with each view's numbers in sparse/0/depth_params.json.
    """
    folder = Path(folder)
    (folder / "depths").mkdir(exist_ok=True)
    parameters = {}
    for k, view in enumerate(views):
        inverse = 1 / view.depth  # 0 in the sky
        offset = -0.02 * (1 + k % 3)
        scale = float(1.1 * inverse.max() - offset) * (1 + 0.1 * (k % 4))
        values = np.round((inverse - offset) / scale * 65536)
        Image.fromarray(values.clip(0, 65535).astype(np.uint16)).save(
            folder / "depths" / f"{view.camera.name}.png"
        )
        parameters[view.camera.name] = {"scale": scale, "offset": offset}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(parameters, indent=1))


def quaternion(rotation) -> np.ndarray:
    """(w, x, y, z) of a rotation matrix: the eigenvector that belongs to its largest root (Bar-Itzhack)."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    K = np.array(
        [
            [a - e - i, 0, 0, 0],
            [d + b, e - a - i, 0, 0],
            [g + c, h + f, i - a - e, 0],
            [h - f, c - g, d - b, a + e + i],
        ]
    )
    _, vectors = np.linalg.eigh(K / 3)
    q = vectors[[3, 0, 1, 2], -1]
    return q if q[0] >= 0 else -q


def _write_binary(sparse: Path, names, views, points: Points) -> None:
    camera = views[0].camera
    with open(sparse / "cameras.bin", "wb") as out:
        out.write(struct.pack("<Qii", 1, 1, PINHOLE))
        out.write(struct.pack("<QQ4d", camera.width, camera.height, *camera.K[[0, 1, 0, 1], [0, 1, 2, 2]]))
    with open(sparse / "images.bin", "wb") as out:
        out.write(struct.pack("<Q", len(views)))
        for k, (name, view, (index, pixels)) in enumerate(zip(names, views, points.tracks)):
            pose = view.camera.world_to_camera
            out.write(struct.pack("<i7di", k + 1, *quaternion(pose[:3, :3]), *pose[:3, 3], 1))
            out.write(name.encode() + b"\0" + struct.pack("<Q", len(index)))
            rows = np.zeros(len(index), [("xy", "<f8", 2), ("point", "<i8")])
            rows["xy"], rows["point"] = pixels, index + 1
            out.write(rows.tobytes())
    with open(sparse / "points3D.bin", "wb") as out:
        out.write(struct.pack("<Q", len(points.xyz)))
        for k, (xyz, rgb, track) in enumerate(zip(points.xyz, points.rgb, _by_point(points))):
            out.write(struct.pack("<Q3d3BdQ", k + 1, *xyz, *rgb, 0.4, len(track)))
            out.write(np.array(track, "<i4").tobytes())


def _write_text(sparse: Path, names, views, points: Points) -> None:
    camera = views[0].camera
    fx, fy, cx, cy = camera.K[[0, 1, 0, 1], [0, 1, 2, 2]]
    lines = ["# Camera list", f"1 PINHOLE {camera.width} {camera.height} {fx!r} {fy!r} {cx!r} {cy!r}"]
    (sparse / "cameras.txt").write_text("\n".join(lines).replace("np.float64(", "").replace(")", "") + "\n")
    lines = ["# Image list: two lines each"]
    for k, (name, view, (index, pixels)) in enumerate(zip(names, views, points.tracks)):
        pose = view.camera.world_to_camera
        numbers = " ".join(f"{value:.17g}" for value in (*quaternion(pose[:3, :3]), *pose[:3, 3]))
        lines.append(f"{k + 1} {numbers} 1 {name}")
        lines.append(" ".join(f"{x:.3f} {y:.3f} {i + 1}" for (x, y), i in zip(pixels, index)))
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list"]
    for k, (xyz, rgb, track) in enumerate(zip(points.xyz, points.rgb, _by_point(points))):
        numbers = " ".join(f"{value:.17g}" for value in xyz)
        lines.append(
            f"{k + 1} {numbers} {rgb[0]} {rgb[1]} {rgb[2]} 0.4 " + " ".join(f"{i} {j}" for i, j in track)
        )
    (sparse / "points3D.txt").write_text("\n".join(lines) + "\n")


def _by_point(points: Points) -> list[list]:
    """For each point, the (image id, position in that image's list) pairs that see it."""
    tracks = [[] for _ in points.xyz]
    for view, (index, _) in enumerate(points.tracks):
        for position, point in enumerate(index):
            tracks[point].append((view + 1, position))
    return tracks


# --- Blender form -------------------------------------------------------------------------------------------

BLENDER_SCALE = 0.5  # brings the terrace into the cube of side 2.6 that these scenes are known to fill
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # y up and z backward, from y down and z forward


def write_blender(folder, views: list[View]) -> None:
    """transforms_train.json and transforms_test.json next to train/ and test/."""
    folder = Path(folder)
    for split, chosen in (
        ("train", [v for v in views if not v.is_test]),
        ("test", [v for v in views if v.is_test]),
    ):
        (folder / split).mkdir(parents=True, exist_ok=True)
        frames = []
        for view in chosen:
            Image.fromarray(view.image).save(folder / split / f"{view.camera.name}.png", compress_level=3)
            camera_to_world = np.linalg.inv(view.camera.world_to_camera) @ OPENGL
            camera_to_world[:3, 3] *= BLENDER_SCALE
            frames.append(
                {"file_path": f"./{split}/{view.camera.name}", "transform_matrix": camera_to_world.tolist()}
            )
        camera = views[0].camera
        angle = 2 * np.arctan(camera.width / (2 * camera.K[0, 0]))
        text = json.dumps({"camera_angle_x": float(angle), "frames": frames}, indent=1)
        (folder / f"transforms_{split}.json").write_text(text)
