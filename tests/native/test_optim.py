"""FusedAdam is torch.optim.Adam; SparseGaussianAdam is the original's visible-only Adam."""

import pytest
import torch
from diff_gaussian_rasterization import FusedAdam, SparseGaussianAdam

from tests.native import golden
from tests.native.scenes import DEVICES

SHAPES = {
    "xyz": (101, 3),
    "f_dc": (101, 1, 3),
    "f_rest": (101, 15, 3),
    "opacity": (101, 1),
    "rotation": (101, 4),
    "one": (),
}


def make_groups(dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = []
    for i, (name, shape) in enumerate(SHAPES.items()):
        param = torch.nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype))
        groups.append({"params": [param], "lr": 10.0 ** -(1 + i % 3), "name": name})
    return groups


def set_gradients(groups, step):
    """The same random gradients for everybody; now and then none, and some exactly zero."""
    g = torch.Generator().manual_seed(1000 + step)
    for i, group in enumerate(groups):
        (param,) = group["params"]
        grad = torch.randn(param.shape, generator=g, dtype=torch.float64) * 10.0 ** (i - 4)
        grad = grad * (torch.rand(param.shape, generator=g) > 0.2)
        param.grad = None if (step + i) % 17 == 0 else grad.to(param)


def train(optimizer, groups, steps, start=0):
    for step in range(start, start + steps):
        groups[0]["lr"] = 0.01 * 0.99**step  # scheduled, as positions are
        optimizer.param_groups[0]["lr"] = groups[0]["lr"]
        set_gradients(groups, step)
        optimizer.step()
    return [group["params"][0].detach().cpu().double() for group in groups]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_fused_adam_is_adam_over_200_steps(eps, device):
    def result(kind, dtype, device):
        groups = make_groups(dtype, device)
        return train(kind(groups, lr=0.0, eps=eps), groups, 200)

    truth, start = result(torch.optim.Adam, torch.float64, "cpu"), make_groups(torch.float64, "cpu")
    plain, ours = result(torch.optim.Adam, torch.float32, "cpu"), result(FusedAdam, torch.float32, device)
    for a, p, t, s, name in zip(ours, plain, truth, start, SHAPES):
        assert (t - s["params"][0]).abs().max() > 0.005, "nothing moved"
        allowed = 4 * (p - t).abs().max() + 1e-6
        assert (a - t).abs().max() <= allowed, f"{name}: {(a - t).abs().max():.2e}, allowed {allowed:.2e}"


