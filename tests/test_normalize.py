"""Scenes that lie where training cannot see them: recognized, and with --normalize trained all the same."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_scenes
import torch
from plyfile import PlyData

import metrics
import render
import train
from arguments import ModelParams
from scene import Scene
from scene.cameras import Camera
from scene.formats.ply import load_ply, save_ply
from scene.frame import Similarity
from tests.test_gaussians import make_model

CPU = torch.device("cpu")
UTM = (500_000.25, 5_100_000.5, 300.0)
SHORT = "--eval --iterations 150 --densify_from_iter 50 --device cpu --disable_viewer --quiet".split()


def run(data: Path, folder: Path, *flags: str) -> tuple[str, dict]:
    """train.log and summary.json of a short run."""
    assert train.main(["-s", str(data), "-m", str(folder), *SHORT, *flags]) == 0
    return (folder / "train.log").read_text(), json.loads((folder / "summary.json").read_text())


def last(summary: dict, name: str = "test") -> float:
    return list(summary["scores"][name].values())[-1]["psnr"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The scene where it is well, its log and summary."""
    folder = tmp_path_factory.mktemp("plain")
    data = tiny_scenes.colmap_scene(folder / "scene")
    return folder, *run(data, folder / "m")


def test_an_ordinary_scene_is_not_worth_a_word(plain):
    folder, log, summary = plain
    assert "Warning" not in log and summary["warnings"] == []
    assert not (folder / "m" / "normalization.json").exists()


