"""render.py --path and --outputs: films of a model, and depth, normals and alpha of its views."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import rasterize
from PIL import Image

import render
import train
from gaussian_renderer import looks, outputs
from scene import Camera, formats
from tests import tiny_scenes
from tests.test_render import known_blobs
from tests.test_video import decoded, psnr

FLAGS = ["--device", "cpu", "--quiet"]
SHORT = ["--seconds", "0.5", "--fps", "12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Blobs that are known, in the folder of a run whose photos are gone."""
    folder = tmp_path_factory.mktemp("film")
    tiny_scenes.colmap_scene(folder / "data")
    options = ["--eval", "--llffhold", "4", "--iterations", "20", "--save_iterations", "10", "20"]
    run = ["-s", str(folder / "data"), "-m", str(folder / "model"), *options, "--disable_viewer", *FLAGS]
    assert train.main(run) == 0
    formats.write(known_blobs(3), folder / "model/point_cloud/iteration_20/point_cloud.ply")
    return folder / "model"


@pytest.fixture
def alone(model):
    """The same without its photos."""
    (model.parent / "data").rename(model.parent / "away")
    yield model
    (model.parent / "away").rename(model.parent / "data")


@pytest.mark.parametrize("kind", ["orbit", "interpolate", "spiral", "still"])
def test_a_film_needs_no_photos(alone, tmp_path, kind):
    to = tmp_path / "a.mp4"
    assert (
        render.main(["-m", str(alone), "--path", kind, "--to", str(to), *SHORT, "--codec", "av1", *FLAGS])
        == 0
    )
    frames = decoded(to)
    assert len(frames) == 6 and frames[0].shape == (40, 56, 3)
    assert all(frame.std() > 10 for frame in frames)
    moves = max(np.abs(a.astype(float) - frames[0]).mean() for a in frames[1:])
    assert (moves < 2) == (kind == "still")


def test_a_film_shows_what_render_py_shows(model, tmp_path):
    """A path that stands still where a photo was taken, against the picture of that view."""
    assert render.main(["-m", str(model), "--skip_train", *FLAGS]) == 0
    to = tmp_path / "frames"
    assert render.main(["-m", str(model), "--path", "still", "--to", str(to), *SHORT, *FLAGS]) == 0
    view = np.asarray(Image.open(model / "test/ours_20/renders/00000.png"))
    names = json.loads((model / "test/ours_20/names.json").read_text())
    assert names["00000.png"] == json.loads((model / "cameras.json").read_text())[0]["img_name"]
    for number in range(6):
        frame = np.asarray(Image.open(to / f"{number:05d}.png"))
        assert frame.std() > 10 and np.abs(frame.astype(int) - view).max() <= 1


def test_outputs_lie_side_by_side_or_in_folders(model, tmp_path):
    both = ["--outputs", "rgb", "depth", *SHORT, *FLAGS]
    assert render.main(["-m", str(model), "--path", "orbit", "--to", str(tmp_path / "a.webp"), *both]) == 0
    assert decoded(tmp_path / "a.webp")[0].shape == (40, 112, 3)
    assert render.main(["-m", str(model), "--path", "orbit", "--to", str(tmp_path / "f"), *both]) == 0
    rgb, depth = (np.asarray(Image.open(tmp_path / "f" / kind / "00003.png")) for kind in ("rgb", "depth"))
    assert psnr(decoded(tmp_path / "a.webp")[3], np.concatenate([rgb, depth], 1)) > 25
    assert len(list((tmp_path / "f").rglob("*.png"))) == 12


def test_the_path_itself_is_written_and_filmed_again(model, tmp_path):
    way, size = tmp_path / "camera_path.json", ["--size", "32", "24"]
    assert render.main(["-m", str(model), "--path", "orbit", "--to", str(way), *SHORT, *size, *FLAGS]) == 0
    assert render.main(["-m", str(model), "--path", str(way), "--to", str(tmp_path / "a"), *FLAGS]) == 0
    again = ["--path", "orbit", "--to", str(tmp_path / "b"), *SHORT, *size, *FLAGS]
    assert render.main(["-m", str(model), *again]) == 0
    for number in range(6):
        a, b = (np.asarray(Image.open(tmp_path / f / f"{number:05d}.png")) for f in ("a", "b"))
        assert a.shape == (24, 32, 3) and np.abs(a.astype(int) - b).max() <= 1


def test_a_bare_file_is_filmed_from_around(tmp_path):
    formats.write(known_blobs(1), tmp_path / "a.spz")
    flags = ["--ply", str(tmp_path / "a.spz"), "--path", "orbit", "--to", str(tmp_path / "f"), *SHORT]
    assert render.main([*flags, "--size", "64", "48", *FLAGS]) == 0
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "f").iterdir())]
    assert len(frames) == 6 and all(frame.std() > 10 for frame in frames)


