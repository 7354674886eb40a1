"""What photos add to the picture: exposures; and how modules make one picture together."""

import json

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import Rendered

from arguments import OptimizationParams
from per_view import Exposure, PerView, Shown
from per_view.exposure import beside
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError

CPU = torch.device("cpu")


def test_exposures_ease_in_and_out():
    opt = OptimizationParams(exposure_lr_delay_steps=100, exposure_lr_delay_mult=0.1)
    for options, iteration, rate in [
        (OptimizationParams(), 0, 1e-2),
        (OptimizationParams(), 15_000, 10**-2.5),  # the geometric mean
        (OptimizationParams(), 40_000, 1e-3),
        (opt, 0, 0.01 * 0.1),
    ]:
        exposure = Exposure(["a"], CPU, options)
        exposure.schedule(iteration)
        assert exposure.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_first_step_moves_by_the_learning_rate():
    exposure = Exposure(["a", "b"], CPU)
    exposure.schedule(0)
    exposure.values.grad = torch.full_like(exposure.values, -1.0)
    exposure.step()
    expected = torch.full((2, 3, 4), 0.01)
    torch.testing.assert_close(exposure.values.detach() - torch.eye(3, 4), expected)
    assert exposure.values.grad is None


def test_exposures_as_json(tmp_path):
    folder = ModelFolder(tmp_path)
    exposure = Exposure(["a", "b", "a"], CPU)
    assert exposure.values.shape == (2, 3, 4), "train and test images can share names"
    exposure.save(folder, 7)
    assert not beside(folder.ply(7)).exists(), "nothing has changed"
    with torch.no_grad():
        exposure.values[1] += 0.25
    exposure.save(folder, 7)
    data = json.loads(folder.exposures.read_text())
    assert list(data) == ["a", "b"] and np.array(data["b"]).shape == (3, 4)
    other = Exposure.load(folder.ply(7), folder, CPU)
    assert torch.equal(other.of("b"), exposure.of("b")) and (other.of("a") == torch.eye(3, 4)).all()
    with pytest.raises(DataError, match="no exposure for the image c, .* the model has 2"):
        other.of("c")
    for text in ('{"a": [[1, 2], [3, 4]]}', '{"a": "x"}', "[]", "{"):
        folder.exposures.write_text(text)
        with pytest.raises(DataError, match=r"exposure.json"):
            Exposure.read(folder.exposures, CPU)


class Scale(PerView):
    def __init__(self, factor: float):
        self.factor = factor

    def picture(self, camera, pictures):
        return pictures[0]._replace(image=self.factor * pictures[0].image)


class Shift(Scale):
    def picture(self, camera, pictures):
        return pictures[0]._replace(image=self.factor + pictures[0].image)


class Twice(PerView):
    """Seen from two places, and the mean of both."""

    def cameras(self, camera):
        return [Camera(camera.name, 2, 2, move * torch.eye(4), torch.eye(3)) for move in (1.0, 3.0)]

    def picture(self, camera, pictures):
        assert len(pictures) == 2
        return pictures[0]._replace(image=(pictures[0].image + pictures[1].image) / 2)


class Flat:
    """Shows the first number of the camera's matrix."""

    def __len__(self):
        return 1

    def picture(self, camera):
        image = camera.world_to_camera[0, 0] * torch.ones(3, 2, 2)
        return Rendered(image, torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, dtype=torch.int32))


def test_modules_compose_from_the_photo_inwards():
    camera = Camera("a", 2, 2, 5 * torch.eye(4), torch.eye(3))
    for modules, expected in [
        ([], 5.0),
        ([Twice()], 2.0),
        ([Scale(10.0), Shift(1.0)], 10 * (1 + 5.0)),
        ([Shift(1.0), Scale(10.0)], 1 + 10 * 5.0),
        ([Scale(10.0), Twice(), Shift(1.0)], 10 * ((1 + 1) + (3 + 1)) / 2),
    ]:
        picture = Shown(Flat(), modules).picture(camera)
        assert (picture.image == expected).all(), modules