@pytest.mark.parametrize("scale, shift", [(1e-6, (0, 0, 0)), (1e-2, (0, 0, 0)), (1, UTM), (0.01, UTM)])
def test_recognized_and_normalized(scale, shift, plain, tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene", scale=scale, shift=shift)
    log, summary = run(data, tmp_path / "lost")
    assert ("the scene is small" in log) == (scale < 0.1)
    assert ("the scene is far from the origin" in log) == (shift == UTM)
    assert log.count("--normalize") == (scale < 0.1) + (shift == UTM)
    assert last(summary) < last(plain[2]) - 1

    log, summary = run(data, tmp_path / "m", "--normalize")
    assert "Warning" not in log and summary["warnings"] == []
    assert last(summary) == pytest.approx(last(plain[2]), abs=0.3)

    # What is written is in the data set's coordinates
    cameras = json.loads((tmp_path / "m" / "cameras.json").read_text())
    expected = json.loads((plain[0] / "m" / "cameras.json").read_text())
    for camera, known in zip(cameras, expected):
        position = scale * np.array(known["position"]) + shift
        np.testing.assert_allclose(camera["position"], position, atol=1e-8 * (1 + max(shift)) * scale)
        np.testing.assert_allclose(camera["rotation"], known["rotation"], atol=1e-12)
    vertices = PlyData.read(Path(summary["point_cloud"]))["vertex"].data
    xyz = np.stack([vertices[name] for name in "xyz"], axis=1).astype(float)
    assert (vertices["x"].dtype == np.float64) == (shift == UTM)
    assert np.abs(np.median((xyz - shift) / scale, axis=0)).max() < 1, "the blobs are within 1 of the origin"
    sizes = np.exp(np.stack([vertices[f"scale_{i}"] for i in range(3)]).astype(float)) / scale
    assert 0.02 < np.median(sizes) < 2
    points = PlyData.read(tmp_path / "m" / "input.ply")["vertex"].data
    assert np.abs((points["x"].astype(float) - shift[0]) / scale).max() < 1.001

    # and is rendered as it was trained
    for command in (render, metrics):
        flags = ["--lpips", "none"] if command is metrics else ["--quiet"]
        assert command.main(["-m", str(tmp_path / "m"), "--device", "cpu", *flags]) == 0
    scored = json.loads((tmp_path / "m" / "results.json").read_text())["ours_150"]["PSNR"]
    assert scored == pytest.approx(last(summary), abs=0.01)  # in 8 bits


def test_points_that_no_camera_sees(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    path = data / "sparse" / "0" / "points3D.txt"
    path.write_text(re.sub(r"^(\d+ \S+) \S+", r"\1 100", path.read_text(), flags=re.M))
    log, summary = run(data, tmp_path / "m")
    assert "no camera sees 100 % of the points" in log
    (warning,) = [w for w in summary["warnings"] if "test views" in w]
    assert re.search(r"have 10\.\d+ dB, and pictures of one color each would have 1\d\.\d+", warning)
    assert log.count(warning) == 2, "when it is measured, and at the end"


def test_a_model_without_gaussians(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.adc.MIN_OPACITY", 2.0)
    log, summary = run(plain[0] / "scene", tmp_path / "m")
    assert summary["gaussians"] == 0
    assert log.count("iteration 101: no Gaussian is left") == 1 and "the model has no Gaussians" in log
    assert summary["warnings"][0].startswith("Warning: the model has no Gaussians")


def test_a_normalized_run_goes_on_and_is_started_from(plain, tmp_path, capsys):
    data = tiny_scenes.colmap_scene(tmp_path / "scene", shift=UTM)
    whole, _ = tmp_path / "whole", run(data, tmp_path / "whole", "--normalize")
    folder = tmp_path / "m"
    run(data, folder, "--normalize", "--iterations", "100", "--checkpoint_iterations", "100")
    assert train.main(["-m", str(folder), "--resume", "--iterations", "150"]) == 0
    ply = "point_cloud/iteration_150/point_cloud.ply"
    assert len((folder / ply).read_bytes()) == len((whole / ply).read_bytes())

    start = ["--start_checkpoint", str(folder / ply), "--iterations", "200", "--test_iterations", "151"]
    _, summary = run(data, tmp_path / "next", "--normalize", *start)
    first = summary["scores"]["test"]["151"]["psnr"]
    assert first > last(plain[2]) - 1, "it went on from there"

    capsys.readouterr()
    options = ["-s", str(data), "-m", str(tmp_path / "no"), *SHORT, "--start_checkpoint"]
    assert train.main([*options, str(folder / "chkpnt100.pth")]) == 1
    assert "it has another --normalize than this run" in capsys.readouterr().err


def test_an_overwritten_run_does_not_leave_its_similarity(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    run(data, tmp_path / "m", "--normalize", "--iterations", "2")
    assert (tmp_path / "m" / "normalization.json").exists()
    run(data, tmp_path / "m", "--overwrite", "--iterations", "2")
    assert not (tmp_path / "m" / "normalization.json").exists()


def test_depth_maps_are_scaled_along(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    tiny_scenes.add_depth_maps(data)
    names = [path.stem for path in (data / "depths").iterdir()]
    params = {name: {"scale": 0.5, "offset": 0.1} for name in names}
    (data / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))
    folders = {"source_path": str(data), "model_path": str(tmp_path), "depths": "depths"}
    scenes = [Scene(ModelParams(**folders, normalize=on), CPU, quiet=True) for on in (False, True)]
    (known, _), (found, _) = (scene.train_cameras[0].inv_depth() for scene in scenes)
    torch.testing.assert_close(found, known * scenes[1].frame.unit)
    assert scenes[1].frame.unit != 1


def test_viewers_move_in_the_coordinates_of_the_data_set(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene", scale=1e-3, shift=(1, 2, 3))
    model = ModelParams(source_path=str(data), model_path=str(tmp_path / "m"), normalize=True)
    scene = Scene(model, CPU, quiet=True)
    for camera, entry in zip(scene.train_cameras, sorted_by_uid(scene)):
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = torch.tensor(entry["rotation"]).T
        matrix[:3, 3] = -matrix[:3, :3] @ torch.tensor(entry["position"], dtype=torch.float64)
        theirs = Camera("viewer", 8, 8, matrix.float(), torch.eye(3))
        scene.enter(theirs)
        torch.testing.assert_close(theirs.world_to_camera, camera.world_to_camera, atol=2e-3, rtol=1e-3)


def sorted_by_uid(scene: Scene) -> list[dict]:
    """Entries of cameras.json, one for each train camera."""
    scene.write_inputs()
    entries = json.loads((Path(scene._model.model_path) / "cameras.json").read_text())
    return [entries[camera.uid] for camera in scene.train_cameras]


@pytest.mark.parametrize("unit, center", [(1e-6, (0, 0, 0)), (3.7, (1, -2, 3)), (1, UTM), (1e-3, UTM)])
def test_models_come_back(unit, center, tmp_path):
    """Positions to float32's last digits, sizes to a millionth."""
    frame, model = Similarity(center, unit), make_model(50)
    save_ply(model, tmp_path / "m.ply", frame=frame)
    again = load_ply(tmp_path / "m.ply", frame=frame)
    for name, value in model.params.items():
        atol = {"means": 2e-5, "log_scales": 2e-6}.get(name, 0)
        torch.testing.assert_close(again.params[name], value, atol=atol, rtol=0)


@pytest.mark.parametrize("text", ["{}", '{"center": [0, 0], "unit": 1}', '{"center": [0, 0, 0], "unit": 0}'])
def test_a_spoiled_similarity_is_named(text, tmp_path):
    (tmp_path / "normalization.json").write_text(text)
    with pytest.raises(ValueError, match="normalization.json: must have three numbers as center"):
        Similarity.stored(tmp_path / "normalization.json")
