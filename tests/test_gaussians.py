"""The model: initial values, meanings, learning rates, the one move of rows; and its PLY form."""

import math

import numpy as np
import pytest
import torch
from plyfile import PlyData

from arguments import OptimizationParams
from scene.formats.ply import load_ply, read_points, save_ply, write_points
from scene.gaussian_model import GaussianModel
from scene.points import PointCloud
from utils.files import DataError

CPU = torch.device("cpu")
SHAPES = {
    "means": (3,), "sh_dc": (1, 3), "sh_rest": (15, 3), "opacity_logits": (1,), "log_scales": (3,),
    "raw_quats": (4,),
}  # fmt: skip


def make_model(count=6, sh_degree=3, extent=2.0, seed=0, **options) -> GaussianModel:
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {"sh_rest": ((sh_degree + 1) ** 2 - 1, 3)}
    params = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    model = GaussianModel(params, sh_degree, extent=extent)
    model.setup_optimizer(OptimizationParams(**options))
    return model


def some_steps(model: GaussianModel, count=3, seed=1) -> None:
    """Steps along made-up gradients, so that every moment is something."""
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(1, count + 1):
        model.schedule(iteration)
        for value in model.params.values():
            value.grad = torch.randn(value.shape, generator=generator)
        model.step(visible=torch.ones(len(model), dtype=torch.bool))


def moments(model: GaussianModel) -> dict[str, dict]:
    return {name: model.optimizer.state[value] for name, value in model.params.items()}


def test_start_from_points():
    # Corners of a square of side 2 and a far point: the mean of the three smallest squared distances.
    xyz = np.float32([[0, 0, 0], [2, 0, 0], [0, 2, 0], [2, 2, 0], [100, 0, 0]])
    rgb = np.float32([[0.5, 0, 1]] * 5)
    model = GaussianModel.from_points(PointCloud(xyz.astype(float), rgb), 2, extent=3.0, device=CPU)
    assert len(model) == 5 and model.sh_degree == 2 and model.active_sh_degree == 0
    torch.testing.assert_close(model.means, torch.from_numpy(xyz))
    corner = math.sqrt((4 + 4 + 8) / 3)
    far = math.sqrt((98**2 + 98**2 + 4 + 100**2) / 3)
    expected = torch.tensor([corner] * 4 + [far])
    torch.testing.assert_close(model.scales, expected[:, None].expand(5, 3), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.opacities, torch.full((5, 1), 0.1))
    torch.testing.assert_close(model.quats, torch.tensor([[1.0, 0, 0, 0]] * 5))
    dc = torch.tensor([0, -0.5, 0.5]) / 0.28209479177387814
    torch.testing.assert_close(model.sh_dc, dc.expand(5, 1, 3))
    assert model.sh_rest.shape == (5, 8, 3) and (model.sh_rest == 0).all()
    with torch.no_grad():
        model.means += 1
    assert (xyz[0] == 0).all(), "the points are not the model's memory"


def test_start_from_points_at_the_same_place_and_from_none():
    same = PointCloud(np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32))
    scales = GaussianModel.from_points(same, 0, 1.0, CPU).scales
    torch.testing.assert_close(scales, torch.full((4, 3), 1e-7**0.5))
    none = PointCloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match="no points to start from; --random_init"):
        GaussianModel.from_points(none, 0, 1.0, CPU)


def test_meaning_of_the_parameters():
    model = make_model()
    torch.testing.assert_close(model.scales, torch.exp(model.log_scales))
    torch.testing.assert_close(model.opacities, 1 / (1 + torch.exp(-model.opacity_logits)))
    torch.testing.assert_close(model.quats.norm(dim=1), torch.ones(6))
    with pytest.raises(AttributeError, match="no attribute velocity"):
        _ = model.velocity


def test_parameters_change_in_place_only():
    """Another tensor would be drawn, but neither optimized nor saved."""
    model = make_model()
    kept, before = model.means, model.means.detach().clone()
    with torch.no_grad():
        model.means += 1
        model.means[0] = 7
    assert model.means is kept is model.params["means"] and (model.means[1:] == before[1:] + 1).all()
    model.reindex(torch.tensor([2]))
    assert torch.equal(model.means, before[2:3] + 1)
    with pytest.raises(AttributeError, match="would not know another means"):
        model.means = torch.nn.Parameter(before)


