"""Poses and blur that are learned with the scene: derivatives, paths, lenses, the gauge, files."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diff_gaussian_rasterization import Rendered, rasterize

import metrics
import render
import train
from arguments import OptimizationParams, Options, PhotoParams, parse_train
from benchmarks import blurred
from per_view import Defocus, Kernel, Motion, Poses, Shown, held_out
from per_view.defocus import over_the_lens
from per_view.kernel import spread
from per_view.light import PLACES, Light
from per_view.mean import mean
from per_view.motion import along, count_for, pixels
from per_view.per_photo import PerPhoto, Seen, dimmed, pose_rate, units
from per_view.poses import common, gauge
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from tests import blurred_scenes, tiny_scenes
from tests.derivatives import assert_derivatives
from tools import contact_sheet
from training.trainer import Trainer
from utils.files import DataError
from utils.image import psnr, read_image
from utils.rigid import rigid, se3_exp, so3_exp, so3_log

CPU = torch.device("cpu")


class Blobs:
    """Gaussians whose colors depend on where one looks from, and which nowhere fade out. Doubles."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.look = {
            "means": torch.rand(12, 3, generator=random).double() * 2 - 1,
            "quats": torch.tensor([1.0, 0, 0, 0]).double().repeat(12, 1),
            "scales": torch.full((12, 3), 1.2).double(),
            "opacities": torch.full((12, 1), 0.4).double(),
            "sh_dc": torch.rand(12, 1, 3, generator=random).double(),
            "sh_rest": 0.3 * torch.randn(12, 3, 3, generator=random).double(),
        }

    def __len__(self):
        return 12

    def picture(self, camera):
        return rasterize(
            **self.look, world_to_camera=camera.world_to_camera, K=camera.K, width=camera.width,
            height=camera.height, background=torch.zeros(3).double(), sh_degree=1,
        )  # fmt: skip


def camera(name: str = "a", angle: float = 0.3) -> Camera:
    matrix = rigid(so3_exp(torch.tensor([0.1, angle, 0.05]).double()), torch.tensor([0.1, 0.0, 4.0]).double())
    K = torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]]).double()
    return Camera(name, 16, 12, matrix, K)


def module(kind: str, size: float):
    torch.manual_seed(1)
    if kind == "poses":
        found = Poses(["a"], torch.linalg.qr(torch.randn(1, 6, 6).double())[0])
        found.values = torch.nn.Parameter(size * torch.randn(1, 6).double())
    elif kind == "defocus":
        found = Defocus(["a"], torch.tensor([[0.2, 0.1, 0.4]]).double(), 5, "linear")
        found.values = torch.nn.Parameter(size * torch.randn(1, 2).double())
    elif kind == "kernel":
        found = Kernel(["a"], size / 3 * torch.randn(1, 4, 6).double(), torch.ones(1, 6).double(), "linear")
    else:
        start = size * torch.randn(1, 4 if kind == "spline" else 2, 6).double() / 3
        start[:, :1] = 0
        found = Motion(["a"], start, torch.ones(1, 6).double(), 5, "linear" if kind == "spline" else "srgb")
        if kind == "spline":
            found.light = Light(["a"], torch.randn(1, PLACES).double())
    return found


@pytest.mark.parametrize("size", (0.0, 0.1))
@pytest.mark.parametrize("kind", ("poses", "linear", "spline", "defocus", "kernel"))
def test_derivatives(kind, size):
    """Of a picture through the rasterizer, whose colors look from the moved camera, too."""
    found, view = module(kind, size), camera()
    weights = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3)).double()

    def loss(values):
        found.values = values
        return (weights * Shown(Blobs(), [found]).picture(view).image).sum()

    start = found.values.detach().clone().requires_grad_()
    if size:
        assert_derivatives(loss, [start], eps=1e-5, atol=1e-4, rtol=1e-3)
    else:  # by symmetry, some are 0
        assert torch.autograd.gradcheck(loss, (start,), eps=1e-5, atol=1e-4, rtol=1e-3)
    (grad,) = torch.autograd.grad(loss(start), start)
    if kind == "poses":
        del found.values
        blind = Blobs()
        blind.look["sh_rest"] = torch.zeros_like(blind.look["sh_rest"])
        found.values = start
        (without,) = torch.autograd.grad((weights * Shown(blind, [found]).picture(view).image).sum(), start)
        assert (grad - without).abs().max() > 0.01 * grad.abs().max(), "colors that change must be felt"


