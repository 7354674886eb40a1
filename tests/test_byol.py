"""examples/byol.py: loss, target and views are those of the paper; a collapse is seen; runs resume."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import nn

from examples import byol as example
from examples import views
from examples.byol import Byol, distance, learn, outputs, probe, right, spread
from sample_scene.labeled import PAIRS, SHAPES, SINGLES, draw


@pytest.fixture(scope="module")
def drawn():
    pictures, labels = draw(SINGLES, 48, seed=3)
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def small(pictures, **settings) -> Byol:
    return Byol(pictures, **{"steps": 6, "batch": 16} | settings)


def weights(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


# --- pictures -----------------------------------------------------------------------------------------------


def test_pictures_show_something_and_are_repeatable(drawn):
    pictures, labels = drawn
    assert pictures.float().flatten(1).std(1).min() > 5, "a flat picture tells nothing"
    assert labels.bincount().tolist() == [8] * len(SHAPES)
    again = draw(SINGLES, 48, seed=3, workers=2)[0]
    assert np.array_equal(again, pictures)
    assert not np.array_equal(draw(SINGLES, 6, seed=4)[0], pictures[:6])
    assert len(PAIRS) == 15 and draw(PAIRS, 1, seed=0)[0].shape == (1, 3, 32, 32)


# --- views --------------------------------------------------------------------------------------------------


def test_each_picture_of_a_batch_has_draws_of_its_own(drawn):
    alike = drawn[0][:1].repeat(8, 1, 1, 1)
    seen = views.view(alike, torch.Generator().manual_seed(0), 0.08, 1.0, 0.2)
    assert seen.shape == alike.shape and seen.isfinite().all()
    assert torch.pdist(seen.flatten(1)).min() > 1
    assert torch.equal(seen, views.view(alike, torch.Generator().manual_seed(0), 0.08, 1.0, 0.2))


def test_crop_jitter_and_blur_each_draw_for_every_picture():
    g = torch.Generator().manual_seed(0)
    alike = torch.rand(1, 3, 32, 32, generator=g).repeat(40, 1, 1, 1)
    jittered = views.jitter(alike.clone(), g)
    for changed in (views.crop(alike, g, 0.4), jittered, views.blur(alike, g)):
        assert len(changed.flatten(1).unique(dim=0)) > 25
    spared = ((jittered - alike).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert 2 <= spared <= 16, "every fifth is spared"


@pytest.mark.parametrize("by", [-0.4, -0.07, 0.05, 0.3])
@pytest.mark.parametrize("index, theirs", [*enumerate(("brightness", "contrast", "saturation", "hue"))])
def test_jitter_is_torchvisions(drawn, index, theirs, by):
    x = drawn[0][:12].float() / 255
    ours = views.JITTER[index][0](x, torch.full((12, 1, 1, 1), by)).clamp(0, 1)
    truth = getattr(TF, f"adjust_{theirs}")(x, by if theirs == "hue" else 1 + by)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-4)  # they round the weights of gray to 4 digits


def test_blur_is_a_gaussian_with_a_width_for_each_picture(drawn):
    x = drawn[0][:5].float() / 255
    sigma = torch.empty(5).uniform_(0.1, 2, generator=torch.Generator().manual_seed(7))
    truth = torch.stack([TF.gaussian_blur(one, [3, 3], [s]) for one, s in zip(x, sigma.tolist())])
    torch.testing.assert_close(views.blur(x, torch.Generator().manual_seed(7)), truth)


def test_crops_are_parts_of_the_picture():
    ramp = torch.linspace(0.1, 0.9, 32).expand(500, 3, 32, 32).clone()  # rises to the right
    cut = views.crop(ramp, torch.Generator().manual_seed(0), 0.25)
    width = (cut[:, 0, 16, 24] - cut[:, 0, 16, 8]) / (ramp[0, 0, 0, 24] - ramp[0, 0, 0, 8])
    assert 0.4 < (width < 0).float().mean() < 0.6, "half of them are mirrored"
    least = math.sqrt(0.25 * 3 / 4)
    assert least - 0.01 < width.abs().min() < 0.5 and 0.95 < width.abs().max() < 1.001
    whole = views.crop(ramp, torch.Generator().manual_seed(0), 1.0)
    same = torch.where(whole[:, :1, :1, :1] < 0.5, whole, whole.flip(3))
    torch.testing.assert_close(same, ramp, rtol=0, atol=1e-5)


# --- the method ---------------------------------------------------------------------------------------------


def test_loss_is_0_for_equal_2_for_unrelated_4_for_opposite_vectors():
    g = torch.Generator().manual_seed(0)
    p, z = torch.randn(4000, 64, generator=g), torch.randn(4000, 64, generator=g)
    torch.testing.assert_close(distance(p, 3 * p), torch.zeros(4000), rtol=0, atol=1e-6)
    torch.testing.assert_close(distance(p, -p), torch.full((4000,), 4.0))
    both = (distance(p, z) + distance(z, p)).mean()
    assert abs(both - 4) < 4 * 2 * 2 / math.sqrt(64 * 4000), "the cosine deviates by 1/sqrt(d)"


def test_each_view_predicts_the_target_of_the_other(drawn, monkeypatch):
    seen = []

    def noted(*args):
        seen.append(views.view(*args))
        return seen[-1]

    monkeypatch.setattr(example, "view", noted)
    loss, _ = small(drawn[0], seed=2).step()
    start = small(drawn[0], seed=2)
    z = [nn.functional.normalize(start.target(v)) for v in seen]
    p = [nn.functional.normalize(start.predictor(start.online(v))) for v in seen]
    expected = 4 - 2 * (p[0] * z[1]).sum(1) - 2 * (p[1] * z[0]).sum(1)
    assert len(seen) == 2 and loss == pytest.approx(expected.mean().item(), abs=1e-5)


def test_equal_views_and_no_predictor_leave_no_loss(drawn, monkeypatch):
    byol = small(drawn[0])
    byol.predictor = nn.Identity()
    assert byol.step()[0] > 0.1
    byol = small(drawn[0])
    byol.predictor = nn.Identity()
    monkeypatch.setattr(example, "view", lambda x, *_: views.scaled(x / 255))
    assert byol.step()[0] == pytest.approx(0, abs=1e-5)


def test_target_gets_no_gradient_and_follows_slowly(drawn):
    byol = small(drawn[0], base=0.9, steps=4)
    start = weights(byol.target)
    byol.step()
    expected = start
    for k in range(1, 4):  # the rate of the first step is small: compare later ones, too
        before = weights(byol.target)
        byol.step()
        tau = 1 - 0.1 * (math.cos(math.pi * k / 4) + 1) / 2
        expected = tau * before + (1 - tau) * weights(byol.online)
        torch.testing.assert_close(weights(byol.target), expected, rtol=0, atol=1e-7)
    assert all(w.grad is None and not w.requires_grad for w in byol.target.parameters())
    assert (weights(byol.target) - start).norm() > 1e-3


def test_tau_of_1_freezes_the_target(drawn):
    byol = small(drawn[0], base=1.0)
    target, online = weights(byol.target), weights(byol.online)
    for _ in range(2):
        byol.step()
    assert torch.equal(weights(byol.target), target)
    assert not torch.equal(weights(byol.online), online)


def test_spread_is_1_all_over_the_sphere_and_0_at_one_point():
    z = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert spread(z) == pytest.approx(1, abs=0.02)
    assert spread(z[:1] * torch.rand(100, 1)) == pytest.approx(0, abs=1e-5)


def test_a_collapse_stops_the_run(drawn):
    byol = small(drawn[0])
    assert byol.step()[1] > 0.3
    nn.init.zeros_(byol.target[1][-1].weight)  # what is left is the bias, the same for every picture
    with pytest.raises(SystemExit, match="step 2: collapse: the spread of embeddings is 0.00, below 0.3"):
        byol.step()


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(drawn, tmp_path):
    whole, cut = small(drawn[0], seed=5), small(drawn[0], seed=5)
    losses = [whole.step()[0] for _ in range(6)]
    for _ in range(3):
        cut.step()
    cut.save(tmp_path / "byol.pt")
    resumed = small(drawn[0], seed=6)
    resumed.load(tmp_path / "byol.pt")
    assert [resumed.step()[0] for _ in range(3)] == losses[3:]
    for part in ("online", "target", "predictor"):
        ours, theirs = getattr(resumed, part).state_dict(), getattr(whole, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


# --- what it is worth ---------------------------------------------------------------------------------------


def test_weights_learn_labels(drawn):
    pictures, labels = drawn
    torch.manual_seed(0)
    start = example.encoder()
    assert sum(w.numel() for w in start.parameters()) == pytest.approx(3.1e5, rel=0.05)
    before = weights(start)
    pictures, labels = pictures[:12].clone(), labels[:12] % 2
    pictures[labels == 1, 2] //= 4  # yellow
    net = learn(start, pictures, labels, steps=30, seed=0)
    assert torch.equal(weights(start), before), "a copy is trained"
    assert right(outputs(net, pictures), labels) == 100


def test_probe_finds_what_a_line_can_tell_apart():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    color = torch.eye(3)[labels].view(90, 3, 1, 1)
    pictures = (100 + 40 * color + 30 * torch.rand(90, 3, 32, 32, generator=g)).byte()
    mean_color = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert probe(mean_color, (pictures[:30], labels[:30]), (pictures[30:], labels[30:])) == 100
    shuffled = labels[:30][torch.randperm(30, generator=g)]
    assert probe(mean_color, (pictures[:30], shuffled), (pictures[30:], labels[30:])) < 90


def test_command_prints_the_table_and_keeps_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "FINE_TUNING", 2)
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
