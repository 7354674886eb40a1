"""Checkpoints: nothing is missing, nothing is unsafe, and the original's are understood."""

import io
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from arguments import ModelParams, OptimizationParams, Options, PipelineParams, RunParams
from gaussian_renderer.fused import can_fuse
from per_view import Exposure
from scene.formats.ply import load_ply, save_ply
from tests.test_density import control, pull
from tests.test_gaussians import make_model, moments, some_steps
from training import checkpoint
from training.checkpoint import RENAMED
from training.queue import ViewQueue
from training.report import RunHistory
from utils.files import DataError

CPU = torch.device("cpu")


def toy_training(first: int, last: int, gaussians, adc, queue, exposure) -> list[int]:
    """A loop with everything that makes randomness and state, and no pictures."""
    shown = []
    for iteration in range(first, last + 1):
        gaussians.schedule(iteration)
        exposure.schedule(iteration)
        view = queue.next()
        shown.append(view)
        for value in [*gaussians.params.values(), exposure.values]:
            value.grad = torch.randn_like(value.detach()) * (1 + view)
        exposure.step()
        gaussians.step(visible=torch.rand(len(gaussians)) < 0.8)
        pull(adc, gaussians, iteration, (torch.rand(len(gaussians)) * 4e-4).tolist())
        adc.after_step(gaussians, iteration)
        shown += [random.random(), float(np.random.rand()), float(np.random.randn())]
    return shown


def fresh(optimizer_type="default", seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    options = dict(
        densify_from_iter=4, densification_interval=5, opacity_reset_interval=7, densify_until_iter=60
    )
    model = make_model(20, optimizer_type=optimizer_type, **options)
    adc, exposure = control(white=True, **options), Exposure(["a", "b"], CPU)
    adc.generator = None
    return {"gaussians": model, "adc": adc, "queue": ViewQueue(7, seed), "exposure": exposure}


@pytest.mark.parametrize("optimizer_type", ["default", "sparse_adam"])
@pytest.mark.parametrize("stop_at", [3, 13, 15, 20])  # before the first refinement; between two; at one
def test_resuming_gives_what_no_interruption_gives(tmp_path, stop_at, optimizer_type):
    whole = fresh(optimizer_type)
    shown = toy_training(1, 32, **whole)
    assert len(whole["gaussians"]) not in (0, 20), "something must have been cloned, split or pruned"

    parts = fresh(optimizer_type)
    first_half = toy_training(1, stop_at, **parts)
    checkpoint.save(tmp_path / "c.pth", stop_at, parts, CPU)
    resumed = fresh(optimizer_type, seed=99)
    assert checkpoint.load(tmp_path / "c.pth", resumed, CPU) == stop_at
    second_half = toy_training(stop_at + 1, 32, **resumed)

    assert first_half + second_half == shown
    model, expected = resumed["gaussians"], whole["gaussians"]
    for name, value in expected.params.items():
        assert torch.equal(model.params[name], value), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments(model)[name][key], moments(expected)[name][key]), name
    assert torch.equal(resumed["exposure"].values, whole["exposure"].values)
    assert model.active_sh_degree == expected.active_sh_degree
    assert torch.equal(resumed["adc"]._stats.visits, whole["adc"]._stats.visits)


def labelled(seed=0) -> dict:
    parts = fresh(seed=seed)
    parts["gaussians"].add_attribute("label", torch.ones(20, 2), lr=0.01)
    parts["gaussians"].setup_optimizer(OptimizationParams())
    return parts


def test_an_attribute_of_ones_own(tmp_path):
    """It is stepped, follows its rows, comes back and is in the PLY; the native call does not know it."""
    options = Options(ModelParams(), OptimizationParams(), PipelineParams(), RunParams())
    assert can_fuse(fresh()["gaussians"], options)
    assert not can_fuse(labelled()["gaussians"], options)

    whole = labelled()
    toy_training(1, 32, **whole)
    parts = labelled()
    toy_training(1, 13, **parts)
    checkpoint.save(tmp_path / "c.pth", 13, parts, CPU)
    resumed = labelled(seed=9)
    checkpoint.load(tmp_path / "c.pth", resumed, CPU)
    toy_training(14, 32, **resumed)
    model, expected = resumed["gaussians"], whole["gaussians"]
    assert model.label.shape == (len(expected), 2) != (20, 2) and model.label.std() > 1e-3
    assert torch.equal(model.label, expected.label)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(moments(model)["label"][key], moments(expected)["label"][key])
    save_ply(model, tmp_path / "labelled.ply")
    assert torch.equal(load_ply(tmp_path / "labelled.ply").label, model.label)
    checkpoint.load(tmp_path / "labelled.ply", resumed, CPU)
    checkpoint.save(tmp_path / "plain.pth", 0, fresh(), CPU)
    with pytest.raises(DataError, match="must be means, .*, raw_quats, label, got means, .*, raw_quats$"):
        checkpoint.load(tmp_path / "plain.pth", labelled(), CPU)