def test_kernels_of_a_network():
    found, view = module("kernel", 0.1), camera()
    rendered = Blobs().picture(view)
    weights, mask = found.network(0, rendered)
    torch.testing.assert_close(weights.sum(0), torch.ones(12, 16).double())
    assert weights.shape == (5, 12, 16) and (weights >= 0).all() and ((0 < mask) & (mask < 1)).all()
    with torch.no_grad():
        found.network.outer.bias[-1] = -50.0  # the mask: all is sharp
    torch.testing.assert_close(Shown(Blobs(), [found]).picture(view).image, rendered.image)
    with torch.no_grad():
        found.network.outer.weight.zero_()
        found.network.outer.bias.copy_(torch.tensor([-50.0, -50, 50, -50, -50, 50]))
    second = replace(view, world_to_camera=found.cameras(view)[2].world_to_camera)
    torch.testing.assert_close(Shown(Blobs(), [found]).picture(view).image, Blobs().picture(second).image)
    assert found.drift.item() == pytest.approx(found.poses(0)[2].square().sum().item())
    stranger = replace(view, name="b")
    assert torch.equal(Shown(Blobs(), [found]).picture(stranger).image, rendered.image)
    assert found.restraint(rendered, stranger, None, 1) == 0


def test_derivatives_of_a_network():
    """And of what restrains it."""
    found, view = module("kernel", 0.1), camera()
    amount = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3)).double()

    def loss(codes, bias, sizes, shared):
        found.sizes.values, found.shared.values = sizes, shared
        with parametrized(found.network, codes, bias):
            picture = Shown(Blobs(), [found]).picture(view)
            return (amount * picture.image).sum() + 100 * found.restraint(picture, view, None, 1)

    inputs = (
        found.network.codes,
        found.network.outer.bias,
        0.1 + found.sizes.values,
        found.shared.values + 0.1,
    )
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    with torch.no_grad():
        found.network.outer.weight.mul_(10)
    assert_derivatives(loss, inputs)


def test_kernels_are_large_or_vanish():
    """Where photos do not mind. None runs away."""
    lengths = []
    for start in (1.0, 4.0, 60.0):
        found = Kernel(["a", "b"], start * spread(torch.zeros(6, 6)).expand(2, 6, 6) / 3, torch.ones(2, 6))
        found.sizes.rate = 0.05
        for _ in range(30):
            found.restraint(None, camera(), None, 1).backward()
            found.sizes.step()
            found.forget_gradients()
        lengths.append(found.poses(0).detach().norm() / 6**0.5)
        assert found.sizes.values[2] == 0, "the other photo's"
    assert lengths[0] < 0.3 and 6 < lengths[1] < 60 and lengths[2] < 40


def test_a_kernel_has_three_points_or_more(capsys):
    """Two whose mean stays, one of which is there, are one."""
    words = ["-s", "data", "--blur", "kernel", "--blur_samples"]
    assert parse_train([*words, "3"]).views.blur_samples == 3
    with pytest.raises(SystemExit):
        parse_train([*words, "2"])
    assert "blur_samples must be at least 3 with --blur kernel, got 2" in capsys.readouterr().err


def test_kernels_move_nothing():
    """Whatever the taps are, their mean is the photo's pose, and the first is. At first they are spread, and
    what is at the usual distance stays where it is."""
    found = module("kernel", 0.1)
    assert found.poses(0)[0].eq(0).all() and found.poses(0).std() > 0.01
    torch.testing.assert_close(found.poses(0).mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)
    found = Kernel(
        ["a"], torch.zeros(1, 6, 6).double(), units(camera().K[None], torch.tensor([0.25]).double())
    )
    found.shared.values.data[0] = spread(found.values[0])
    view = replace(camera(), world_to_camera=torch.eye(4).double())
    motions = torch.stack([place.world_to_camera for place in found.cameras(view)])
    for distance, seen in ((4.0, torch.zeros(7, 2).double()), (4000.0, found.poses(0)[:, :2])):
        there = view.K @ (motions @ torch.tensor([0, 0, distance, 1]).double())[:, :3, None]
        torch.testing.assert_close(there[:, :2, 0] / there[:, 2:, 0], seen + view.K[:2, 2], atol=0.02, rtol=0)


