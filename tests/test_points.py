"""Points, and models to start from, with numbers that are none: left out, told, and nothing else happens."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_scenes
import torch
from plyfile import PlyData, PlyElement

import train
from per_view import Exposure
from scene.formats.ply import load_ply, read_points, save_ply, write_points
from scene.points import FARTHEST, PointCloud, usable
from tests.test_gaussians import make_model
from training.checkpoint import FORMAT
from utils.files import DataError

SHORT = "--iterations 110 --device cpu --disable_viewer --quiet".split()
BAD = {"nan": np.nan, "inf": -np.inf, "far": 1e300}


def ply_with(path: Path, bad: float, colors: str = "u1") -> None:
    """40 blobs, three of which have one coordinate that is bad."""
    table = np.zeros(43, [(n, "f8") for n in "xyz"] + [(n, colors) for n in ("red", "green", "blue")])
    means = tiny_scenes.blobs()["means"].numpy()
    for i, name in enumerate("xyz"):
        table[name][:40] = means[:, i]
        table[name][40 + i] = bad
    for name in ("red", "green", "blue"):
        table[name] = 100
    PlyData([PlyElement.describe(table, "vertex")]).write(path)


def data_set(kind: str, folder: Path, bad: float) -> Path:
    """The tiny scene with such points, in one of the formats that have points."""
    if kind == "Blender":
        ply_with(tiny_scenes.blender_scene(folder) / "points3d.ply", bad)
    elif kind == "transforms.json":
        tiny_scenes.blender_scene(folder)
        meta = json.loads((folder / "transforms_train.json").read_text())
        for path in folder.glob("transforms_*.json"):
            path.unlink()
        (folder / "transforms.json").write_text(json.dumps(meta | {"ply_file_path": "cloud.ply"}))
        ply_with(folder / "cloud.ply", bad)
    else:
        model = tiny_scenes.colmap_scene(folder) / "sparse" / "0"
        if kind == "COLMAP":
            with open(model / "points3D.txt", "a") as file:
                for row in np.where(np.eye(3, dtype=bool), bad, 0.0).tolist():
                    file.write(" ".join(map(str, [99, *row, 9, 9, 9, 0.5, 1, 0])) + "\n")
        else:
            ply_with(model / "points3D.ply", bad)
    return folder


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["COLMAP", "COLMAP, PLY", "Blender", "transforms.json"])
def test_bad_points_are_left_out(kind, bad, tmp_path):
    data, folder = data_set(kind, tmp_path / "scene", BAD[bad]), tmp_path / "m"
    assert train.main(["-s", str(data), "-m", str(folder), *SHORT]) == 0
    log = (folder / "train.log").read_text()
    assert "3 are left out, as they are not finite or farther away than 1e+12" in log
    assert ", 40 Gaussians;" in log
    assert (
        np.isfinite(read_points(folder / "input.ply").xyz).all()
        and len(read_points(folder / "input.ply")) == 40
    )


def test_a_cloud_of_nothing_else(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    path = data / "sparse" / "0" / "points3D.ply"
    write_points(path, PointCloud(np.full((5, 3), np.nan), np.zeros((5, 3))))
    assert train.main(["-s", str(data), "-m", str(tmp_path / "m"), *SHORT, "--iterations", "1"]) == 0
    assert "5 are left out" in (tmp_path / "m" / "train.log").read_text()


def test_colors():
    rgb = np.float32([[0, 0.5, 1], [np.nan, 0.25, np.inf], [257, -3, 0.125]])
    cloud, wrong = usable(PointCloud(np.zeros((3, 3)), rgb))
    np.testing.assert_array_equal(cloud.rgb, np.float32([[0, 0.5, 1], [0.5, 0.25, 0.5], [1, 0, 0.125]]))
    assert wrong == "1 have colors that are not finite, and become gray"


def test_good_points_are_as_they_were():
    xyz = np.random.RandomState(0).randn(100, 3) * 0.9 * FARTHEST / 10
    rgb = np.arange(300, dtype=np.float32).reshape(100, 3) % 256 / 255
    cloud, wrong = usable(PointCloud(xyz, rgb))
    assert wrong == "" and cloud.xyz.dtype == np.float32
    np.testing.assert_array_equal(cloud.xyz, xyz.astype(np.float32))
    np.testing.assert_array_equal(cloud.rgb, rgb)


# Models


def spoiled_model(path: Path) -> None:
    """2 of 6 Gaussians are not finite."""
    model = make_model()
    with torch.no_grad():
        model.sh_rest[1, 3, 2] = torch.nan
        model.log_scales[4, 0] = torch.inf
    save_ply(model, path)


def test_a_model_with_bad_gaussians(tmp_path, capsys):
    spoiled_model(tmp_path / "m.ply")
    model = load_ply(tmp_path / "m.ply")
    assert len(model) == 4 and model.finite().all()
    torch.testing.assert_close(model.means, make_model().means[[0, 2, 3, 5]])
    assert (
        f"{tmp_path / 'm.ply'}: 2 of 6 Gaussians are left out, as they are not finite"
        in capsys.readouterr().out
    )
    bad = make_model()
    with torch.no_grad():
        bad.opacity_logits[:] = torch.nan
    save_ply(bad, tmp_path / "m.ply")
    with pytest.raises(DataError, match="m.ply: has no Gaussian whose numbers are all finite"):
        load_ply(tmp_path / "m.ply")


@pytest.mark.parametrize("kind", ["PLY", "checkpoint"])
def test_starting_from_bad_gaussians(kind, tmp_path):
    """They are many, so that a run would end at iteration 100, and lower learning rates would not help."""
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    options = ["-s", str(data), *SHORT, "--checkpoint_iterations", "110"]
    assert train.main([*options, "-m", str(tmp_path / "a")]) == 0
    start = tmp_path / "a" / "chkpnt110.pth"
    state = torch.load(start, weights_only=True)
    assert state["format"] == FORMAT
    state["parts"]["gaussians"]["params"]["means"][3:8, 1] = torch.nan
    torch.save(state, start)
    if kind == "PLY":
        start = tmp_path / "a" / "point_cloud" / "iteration_110" / "point_cloud.ply"
        table = PlyData.read(start, mmap=False)
        table["vertex"].data["y"][3:8] = np.nan
        table.write(start)
    options += ["--iterations", "220", "--start_checkpoint", str(start)]
    assert train.main([*options, "-m", str(tmp_path / "b")]) == 0
    log = (tmp_path / "b" / "train.log").read_text()
    assert ", 35 Gaussians;" in log
    assert kind == "PLY" or "5 of 40 Gaussians are left out, as they are not finite" in log


def test_exposures_that_are_not_finite(tmp_path):
    (tmp_path / "exposure.json").write_text('{"a": [[1, 0, 0, NaN], [0, 1, 0, 0], [0, 0, 1, 0]]}')
    with pytest.raises(DataError, match="exposure.json: must hold finite numbers"):
        Exposure.read(tmp_path / "exposure.json", torch.device("cpu"))
