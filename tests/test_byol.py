"""examples/byol.py: pictures, views, loss and target are as they should be; collapse is seen; runs resume."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from examples import byol as example
from examples.byol import NEW, OLD, SHAPES, Byol, draw, percent, picture, probe, taught, view


@pytest.fixture(scope="module")
def drawn():
    return draw(NEW, 40, seed=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def small(pictures, **settings) -> Byol:
    return Byol(pictures, **{"steps": 6, "batch": 16} | settings)


def weights(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


# Pictures and views


def test_each_picture_shows_its_shape_and_is_repeatable(drawn):
    pictures, labels = drawn
    assert pictures.shape == (40, 3, 32, 32) and labels.bincount().tolist() == [8] * len(NEW)
    assert pictures.float().flatten(1).std(1).min() > 5, "a flat picture tells nothing"
    assert np.array_equal(picture(NEW[2], (3, 7)), pictures[7])
    assert not np.array_equal(picture(NEW[2], (4, 7)), pictures[7])
    for name in SHAPES:
        seen = picture(name, (0, 0)).astype(float)
        color = abs(seen[0] - seen[2]) > 8  # the ground is gray
        assert 0.03 < color.mean() < 0.6 and color[8:24, 8:24].mean() > color.mean(), name
    assert not set(OLD) & set(NEW)


def test_each_picture_of_a_batch_has_draws_of_its_own(drawn):
    alike = drawn[0][:1].repeat(12, 1, 1, 1)
    for change in (view(0.08), view(1.0, blur=1.0), view(0.4, solarize=1.0)):
        torch.manual_seed(0)
        seen = change(alike)
        assert seen.shape == alike.shape and len(seen.flatten(1).unique(dim=0)) > 8
        torch.manual_seed(0)
        assert torch.equal(change(alike), seen)


# The method


class Plain(nn.Module):
    """Embeds a picture as its first numbers."""

    def __init__(self, size: int = 64):
        super().__init__()
        self.size, self.weight = size, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.flatten(1)[:, : self.size]


def bare(views, embeddings, **settings) -> Byol:
    """Pictures are embeddings, and there is no network."""
    byol = small(embeddings, batch=len(embeddings), **settings)
    byol.online, byol.target, byol.predictor = Plain(), Plain(), nn.Identity()
    byol.views = views
    return byol


def test_loss_is_0_for_equal_4_for_unrelated_8_for_opposite_vectors():
    torch.manual_seed(0)
    z = torch.randn(3000, 64)
    same, opposite, unrelated = (lambda x: 3 * x), (lambda x: -x), (lambda x: torch.randn_like(x))
    assert bare((same, same), z).step()[0] == pytest.approx(0, abs=1e-5)
    assert bare((same, opposite), z).step()[0] == pytest.approx(8, abs=1e-5)
    loss, apart = bare((same, unrelated), z).step()
    assert abs(loss - 4) < 4 * 2 * 2 / math.sqrt(64 * 3000), "the cosine deviates by 1/sqrt(d)"
    assert apart == pytest.approx(1, abs=0.02), "all over the sphere"


def test_each_view_predicts_the_target_of_the_other(drawn):
    byol = small(drawn[0])
    seen = []
    noted = [lambda x, v=v: seen.append(v(x)) or seen[-1] for v in byol.views]
    start = copy.deepcopy(byol)
    byol.views = noted
    loss, _ = byol.step()
    z = [nn.functional.normalize(start.target(v)) for v in seen]
    p = [nn.functional.normalize(start.predictor(start.online(v))) for v in seen]
    expected = 4 - 2 * (p[0] * z[1]).sum(1) - 2 * (p[1] * z[0]).sum(1)
    assert len(seen) == 2 and loss == pytest.approx(expected.mean().item(), abs=1e-5)


def test_target_gets_no_gradient_and_follows_slowly(drawn):
    byol = small(drawn[0], base=0.9, steps=4)
    start = weights(byol.target)
    for k in range(4):
        before = weights(byol.target)
        byol.step()
        tau = 1 - 0.1 * (math.cos(math.pi * k / 4) + 1) / 2
        expected = tau * before + (1 - tau) * weights(byol.online)
        torch.testing.assert_close(weights(byol.target), expected, rtol=0, atol=1e-6)
    assert all(w.grad is None and not w.requires_grad for w in byol.target.parameters())
    assert (weights(byol.target) - start).norm() > 1e-3


def test_tau_of_1_freezes_the_target(drawn):
    byol = small(drawn[0], base=1.0)
    target, online = weights(byol.target), weights(byol.online)
    for _ in range(2):
        byol.step()
    assert torch.equal(weights(byol.target), target)
    assert not torch.equal(weights(byol.online), online)


def test_a_collapse_stops_the_run(drawn):
    byol = small(drawn[0])
    assert byol.step()[1] > 0.3
    nn.init.zeros_(byol.target[-1].weight)  # what is left is the bias, the same for every picture
    with pytest.raises(SystemExit, match="step 2: collapse: the spread of embeddings is 0.00, below 0.3"):
        byol.step()


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(drawn, tmp_path):
    whole = small(drawn[0], seed=5)
    whole.learn(tmp_path / "whole.pt")
    cut = small(drawn[0], seed=5)
    step, cut.step = cut.step, lambda: step() if cut.k < 4 else pytest.fail("killed")
    with pytest.raises(pytest.fail.Exception):
        cut.learn(tmp_path / "cut.pt", every=3)
    resumed = small(drawn[0], seed=6)
    resumed.learn(tmp_path / "cut.pt")
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# What it is worth


def test_weights_learn_labels(drawn):
    torch.manual_seed(0)
    start = example.encoder()
    assert sum(w.numel() for w in start.parameters()) == pytest.approx(2.4e5, rel=0.02)
    before = weights(start)
    pictures, labels = drawn[0][:12].clone(), drawn[1][:12] % 2
    pictures[labels == 1, 2] //= 4  # yellow
    net = taught(start, pictures, labels, steps=30, seed=0)
    assert torch.equal(weights(start), before), "a copy is trained"
    assert percent(net, pictures, labels) == 100


def test_probe_finds_what_a_line_can_tell_apart():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    color = torch.eye(3)[labels].view(90, 3, 1, 1)
    pictures = (100 + 40 * color + 30 * torch.rand(90, 3, 32, 32)).byte()
    mean_color = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 128, bias=False))
    before = weights(mean_color)
    assert percent(probe(mean_color, pictures[:30], labels[:30]), pictures[30:], labels[30:]) == 100
    assert torch.equal(weights(mean_color), before), "frozen"
    shuffled = labels[:30][torch.randperm(30)]
    assert percent(probe(mean_color, pictures[:30], shuffled), pictures[30:], labels[30:]) < 90


def test_command_prints_the_table_and_keeps_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "taught", lambda *args: taught(*args[:3], 2, args[4]))
    small = ["-o", str(tmp_path), "--seeds", "0", "1", "--steps", "2", "--pictures", "60", "--labels", "5"]
    example.main(small)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| A", "| B", "| C", "| -", "| D", "| E"]
    assert all("±" in row and "nan" not in row for row in rows[1:])
    assert sum("step 2, loss" in line for line in lines) == 2
    example.main(small)
    again = capsys.readouterr().out.splitlines()
    assert again == [line for line in lines if "step 2, loss" not in line], "nothing is trained twice by BYOL"