@contextmanager
def parametrized(network, codes, bias):
    kept = network.codes, network.outer.bias
    del network.codes, network.outer.bias
    network.codes, network.outer.bias = codes, bias
    yield
    del network.codes, network.outer.bias
    network.codes, network.outer.bias = kept


def test_an_uneven_exposure_is_found():
    """The camera started slowly: the weights of a path's pictures come out."""
    start = torch.tensor([[[0.0] * 6, [0.1, 0.05, 0, 0, 0, 0]]]).double()
    motion, view = Motion(["a"], start, torch.ones(1, 6).double(), 5), camera()
    true = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double()
    random, one = torch.Generator().manual_seed(0), torch.ones(1, 12, 16).double()
    seen = torch.rand(5, 3, 12, 16, generator=random).double()
    pictures = [Rendered(image, one, one, torch.ones(1)) for image in seen]
    photo = mean(pictures, "srgb", true).image
    assert psnr(mean(pictures, "srgb").image, photo) < 50
    motion.light = Light(["a"], torch.zeros(1, PLACES).double())
    torch.testing.assert_close(motion.picture(view, pictures).image, mean(pictures, "srgb").image)
    for step in range(300):
        motion.light.rate = 0.1 * 0.98**step
        (motion.picture(view, pictures).image - photo).square().mean().backward()
        motion.light.step()
    torch.testing.assert_close(motion.light.weights(0, motion.times(5)).detach(), true, atol=0.01, rtol=0)

    def weighted(values):
        motion.light.values = values
        return motion.picture(view, pictures).image + motion.light.restraint(0)

    del motion.light.values
    assert_derivatives(weighted, [torch.randn(1, PLACES).double()])


def test_ends_and_middle_of_paths():
    poses = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double() * 0.3
    ends = along(poses, torch.tensor([0.0, 1.0]).double())
    for motion, pose in zip(ends, poses):
        torch.testing.assert_close(so3_log(motion[:3, :3]), pose[3:])
        torch.testing.assert_close(-motion[:3, :3].T @ motion[:3, 3], pose[:3])  # where the camera is

    four = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double() * 0.1
    middle = along(four, torch.tensor([0.5]).double())[0]
    weights = torch.tensor([1, 23, 23, 1]).double() / 48
    torch.testing.assert_close(-middle[:3, :3].T @ middle[:3, 3], weights @ four[:, :3])
    torch.testing.assert_close(so3_log(middle[:3, :3]), weights @ four[:, 3:], atol=2e-3, rtol=0)
    even = torch.linspace(-1, 2, 4).double()[:, None] * torch.tensor([0.3, 0.1, 0, 0.02, 0, 0.05]).double()
    straight = along(even[1:3], torch.linspace(0, 1, 7).double())
    torch.testing.assert_close(along(even, torch.linspace(0, 1, 7).double()), straight)


def test_straight_paths_in_closed_form():
    half = torch.tensor([0.1, -0.2, 0.05, 0.3, -0.1, 0.2]).double()
    times = torch.linspace(0, 1, 5).double()
    start, units = torch.stack([0 * half, half])[None], torch.full((1, 6), 0.7).double()
    motion = Motion(["a"], start, units, 5)
    assert motion.straight
    found = motion.motions(0, times)
    assert (found[0] - found[-1]).abs().max() > 0.1
    torch.testing.assert_close(found, along(motion.poses(0), times))
    assert not Motion(["a"], start + 0.1, units, 5).straight


def test_lengths_of_paths_in_pixels():
    K = torch.tensor([[[100.0, 0, 50], [0, 100, 40], [0, 0, 1]]]).double()
    aside = torch.tensor([[-0.1, 0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0, 0]]).double()
    motions = along(aside, torch.linspace(0, 1, 5).double())[None]
    assert pixels(motions, K, torch.tensor([0.25]).double()).item() == pytest.approx(100 * 0.2 / 4)
    turn = torch.tensor([[0, 0, 0, 0, -0.005, 0], [0, 0, 0, 0, 0.005, 0]]).double()
    motions = along(turn, torch.linspace(0, 1, 5).double())[None]
    assert pixels(motions, K, torch.tensor([0.25]).double()).item() == pytest.approx(1.0, rel=0.1)
    assert [count_for(x, 10) for x in (0.0, 1.5, 5.2, 50.0, float("nan"))] == [3, 3, 7, 10, 10]