def test_a_model_in_another_frame_is_seen_from_the_same_places(model, tmp_path):
    """--normalize: the PLY and cameras.json are in the data set's coordinates, the model in memory is not."""
    moved = shutil.copytree(model, tmp_path / "moved")
    about = {"center": [0.3, -0.2, 0.5], "unit": 2.0}
    (moved / "normalization.json").write_text(json.dumps(about))
    for folder, to in ((model, "a"), (moved, "b")):
        flags = ["-m", str(folder), "--path", "orbit", "--to", str(tmp_path / to), *SHORT, *FLAGS]
        assert render.main(flags) == 0
    a, b = (np.asarray(Image.open(tmp_path / to / "00002.png")) for to in ("a", "b"))
    assert psnr(a, b) > 45


def test_timelapse_goes_through_the_saved_models(model, tmp_path):
    flags = ["--path", "still", "--timelapse", "--to", str(tmp_path / "f"), *SHORT, *FLAGS]
    assert render.main(["-m", str(model), *flags]) == 0
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "f").iterdir())]
    assert len(frames) == 6
    same = [np.array_equal(a, b) for a, b in zip(frames, frames[1:])]
    assert same == [True, True, False, True, True], "three frames of iteration 10, three of iteration 20"


def test_depth_normals_and_alpha_of_the_views(model):
    assert render.main(["-m", str(model), "--outputs", "depth", "normals", "alpha", *FLAGS]) == 0
    folder = model / "test/ours_20"
    levels = json.loads((folder / "depth/levels.json").read_text())
    shot = next(s for s in tiny_scenes.shots() if s.name == "shot 00")  # what the model is
    depth = np.asarray(Image.open(folder / "depth/00000.png")) * levels["00000.png"]
    seen = shot.alpha > 0.6
    assert seen.sum() > 300
    np.testing.assert_allclose(depth[seen], (shot.alpha / np.maximum(shot.inv_depth, 1e-9))[seen], rtol=1e-3)
    assert (depth[shot.alpha < 0.4] == 0).all()
    alpha = np.asarray(Image.open(folder / "alpha/00000.png"))[..., 0] / 255
    np.testing.assert_allclose(alpha, shot.alpha, atol=0.003)
    normals = np.asarray(Image.open(folder / "normals/00000.png"))
    assert normals.shape == (40, 56, 3) and normals.std() > 10
    assert render.main(["-m", str(model), "--skip_train", *FLAGS]) == 0
    assert not list(folder.glob("depth/*.png")), "of an earlier rendering"


def test_normals_of_a_plane():
    """Splats on the plane z = 4 - x/2, from the origin: the normal (-1, 0, -2) / sqrt(5) points back."""
    g = torch.Generator().manual_seed(0)
    xy = torch.rand(4000, 2, generator=g) * 6 - 3
    n = len(xy)
    K = torch.tensor([[60.0, 0, 28], [0, 60.0, 20], [0, 0, 1]])
    rendered = rasterize(
        means=torch.cat([xy, 4 - xy[:, :1] / 2], 1), quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        scales=torch.full((n, 3), 0.05), opacities=torch.full((n, 1), 0.95), colors=torch.rand(n, 3),
        world_to_camera=torch.eye(4), K=K, width=56, height=40, background=torch.zeros(3),
    )  # fmt: skip
    camera = Camera("", 56, 40, torch.eye(4), K)
    found = looks.normals(rendered, camera)[:, 5:-5, 5:-5].reshape(3, -1).mean(1)
    expected = torch.tensor([-1.0, 0.0, -2.0]) / 5**0.5
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
    at = outputs.depth(rendered)[20, 28]
    assert float(at) == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--path", "orbit"], "path and to belong together"),
        (["--to", "a.mp4"], "path and to belong together"),
        (["--path", "circle", "--to", "a.mp4"], "path must be one of orbit"),
        (["--path", "orbit", "--to", "a.mp4", "--size", "7"], "size must be a width and a height"),
        (["--outputs", "rgb", "colour"], "outputs must be some of rgb"),
        (["--timelapse"], "timelapse goes through all iterations"),
    ],
)
def test_flags_that_cannot_be_meant(model, flags, said, capsys):
    with pytest.raises(SystemExit):
        render.main(["-m", str(model), *flags])
    assert said in capsys.readouterr().err


def test_targets_that_cannot_be_written_are_refused_before_any_work(model, tmp_path, capsys):
    flags = ["--path", "orbit", "--to", str(tmp_path / "a.avi")]
    assert render.main(["-m", str(model), *flags, *FLAGS]) == 1
    assert "a.avi: must end in one of .mp4" in capsys.readouterr().err
    assert (
        render.main(["-m", str(model), "--path", "orbit", "--to", "x.mp4", "--seconds", "1e8", *FLAGS]) == 1
    )
    assert "at most 100,000 frames" in capsys.readouterr().err
