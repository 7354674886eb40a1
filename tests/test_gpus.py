"""Two GPUs: a run on the second one is the run that the first one would have made, and leaves that alone."""

import subprocess
import sys

import pytest
import tiny_scenes
import torch
from diff_gaussian_rasterization import photometric_loss, rasterize

from training.report import Deferred

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RUN = """
import sys, torch, train
assert train.main(sys.argv[1:]) == 0
device = sys.argv[-1]
other = "cuda:0" if device == "cuda:1" else "cuda:1"
assert torch.cuda.current_device() == int(device[-1])
assert torch.cuda.max_memory_allocated(device) > 0 and torch.cuda.max_memory_allocated(other) == 0
"""


def test_values_have_arrived_when_they_are_read():
    """The device is busy when they are sent for, and is not the current one."""
    device = torch.device("cuda:1")
    deferred, value = Deferred(device), torch.zeros((), device=device)
    with torch.cuda.device(0):
        for iteration in range(1, 6):
            with torch.cuda.device(1):
                torch.cuda._sleep(200_000_000)  # a tenth of a second
            deferred.put(iteration, {"loss": value + iteration})
            deferred.send()
            assert deferred.receive() == [(iteration, {"loss": float(iteration)})]


@pytest.mark.parametrize("way", [["--fused"], ["--no-fused", "--data_device", "cpu"]])
def test_training_on_the_second_one(way, tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "scene")
    models, losses = [], []
    for device in ("cuda:0", "cuda:1"):
        folder = tmp_path / device[-1]
        options = f"-s {data} -m {folder} --eval --iterations 300 --densify_from_iter 50 --quiet".split()
        options += ["--deterministic", "--checkpoint_iterations", "300", *way, "--device", device]
        subprocess.run([sys.executable, "-c", RUN, *options], check=True, timeout=300)
        models.append((folder / "point_cloud" / "iteration_300" / "point_cloud.ply").read_bytes())
        losses.append(torch.load(folder / "chkpnt300.pth", weights_only=True)["parts"]["history"]["smooth"])
    assert models[0] == models[1]
    assert losses[0] == losses[1] and losses[0]["loss"] > 0


def test_operators_find_the_device_of_their_tensors():
    """Also while another one is current."""
    camera = torch.tensor(tiny_scenes.look_at_origin(torch.tensor([0.0, 0.5, -4.0]).numpy())).float()
    K = torch.tensor([[60.0, 0, 28], [0, 60, 20], [0, 0, 1]])
    gradients = []
    for device in ("cuda:0", "cuda:1"):
        splats = {name: value.to(device).requires_grad_() for name, value in tiny_scenes.blobs().items()}
        with torch.cuda.device(0):
            image = rasterize(
                **splats, world_to_camera=camera.to(device), K=K.to(device), width=56, height=40,
                background=torch.zeros(3, device=device),
            ).image  # fmt: skip
            photometric_loss(image, torch.zeros_like(image), 0.2)[0].backward()
        assert image.std() > 0.05
        gradients.append([image.detach().cpu()] + [value.grad.cpu() for value in splats.values()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)