def test_what_is_in_focus_stays_where_it_is():
    lens = torch.tensor([0.1, 1 / 5]).double()
    motions = over_the_lens(lens, 50)
    centers = -(motions[:, :3, :3].mT @ motions[:, :3, 3:])[..., 0]
    assert centers.norm(dim=1).max() < 0.1 and centers.mean(0).norm() < 0.01
    assert centers.square().sum(1).mean().item() == pytest.approx(0.1**2 / 2)  # of an even disc
    for depth, radius in ((5.0, 0.0), (2.5, 0.1 * abs(1 / 2.5 - 1 / 5)), (50.0, 0.1 * abs(1 / 50 - 1 / 5))):
        seen = motions @ torch.tensor([0.0, 0, depth, 1]).double()
        spots = seen[:, :2] / seen[:, 2:3]
        assert spots.square().sum(1).mean().sqrt().item() == pytest.approx(radius / 2**0.5, abs=2e-5)


def test_mean_of_numbers_and_of_light():
    def flat(value, radius):
        one = torch.full((1, 2, 2), value)
        return Rendered(one.expand(3, -1, -1), one, one, torch.tensor([radius, 0]))

    pictures = [flat(0.2, 0), flat(1.4, 7)]
    plain, light = mean(pictures, "srgb"), mean(pictures, "linear")
    assert plain.image[0, 0, 0].item() == pytest.approx(0.6)  # what is brighter than white is white
    assert light.image[0, 0, 0].item() == pytest.approx(((0.2**2.2 + 1) / 2) ** (1 / 2.2))
    assert plain.radii.tolist() == [7, 0] and plain.alpha[0, 0, 0].item() == pytest.approx(0.8)
    assert mean(pictures[1:], "srgb") is pictures[1]
    dark = torch.zeros(3, 2, 2, requires_grad=True)
    mean([flat(0.0, 1)._replace(image=dark)] * 2, "linear").image.sum().backward()
    assert dark.grad.isfinite().all()


def test_similarities_of_the_world_are_taken_out_and_nothing_else():
    views = torch.stack([camera(angle=0.7 * k).world_to_camera for k in range(9)])
    units = torch.randn(9, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    basis = gauge(views, units)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7), atol=1e-5, rtol=0)

    def twists(after):
        motions = after @ torch.linalg.inv(views)
        turns = so3_log(motions[:, :3, :3])
        small = torch.cat([motions[:, :3, 3], turns], 1)
        return torch.linalg.solve(units, small[..., None])[..., 0].float()

    world = se3_exp(1e-4 * torch.tensor([1.0, 2, -1, 0.5, 1, -2]).double())
    together = twists(views @ world)
    larger = views.clone()
    larger[:, :3, 3] *= 1.0001
    for what in (together, twists(larger)):
        assert (what - common(what, basis)).norm() < 2e-3 * what.norm()
    own = torch.zeros(9, 6)
    own[4] = 1e-3
    assert (own - common(own, basis)).norm() > 0.5 * own.norm()
    one = gauge(views[:1], units[:1])
    assert one.isfinite().all() and (one.T @ one).diagonal().sum() == pytest.approx(6, abs=1e-4)


def test_only_the_trained_photo_moves():
    photos = PerPhoto(["a", "b", "a"], torch.zeros(3, 6))
    photos.rate = 0.01
    for _ in range(3):
        photos.values.grad = torch.zeros(2, 6)
        photos.values.grad[1] = torch.tensor([1.0, -1, 5, -5, 0, 1e-6])
        photos.step()
    expected = -0.03 * torch.tensor([1.0, -1, 1, -1, 0, 1])
    torch.testing.assert_close(photos.values.detach(), torch.stack([torch.zeros(6), expected]))
    assert photos.steps.tolist() == [0, 3] and photos.values.grad is None


def test_states_are_checked_and_found_by_name():
    photos = PerPhoto(["a", "b"], torch.zeros(2, 6))
    other = PerPhoto(["b", "c"], torch.ones(2, 6))
    photos.load_state_dict(other.state_dict())
    assert photos.values.sum(1).tolist() == [0, 6]
    state = other.state_dict()
    for wrong in ({"values": torch.ones(2, 5)}, {"mean": 3}, {"names": ["b", "b"]}):
        with pytest.raises(ValueError):
            photos.load_state_dict(state | wrong)
    motion = Motion(["a"], torch.zeros(1, 2, 6), torch.ones(1, 6))
    with pytest.raises(ValueError, match="counts"):
        motion.load_state_dict(motion.state_dict() | {"counts": [0.5]})


