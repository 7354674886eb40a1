"""--offload: colors in the host's memory. A CPU plays the GPU here: the same code, with one memory."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import rasterize

import train
from arguments import OptimizationParams, parse_train
from gaussian_renderer.fused import FusedIteration
from gaussian_renderer.fused_offload import OffloadedIteration
from scene import Scene, color_table, gaussian_model, offload
from scene.cameras import Camera
from scene.color_table import Clock, Colors
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from scene.gaussian_model import MOMENTS, GaussianModel
from scene.offload import Offloaded, may_see
from scene.points import PointCloud
from tests import tiny_scenes
from tests.native.scenes import DEVICES, relative_error
from tests.test_gaussians import SHAPES, make_model, moments
from training.trainer import Trainer
from utils.files import DataError

SHORT = [
    "--device", "cpu", "--disable_viewer", "--quiet", "--iterations", "50", "--densify_from_iter", "5",
    "--densification_interval", "10", "--densify_until_iter", "45", "--opacity_reset_interval", "35",
    "--densify_grad_threshold", "1e-4", "--checkpoint_every", "-1",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Each view shows about half of the blobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_scenes, "FOCAL", 150.0)
        return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


@pytest.fixture
def plays_the_gpu(monkeypatch):
    monkeypatch.setattr(offload, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(color_table, "PIECE", 7)  # several pieces of a handful of rows
    monkeypatch.setattr(offload, "SCAN", 13)
    degree = lambda iteration, highest: min(iteration // 5, highest)  # noqa: E731
    monkeypatch.setattr(gaussian_model, "sh_degree_at", degree)


def trained(scene, folder, *flags) -> GaussianModel:
    train.main(["-s", str(scene), "-m", str(folder), *SHORT, *flags])
    found = ModelFolder(folder)
    return load_ply(found.ply(found.saved(-1)))


def farthest(ours: GaussianModel, theirs: GaussianModel) -> float:
    assert len(ours) == len(theirs)
    return max(
        float((ours.params[n] - v).detach().abs().max()) for n, v in theirs.params.items() if v.numel()
    )


WAYS = {
    "adc": "",
    "adc, in separate steps": "--no-fused",
    "growth of all kinds": "--absgrad --cap_max 300 --antialiasing --random_background",
    "sparse": "--optimizer_type sparse_adam",
    "shared steps": "--update_every 3",
    "larger steps": "--views_per_step 2 --update_every 3",
    "improved": "--strategy improved --cap_max 90",
    "improved by disagreement": "--strategy improved --cap_max 60 --grow_by disagreement",
    "mcmc": "--strategy mcmc --cap_max 100 --densify_from_iter 60",  # where copies go is a matter of rounding
    "several pictures": "--poses --pose_from_iter 5 --blur motion --blur_from_iter 10 --blur_samples 3",
    "own colors": "--train_test_exp --opacity_reg 0.01",
    "blurred, averaged": "--filter_3d --average_last 20",
    "no bands": "--sh_degree 0 --convert_SHs_python",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_that_of_a_run_without(way, scene, tmp_path, plays_the_gpu):
    flags = WAYS[way].split()
    plain = trained(scene, tmp_path / "plain", "--no-fused", *flags)
    ours = trained(scene, tmp_path / "ours", "--offload", *flags)
    assert len(plain) > 40 or "mcmc" in flags, "nothing has grown"
    assert farthest(ours, plain) < 1e-4, "of numbers around 1, after 50 steps"


def run(scene, device: str, *flags: str) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """After 20 steps; and what the parameters were before. Beside the blobs there are others, around."""
    options = parse_train(["-s", str(scene), "-m", "none", "--device", device, "--sh_degree", "2", *flags])
    loaded = Scene(options.model, torch.device(device), quiet=True)
    xyz, rgb = loaded.points.xyz, loaded.points.rgb
    around = [
        xyz + 9 * np.array(shift) for shift in ((0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1))
    ]
    loaded.points = PointCloud(np.concatenate(around), np.concatenate([rgb] * len(around)))
    trainer = Trainer(loaded, options, print)
    with torch.no_grad():  # round ones have no gradient of their rotation
        random = torch.Generator().manual_seed(0)
        trainer.gaussians.log_scales += torch.rand(len(loaded.points), 3, generator=random).to(device)
    start = {name: value.detach().clone() for name, value in trainer.gaussians.params.items()}
    for number in range(1, 21):
        trainer.step(number)
    return trainer, start


@pytest.mark.parametrize("device", DEVICES)
def test_native_steps_are_those_of_a_run_without(device, scene, plays_the_gpu):
    """As the native step is compared with separate ones: relative to how far the parameters have moved."""
    plain, start = run(scene, device)
    ours, _ = run(scene, device, "--offload")
    assert type(plain.native) is FusedIteration and isinstance(ours.native, OffloadedIteration)
    assert isinstance(ours.gaussians, Offloaded) and ours.gaussians._colors
    late = ours.gaussians._colors._moved_at < 20
    assert 0.05 < late.float().mean() < 0.95, "some are seen, and some are not"
    assert (ours.native._part._waiting is not None) == (device == "cuda")
    for name, value in plain.gaussians.params.items():
        moves = value - start[name]
        assert relative_error(ours.gaussians.params[name].to(device) - start[name], moves) < 1e-3, name
    for name, state in moments(plain.gaussians).items():
        for key in MOMENTS:
            found = moments(ours.gaussians)[name][key].to(device)
            assert relative_error(found, state[key]) < 1e-3, (name, key)
    for a, b in zip(vars(ours.strategy._stats).values(), vars(plain.strategy._stats).values()):
        assert a is b is None or relative_error(a, b) < 1e-3


def test_what_a_row_has_missed():
    """One number, with rates of 0.1: m = 0.6, v = 0.09 after step 3. Step 4 has a gradient of 0: m = 0.54,
    v = 0.08991, and bias corrections 0.3439 and 0.003994. So it moves by 0.1 * 0.54 / 0.3439 divided by
    sqrt(0.08991 / 0.003994)."""
    clock = Clock(3, CPU)
    clock.tick([0.1, 0.1], (0.9, 0.999))
    row = torch.tensor([[1.0] * 6 + [0.6] * 6 + [0.09] * 6])
    clock.catch_up(row, torch.tensor([3], dtype=torch.int32))
    expected = 1 - 0.1 * 0.54 / 0.3439 / math.sqrt(0.08991 / (1 - 0.999**4))
    torch.testing.assert_close(row[0, [0, 5]], torch.full((2,), expected))
    torch.testing.assert_close(row[0, [6, 12]], torch.tensor([0.54, 0.08991]))


@pytest.mark.parametrize("missed", [0, 1, 2, 30, 300, 1500])
@pytest.mark.parametrize("before", [1, 20, 2000])
def test_missed_steps_are_those_of_dense_adam(before, missed):
    """In float64, with rates that fall, and betas that change."""
    random = torch.Generator().manual_seed(before + missed)
    width = 12
    row = torch.randn(5, 3 * width, generator=random, dtype=torch.float64)
    row[:, 2 * width :] = row[:, 2 * width :] ** 2 * 1e-4
    value, avg, square = (t.clone() for t in row.split(width, 1))
    clock = Clock(before, CPU)
    for step in range(before + 1, before + missed + 1):
        rates = [2.5e-3 * 0.999**step, 1.25e-4 * 0.999**step]
        b1, b2 = (0.9, 0.999) if step % 100 < 50 else (0.8, 0.998)
        clock.tick(rates, (b1, b2))
        avg, square = b1 * avg, b2 * square
        root = (square / (1 - b2**step)).sqrt() + 1e-15
        each = torch.tensor([rates[0]] * 3 + [rates[1]] * (width - 3), dtype=torch.float64)
        value = value - each * avg / (1 - b1**step) / root
    clock.catch_up(row, torch.full((5,), before, dtype=torch.int32))
    for ours, truth in zip(row.split(width, 1), (value, avg, square)):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def camera(distance: float, width: int = 640, height: int = 400) -> Camera:
    matrix = torch.eye(4)
    matrix[2, 3] = distance
    K = torch.tensor([[500.0, 0, 0.4 * width], [0, 600, 0.6 * height], [0, 0, 1]])
    return Camera("", width, height, matrix, K)


@pytest.mark.parametrize("distance", [0.0, 1.0, 5.0])
def test_nothing_that_shows_is_left_out(distance):
    random = torch.Generator().manual_seed(0)
    means = torch.randn(20_000, 3, generator=random) * torch.tensor([4.0, 4.0, 3.0])
    scales = torch.exp(torch.randn(20_000, 3, generator=random) - 3)
    view, quats = camera(distance), torch.randn(20_000, 4, generator=random)
    shows = rasterize(
        means, quats / quats.norm(dim=1, keepdim=True), scales, torch.ones(20_000, 1),
        colors=torch.ones(20_000, 3), world_to_camera=view.world_to_camera, K=view.K, width=view.width,
        height=view.height, background=torch.zeros(3),
    ).radii > 0  # fmt: skip
    found = may_see(view, means, scales.amax(1))
    assert shows.sum() > 500 and not (shows & ~found).any()
    assert found.sum() < 2.0 * shows.sum() and found.float().mean() < 0.6
    places = torch.stack([view.world_to_camera, torch.eye(4)])
    either = may_see(replace(view, world_to_camera=places), means, scales.amax(1))
    assert torch.equal(either, found | may_see(camera(0.0), means, scales.amax(1)))


def test_rows_move_with_their_moments(plays_the_gpu):
    """Some have waited for steps, and so have the parents of new ones."""
    plain = make_model(30, extent=2.0)
    ours = Offloaded({n: v.detach() for n, v in plain.params.items()}, 3, extent=2.0)
    ours.setup_optimizer(OptimizationParams())
    random = torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randperm(30, generator=random)[:10].sort().values
        grads = {n: torch.randn(10, *shape, generator=random) for n, shape in SHAPES.items()}
        for name, value in plain.params.items():
            value.grad = torch.zeros_like(value).index_copy_(0, rows, grads[name])
        ours._seen = offload.Seen(rows, grads, None)
        for model in (plain, ours):
            model.schedule(1)
            model.step(torch.ones(30, dtype=torch.bool))
    index = torch.tensor([29, 3, 3, 17, 0, 5, 5, 5, 21])
    fresh = torch.tensor([False, False, True, False, False, False, True, True, False])
    for model in (plain, ours):
        model.reindex(index, fresh)
    assert ours._colors and len(ours._colors._moved_at.unique()) > 1, (
        "all have been moved up, which takes too long"
    )
    for name, value in plain.params.items():
        torch.testing.assert_close(ours.params[name], value, rtol=1e-5, atol=1e-6)
    for name, state in moments(plain).items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(moments(ours)[name][key], state[key], rtol=1e-5, atol=1e-6)
        assert moments(ours)[name]["step"] == 6


@pytest.mark.parametrize("flags", ["", "--update_every 4 --opacity_reg 0.01", "--average_last 30"])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(flags, scene, tmp_path, plays_the_gpu):
    more = ["--offload", *flags.split()]
    whole = trained(scene, tmp_path / "whole", *more, "--checkpoint_iterations", "23", "30")
    for number in (23, 30):
        state = tmp_path / "whole" / f"chkpnt{number}.pth"
        assert state.is_file()
        rest = trained(scene, tmp_path / f"rest{number}", *more, "--start_checkpoint", str(state))
        assert farthest(rest, whole) == 0, number


def test_checkpoints_are_those_of_any_run(scene, tmp_path, plays_the_gpu):
    plain = trained(scene, tmp_path / "a", "--no-fused", "--checkpoint_iterations", "23")
    ours = trained(scene, tmp_path / "b", "--offload", "--checkpoint_iterations", "23")
    there = trained(
        scene, tmp_path / "c", "--offload", "--start_checkpoint", str(tmp_path / "a/chkpnt23.pth")
    )
    back = trained(
        scene, tmp_path / "d", "--no-fused", "--start_checkpoint", str(tmp_path / "b/chkpnt23.pth")
    )
    assert max(farthest(model, plain) for model in (ours, there, back)) < 1e-4


def test_what_is_wrong_in_a_checkpoint_is_told(scene, tmp_path, plays_the_gpu, capsys):
    trained(scene, tmp_path / "a", "--offload", "--iterations", "4", "--checkpoint_iterations", "2")
    state = torch.load(tmp_path / "a/chkpnt2.pth", weights_only=True)
    behind = state["parts"]["gaussians"]["behind"]
    for key, value, told in [
        ("moved_at", behind["moved_at"] + 7, "the steps of waiting rows must be 0 to 2"),
        ("moved_at", behind["moved_at"][1:], "must be 40 32-bit integers"),
        ("sums", behind["sums"].float(), "must be pairs of 64-bit floats"),
        ("decays", behind["decays"][1:], "must be pairs of 64-bit floats"),
        ("first", -1, "first step of waiting rows must be an integer from 0"),
    ]:
        state["parts"]["gaussians"]["behind"] = behind | {key: value}
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(DataError, match="was it trained"):
            trained(scene, tmp_path / "b", "--offload", "--start_checkpoint", str(tmp_path / "bad.pth"))
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("flags, where", [("--no-fused", "_room_for_step"), ("", "taken")])
def test_a_step_for_which_memory_is_lacking_is_taken_again(
    flags, where, scene, tmp_path, plays_the_gpu, monkeypatch
):
    more = ["--offload", "--densify_until_iter", "0", *flags.split()]
    plain = trained(scene, tmp_path / "plain", *more)
    calls, real = iter(range(1000)), getattr(Offloaded, where)

    def lacking(*arguments):
        if next(calls) == 20:
            torch.empty(2**50)
        return real(*arguments)

    monkeypatch.setattr(Offloaded, where, lacking)
    again = trained(scene, tmp_path / "again", *more)
    assert next(calls) == 51 and farthest(again, plain) == 0


def test_numbers_that_are_not_finite_are_noticed(plays_the_gpu):
    model = Offloaded({n: v.detach() for n, v in make_model(5).params.items()}, 3)
    model.setup_optimizer(OptimizationParams())
    model.schedule(1)
    grads = {name: torch.ones(2, *shape) for name, shape in SHAPES.items()}
    grads["sh_rest"][1, 3, 2] = math.nan
    model._seen = offload.Seen(torch.tensor([1, 4]), grads, None)
    assert torch.stack(model.sums()).isfinite().all()
    model.step(torch.ones(5, dtype=torch.bool))
    assert not torch.stack(model.sums()).isfinite().all()
    assert model.finite().tolist() == [True, True, True, True, False]
    model.reindex(model.finite().nonzero()[:, 0])
    assert torch.stack(model.sums()).isfinite().all()


def test_where_it_has_no_use_it_says_so(scene, tmp_path, capsys, monkeypatch):
    flags = ["-s", str(scene), "-m", str(tmp_path / "m"), "--device", "cpu", "--disable_viewer", "--offload"]
    train.main([*flags, "--iterations", "2"])
    assert re.search(r"^--offload changes nothing on a CPU", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        train.main([*flags, "--method", "nerf"])
    assert "offload must go with --method gaussians, got nerf" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "offload is for one process and its GPU, got 4 (WORLD_SIZE)" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", ["", "--optimizer_type sparse_adam"])
def test_on_a_gpu(flags, scene, tmp_path):
    gpu = ["--device", "cuda", "--deterministic", "--no-fused", *flags.split()]
    plain = trained(scene, tmp_path / "plain", *gpu)
    ours = trained(scene, tmp_path / "ours", *gpu, "--offload")
    assert farthest(ours, plain) < 1e-4
    assert farthest(trained(scene, tmp_path / "again", *gpu, "--offload"), ours) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_bus_brings_what_the_host_has(degree):
    """Rows that come and go, on a GPU and on a CPU; each time some that have just been written."""
    random, count = torch.Generator().manual_seed(degree), 5000
    shapes = {"sh_dc": (1, 3), "sh_rest": ((degree + 1) ** 2 - 1, 3)}
    values = {
        name: [torch.rand(count, *shape, generator=random) + 0.1 for _ in range(3)]
        for name, shape in shapes.items()
    }
    tables = {device: Colors.of(values, torch.device(device), 0) for device in ("cpu", "cuda")}
    for _ in range(30):
        rows = (torch.rand(count, generator=random) < 0.5).nonzero()[:, 0]
        wanted = torch.rand(len(rows), generator=random) < 0.7
        found = {}
        for device, colors in tables.items():
            fetched = found[device] = colors.fetch(rows.to(device))
            for name in shapes:
                fetched.values[name][0].mul_(1.01)
                fetched.values[name][1].add_(0.1)
            colors.clock.tick([0.01, 0.02], (0.9, 0.999))
            colors.store(fetched, wanted.to(device))
        for name in shapes:
            for ours, theirs in zip(found["cuda"].values[name], found["cpu"].values[name]):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)
    assert tables["cpu"]._moved_at.unique().numel() > 5
    for colors in tables.values():
        colors.catch_up()
    ours, theirs = tables["cuda"].on_host(), tables["cpu"].on_host()
    for name in shapes:
        for a, b, begun in zip(ours[name], theirs[name], values[name]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert not b.numel() or not torch.allclose(b, begun, rtol=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_colors_take_no_memory_of_the_gpu():
    before = torch.cuda.memory_allocated()
    params = {n: v.detach().cuda() for n, v in make_model(100_000).params.items()}
    model = Offloaded(params, 3)
    model.setup_optimizer(OptimizationParams())
    del params
    assert model.sh_rest.is_pinned() and model.means.is_cuda
    assert torch.cuda.memory_allocated() - before < 60 * 100_000
