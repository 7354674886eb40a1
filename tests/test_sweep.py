"""Points made from photos lie on the surfaces of the sample scene, whose depths are known exactly."""

import threading
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from arguments import ModelParams
from sample_scene import Options, photograph, write_colmap
from scene import MADE_POINTS, Scene, sweep
from scene.cameras import Camera
from scene.formats.ply import read_points
from scene.images import Picture
from tests.test_scene import ring

CPU = torch.device("cpu")
OPTIONS = Options(views=24, width=160, height=120, points=10, quality=0.3)
photos = cache(lambda: photograph(OPTIONS))
assert OPTIONS.width * OPTIONS.height <= sweep.PIXELS, "pixels here are those that are compared"


def cameras(zoom=1.0, masks=None):
    """Of the photos; with focal lengths too long by a factor, or with where each photo counts."""

    def picture(array):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return Picture(lambda: tensor, tensor.shape, CPU, dtype=tensor.dtype)

    return [
        Camera(
            view.camera.name, OPTIONS.width, OPTIONS.height,
            torch.tensor(view.camera.world_to_camera).float(),
            torch.tensor(view.camera.K * [[zoom, 1, 1], [1, zoom, 1], [1, 1, 1]]).float(),
            uid=uid, photo=picture(view.image.transpose(2, 0, 1)),
            counted=None if masks is None else picture(masks[uid]),
        )
        for uid, view in enumerate(photos()[0])
    ]  # fmt: skip


def on_the_terrace(cameras):
    """Of the pixels of all views, 4 to 8 m away: the share that gets a depth, and its relative errors."""
    views = [sweep.Small.of(camera) for camera in cameras]
    near = sweep.neighbors(views)
    swept = [sweep.sweep(view, [views[j] for j in others]) for view, others in zip(views, near)]
    errors, count = [], 0
    for view, own, others, (_, _, depth, *_) in zip(views, swept, near, photos()[0]):
        there = (depth > 4).ravel() & (depth < 8).ravel()
        good = there & sweep.agreed(view, own, [(views[j], swept[j]) for j in others]).numpy()
        errors.append(np.abs(own.inverse_depth.numpy().ravel()[good] * depth.ravel()[good] - 1))
        count += there.sum()
    errors = np.concatenate(errors)
    return len(errors) / count, errors


def test_depths_are_those_of_the_surfaces():
    share, errors = on_the_terrace(cameras())
    assert share > 0.4
    assert np.median(errors) < 0.012 and np.percentile(errors, 75) < 0.03
    _, wrong = on_the_terrace(cameras(zoom=1.1))
    assert np.median(wrong) > 0.02, "lenses that are not the photos' would have been noticed"


def test_points_are_of_pixels_that_count():
    """Only the right half of one photo does; points are at its pixels' centers and have their colors."""
    masks = np.zeros((OPTIONS.views, OPTIONS.height, OPTIONS.width), np.uint8)
    masks[5, :, 80:] = 1
    points = sweep.points_from_photos(cameras(masks=masks), 100_000, seed=0)
    view = photos()[0][5]
    in_camera = points.xyz @ view.camera.world_to_camera[:3, :3].T + view.camera.world_to_camera[:3, 3]
    x, y = (in_camera @ view.camera.K.T)[:, :2].T / in_camera[:, 2]
    assert len(points) > 1000 and x.min() > 80
    np.testing.assert_allclose(np.stack([x, y]) % 1, 0.5, atol=0.01)
    np.testing.assert_allclose(points.rgb, view.image[y.astype(int), x.astype(int)] / 255, atol=1e-6)


@pytest.fixture
def threads():
    """Sets how many threads PyTorch takes."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_take_whole_views(threads, monkeypatch):
    """Two threads that shared each short operation were ten times slower than one on a busy machine. How many
    there are does not move a point."""
    threads(1)
    alone = sweep.points_from_photos(cameras(), 100_000, seed=0)
    took_part, warped = set(), sweep._warped

    def watched(*arguments):
        took_part.add((torch.get_num_threads(), threading.get_ident()))
        return warped(*arguments)

    monkeypatch.setattr(sweep, "_warped", watched)
    threads(3)
    together = sweep.points_from_photos(cameras(), 100_000, seed=0)
    assert {count for count, _ in took_part} == {1} and len(took_part) > 1
    assert torch.get_num_threads() == 3
    np.testing.assert_array_equal(together.xyz, alone.xyz)
    np.testing.assert_array_equal(together.rgb, alone.rgb)


def test_a_data_set_without_points_starts_from_those_of_its_train_photos(tmp_path, capsys):
    views, points = photos()
    write_colmap(tmp_path / "data", views, points)
    (tmp_path / "data" / "sparse" / "0" / "points3D.bin").unlink()
    model = ModelParams(source_path=str(tmp_path / "data"), model_path=str(tmp_path / "model"), eval=True)
    scene = Scene(model, CPU)
    scene.write_inputs()
    made = scene.points
    said = capsys.readouterr().out
    assert f"Points: {len(made)} on the surfaces that the photos show; the data set has none" in said
    assert len(made) == MADE_POINTS
    np.testing.assert_array_equal(read_points(tmp_path / "model" / "input.ply").xyz, made.xyz)

    Image.new("RGB", (160, 120), "red").save(tmp_path / "data" / "images" / "view_008.png")  # held out
    np.testing.assert_array_equal(Scene(model, CPU, quiet=True).points.xyz, made.xyz)
    Image.new("RGB", (160, 120), "red").save(tmp_path / "data" / "images" / "view_009.png")
    assert not np.array_equal(Scene(model, CPU, quiet=True).points.xyz, made.xyz)


@pytest.mark.parametrize("count, size", [(9, (8, 6)), (1, (8, 6)), (3, (4, 2))])
def test_photos_that_show_nothing_leave_random_points(tmp_path, capsys, count, size):
    folder = ring(tmp_path / "data", count, size)
    (folder / "sparse" / "0" / "points3D.txt").unlink()
    points = Scene(ModelParams(source_path=str(folder), model_path=str(tmp_path / "model")), CPU).points
    assert "random ones, in what the cameras see, as the photos gave only 0" in capsys.readouterr().out
    assert len(points) == MADE_POINTS and np.isfinite(points.xyz).all()