def test_poses_rest_at_first_and_after_opacity_resets():
    options = Options(None, OptimizationParams(iterations=10_000), None, None, views=PhotoParams())
    rates = {i: pose_rate(options, i) for i in (1, 500, 501, 3000, 3001, 3300, 3301, 9_999)}
    assert [i for i, rate in rates.items() if rate == 0] == [1, 500, 3001, 3300]
    assert rates[501] == pytest.approx(0.5, rel=1e-3) and rates[9_999] == pytest.approx(0.005, rel=1e-2)
    assert not dimmed(options._replace(opt=OptimizationParams(strategy="mcmc")), 3001)
    assert not dimmed(options._replace(opt=OptimizationParams(densify_until_iter=3000)), 3001)


def test_paths_shorten_where_photos_do_not_mind():
    """A path that brings nothing goes; its mean stays, and other photos rest."""
    motion = Motion(["a", "b"], torch.full((2, 4, 6), 0.02), torch.ones(2, 6))
    motion.rate = 0.005
    before = motion.all_poses()
    for _ in range(40):
        motion.restraint(None, camera(), None, 1).backward()
        motion.step()
    after = motion.all_poses()
    assert motion.values[0].norm() < 0.02 and torch.equal(before[1], after[1])
    times = torch.linspace(0, 1, 1001)
    mean = along(after[0], times)[:, :3, 3].mean(0)  # of where the camera is, nearly
    torch.testing.assert_close(mean, along(before[0], times)[:, :3, 3].mean(0), atol=2e-3, rtol=0)


def test_poses_stay_where_photos_do_not_mind():
    poses = Poses(["a", "b"], torch.eye(6).expand(2, 6, 6))
    torch.nn.init.constant_(poses.values, 0.3)
    poses.rate = 0.02
    for _ in range(40):
        poses.restraint(None, camera(), None, 1).backward()
        poses.step()
    assert poses.values[0].norm() < 0.05 and poses.values[1].eq(0.3).all()
    assert poses.restraint(None, camera("z"), None, 1) == 0


def test_files(tmp_path):
    folder = ModelFolder(tmp_path)
    for found, name in [
        (module("poses", 0.1), "poses.json"),
        (module("spline", 0.1), "blur.json"),
        (module("defocus", 0.1), "blur.json"),
    ]:
        if isinstance(found, Motion):
            one = torch.eye(4)[None], camera().K[None], torch.ones(1).double(), torch.ones(1, 2)
            found.seen = Seen(*one, torch.eye(6)[None])
        found.save(folder, 7)
        path = folder.ply(7).with_name(name)
        other = type(found).read(path, CPU)
        view = camera()
        if isinstance(found, Motion):
            torch.testing.assert_close(other.light.values.double(), found.light.values)
        floats = Camera("a", 16, 12, view.world_to_camera.float(), view.K.float())
        for a, b in zip(found.cameras(view), other.cameras(floats), strict=True):
            torch.testing.assert_close(a.world_to_camera.float(), b.world_to_camera, atol=1e-5, rtol=0)
        whole = json.loads(path.read_text())
        for wrong in ({"a": [1, 2]}, {**whole, "paths": {"a": [[1] * 6]}, "lenses": {"a": [1]}}, {}):
            path.write_text(json.dumps(wrong))
            if wrong or name == "blur.json":
                with pytest.raises(DataError, match=name):
                    type(found).read(path, CPU)


def test_lenses_that_stay_small_are_closed(tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "data")
    flags = ["-s", str(data), "-m", str(tmp_path / "m"), "--blur", "defocus", "--blur_from_iter", "500"]
    options = parse_train([*flags, "--iterations", "1500", "--blur_samples", "4"])
    scene = Scene(options.model, CPU, quiet=True)
    lens, other = (Defocus.attached(options, scene) for _ in range(2))
    wide, small, *_ = scene.train_cameras
    with torch.no_grad():  # of 1.4 pixels, and of 1.6
        lens.shared.values[0, 0] = math.log(1.4)
        lens.values[lens.rows[wide.name], 0] = math.log(1.6 / 1.4)
    for iteration, renders in ((700, 4), (900, 4), (1000, 1)):
        lens.schedule(iteration)
        assert [len(lens.cameras(camera)) for camera in (wide, small)] == [4, renders], iteration
    other.load_state_dict(lens.state_dict())
    with torch.no_grad():
        other.values[:, 0] += 1.0
    other.schedule(1100)
    assert [len(other.cameras(camera)) for camera in (wide, small)] == [4, 1], "what is closed stays closed"
    folder = ModelFolder(tmp_path / "m")
    lens.save(folder, 7)
    saved = Defocus.read(folder.ply(7).with_name("blur.json"), CPU)
    for camera, same in ((wide, False), (small, True)):
        places = torch.stack([seen.world_to_camera for seen in saved.cameras(camera)])
        assert bool((places == camera.world_to_camera).all()) == same


