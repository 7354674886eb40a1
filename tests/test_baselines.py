"""NeRF and voxel grids: closed forms in float64, and short runs by the command line."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import export
import metrics
import render
import train
from arguments import FieldParams
from baselines import dvgo, nerf
from baselines.rays import Captured, Photos, Rays, Space, composite, encode
from baselines.voxels import Voxels, shift_of
from scene.folder import ModelFolder
from tests import tiny_scenes
from training import checkpoint, table

TINY = {
    "dvgo": [
        "--coarse_iters", "30", "--num_voxels_coarse", "4000", "--num_voxels", "16000",
        "--pg_scale", "5", "10", "--N_rand", "256", "--rgbnet_width", "16",
    ],
    "nerf": [
        "--netdepth", "4", "--netwidth", "32", "--N_samples", "16", "--N_importance", "16", "--N_rand", "64",
    ],
}  # fmt: skip
SHORT = ["--disable_viewer", "--quiet", "--eval", "--device", "cpu", "--iterations", "60"]


def cube(params: FieldParams | None = None, fine: bool = False, voxels: int = 4**3) -> Voxels:
    """Voxels from 0 to 1, and rays from depth 0.1 on."""
    low, high = torch.zeros(3), torch.ones(3)
    return Voxels(params or FieldParams(), Space(0.1, 9.0, low, high, False), low, high, fine, voxels)


def ray(origin: tuple, direction: tuple) -> Rays:
    return Rays(torch.tensor([origin]), torch.tensor([direction]))


# Compositing


def test_weights_and_what_is_left_sum_to_one():
    tau = torch.rand(50, 30, dtype=torch.float64) * 2
    weights, left = composite(tau)
    alpha = 1 - torch.exp(-tau)
    before = torch.cumprod(torch.cat([torch.ones(50, 1), 1 - alpha], -1), -1)
    assert torch.allclose(weights, alpha * before[:, :-1], atol=1e-14, rtol=0)
    assert torch.allclose(weights.sum(1) + left, torch.ones_like(left), atol=1e-14, rtol=0)


def test_a_solid_sample_hides_all_behind_it():
    tau = torch.tensor([[0.0, math.inf, 3.0, math.inf]])
    weights, left = composite(tau)
    assert weights.tolist() == [[0, 1, 0, 0]] and left.item() == 0


def test_gradients_of_compositing():
    tau = torch.rand(4, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(composite, (tau,))


# Voxels


def test_alpha_is_the_shifted_softplus_of_density():
    voxels = cube(FieldParams(alpha_init=1e-2), fine=True)
    v, delta = torch.linspace(-20, 20, 81, dtype=torch.float64), 0.5
    alpha = 1 - (1 + torch.exp(v + voxels.shift)) ** -delta
    ours = -torch.expm1(-voxels.tau(v, delta))
    assert torch.allclose(ours, alpha, atol=1e-12, rtol=0)


def test_alpha_init_gives_the_published_biases():
    assert shift_of(1e-2) == pytest.approx(-4.59512, abs=5e-6)
    assert shift_of(1e-6) == pytest.approx(-13.81551, abs=5e-6)
    ends, space = torch.ones(3), Space(1.0, 9.0, -torch.ones(3), torch.ones(3), unbounded=True)
    for params, alpha in ((FieldParams(), 1e-4), (FieldParams(alpha_init_coarse=1e-5), 1e-5)):
        assert Voxels(params, space, -ends, ends, False, 8).shift == shift_of(alpha)
    assert cube().shift == shift_of(1e-6)


def test_rays_that_miss_the_box_see_the_background_exactly():
    voxels, background = cube(), torch.tensor([0.1, 0.7, 0.3])
    with torch.no_grad():
        voxels.density.fill_(50)
        away = voxels.see(ray((5.0, 5, 5), (0.0, 0, 1)), background)[0]
        hit = voxels.see(ray((0.5, 0.5, -1), (0.0, 0, 1)), background)[0]
    assert torch.equal(away.color[0], background) and away.left.item() == 1
    assert hit.left.item() < 1e-6 and hit.color[0, 0].item() == pytest.approx(0.5)


def test_depth_of_a_wall():
    voxels = cube(voxels=20**3)
    with torch.no_grad():
        voxels.density.fill_(-100)
        voxels.density[..., 10:] = 100  # z > 0.5
        seen, _ = voxels.see(ray((0.5, 0.5, -1), (0.0, 0, 1)), torch.zeros(3))
    assert 1 / seen.inv_depth.item() == pytest.approx(1.5, abs=0.06)


def random_rays(count: int, seed: int = 0) -> Rays:
    """From around the cube, to places in it and beside it."""
    random = torch.Generator().manual_seed(seed)
    origins = torch.randn(count, 3, generator=random)
    origins = 0.5 + 2 * origins / origins.norm(dim=1, keepdim=True)
    return Rays(origins, torch.rand(count, 3, generator=random) * 1.6 - 0.3 - origins)


def test_samples_are_all_points_half_a_voxel_apart_in_the_box():
    voxels, rays = cube(voxels=12**3), random_rays(200)
    t, index, points = voxels.samples(rays)
    every = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
    assert torch.allclose(every.flatten(0, 1)[index], points)
    gaps = (every.diff(dim=1)).norm(dim=-1)
    assert torch.allclose(gaps, torch.full_like(gaps, 0.5 / 12), rtol=1e-3)
    kept = torch.zeros(t.shape, dtype=torch.bool).flatten().index_fill(0, index, True)
    assert kept[((every > 1e-4) & (every < 1 - 1e-4)).all(-1).flatten()].all()
    assert not kept[((every < -1e-4) | (every > 1 + 1e-4)).any(-1).flatten()].any()
    assert 50 < kept.view(t.shape).any(1).sum() < 200 and not kept.view(t.shape)[:, -1].any()


def test_free_space_is_what_the_nearest_coarse_voxels_know():
    coarse, fine = cube(voxels=6**3), cube(fine=True)
    with torch.no_grad():
        coarse.density.fill_(-100)
        coarse.density[0, 0, 1, 4, 2] = 20
    fine.look_only_where(coarse)
    points = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    nearest = (points * 5).round()
    known = ((nearest - torch.tensor([1.0, 4, 2])).abs() <= 1).all(-1)  # a voxel around it, too
    truth = known & (nearest >= 0).all(-1) & (nearest <= 5).all(-1)
    assert torch.equal(fine.may_be(points), truth) and 20 < truth.sum() < 1000


def test_another_resolution_keeps_a_linear_field():
    voxels, place = cube(voxels=5**3), torch.rand(200, 3)
    x = torch.linspace(0, 1, 5)
    field = 1 + 2 * x[:, None, None] - 3 * x[None, :, None] + 0.5 * x
    with torch.no_grad():
        voxels.density.copy_(field[None, None])
        voxels.scale_to(9**3)
    truth = 1 + 2 * place[:, 0] - 3 * place[:, 1] + 0.5 * place[:, 2]
    assert voxels.density.shape[2:] == (9, 9, 9)
    assert torch.allclose(voxels.interpolate(voxels.density, place)[:, 0], truth, atol=1e-5)


def test_views_are_counted_where_their_samples_are():
    """One ray along the grid points (1, 1, :): 8 samples per unit, a point takes those within 1/3."""
    voxels, K = cube(), torch.tensor([[1e6, 0, 0.5], [0, 1e6, 0.5], [0, 0, 1]])
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([-1 / 3, -1 / 3, 2])
    camera = SimpleNamespace(
        width=1, height=1, K=K, world_to_camera=pose, device=pose.device,
        image=lambda: torch.zeros(3, 1, 1, dtype=torch.uint8), counts=lambda: None,
    )  # fmt: skip
    cameras = [camera, camera]
    run = SimpleNamespace(voxels=voxels, cameras=cameras, photos=Photos(cameras), device=pose.device)
    views, truth = dvgo.Trainer.views_that_see(run)[0, 0], torch.zeros(4, 4, 4)
    truth[1, 1] = 2
    assert torch.equal(views, truth)


def test_samples_that_hardly_count_change_little():
    exact, quick = (cube(FieldParams(fast_color_thres=t), fine=True, voxels=12**3) for t in (0.0, 1e-4))
    quick.load_state_dict(exact.state_dict())
    for voxels in (exact, quick):
        with torch.no_grad():
            voxels.density.copy_(torch.randn(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)))
    one, two = (v.see(ray((0.4, 0.5, -1), (0.05, 0, 1)), torch.ones(3))[0] for v in (exact, quick))
    assert (one.color - two.color).abs().max() < 5e-3 and one.left.item() < 0.9


# NeRF


def test_encoding_has_no_pi_and_keeps_the_position():
    x = torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64)
    parts = encode(x, 2).view(5, 3)
    assert torch.equal(parts, torch.cat([x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()]))
    assert encode(x, 10).shape[1] == 63 and encode(x, 4).shape[1] == 27
    assert torch.equal(encode(x, -1), x)


def test_the_network_has_the_published_number_of_weights():
    assert sum(value.numel() for value in nerf.Network(FieldParams()).parameters()) == 595_844


@pytest.mark.parametrize("inputs, outputs", ((63, 256), (319, 256), (256, 1), (283, 128), (128, 3)))
def test_zeros_up_to_multiples_of_eight_change_nothing(inputs, outputs):
    layer = torch.nn.Linear(inputs, outputs).double()
    x, g = (torch.randn(5, 7, n, dtype=torch.float64, requires_grad=n == inputs) for n in (inputs, outputs))
    found = [(y := ask(layer, x), *torch.autograd.grad(y, [x, *layer.parameters()], g))
             for ask in (nerf.in_eights, torch.nn.Linear.__call__)]  # fmt: skip
    for ours, truth in zip(*found):
        assert ours.shape == truth.shape and torch.allclose(ours, truth, atol=1e-12, rtol=0)


def test_bfloat16_rounds_and_does_nothing_else():
    torch.manual_seed(0)
    network, points, views = nerf.Network(FieldParams(bf16=True)), torch.rand(8, 20, 3), torch.rand(8, 3)
    rounded = network(points, views)
    network.params = FieldParams()
    for ours, truth in zip(rounded, network(points, views)):
        assert ours.shape == truth.shape and ours.dtype == torch.float32
        assert (ours - truth).abs().max() < 0.01 < truth.std() * 2, "eight bits"


def test_the_color_network_has_the_published_number_of_weights():
    assert sum(value.numel() for value in cube(fine=True).rgbnet.parameters()) == 22_019


def test_samples_of_a_single_hot_bin_stay_in_it():
    bins = torch.linspace(2, 6, 11, dtype=torch.float64)[None]
    weights = torch.zeros(1, 10, dtype=torch.float64)
    weights[0, 3] = 1e6
    for random in (False, True):
        drawn = nerf.sample_pdf(bins, weights, 128, random)[0, 1:-1]  # u = 0 and 1 are the ends of the range
        assert (drawn >= bins[0, 3] - 1e-9).all() and (drawn <= bins[0, 4] + 1e-9).all()


def test_samples_follow_the_weights():
    torch.manual_seed(0)
    bins, weights = torch.linspace(0, 1, 5)[None], torch.tensor([[1.0, 2, 0, 1]])
    drawn = nerf.sample_pdf(bins, weights, 40_000, True)[0]
    share = torch.histc(drawn, 4, 0, 1) / len(drawn)
    assert torch.allclose(share, weights[0] / 4, atol=0.01)


def test_stratified_samples_stay_in_their_bins():
    t = torch.linspace(2, 6, 64)[None].expand(100, -1)
    drawn, middles = nerf.stratified(t), (t[:, 1:] + t[:, :-1]) / 2
    assert (drawn[:, 1:] >= middles).all() and (drawn[:, :-1] <= middles).all()


# Space


def test_unbounded_space_is_drawn_in():
    space = Space(1.0, 100.0, -torch.ones(3), torch.tensor([1.0, 1, 3]), unbounded=True)
    points = torch.tensor([[0.5, 0, 1], [2.0, 0, 1], [0, 0, 1e9]])
    assert torch.allclose(space.inside(points), torch.tensor([[0.5, 0, 0], [1.5, 0, 0], [0, 0, 2]]))
    depths = space.depths(5, torch.device("cpu"))
    assert torch.allclose(1 / depths, torch.linspace(1, 0.01, 5))


def test_samples_of_an_unbounded_scene_are_half_a_voxel_apart_where_it_is_drawn_in():
    """Else near voxels are asked so often that they hide all behind them, and far ones hardly at all."""
    space = Space(0.1, 1000.0, -torch.ones(3), torch.ones(3), unbounded=True)
    ends = torch.full((3,), 2.1)
    voxels = Voxels(FieldParams(), space, -ends, ends, False, 42**3)
    rays = random_rays(100)
    t, index, points = voxels.samples(rays)
    every = space.inside(rays.origins[:, None] + rays.directions[:, None] * t[..., None])
    assert torch.allclose(every.flatten(0, 1)[index], points, atol=1e-5)
    there = torch.zeros(t.shape, dtype=torch.bool).flatten().index_fill(0, index, True).view(t.shape)
    gaps = every.diff(dim=1).norm(dim=-1)[there[:, 1:]]
    assert gaps.quantile(0.01) > 0.048 and gaps.quantile(0.99) < 0.052 and gaps.max() < 0.065
    ends = (every * there[..., None]).abs().amax(-1).amax(1)
    assert ends.min() > 1.9, "as far as there is something"


# Runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("data")
    return {"dvgo": tiny_scenes.blender_scene(home / "b"), "nerf": tiny_scenes.colmap_scene(home / "c")}


def same(one, other) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


@pytest.mark.parametrize("method", TINY)
def test_a_run_that_goes_on_ends_as_one_that_was_left_alone(method, scenes, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*SHORT, *TINY[method], "--method", method, "-s", str(scenes[method]), "--checkpoint_iterations"]
    assert train.main([*flags, "37", "60", "-m", str(whole)]) == 0
    assert train.main([*flags, "37", "60", "-m", str(cut)]) == 0
    for path in (cut / "chkpnt60.pth", cut / "summary.json", cut / "point_cloud/iteration_60/field.pth"):
        path.unlink()
    assert train.main(["-m", str(cut), "--resume", "--quiet", "--disable_viewer"]) == 0
    ours, theirs = (checkpoint.read(folder / "chkpnt60.pth") for folder in (cut, whole))
    part = "voxels" if method == "dvgo" else "field"
    assert same(ours["parts"][part], theirs["parts"][part]) and same(
        ours["random"]["torch"], theirs["random"]["torch"]
    )
    model = "point_cloud/iteration_60/field.pth"
    assert (cut / model).read_bytes() == (whole / model).read_bytes()
    assert json.loads((whole / "config.json").read_text())["FieldParams"]["N_rand"] > 0
    assert render.main(["-m", str(whole), "--quiet", "--skip_train"]) == 0
    assert metrics.main(["-m", str(whole), "--lpips", "none"]) == 0
    scores = json.loads((whole / "results.json").read_text())["ours_60"]
    summary = json.loads((whole / "summary.json").read_text())
    assert scores["PSNR"] == pytest.approx(summary["scores"]["test"]["60"]["psnr"], abs=0.05)
    head, row = table.compare([whole])
    cells = dict(zip(head, row))
    assert export.main(["-m", str(whole), "--to", str(tmp_path / "a.spz")]) == 1
    assert "is a NeRF or a voxel grid, it has no splats" in capsys.readouterr().err
    assert cells["MB"] == (whole / model).stat().st_size / 1e6 and cells["Gaussians"] is None


@pytest.mark.parametrize("method", TINY)
def test_flags_of_the_run_that_goes_on_count(method, scenes, tmp_path):
    flags = [*SHORT, *TINY[method], "--method", method, "-s", str(scenes[method]), "-m", str(tmp_path / "m")]
    assert train.main([*flags, "--iterations", "2", "--checkpoint_iterations", "2"]) == 0
    assert train.main([*flags, "--iterations", "4", "--resume", "--chunk", "777"]) == 0
    path = tmp_path / "m/point_cloud/iteration_4/field.pth"
    state = torch.load(path)
    assert state["params"]["chunk"] == 777
    if method == "nerf":
        torch.save(state | {"params": state["params"] | {"compile": True}}, path)
        shown = nerf.load(None, None, ModelFolder(tmp_path / "m"), 4, torch.zeros(3))
        assert shown.scene.field._ask is nerf._ask, "on a CPU, pictures wait for no compiler"
        assert train.main([*flags, "--iterations", "9", "--resume", "--netwidth", "48"]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_learns_what_the_step_itself_does(scenes, tmp_path, monkeypatch):
    def weights(steps: int, first: int) -> dict:
        monkeypatch.setattr(Captured, "FIRST", first)  # calls that are not captured
        folder = tmp_path / f"{steps}_{first}"
        flags = [*SHORT, *TINY["nerf"], "--method", "nerf", "-s", str(scenes["nerf"]), "-m", str(folder)]
        assert train.main([*flags, "--device", "cuda", "--deterministic", "--iterations", str(steps)]) == 0
        return torch.load(folder / f"point_cloud/iteration_{steps}/field.pth")["tensors"]

    early, apart, captured = weights(2, 99), weights(60, 99), weights(60, 3)
    for name, value in apart.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=1e-5)
    layer = "fine.layers.0.weight"
    assert (apart[layer] - early[layer]).abs().max() > 1e-3


@pytest.mark.parametrize("method", TINY)
def test_pictures_get_better(method, scenes, tmp_path):
    more = {
        "dvgo": ["--coarse_iters", "120", "--iterations", "220", "--num_voxels", "27000"],
        "nerf": [
            "--iterations", "150", "--N_rand", "256", "--lrate", "1e-2", "--multires", "4",
            "--precrop_iters", "0", "--N_importance", "0",
        ],
    }[method]  # fmt: skip
    flags = [
        *SHORT,
        *TINY[method],
        "--method",
        method,
        "-s",
        str(scenes["dvgo"]),
        "--test_iterations",
        "1",
        *more,
    ]
    assert train.main([*flags, "-m", str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run/summary.json").read_text())["scores"]["train"]
    first, *_, last = (score["psnr"] for score in scores.values())
    assert last > first + 5, f"PSNR went from {first:.2f} to {last:.2f} dB"


@pytest.mark.parametrize("flag", ("--train_test_exp", "--poses", "--blur motion", "--appearance ppisp"))
def test_what_only_gaussians_know_is_refused(flag, scenes, tmp_path, capsys):
    flags = [
        "--method",
        "nerf",
        "-s",
        str(scenes["nerf"]),
        "-m",
        str(tmp_path / "m"),
        *flag.split(),
        *SHORT,
    ]
    assert train.main(flags) != 0
    assert f"{flag.split()[0][2:]} is for --method gaussians" in capsys.readouterr().err
