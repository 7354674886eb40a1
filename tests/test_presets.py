"""--preset: a named set of flags, stored with the model and printed, each of which can still be given."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import train
from arguments import PRESETS, OptimizationParams, parse_train
from benchmarks import figure
from scene import Scene
from scene.folder import ModelFolder
from tests import tiny_scenes
from training.trainer import Trainer


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


def opt(*words) -> OptimizationParams:
    return parse_train(["-s", "x", *words]).opt


def flags(*words) -> dict:
    """What a preset can set."""
    options = parse_train(["-s", "x", *words])
    return asdict(options.opt) | asdict(options.pipe)


def test_published_is_the_default_and_changes_nothing():
    assert opt() == opt("--preset", "published") == OptimizationParams()
    assert flags() == flags("--preset", "published")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "published"])
def test_a_preset_is_its_flags(name):
    words = []
    for flag, value in PRESETS[name].items():
        words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    assert flags("--preset", name) == flags(*words) | {"preset": name}


def test_each_flag_can_be_given(tmp_path):
    ours = opt("--preset", "fast", "--iterations", "9", "--strategy", "mcmc", "--cap_max", "7")
    assert (ours.iterations, ours.strategy, ours.cap_max, ours.budget) == (9, "mcmc", 7, 0)
    assert ours.opacity_lr == 0.05, "of mcmc"
    ours = opt("--preset", "fast", "--iterations", "4000", "--densify_until_iter", "1234")
    assert (ours.densify_until_iter, ours.coarse_until, ours.position_lr_max_steps) == (1234, 1000, 4000)
    assert ours.visits == 0 and opt("--preset", "fast", "--iterations", "4000", "--visits", "7").visits == 7
    assert (
        flags("--preset", "fast")["antialiasing"]
        and not flags("--preset", "fast", "--no-antialiasing")["antialiasing"]
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"preset": "small", "budget": 0.3, "cap_max": 5, "iterations": 77}))
    ours = opt("--config", str(config))
    assert (ours.strategy, ours.budget, ours.iterations) == ("improved", 0.3, 77)
    ours = opt("--config", str(config), "--preset", "fast")
    assert (ours.preset, ours.budget, ours.iterations) == ("fast", 100, 8_000)


def test_an_unknown_preset_is_named(capsys):
    with pytest.raises(SystemExit):
        opt("--preset", "fastest")
    assert "preset must be one of published, fast, best, small, got fastest" in capsys.readouterr().err


def trainer(scene, *words) -> Trainer:
    options = parse_train(["-s", str(scene), "-m", "m", "--device", "cpu", *words])
    return Trainer(Scene(options.model, torch.device("cpu"), 0, quiet=True), options, print)


def test_the_budget_follows_points_and_pixels(scene):
    pixels = 8 * tiny_scenes.WIDTH * tiny_scenes.HEIGHT
    expected = round(46 * math.sqrt(tiny_scenes.BLOBS) * pixels ** (1 / 6))
    one = trainer(scene, "--preset", "small")
    assert one.opt.cap_max == one.options.opt.cap_max == one.strategy.budget == expected
    made_up = trainer(scene, "--preset", "small", "--random_init", "99")
    assert made_up.opt.cap_max == round(46 * math.sqrt(15_000) * pixels ** (1 / 6))
    assert trainer(scene, "--preset", "small", "--cap_max", "33").opt.cap_max == 33


def test_iterations_follow_photos(scene):
    """8 photos, of which --eval sets one aside; stages scale along."""
    few = trainer(scene, "--iterations", "9000", "--visits", "700", "--coarse_until", "900").opt
    assert (few.iterations, few.coarse_until, few.densify_until_iter) == (5600, 560, 9334)
    assert few.average_last == 0
    fewer = trainer(scene, "--iterations", "9000", "--visits", "750", "--eval").opt
    assert fewer.iterations == 5250
    assert trainer(scene, "--iterations", "9000", "--visits", "1").opt.iterations == 5000
    assert trainer(scene, "--iterations", "99", "--visits", "1").opt.iterations == 99
    assert trainer(scene, "--iterations", "9000", "--visits", "5000").opt.iterations == 9000


def test_a_run_ends_when_its_photos_were_shown(scene, tmp_path, monkeypatch):
    monkeypatch.setattr("training.trainer.FEWEST", 3)
    line = [
        "-s",
        str(scene),
        "-m",
        str(tmp_path),
        "--visits",
        "1",
        "--quiet",
        "--device",
        "cpu",
        "--disable_viewer",
    ]
    assert train.main(line) == 0
    assert ModelFolder(tmp_path).saved_iterations() == [8]
    stored = json.loads((tmp_path / "config.json").read_text())["OptimizationParams"]
    assert (stored["iterations"], stored["visits"], stored["position_lr_max_steps"]) == (8, 1, 8)
    assert train.main(["-m", str(tmp_path), "--resume"]) == 0
    assert ModelFolder(tmp_path).saved_iterations() == [8]


def test_a_run_prints_and_stores_it(scene, tmp_path):
    line = ["-s", str(scene), "-m", str(tmp_path), "--preset", "fast", "--iterations", "3", "--quiet"]
    assert train.main([*line, "--device", "cpu", "--disable_viewer"]) == 0
    log = ModelFolder(tmp_path).log.read_text()
    assert "--preset fast: --strategy improved --iterations 3" in log
    stored = json.loads((tmp_path / "config.json").read_text())["OptimizationParams"]
    assert stored["preset"] == "fast" and stored["coarse_until"] == 1
    again = parse_train(["--resume", "-m", str(tmp_path)]).opt
    assert asdict(again) == stored


def test_the_page_has_the_flags_of_each_preset():
    page = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in PRESETS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        words = row.split("|")[3].replace("`", "").replace("none", "").split()
        assert flags(*words) | {"preset": name} == flags("--preset", name)


def test_the_figure_has_a_point_for_the_mean_of_each_way(tmp_path):
    def run(way, psnr, count, **more):
        scores = {"test": {"7": {"psnr": 1.0}, "30": {"psnr": psnr}}}
        return json.dumps({"scene": "bonsai", "way": way, "gaussians": count, "scores": scores} | more)

    lines = ["table", run("adc", 31.0, 100), run("adc", 32.0, 300), run("mcmc", 30.0, 50)]
    lines.append(run("mcmc", 99.0, 1).replace("bonsai", "lego"))
    points = figure.read(lines, "bonsai")
    assert points == [("adc", 200, None, 31.5), ("mcmc", 50, None, 30.0)]
    root = ElementTree.fromstring(figure.figure(points, "bonsai"))
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert [float(node.get("cx")) for node in circles] == pytest.approx([358, 89.5], abs=0.1)
    timed = figure.read([run("adc", 31.0, 100, optimization_seconds=4.0)], "bonsai")
    assert figure.figure(timed, "bonsai").count("<circle") == 2 and timed[0].seconds == 4
    slower = figure.Point("mcmc", 5, None, 40.0)  # the best, but nobody knows how long it took
    numbers = re.findall(r'fill="(?!#222222)[^"]*">(\d)</text>', figure.figure([slower, *timed], "bonsai"))
    assert numbers == ["1", "2", "2"]


def test_ticks_are_round_numbers_around_the_values():
    assert figure.Axis.over([31.62, 32.33]).ticks() == pytest.approx([31.6, 31.8, 32.0, 32.2, 32.4])
    assert figure.Axis.over([250_000, 785_000], from_zero=True).ticks() == [0, 2e5, 4e5, 6e5, 8e5]