def test_a_checkpoint_is_plain_data(tmp_path):
    parts = fresh()
    toy_training(1, 3, **parts)
    checkpoint.save(tmp_path / "c.pth", 3, parts, CPU)
    state = torch.load(tmp_path / "c.pth", weights_only=True)  # nothing allow-listed
    assert (state["format"], state["version"], state["iteration"]) == ("TileSplat checkpoint", 2, 3)

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, [*value, *value.values()]), {dict})
        if isinstance(value, list | tuple):
            return set().union(*map(kinds, value), {type(value)})
        return {type(value)}

    assert kinds(state) <= {dict, list, tuple, torch.Tensor, int, float, str, bool, type(None)}


def test_a_failing_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    parts = fresh()
    checkpoint.save(tmp_path / "c.pth", 0, parts, CPU)
    before = (tmp_path / "c.pth").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path / "c.pth", 1, parts, CPU)
    assert (tmp_path / "c.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def original_checkpoint(path, scalar=np.float64, protocol=2) -> dict:
    """What the original writes: a tuple of tensors, parameters and an Adam state with numpy scalars in it."""
    count = 5
    shapes = {
        "xyz": (3,), "f_dc": (1, 3), "f_rest": (15, 3), "opacity": (1,), "scaling": (3,), "rotation": (4,),
    }  # fmt: skip
    torch.manual_seed(3)
    params = {name: nn.Parameter(torch.randn(count, *shape)) for name, shape in shapes.items()}
    groups = [{"params": [value], "lr": 0.1, "name": name} for name, value in params.items()]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
    for _ in range(4):
        for value in params.values():
            value.grad = torch.randn_like(value)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = scalar(1.25e-4)
    grad_sum, visits = torch.rand(count, 1), torch.full((count, 1), 3.0)
    state = (
        2, params["xyz"], params["f_dc"], params["f_rest"], params["scaling"], params["rotation"],
        params["opacity"], torch.zeros(count), grad_sum, visits, optimizer.state_dict(), scalar(4.5),
    )  # fmt: skip
    torch.save((state, 7000), path, pickle_protocol=protocol)
    return {"params": params, "optimizer": optimizer, "grad_sum": grad_sum}


@pytest.mark.parametrize("scalar", [np.float64, np.float32, float])
def test_checkpoint_of_the_original(tmp_path, scalar):
    path = tmp_path / "chkpnt7000.pth"
    written = original_checkpoint(path, scalar)
    model, density = make_model(3, extent=1.0), control()
    parts = {"gaussians": model, "adc": density, "queue": ViewQueue(4)}
    assert checkpoint.load(path, parts, CPU) == 7000
    assert (len(model), model.sh_degree, model.active_sh_degree, model.extent) == (5, 3, 2, 4.5)
    for name, value in written["params"].items():
        assert torch.equal(model.params[RENAMED[name]], value)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments(model)[RENAMED[name]][key], written["optimizer"].state[value][key])
    assert torch.equal(density._stats.grad_norm_sum, written["grad_sum"][:, 0])
    assert (density._stats.visits == 3).all()

    # It goes on as torch's own Adam would.
    model.schedule(7001)
    rates = {group["name"]: group["lr"] for group in model.optimizer.param_groups}
    for group in written["optimizer"].param_groups:
        group["lr"] = rates[RENAMED[group["name"]]]
    for name, value in written["params"].items():
        value.grad = torch.full_like(value, 0.5)
        model.params[RENAMED[name]].grad = torch.full_like(value, 0.5)
    written["optimizer"].step()
    model.step(visible=torch.ones(5, dtype=torch.bool))
    for name, value in written["params"].items():
        torch.testing.assert_close(model.params[RENAMED[name]], value, rtol=1e-5, atol=1e-6)


def test_going_on_from_a_ply(tmp_path):
    path = tmp_path / "point_cloud" / "iteration_7000" / "point_cloud.ply"
    saved = make_model(5)
    save_ply(saved, path)
    model = make_model(3, extent=2.5)
    parts = {"gaussians": model, "adc": control(), "queue": ViewQueue(4)}
    some_steps(model)
    assert checkpoint.load(path, parts, CPU) == 7000
    assert (len(model), model.active_sh_degree, model.extent) == (5, 3, 2.5)
    for name, value in saved.params.items():
        assert torch.equal(model.params[name], value)
    assert not any(state for state in moments(model).values())
    some_steps(model)
    path.rename(tmp_path / "other.ply")
    assert checkpoint.load(tmp_path / "other.ply", parts, CPU) == 0


