"""Each strategy with each option that it can meet: the run learns, and one that is continued ends with the
same bits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from scene.folder import ModelFolder
from tests import tiny_scenes
from training import checkpoint
from training.trainer import Trainer

STRATEGIES = {
    "adc": [],
    "absgrad": ["--absgrad"],
    "mcmc": ["--strategy", "mcmc"],
    "improved": ["--strategy", "improved"],
    "decay": ["--strategy", "improved", "--opacity_decay", "0.01", "--grow_by", "error"],
}
OPTIONS = {
    "exposures": ["--train_test_exp", "--eval"],
    "masks": ["--masks", "masks"],
    "depth": ["--depths", "depths"],
    "antialiasing": ["--antialiasing", "--white_background"],
    "background": ["--random_background", "--deterministic"],
    "views": ["--update_every", "1", "3", "--opacity_reg", "0.01", "--coarse_until", "20"],
    "views apart": ["--update_every", "2", "4", "--no-fused", "--depths", "depths"],
    "sparse": ["--optimizer_type", "sparse_adam"],
}
LINE = [
    "--iterations", "80", "--densify_from_iter", "10", "--densification_interval", "10", "--cap_max", "70",
    "--densify_until_iter", "60", "--opacity_reset_interval", "90", "--test_iterations", "1", "--device",
    "cpu", "--disable_viewer", "--quiet", "--densify_grad_threshold", "1e-4", "--feature_lr", "0.02",
    "--opacity_lr", "0.1", "--checkpoint_iterations", "47", "80",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")
    tiny_scenes.add_depth_maps(folder)
    params = {f"shot {i:02d}": {"scale": 0.5, "offset": 0.1} for i in range(8)}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))
    (folder / "masks").mkdir()
    for photo in (folder / "images").iterdir():
        mask = np.full((tiny_scenes.HEIGHT, tiny_scenes.WIDTH), 255, np.uint8)
        mask[:10, :20] = 0
        Image.fromarray(mask).save(folder / "masks" / photo.name)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


def run(scene, out, *options) -> dict:
    assert train.main([*LINE, "-s", str(scene), "-m", str(out), *options]) == 0
    parts = checkpoint.read(ModelFolder(out).checkpoint(80))["parts"]
    return parts["gaussians"]["params"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_learns_and_resumes(scene, tmp_path, strategy, option):
    options = [*STRATEGIES[strategy], *OPTIONS[option]]
    whole = run(scene, tmp_path / "whole", *options)
    scores = json.loads((tmp_path / "whole" / "summary.json").read_text())["scores"]["train"]
    if option != "background":  # against random colors, holes show: it takes longer
        assert scores["80"]["psnr"] > scores["1"]["psnr"], scores
    assert 0 < len(whole["means"]) <= 70 and all(value.isfinite().all() for value in whole.values())
    start = str(ModelFolder(tmp_path / "whole").checkpoint(47))
    ours = run(scene, tmp_path / "on", *options, "--start_checkpoint", start)
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


@pytest.mark.parametrize("every", ["1", "4"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_out_of_memory_in_a_step(scene, tmp_path, monkeypatch, strategy, every):
    """At iteration 26, twice: the faintest tenth goes, and from then on there are at most so many."""
    learn, failures = Trainer._learn, []

    def fails(self, iteration, *arguments):
        if iteration == 26 and len(failures) < 2:
            failures.append(len(self.gaussians))
            raise torch.OutOfMemoryError
        return learn(self, iteration, *arguments)

    monkeypatch.setattr(Trainer, "_learn", fails)
    ours = run(scene, tmp_path, *STRATEGIES[strategy], "--update_every", every)
    assert len(failures) == 2 and len(ours["means"]) <= int(0.9 * failures[-1])
    assert "at most" in ModelFolder(tmp_path).log.read_text()