def test_a_file_of_kernels(tmp_path):
    folder, found, view = ModelFolder(tmp_path), module("kernel", 0.1), camera()
    found.save(folder, 7)
    path = folder.ply(7).with_name("blur.pth")
    other = Kernel.read(path, CPU)
    torch.testing.assert_close(
        Shown(Blobs(), [other]).picture(view).image, Shown(Blobs(), [found]).picture(view).image
    )
    state = torch.load(path, weights_only=True)
    for wrong in ({}, state | {"poses": state["poses"][:, 1:]}, state | {"names": ["a", "b"]}, {"poses": 1}):
        torch.save(wrong, path)
        with pytest.raises(DataError, match=r"blur\.pth: must have the kernels"):
            Kernel.read(path, CPU)


def test_a_picture_of_many_renders_is_one_visit(tmp_path):
    """What densification decides by: the pull of the whole picture, seen once."""
    data = tiny_scenes.colmap_scene(tmp_path / "data")
    found = {}
    for blur in ("none", "motion"):
        options = ["-s", str(data), "-m", str(tmp_path / blur), "--blur", blur, "--blur_from_iter", "0"]
        options = parse_train([*options, "--blur_samples", "5", "--no-fused"])
        trainer = Trainer(Scene(options.model, CPU, quiet=True), options, print)
        if blur == "motion":
            torch.nn.init.zeros_(trainer.modules[0].values)  # five renders that are the same
        trainer.step(1)
        stats = trainer.strategy._stats
        found[blur] = stats.grad_norm_sum, stats.visits
    (pull, visits), (pull_of_five, visits_of_five) = found.values()
    assert 0 < visits.sum() <= len(visits)
    assert torch.equal(visits, visits_of_five)
    torch.testing.assert_close(pull_of_five, pull, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    (
        ["--poses", "--blur", "defocus"],
        ["--blur", "motion", "--blur_weights"],
        ["--blur", "kernel"],
        ["--appearance", "exposure"],
        ["--appearance", "ppisp", "--blur", "motion"],
        ["--appearance", "bilateral"],
    ),
)
def test_resuming_changes_nothing(options, tmp_path):
    data = tiny_scenes.colmap_scene(tmp_path / "data")
    short = ["-s", str(data), "--iterations", "24", "--checkpoint_iterations", "13"]
    short += ["--pose_from_iter", "4", "--blur_from_iter", "4"]
    short += ["--checkpoint_every", "-1", "--blur_samples", "3", "--eval", "--llffhold", "4", "--quiet"]
    short += ["--device", "cpu", "--disable_viewer", *options]
    whole, resumed = ModelFolder(tmp_path / "whole"), ModelFolder(tmp_path / "resumed")
    assert train.main([*short, "-m", str(whole)]) == 0
    shutil.copytree(whole.path, resumed.path)
    for path in (whole.ply(24).parent, whole.path / "chkpnt24.pth", whole.summary):
        shutil.rmtree(resumed.path / path.relative_to(whole.path), ignore_errors=True)
        (resumed.path / path.relative_to(whole.path)).unlink(missing_ok=True) if path.is_file() else None
    assert train.main(["-m", str(resumed), "--resume", "--quiet"]) == 0
    files = sorted(path.name for path in whole.ply(24).parent.iterdir())
    assert "point_cloud.ply" in files and {
        "poses.json",
        "blur.json",
        "blur.pth",
        "appearance.json",
        "appearance.pth",
    } & set(files)
    for name in files:
        assert (resumed.ply(24).with_name(name)).read_bytes() == whole.ply(24).with_name(name).read_bytes()