def test_both_spellings_of_numpys_module(tmp_path):
    """numpy 2 renamed the module that its scalars pickle under; files by either numpy are read."""
    path = tmp_path / "c.pth"
    original_checkpoint(path)
    for old, new in [
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"numpy.core.", b"numpy._core."),
    ]:
        with zipfile.ZipFile(path) as source:
            files = {info.filename: source.read(info) for info in source.infolist()}
        name = next(name for name in files if name.endswith("data.pkl"))
        if old not in files[name]:
            continue
        files[name] = files[name].replace(old, new)
        with zipfile.ZipFile(path, "w") as target:
            for filename, data in files.items():
                target.writestr(filename, data)
        assert checkpoint.read(path)["iteration"] == 7000
    assert checkpoint.read(path)["parts"]["gaussians"]["extent"] == 4.5


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "c.pth"
    parts = fresh()
    for content, message in [
        (Evil(), "cannot be read as a checkpoint"),
        ({"format": "TileSplat checkpoint", "x": Evil()}, "cannot be read as a checkpoint"),
        ({"weights": torch.zeros(3)}, "is not a checkpoint of TileSplat or of the original"),
        (torch.zeros(3), "is not a checkpoint of TileSplat or of the original"),
        (((1, 2, 3), 5), "is not a checkpoint of the original"),
        ({"format": "TileSplat checkpoint", "version": 99}, "has version 99, must have 2"),
        ({"format": "TileSplat checkpoint", "version": 2}, "does not fit this run"),
    ]:
        torch.save(content, path)
        with pytest.raises(DataError, match=rf"c.pth: {message}"):
            checkpoint.load(path, parts, CPU)
    for data in (b"", b"garbage", pickle.dumps(Evil()), pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(DataError, match="c.pth"):
            checkpoint.load(path, parts, CPU)
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "none.pth")


def test_torn_files(tmp_path):
    parts = fresh()
    toy_training(1, 3, **parts)
    checkpoint.save(tmp_path / "c.pth", 3, parts, CPU)
    whole = (tmp_path / "c.pth").read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        (tmp_path / "c.pth").write_bytes(whole[:length])
        with pytest.raises(DataError, match="c.pth"):
            checkpoint.load(tmp_path / "c.pth", parts, CPU)
    assert torch.load(io.BytesIO(whole), weights_only=True)["iteration"] == 3


def as_version_1(state: dict) -> dict:
    """How checkpoints were before parts had names."""
    old = {name: was for was, name in checkpoint.RENAMED.items()}
    parts, exposure = state["parts"], state["parts"]["exposure"]
    model = dict(parts["gaussians"])
    for key in ("params", "moments"):
        model[key] = {old[name]: value for name, value in model[key].items()}
    model |= {"exposure_names": exposure["names"], "exposures": exposure["values"]}
    model["exposure_moments"] = exposure["moments"]
    told = {"scores": {}, "smooth": [0.5, 0.25, 0.0], "waiting": [[3, [0.5, 0.25, 0.0]]]}
    told |= {"seconds": 1.0, "left_out": 0.0}
    rest = {key: state[key] for key in ("format", "iteration", "random")}
    return rest | {
        "version": 1, "gaussians": model, "density": parts["adc"], "queue": parts["queue"], "told": told,
    }  # fmt: skip


def test_a_checkpoint_of_version_1_goes_on_to_the_same_bits(tmp_path):
    whole = fresh()
    shown = toy_training(1, 32, **whole)
    parts = fresh()
    first_half = toy_training(1, 15, **parts)
    checkpoint.save(tmp_path / "c.pth", 15, parts, CPU)
    torch.save(as_version_1(torch.load(tmp_path / "c.pth", weights_only=True)), tmp_path / "c.pth")
    resumed, history = fresh(seed=99), RunHistory()
    assert checkpoint.load(tmp_path / "c.pth", resumed | {"history": history}, CPU) == 15
    assert first_half + toy_training(16, 32, **resumed) == shown
    for name, value in whole["gaussians"].params.items():
        assert torch.equal(resumed["gaussians"].params[name], value), name
    assert torch.equal(resumed["exposure"].values, whole["exposure"].values)
    assert history.smooth == {"loss": 0.5, "l1": 0.25, "depth": 0.0} and history.waiting[0][0] == 3