def test_fused_adam_in_double_is_adam_to_the_last_digits():
    results = []
    for kind in (torch.optim.Adam, FusedAdam):
        groups = make_groups(torch.float64, "cpu")
        results.append(train(kind(groups, lr=0.0, eps=1e-15), groups, 50))
    for a, t in zip(*results):
        assert torch.allclose(a, t, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_state_goes_to_adam_and_back(device):
    """Half the steps with one, half with the other, through state_dict."""
    expected = make_groups(torch.float32, device)
    truth = train(torch.optim.Adam(expected, lr=0.0), expected, 40)
    for first, second in [(torch.optim.Adam, FusedAdam), (FusedAdam, torch.optim.Adam)]:
        groups = make_groups(torch.float32, device)
        a = first(groups, lr=0.0)
        train(a, groups, 20)
        b = second(groups, lr=0.0)
        state = a.state_dict()
        for group in state["param_groups"]:  # torch's Adam has settings that ours does not
            for key, value in torch.optim.Adam([torch.zeros(1)]).param_groups[0].items():
                group.setdefault(key, value)
        b.load_state_dict(state)
        for x, t in zip(train(b, groups, 20, start=20), truth):
            assert torch.allclose(x, t, atol=1e-5)


def test_a_closure_is_called_with_gradients():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert torch.allclose(param, torch.full((3,), 0.9), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_adam_is_the_original(device):
    case = golden.load("sparse_adam")
    param = torch.nn.Parameter(torch.from_numpy(case["p0"]).clone().to(device))
    optimizer = SparseGaussianAdam([{"params": [param], "name": "p"}], lr=0.01, eps=1e-15)
    for i in range(5):
        param.grad = torch.from_numpy(case[f"grad{i}"]).to(device)
        optimizer.step(torch.from_numpy(case[f"vis{i}"]).to(device), 50)
        expected = torch.from_numpy(case[f"p{i + 1}"])
        assert (param.detach().cpu() - expected).abs().max() < 2e-6
    assert (expected - torch.from_numpy(case["p0"])).abs().max() > 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_adam_leaves_the_invisible_alone(device):
    groups = [g for g in make_groups(torch.float32, device) if g["name"] != "one"]
    optimizer = SparseGaussianAdam(groups, lr=0.0, eps=1e-15)
    visible = torch.zeros(101, dtype=torch.bool, device=device)
    visible[::3] = True
    for step in range(1, 4):
        before = [g["params"][0].detach().clone() for g in groups]
        set_gradients(groups, step)
        optimizer.step(visible, 101)
        for group, old in zip(groups, before):
            param = group["params"][0]
            assert torch.equal(param[~visible], old[~visible])
            if param.grad is None:
                continue
            state = optimizer.state[param]
            assert (state["exp_avg"][~visible] == 0).all() and (state["exp_avg_sq"][~visible] == 0).all()
            moved = (param != old)[visible & (param.grad.flatten(1) != 0).any(1)]
            assert moved.any()


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_named(device):
    param = torch.nn.Parameter(torch.zeros(10, 3, device=device))
    param.grad = torch.ones_like(param)
    optimizer = SparseGaussianAdam([param], lr=0.1, eps=1e-8)
    with pytest.raises(ValueError, match=r"visibility must be \[10\] bool, got \[9\] bool"):
        optimizer.step(torch.ones(9, dtype=torch.bool, device=device), 10)
    with pytest.raises(ValueError, match=r"visibility must be \[10\] bool, got \[10\] float32"):
        optimizer.step(torch.ones(10, device=device), 10)
    m = torch.zeros(10, 3, device=device)
    with pytest.raises(ValueError, match=r"exp_avg\[0\] must be \[10, 3\] float32 .*, got \[3, 10\] float32"):
        torch.ops.tilesplat.adam_step([m], [m], [m.reshape(3, 10)], [m], [0.1], 0.9, 0.999, 1e-8, 1, None)
    with pytest.raises(ValueError, match=r"must have 1 entries like params, got 2, 1, 1 and 1"):
        torch.ops.tilesplat.adam_step([m], [m, m], [m], [m], [0.1], 0.9, 0.999, 1e-8, 1, None)
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16, device=device))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match=r"params\[0\] must be float32 .*, got \[4\] float16"):
        FusedAdam([half]).step()


def strided(tensor):
    """The same numbers in another order of memory, as np.vstack(...).T of COLMAP's points leaves them."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def take_steps(kind, layout, device, **settings):
    """Three steps of a table [101, 3], visible in part: its values and both moments."""
    groups = make_groups(torch.float32, device)[:1]
    param = groups[0]["params"][0] = torch.nn.Parameter(layout(groups[0]["params"][0].detach()))
    optimizer = kind(groups, lr=0.0, **settings)
    visible = torch.arange(101, device=device) % 3 > 0
    for step in range(1, 4):
        set_gradients(groups, step)
        optimizer.step(visible, 101) if kind is SparseGaussianAdam else optimizer.step()
    state = optimizer.state[param]
    return param, state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [SparseGaussianAdam, FusedAdam])
def test_parameters_of_any_layout(kind, device):
    expected = take_steps(kind, torch.Tensor.contiguous, device, eps=1e-15)
    result = take_steps(kind, strided, device, eps=1e-15)
    assert not result[0].is_contiguous() and result[1].abs().max() > 0
    for ours, truth in zip(result, expected):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_any_layout(device):
    """torch.optim.Adam makes moments in the layout of the parameter; they come in by its state dict."""
    results = []
    for layout in (torch.Tensor.contiguous, strided):
        groups = make_groups(torch.float32, device)[:1]
        groups[0]["params"][0] = torch.nn.Parameter(layout(groups[0]["params"][0].detach()))
        theirs, ours = torch.optim.Adam(groups, lr=0.0, eps=1e-15), FusedAdam(groups, lr=0.0, eps=1e-15)
        train(theirs, groups, 2)
        state = theirs.state_dict()
        ours.load_state_dict({**state, "param_groups": ours.state_dict()["param_groups"]})
        moment = ours.state[groups[0]["params"][0]]["exp_avg"]
        assert moment.is_contiguous() == (layout is torch.Tensor.contiguous)
        results.append([*train(ours, groups, 3, start=2), moment])
    for a, b in zip(*results):
        assert torch.equal(a, b)
