"""A scene in cells: cut, trained each by itself, and joined."""

import json
import shlex
import subprocess

import numpy as np
import pytest
import torch

import render
import train
from capture import chunks
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from tests import tiny_scenes
from tests.test_step_options import LINE

FLAGS = ["--iterations", "12", "--quiet"]


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scene = tiny_scenes.colmap_scene(folder / "scene", count=9)
    line = [*LINE, "-s", str(scene), "-m", str(folder / "coarse"), "--iterations", "20", "--eval", "-w"]
    assert train.main([*line, "--test_iterations", "-1", "--densify_until_iter", "0"]) == 0
    return folder / "coarse"


def split(coarse, out, *words) -> int:
    return chunks.main(["split", "-m", str(coarse), "-o", str(out), "--device", "cpu", *words])


@pytest.mark.parametrize("columns, rows", [(1, 1), (3, 1), (2, 4)])
def test_cells_hold_equally_many_and_each_gaussian_is_in_one(columns, rows):
    places = np.random.default_rng(0).normal(size=(800, 3)).astype(np.float32)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    cells = chunks.cut(places.astype(np.float64) @ axes.T[:, :2], columns, rows)
    inside = [
        ((places.astype(np.float64) @ axes.T[:, :2] >= low) & (places @ axes.T[:, :2] < high)).all(1)
        for low, high in cells
    ]
    assert (np.sum(inside, 0) == 1).all() and len(cells) == columns * rows
    counts = np.bincount(chunks.number_of_cell(cells, axes, places))
    assert counts.max() - counts.min() <= 2


def test_shares_of_a_picture_add_up_to_what_is_opaque(coarse):
    gaussians = load_ply(ModelFolder(coarse).ply(20))
    scene = chunks.Scene(chunks._options(ModelFolder(coarse)), torch.device("cpu"), for_training=False)
    which = torch.arange(len(gaussians)) % 3
    parts = chunks.shares(gaussians, scene.train_cameras[0], which, 3)
    black = torch.zeros(3)
    alpha = chunks_alpha(gaussians, scene.train_cameras[0], black)
    assert parts.sum() == pytest.approx(alpha, rel=1e-4) and (parts > 0.01).all()


def chunks_alpha(gaussians, camera, background) -> float:
    from arguments import PipelineParams
    from gaussian_renderer import render as picture

    gaussians.active_sh_degree = 0
    return picture(camera, gaussians, PipelineParams(), background).alpha.mean().item()


@pytest.fixture(scope="module")
def city(coarse, tmp_path_factory):
    out = tmp_path_factory.mktemp("cells") / "city"
    assert split(coarse, out, "--cells", "2", "1", "--", *FLAGS) == 0
    assert chunks.main(["train", "-o", str(out), "--device", "cpu"]) == 0
    assert chunks.main(["merge", "-o", str(out)]) == 0
    return out


def test_each_cell_has_its_photos_and_the_options_of_the_coarse_run(coarse, city):
    lines = (city / "commands.txt").read_text().splitlines()
    assert len(lines) == 2 and all(shlex.split(line)[-3:] == FLAGS for line in lines)
    listed = set()
    for i in range(2):
        options = json.loads((city / f"cell_{i}" / "model" / "config.json").read_text())
        assert (
            options["ModelParams"]["white_background"] and options["OptimizationParams"]["iterations"] == 12
        )
        kept = json.loads((city / f"cell_{i}" / "model" / "split.json").read_text())
        listed |= {*kept["train"], *kept["test"]}
        names = (city / f"cell_{i}" / "data" / "train.txt").read_text().split("\n")[:-1]
        assert sorted(kept["train"]) == sorted(names)
    whole = json.loads((coarse / "split.json").read_text())
    assert listed == {*whole["train"], *whole["test"]}


def test_the_joined_model_has_of_each_cell_what_is_inside(coarse, city):
    plan = json.loads((city / "chunks.json").read_text())
    joined = load_ply(ModelFolder(city / "model").ply(12))
    rows = []
    for i in range(2):
        part = load_ply(ModelFolder(city / f"cell_{i}" / "model").ply(12))
        inside = chunks.number_of_cell(plan["cells"], plan["axes"], part.means.detach().numpy()) == i
        rows.append(part.sh_dc.detach()[torch.from_numpy(inside)])
    assert torch.equal(joined.sh_dc.detach(), torch.cat(rows)) and min(map(len, rows)) > 5


def test_the_joined_model_is_rendered(city):
    assert render.main(["-m", str(city / "model"), "--skip_train", "--device", "cpu", "--quiet"]) == 0
    assert len(list(ModelFolder(city / "model").pictures("test", 12).glob("renders/*.png"))) == 2


def test_what_is_trained_is_not_trained_again(city, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda *words, **rest: ran.append(words))
    assert chunks.main(["train", "-o", str(city), "--device", "cpu"]) == 0
    assert not ran


def test_a_cell_that_fails_is_named(coarse, tmp_path, capsys):
    assert split(coarse, tmp_path / "city", "--cells", "2", "1", "--", "--iterations", "0") == 0
    assert chunks.main(["train", "-o", str(tmp_path / "city"), "--device", "cpu"]) == 1
    assert "2 of 2 cells failed, the first with: python train.py" in capsys.readouterr().err


def test_what_cannot_be_joined_is_refused(coarse, tmp_path, capsys):
    config = json.loads((coarse / "config.json").read_text())
    config["PhotoParams"]["poses"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert split(tmp_path, tmp_path / "city") == 1
    assert "cells cannot be joined with --train_test_exp, --poses or --blur" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        split(coarse, tmp_path / "city", "--cells", "0", "1")
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_a_model_folder_without_a_plan(tmp_path, capsys):
    assert chunks.main(["merge", "-o", str(tmp_path)]) == 1
    assert "chunks.json" in capsys.readouterr().err