def test_learning_rates():
    model = make_model(extent=2.0)
    rates = lambda: {group["name"]: group["lr"] for group in model.optimizer.param_groups}  # noqa: E731
    assert list(rates()) == ["means", "sh_dc", "sh_rest", "opacity_logits", "log_scales", "raw_quats"], (
        "the original's order"
    )
    assert all(group["eps"] == 1e-15 for group in model.optimizer.param_groups)
    constant = {
        "sh_dc": 0.0025,
        "sh_rest": 0.000125,
        "opacity_logits": 0.025,
        "log_scales": 0.005,
        "raw_quats": 0.001,
    }
    for iteration, xyz in [(0, 3.2e-4), (15_000, 3.2e-5), (30_000, 3.2e-6), (40_000, 3.2e-6)]:
        model.schedule(iteration)
        assert rates() == pytest.approx({"means": xyz} | constant)


def test_bands_of_color_come_one_by_one():
    model = make_model(sh_degree=2)
    seen = []
    for iteration in (1, 999, 1000, 1999, 2000, 3000, 4000):
        model.schedule(iteration)
        seen.append(model.active_sh_degree)
    assert seen == [0, 0, 1, 1, 2, 2, 2]


def test_first_step_moves_by_the_learning_rate():
    """Adam's first step is lr * sign(gradient)."""
    model = make_model(extent=2.0)
    before = {name: value.detach().clone() for name, value in model.params.items()}
    model.schedule(0)
    for value in model.params.values():
        value.grad = torch.full_like(value, 3.0)
    model.step(visible=torch.ones(6, dtype=torch.bool))
    rates = {
        "means": 3.2e-4,
        "sh_dc": 2.5e-3,
        "sh_rest": 1.25e-4,
        "opacity_logits": 0.025,
        "log_scales": 0.005,
        "raw_quats": 1e-3,
    }
    for name, rate in rates.items():
        moved = before[name] - model.params[name]
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0, atol=1e-6)
        assert model.params[name].grad is None


def test_sparse_adam_moves_only_what_is_seen():
    model = make_model(optimizer_type="sparse_adam")
    before = model.means.detach().clone()
    for value in model.params.values():
        value.grad = torch.ones_like(value)
    visible = torch.tensor([True, False, True, False, False, True])
    model.step(visible)
    assert ((model.means != before).any(dim=1) == visible).all()


@pytest.mark.parametrize("kind", ["default", "sparse_adam"])
def test_reindex_carries_moments(kind):
    model = make_model(optimizer_type=kind)
    some_steps(model)
    old = {name: value.detach().clone() for name, value in model.params.items()}
    old_moments = {name: {k: v.clone() for k, v in state.items()} for name, state in moments(model).items()}
    assert all(state["exp_avg"].abs().min() > 0 for state in old_moments.values())

    index = torch.tensor([4, 0, 0, 2])
    model.reindex(index, fresh=torch.tensor([False, False, True, False]))
    assert len(model) == 4
    for name, value in model.params.items():
        assert value.requires_grad and value.is_leaf
        assert torch.equal(value, old[name][index])
        for key in ("exp_avg", "exp_avg_sq"):
            expected = old_moments[name][key][index]
            expected[2] = 0
            assert torch.equal(moments(model)[name][key], expected)
    assert len(model.optimizer.state) == 6, "no state of rows that are gone is left behind"
    some_steps(model)  # and it goes on

    model.reindex(torch.zeros(0, dtype=torch.long))
    assert len(model) == 0


def test_reindex_before_the_first_step():
    model = make_model()
    model.reindex(torch.tensor([5]))
    assert len(model) == 1
    some_steps(model)


def test_opacity_reset():
    model = make_model()
    some_steps(model)
    with torch.no_grad():
        model.opacity_logits[:3] = torch.tensor([[-6.0], [400.0], [2.0]])
    logits = model.opacity_logits.detach().clone()
    xyz_moment = moments(model)["means"]["exp_avg"].clone()
    model.reset_opacity()
    assert model.opacities[0].item() == pytest.approx(1 / (1 + math.exp(6))), "already below"
    torch.testing.assert_close(model.opacities[1:3], torch.full((2, 1), 0.01))
    assert model.opacity_logits[1].item() == pytest.approx(math.log(0.01 / 0.99))
    assert (model.opacity_logits <= logits + 1e-5).all()
    for key in ("exp_avg", "exp_avg_sq"):
        assert (moments(model)["opacity_logits"][key] == 0).all()
    assert torch.equal(moments(model)["means"]["exp_avg"], xyz_moment)


