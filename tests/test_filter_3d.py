"""--filter_3d: what Gaussians are blurred by, that the blur is in the saved file, and what it is good for."""

import json
import math

import pytest
import torch

import render
import train
from arguments import PipelineParams, parse_train
from scene import Scene
from scene.cameras import Camera
from scene.filter_3d import blurred, smallest_scales
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from tests import tiny_scenes
from tests.test_gaussians import make_model
from training import checkpoint
from training.trainer import Trainer
from utils.image import psnr, to_float

LINE = [
    "--iterations", "300", "--densify_from_iter", "10", "--densification_interval", "20", "--cap_max", "80",
    "--densify_until_iter", "120", "--opacity_reset_interval", "70", "--test_iterations", "300", "--device",
    "cpu", "--disable_viewer", "--quiet", "--densify_grad_threshold", "1e-4", "--feature_lr", "0.01",
    "--opacity_lr", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


def camera(distance: float, focal: float = 100.0) -> Camera:
    """Looks along z at the origin, 20 x 10 pixels."""
    matrix = torch.eye(4)
    matrix[2, 3] = distance
    K = torch.tensor([[focal, 0.0, 10.0], [0.0, focal, 5.0], [0.0, 0.0, 1.0]])
    return Camera("a", 20, 10, matrix, K)


def test_the_smallest_scale_is_that_of_a_pixel_seen_from_nearest():
    """Worked by hand: x = 0.25 at depth 2 is 2.5 pixels beside the picture, which is within 15 % of 20."""
    means = torch.tensor([[0.0, 0, 0], [0.25, 0, 0], [0.0, 0, -3.9], [0, 50.0, 0], [0, 0, -1.85]])
    ours = smallest_scales(means, [camera(2.0), camera(4.0, focal=50.0)])
    # The third is behind the first camera, and nearer than 0.2 to the second; the fourth is seen by nobody.
    # The second is 2.5 pixels outside of the first camera's picture, which counts. The fifth is too near to
    # the first camera.
    distances = [2.0, 2.0, 2.15, 2.15, 2.15]
    expected = torch.tensor(distances) * math.sqrt(0.2) / 100
    torch.testing.assert_close(ours, expected)


def test_blur_keeps_how_much_there_is():
    scales, opacities = torch.tensor([[0.3, 0.4, 1.2]]), torch.tensor([[0.8]])
    wider, fainter = blurred(scales, opacities, torch.tensor([0.4]))
    torch.testing.assert_close(wider, torch.tensor([[0.5, math.sqrt(0.32), math.sqrt(1.6)]]))
    torch.testing.assert_close(fainter * wider.prod(), opacities * scales.prod())


def test_a_reset_is_of_what_is_shown():
    model = make_model(6)
    model.smallest = torch.full((6,), 2.0) * model.scales.detach().amax()
    before = model.opacities.detach()
    model.reset_opacity()
    assert (model.shown()[1] <= 0.01 + 1e-6).all() and (model.opacities <= before + 1e-6).all()


def run(scene, out, *options) -> dict:
    line = ["-s", str(scene), "-m", str(out), *LINE, *options, "--checkpoint_iterations", "130", "300"]
    assert train.main(line) == 0
    return checkpoint.read(ModelFolder(out).checkpoint(300))["parts"]["gaussians"]["params"]


@pytest.mark.parametrize("strategy", ["adc", "mcmc", "improved"])
def test_a_continued_run_ends_with_the_same_bits(scene, tmp_path, strategy):
    options = ("--filter_3d", "--strategy", strategy)
    whole = run(scene, tmp_path / "whole", *options)
    start = str(ModelFolder(tmp_path / "whole").checkpoint(130))
    ours = run(scene, tmp_path / "on", *options, "--start_checkpoint", start)
    for name, value in whole.items():
        assert torch.equal(ours[name], value), name


def test_the_saved_file_has_the_blur(scene, tmp_path):
    """render.py shows what the trainer scored, up to 8 bits, and knows nothing of the filter."""
    raw = run(scene, tmp_path, "--filter_3d", "--eval", "--antialiasing")
    saved = load_ply(ModelFolder(tmp_path).ply(300))
    assert (saved.log_scales > raw["log_scales"]).all()
    assert (saved.opacity_logits < raw["opacity_logits"]).all()
    assert render.main(["-m", str(tmp_path), "--skip_train", "--quiet", "--device", "cpu"]) == 0
    scored = json.loads((tmp_path / "summary.json").read_text())["scores"]["test"]["300"]["psnr"]
    options = parse_train(["-s", str(scene), "-m", str(tmp_path / "n"), "--eval", "--device", "cpu"])
    test = Scene(options.model, torch.device("cpu"), 0, quiet=True).test_cameras
    shown = [psnr(as_rendered(saved, view).clamp(0, 1), to_float(view.image())).item() for view in test]
    assert sum(shown) / len(shown) == pytest.approx(scored, abs=1e-3)


def as_rendered(model, view):
    from gaussian_renderer import render as picture

    return picture(view, model, PipelineParams(antialiasing=True), torch.zeros(3)).image


def test_it_is_renewed_when_rows_move_and_late_in_the_run(scene):
    line = ["-s", str(scene), "-m", "m", *LINE, "--filter_3d", "--iterations", "500"]
    options = parse_train(line)
    trainer = Trainer(Scene(options.model, torch.device("cpu"), 0, quiet=True), options, print)
    assert trainer.native is None
    renewed = []
    for iteration in [*range(1, 4), 50, 199, 200, 201, 300, 400, 450, 500]:
        before = trainer.gaussians.smallest
        trainer._blur(iteration)
        renewed += [iteration] * (trainer.gaussians.smallest is not before)
    assert renewed == [1, 200, 300, 400]
    trainer.gaussians.reindex(torch.arange(3))
    assert trainer.gaussians.smallest is None
    trainer._blur(450)
    assert trainer.gaussians.smallest.shape == (3,)