def test_blurred_and_sharp_views(tmp_path, monkeypatch):
    """render.py shows train views both ways, test views where they fit best; each folder says how."""
    monkeypatch.setattr(held_out, "STEPS", 20)
    blurred_scenes.make(tmp_path / "data", blurred_scenes.straight)
    model, cpu = tmp_path / "model", ["--device", "cpu", "--quiet"]
    options = ["--eval", "--blur", "motion", "--iterations", "12", "--blur_from_iter", "3"]
    assert (
        train.main(["-s", str(tmp_path / "data"), "-m", str(model), "--disable_viewer", *options, *cpu]) == 0
    )
    blur = ModelFolder(model).ply(12).with_name("blur.json")
    about = json.loads(blur.read_text())
    far = [[0.2, 0, 0, 0, 0, 0], [-0.2, 0, 0, 0, 0, 0]]
    blur.write_text(json.dumps(about | {"paths": dict.fromkeys(about["paths"], far)}))
    refined = ["--refine_test_poses", "--fit_test_colors"]
    for flags in ([], ["--views", "sharp"], ["--align_test_poses"], refined[:1], refined):
        assert render.main(["-m", str(model), *flags, *cpu]) == 0
    photographed, sharp = (
        read_image(model / "train" / name / "renders" / "00003.png").float()
        for name in ("ours_12", "ours_12_sharp")
    )
    assert sharp.diff(dim=2).square().mean() > 1.05 * photographed.diff(dim=2).square().mean()
    assert (
        metrics.main(["-m", str(model), "--lpips", "none", "--table", str(model / "t.md"), "--device", "cpu"])
        == 0
    )
    found = json.loads((model / "results.json").read_text())
    assert found["ours_12_refined"]["PSNR"] > found["ours_12"]["PSNR"]
    assert found["ours_12_refined_colors"]["PSNR"] > found["ours_12_refined"]["PSNR"]
    assert all(name in (model / "t.md").read_text() for name in ("ours_12_aligned", "ours_12_refined"))
    assert contact_sheet.main(["-m", str(model), "--blur"]) == 0
    sheet = read_image(model / "blur_sheet.png")
    assert sheet.float().std() > 10
    drawn = (sheet == torch.tensor(contact_sheet.TRAIL)[:, None, None]).all(0).nonzero()
    assert len(drawn) > 100 and drawn[:, 1].max() < sheet.shape[2] // 3, "paths, in the photos"


def test_renders_with_a_blur_that_is_known(tmp_path):
    """benchmarks/blurred.py: test views stay sharp, train views are the mean along the path that it tells."""
    data, model, to = tiny_scenes.colmap_scene(tmp_path / "data"), tmp_path / "model", tmp_path / "renders"
    options = ["-s", str(data), "-m", str(model), "--iterations", "3", "--eval", "--llffhold", "4"]
    assert train.main([*options, "--quiet", "--device", "cpu", "--disable_viewer"]) == 0
    blurred.main(["-m", str(model), "--to", str(to), "--samples", "3", "--device", "cpu"])
    sharp, moved = (
        Scene(
            parse_train(["-s", str(to / kind), "-m", str(tmp_path / kind), "--eval"]).model, CPU, quiet=True
        )
        for kind in ("sharp", "blurred")
    )
    truth = json.loads((to / "blurred" / "true_poses.json").read_text())
    assert set(truth) == {view.name for view in moved.train_cameras}
    assert len(sharp.test_cameras) == len(moved.test_cameras) > 0
    for a, b in zip(sharp.test_cameras, moved.test_cameras, strict=True):
        assert torch.equal(a.image(), b.image())
    shown, _ = blurred.load(str(model), CPU)
    for view in moved.train_cameras:
        poses = torch.tensor(truth[view.name]["exposed_from"])
        torch.testing.assert_close(poses[1], view.world_to_camera, atol=1e-5, rtol=0)
        with torch.no_grad():
            pictures = [shown.picture(replace(view, world_to_camera=pose)).image for pose in poses]
        image = torch.stack(pictures).clamp(0, 1).mean(0)
        assert (view.image() / 255 - image).abs().max() < 2 / 255


def trained(data: Path, model: Path, *options: str, steps: int = 1200) -> tuple[float, ModelFolder]:
    """PSNR of the held-out views, and the folder. On one thread: the pictures are small."""
    schedule = f"--iterations {steps} --densify_from_iter 100 --densify_until_iter {steps * 2 // 3} --eval"
    schedule += f" --position_lr_max_steps {steps} --opacity_reset_interval 50000 --cap_max 1500"
    schedule += f" --blur_from_iter {steps // 6} --pose_from_iter {steps // 6} --blur_samples 7"
    schedule += " --sh_degree 0 --disable_viewer --quiet"
    flags = ["-s", str(data), "-m", str(model), "--device", "cpu", *schedule.split(), *options]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train.main(flags) == 0
    finally:
        torch.set_num_threads(threads)
    folder = ModelFolder(model)
    return json.loads(folder.summary.read_text())["scores"]["test"][str(steps)]["psnr"], folder