def header_of(path) -> list[str]:
    return path.read_bytes().partition(b"end_header\n")[0].decode().split("\n")[:-1]


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_is_the_originals_layout(tmp_path, degree):
    model = make_model(sh_degree=degree)
    path = tmp_path / "point_cloud.ply"
    save_ply(model, path)
    rest = 3 * ((degree + 1) ** 2 - 1)
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(rest)] + ["opacity"]
    names += ["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert header_of(path) == [
        "ply", "format binary_little_endian 1.0", "element vertex 6", *(f"property float {n}" for n in names)
    ]  # fmt: skip
    rows = np.frombuffer(path.read_bytes().partition(b"end_header\n")[2], "<f4").reshape(6, len(names))
    p = {name: value.detach().numpy() for name, value in model.params.items()}
    np.testing.assert_array_equal(rows[:, :3], p["means"])
    assert (rows[:, 3:6] == 0).all()
    np.testing.assert_array_equal(rows[:, 6:9], p["sh_dc"][:, 0])
    for channel in range(3):  # all red coefficients, then green, then blue
        third = rest // 3
        ours = rows[:, 9 + channel * third : 9 + (channel + 1) * third]
        np.testing.assert_array_equal(ours, p["sh_rest"][:, :, channel])
    np.testing.assert_array_equal(
        rows[:, -8:], np.hstack([p["opacity_logits"], p["log_scales"], p["raw_quats"]])
    )

    again = load_ply(path)
    assert again.sh_degree == again.active_sh_degree == degree
    for name, value in model.params.items():
        assert torch.equal(again.params[name], value)
        assert again.params[name].is_contiguous()


def test_ply_says_how_it_was_filtered_where_sibr_does_not_mind(tmp_path):
    save_ply(make_model(), tmp_path / "a.ply", antialiasing=True)
    assert header_of(tmp_path / "a.ply")[:4] == [
        "ply", "format binary_little_endian 1.0", "element vertex 6", "comment SplatRenderMode: mip"
    ]  # fmt: skip
    assert torch.equal(load_ply(tmp_path / "a.ply").means, make_model().means)


@pytest.mark.parametrize("form", ["ascii", "<", ">", "double"])
def test_ply_of_others(tmp_path, form):
    """Any order of properties, others between them, any number type, either byte order, ascii."""
    model = make_model(sh_degree=1)
    save_ply(model, tmp_path / "a.ply")
    ply = PlyData.read(str(tmp_path / "a.ply"))
    vertices = ply["vertex"].data
    order = np.random.RandomState(0).permutation([*vertices.dtype.names, "more"])
    other = np.zeros(
        len(vertices), [(n, "f8" if form == "double" else "u1" if n == "more" else "f4") for n in order]
    )
    for name in vertices.dtype.names:
        other[name] = vertices[name]
    from plyfile import PlyElement

    faces = PlyElement.describe(np.zeros(2, [("i", "i4")]), "face")
    PlyData(
        [faces, PlyElement.describe(other, "vertex")],
        text=form == "ascii",
        byte_order=">" if form == ">" else "<",
    ).write(str(tmp_path / "b.ply"))
    again = load_ply(tmp_path / "b.ply")
    for name, value in model.params.items():
        torch.testing.assert_close(again.params[name], value, rtol=1e-6, atol=1e-6)


def test_ply_mistakes_are_named(tmp_path):
    path = tmp_path / "a.ply"
    save_ply(make_model(sh_degree=1), path)
    whole = path.read_bytes()
    for old, new, message in [
        (b"float opacity", b"float opacite", "lacks the vertex property opacity"),
        (b"float rot_3", b"float root3", "lacks the vertex property rot_3"),
        (b"float f_rest_8", b"float g_rest_8", "must have 0, 9, 24 or 45 f_rest properties .* got 8"),
        (b"element vertex", b"element corner", "has no element named vertex"),
        (b"property float x", b"property flaot x", "cannot be read as PLY"),
        (b"element vertex 6", b"element vertex 7", "cannot be read as PLY"),
        (b"element vertex 6", b"element vertex 99999999999999", "cannot be read as PLY"),
        (b"ply\n", b"plx\n", "cannot be read as PLY"),
    ]:
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(DataError, match=rf"a.ply: {message}"):
            load_ply(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="a.ply"):
            load_ply(path)
    with pytest.raises(DataError, match="cannot be read as PLY"):
        load_ply(tmp_path / "none.ply")


def test_point_clouds_as_ply(tmp_path):
    points = PointCloud(np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([[0, 0.2, 1], [127 / 255, 1, 0]]))
    write_points(tmp_path / "p.ply", points)
    again = read_points(tmp_path / "p.ply")
    np.testing.assert_array_equal(again.xyz, points.xyz)
    np.testing.assert_allclose(again.rgb, points.rgb, atol=1e-7)
    (tmp_path / "q.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\nproperty double x\nproperty double y\nproperty double z\n"
        "end_header\n1 2 3\n"
    )
    again = read_points(tmp_path / "q.ply")
    assert again.xyz.tolist() == [[1, 2, 3]] and again.rgb.tolist() == [[0.5, 0.5, 0.5]]
