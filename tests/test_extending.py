"""The exercises of docs/extending.md: their code is taken from the page."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
import per_view
import render
import strategies
import train
from arguments import ConfigError, ModelParams, PipelineParams
from scene import Scene
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from tests import tiny_scenes

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python\n# ([^\n]+)\n(.*?)^```", PAGE, re.M | re.S))
QUIET = ["--device", "cpu", "--quiet", "--disable_viewer"]
SHORT = ["--iterations", "30", "--densify_from_iter", "5", "--densification_interval", "10"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """The package `ideas`, with all files of the page; those of our packages are found in them, too."""
    folder = tmp_path / "ideas"
    for name in BLOCKS:
        if name.endswith(".py"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(BLOCKS[name])
    monkeypatch.syspath_prepend(tmp_path)
    for package in (strategies, per_view):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / package.__name__)])
    importlib.invalidate_caches()
    yield folder
    for name in list(sys.modules):
        if name.split(".")[0] == "ideas" or name in ("strategies.lottery", "per_view.curve"):
            del sys.modules[name]


def trained(scene: Path, folder: Path, *options) -> ModelFolder:
    assert train.main(["-s", str(scene), "-m", str(folder), *map(str, [*SHORT, *QUIET, *options])]) == 0
    return ModelFolder(folder)


def same_after_resuming(scene: Path, tmp_path: Path, *options) -> ModelFolder:
    """The folder of a run; one that went on from its checkpoint at 13 has left the same model."""
    whole = trained(scene, tmp_path / "whole", *options, "--checkpoint_iterations", 13)
    rest = trained(scene, tmp_path / "rest", *options, "--start_checkpoint", whole.checkpoint(13))
    for path in whole.ply(30).parent.iterdir():
        ours, theirs = rest.ply(30).with_name(path.name), path
        if path.name == "point_cloud.ply" and path.read_bytes()[:2] == b"PK":
            ours, theirs = (torch.load(file, weights_only=True) for file in (ours, theirs))
            assert torch.equal(ours, theirs)
        else:
            assert ours.read_bytes() == theirs.read_bytes(), path.name
    return whole


def test_the_page_has_these_files():
    assert [name for name in BLOCKS if name.endswith(".py")] == [
        "labels.py", "strategies/lottery.py", "per_view/curve.py", "voxels.py",
    ]  # fmt: skip
    edits = [name for name in BLOCKS if not name.endswith(".py")]
    assert edits == ["per_view/__init__.py, in attached()"], "existing files that have to be edited"


def test_own_attribute(scene, tmp_path, ideas):
    folder = same_after_resuming(scene, tmp_path, "--method", "ideas.labels")
    gaussians = load_ply(folder.ply(30))
    assert gaussians.labels.shape == (len(gaussians), 5) and gaussians.labels.std() > 0.05
    labels = importlib.import_module("ideas.labels")
    data = Scene(ModelParams(source_path=str(scene)), CPU, for_training=False, quiet=True)
    camera = data.train_cameras[0]
    with torch.no_grad():
        picture, truth = labels.label_picture(gaussians, camera, PipelineParams()), labels.label_truth(camera)
        assert picture.shape == (5, tiny_scenes.HEIGHT, tiny_scenes.WIDTH)
        error = (picture[:4] - truth[:4]).abs().mean()
    assert error < 0.8 * truth[:4].abs().mean(), "it has learned something"
    assert render.main(["-m", str(folder), "--device", "cpu", "--quiet"]) == 0


@pytest.mark.parametrize("name", ["lottery", "ideas.strategies.lottery"])
def test_own_strategy(name, scene, tmp_path, ideas):
    folder = same_after_resuming(scene, tmp_path, "--strategy", name)
    count = len(load_ply(folder.ply(30)))
    assert count > tiny_scenes.BLOBS
    drawn = torch.load(folder.checkpoint(13), weights_only=True)["parts"][name]["drawn"]
    assert 0 < drawn < count


@pytest.mark.parametrize("name", ["lotery", "ideas.lottery", "no.such"])
def test_strategies_that_are_not_there(name, ideas):
    options = train.parse_train(["-s", "x", "--strategy", name])
    with pytest.raises(ConfigError, match=f"strategy must be one of adc, .*or a module, got {name}"):
        strategies.make(options, 1.0, print)


def test_own_color_curve(scene, tmp_path, ideas, monkeypatch):
    source = inspect.getsource(per_view.attached)
    added = BLOCKS["per_view/__init__.py, in attached()"]
    assert source.count("    return modules\n") == 1
    edited: dict = {}
    source = source.replace("    return modules\n", added + "    return modules\n")
    exec(source, vars(per_view), edited)
    monkeypatch.setattr(per_view, "attached", edited["attached"])
    folder = same_after_resuming(scene, tmp_path)
    curves = np.array(list(json.loads(folder.ply(30).with_name("curve.json").read_text()).values()))
    assert curves.shape == (8, 3) and 0.01 < np.abs(curves - 1).max() < 0.5
    state = torch.load(folder.checkpoint(13), weights_only=True)["parts"]["curve"]
    assert state["optimizer"]["state"][0]["step"] == 13


def test_own_representation(scene, tmp_path, ideas):
    options = ["--method", "ideas.voxels", "--eval", "--llffhold", 4, "--test_iterations", 1]
    folder = same_after_resuming(scene, tmp_path, *options)
    scores = json.loads(folder.summary.read_text())["scores"]["test"]
    assert scores["30"]["psnr"] > scores["1"]["psnr"] + 2, scores
    assert render.main(["-m", str(folder), "--device", "cpu", "--quiet"]) == 0
    assert metrics.main(["-m", str(folder), "--device", "cpu", "--lpips", "none"]) == 0
    scored = json.loads(folder.results.read_text())["ours_30"]["PSNR"]
    assert scored == pytest.approx(scores["30"]["psnr"], abs=0.1)