def sharp_psnr(model: ModelFolder, truth: blurred_scenes.Truth) -> float:
    """Of train views without their blur, against what they would have been."""
    assert render.main(["-m", str(model), "--views", "sharp", "--device", "cpu", "--quiet"]) == 0
    folder, scores = model.path / "train" / "ours_1200_sharp", []
    for file, name in json.loads((folder / "names.json").read_text()).items():
        view = truth.cameras[name.removesuffix(".png")]
        true = blurred_scenes.picture(torch.tensor(view.world_to_camera), torch.tensor(view.K))
        scores.append(psnr(read_image(folder / "renders" / file) / 255, torch.tensor(true).permute(2, 0, 1)))
    return float(torch.stack(scores).mean())


@pytest.mark.slow
def test_sharpness_comes_back(tmp_path):
    """And paths are as long as they were. Kernels, which know no paths, come near."""
    truth = blurred_scenes.make(tmp_path / "data", blurred_scenes.straight, count=16)
    _, plain = trained(tmp_path / "data", tmp_path / "plain")
    _, folder = trained(tmp_path / "data", tmp_path / "sharp", "--blur", "motion")
    before, after = sharp_psnr(plain, truth), sharp_psnr(folder, truth)
    assert after > before + 1.5, (before, after)
    paths = json.loads(folder.ply(1200).with_name("blur.json").read_text())["paths"]
    lengths = {"found": 0.0, "true": 0.0}
    for name, path in paths.items():
        view = name.removesuffix(".png")
        K, depth = torch.tensor(truth.cameras[view].K)[None], torch.tensor([0.25]).double()
        found = along(torch.tensor(path).double(), torch.linspace(0, 1, 7).double())
        for key, motions in (("found", found), ("true", truth.motions[view])):
            lengths[key] += pixels(motions[None], K, depth).item()
    assert lengths["found"] == pytest.approx(lengths["true"], rel=0.1)
    _, folder = trained(tmp_path / "data", tmp_path / "kernel", "--blur", "kernel")
    mixed = sharp_psnr(folder, truth)
    assert mixed > before + 0.5 * (after - before), (before, mixed, after)


@pytest.mark.slow
def test_sharp_photos_in_place_lose_nothing(tmp_path):
    """Paths and poses that are free drift, and test views no longer fit."""
    blurred_scenes.make(tmp_path / "data", count=16)
    plain, _ = trained(tmp_path / "data", tmp_path / "plain", steps=600)
    for name in ("motion", "defocus", "kernel", "poses"):
        flags = ["--poses"] if name == "poses" else ["--blur", name]
        score, _ = trained(tmp_path / "data", tmp_path / name, *flags, steps=600)
        assert score > plain - 0.25, (name, score, plain)


@pytest.mark.slow
def test_wrong_poses_become_better(tmp_path):
    truth = blurred_scenes.make(tmp_path / "data", misplaced=0.01, count=16)
    given, before = trained(tmp_path / "data", tmp_path / "given")
    refined, after = trained(tmp_path / "data", tmp_path / "refined", "--poses")
    assert refined > given + 1, (refined, given)
    matrices = torch.stack([torch.tensor(camera.world_to_camera) for camera in truth.cameras.values()])
    origin = matrices.new_tensor([0, 0, 0, 1])
    errors = []
    for path in (before.cameras, after.ply(1200).with_name("cameras.json")):
        found = {camera["img_name"].removesuffix(".png"): camera for camera in json.loads(path.read_text())}
        seen = [  # where the middle of the scene is in the picture
            (torch.tensor(camera["rotation"]).double().T @ -torch.tensor(camera["position"]).double())
            for camera in (found[name] for name in truth.cameras)
        ]
        true = (matrices @ origin)[:, :3]
        error = torch.stack([a[:2] / a[2] - b[:2] / b[2] for a, b in zip(seen, true)])
        errors.append((blurred_scenes.FOCAL * error).norm(dim=1).mean().item())
    assert errors[1] < 0.5 * errors[0], errors
