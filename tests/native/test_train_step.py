"""The fused training step is rasterize, photometric_loss, backward and Adam, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, TrainStep, photometric_loss, rasterize
from diff_gaussian_rasterization.dealt import DealtStep
from torch import Tensor

from tests.native.scenes import DEVICES, Scene, assert_not_blank, make_scene, relative_error, to_raw

NAMES = ("means", "sh_dc", "sh_rest", "opacities", "scales", "quats")
LRS = (2e-3, 3e-3, 1e-3, 2e-2, 5e-3, 4e-3)
BETAS, EPS, LAMBDA = (0.9, 0.999), 1e-8, 0.2


@dataclass
class Outcome:
    params: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    stats: ScreenStats
    losses: Tensor  # loss, L1, steps taken, steps skipped


def training_scene(
    count: int, size=(64, 48), degree: int = 3, stored: int | None = None, seed: int = 0
) -> Scene:
    """Raw, a third of it behind the camera; `stored` is the degree that sh_rest has room for."""
    scene = to_raw(make_scene(count, size, seed=seed, degree=degree if stored is None else stored))
    scene.means[1::3] += 2.5 * (torch.linalg.inv(scene.world_to_camera)[:3, 3] - scene.means[1::3])
    return scene.but(sh_degree=degree)


def target_like(scene: Scene, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(5)
    small = torch.rand(1, 3, 6, 7, generator=g)
    size = (scene.height, scene.width)
    image = torch.nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=True)[0]
    return (image * 255).round().to(torch.uint8) if dtype == torch.uint8 else image.to(dtype)


def fresh(scene: Scene, device: str, dtype: torch.dtype, absolute: bool) -> Outcome:
    params = [getattr(scene, name).to(device, dtype, copy=True).contiguous() for name in NAMES]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    stats = ScreenStats.zeros(len(params[0]), device, absolute=absolute)
    return Outcome(params, *zeros, stats, torch.zeros(4, device=device))


def camera(scene: Scene, step: int, device: str, dtype: torch.dtype) -> dict:
    """Every step looks from a slightly different place."""
    view = scene.world_to_camera.clone()
    view[0, 3] += 0.05 * step
    return {
        "world_to_camera": view.to(device, dtype),
        "K": scene.K.to(device, dtype),
        "background": scene.background.to(device, dtype),
    }


def train_separately(scene, steps, target, mask, device, dtype=torch.float32, absolute=True) -> Outcome:
    out = fresh(scene, device, dtype, absolute)
    leaves = {name: p.requires_grad_() for name, p in zip(NAMES, out.params)}
    optimizer = FusedAdam([{"params": [p], "lr": lr} for p, lr in zip(out.params, LRS)], betas=BETAS, eps=EPS)
    for step in range(1, steps + 1):
        image = rasterize(
            **leaves, **camera(scene, step, device, dtype), width=scene.width, height=scene.height,
            sh_degree=scene.sh_degree, antialiasing=scene.antialiasing, raw=True, stats=out.stats,
        ).image  # fmt: skip
        loss, l1 = photometric_loss(image, target, LAMBDA, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out.losses += torch.stack([loss.detach(), l1, torch.ones_like(l1), torch.zeros_like(l1)])
    if scene.means.numel():
        assert_not_blank(image.detach(), 0.01)
    for i, p in enumerate(out.params):
        state = optimizer.state[p]
        out.exp_avg[i], out.exp_avg_sq[i] = state["exp_avg"], state["exp_avg_sq"]
        p.requires_grad_(False)
    return out


def fused_step(
    out: Outcome, scene, step, target, mask, device, dtype=torch.float32, capacity=0, entries=None
):
    view = camera(scene, step, device, dtype)
    stats = out.stats
    torch.ops.tilesplat.train_step(
        out.params, out.exp_avg, out.exp_avg_sq, list(LRS), *BETAS, EPS, step,
        view["world_to_camera"], view["K"], view["background"], target, mask,
        scene.sh_degree, scene.antialiasing, LAMBDA,
        stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum, out.losses, capacity, entries,
    )  # fmt: skip


def train_fused(
    scene, steps, target, mask, device, dtype=torch.float32, absolute=True, capacity=0
) -> Outcome:
    out = fresh(scene, device, dtype, absolute)
    for step in range(1, steps + 1):
        fused_step(out, scene, step, target, mask, device, dtype, capacity)
    return out


def assert_same(fused: Outcome, separate: Outcome, start: Scene, tolerance: float) -> None:
    for i, name in enumerate(NAMES):
        before = getattr(start, name).to(separate.params[i])
        for what, a, b in (
            ("moves", fused.params[i] - before, separate.params[i] - before),
            ("first moments", fused.exp_avg[i], separate.exp_avg[i]),
            ("second moments", fused.exp_avg_sq[i], separate.exp_avg_sq[i]),
        ):
            assert a.shape == b.shape
            assert relative_error(a, b) <= tolerance, f"{what} of {name}: {relative_error(a, b):.1e}"
    for key in ("grad_norm_sum", "visits", "abs_grad_norm_sum"):
        a, b = getattr(fused.stats, key), getattr(separate.stats, key)
        if b is not None:
            assert relative_error(a, b) <= tolerance, key
    assert relative_error(fused.losses, separate.losses) <= 1e-5


def compare(scene: Scene, device, steps=5, target_dtype=torch.uint8, masked=False, absolute=True, capacity=0):
    target = target_like(scene, target_dtype).to(device)
    mask = None
    if masked:
        mask = torch.ones(scene.height, scene.width, device=device)
        mask[: scene.height // 3] = 0.25
    separate = train_separately(scene, steps, target, mask, device, absolute=absolute)
    fused = train_fused(scene, steps, target, mask, device, absolute=absolute, capacity=capacity)
    # Sums over pixels in another order; where the gradient nearly cancels, Adam makes something of the rest.
    assert_same(fused, separate, scene, 1e-3)
    if len(scene.means) > 10:
        moved = (separate.params[0] - scene.means.to(separate.params[0])).abs().amax(1) > 0
        assert 0.3 < moved.float().mean() < 0.9, "some are seen, and some are not"
    return fused, separate


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_every_degree(degree, device):
    compare(training_scene(300, degree=degree), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_degrees_that_are_not_in_use_yet(degree, device):
    """Their gradient is zero, and so they stay."""
    scene = training_scene(300, degree=degree, stored=3)
    fused, _ = compare(scene, device)
    unused = (degree + 1) ** 2 - 1
    assert torch.equal(fused.params[2][:, unused:].cpu(), scene.sh_rest[:, unused:].float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 128, 129, 300])
def test_any_count(count, device):
    scene = training_scene(count, size=(33, 20), degree=2)
    scene.means[:1] = 0.0  # in the middle of the view
    compare(scene, device, steps=3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(16, 16), (50, 37), (100, 5)])
def test_ragged_sizes(size, device):
    compare(training_scene(300, size=size), device, steps=3)


@pytest.mark.parametrize("device", DEVICES)
def test_options(device):
    compare(training_scene(200).but(antialiasing=True), device)
    compare(training_scene(200), device, target_dtype=torch.float32, absolute=False)
    compare(training_scene(200), device, masked=True)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
def test_room_to_spare_changes_nothing(device):
    compare(training_scene(300), device, capacity=100_000)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_out_of_view_go_on_moving(device):
    """As with torch.optim.Adam: their gradient is zero, their momentum is not."""
    scene = training_scene(200)
    target = target_like(scene, torch.uint8).to(device)
    out = train_fused(scene, 3, target, None, device)
    before = [p.clone() for p in out.params]
    away = scene.but(world_to_camera=scene.world_to_camera.clone())
    away.world_to_camera[2, 3] -= 100  # everything is behind the camera now
    visits = out.stats.visits.clone()
    avg = [m.clone() for m in out.exp_avg]
    fused_step(out, away, 4, target, None, device)
    assert torch.equal(out.stats.visits, visits)
    for name, p, old, m, old_m in zip(NAMES, out.params, before, out.exp_avg, avg):
        assert (p - old).abs().max() > 0, name
        assert torch.allclose(m, 0.9 * old_m, rtol=1e-5), name


@pytest.mark.skipif("cuda" not in DEVICES, reason="a CPU asks for no room")
def test_no_gaussians_and_room_for_some():
    """Density control can leave none; a view asks for the room it had."""
    scene = training_scene(0)
    target = target_like(scene, torch.uint8).cuda()
    out = fresh(scene, "cuda", torch.float32, True)
    fused_step(out, scene, 1, target, None, "cuda", capacity=100_000)
    assert out.losses[2] == 1 and out.losses[0] > 0.01


def test_the_room_for_pairs_grows_with_the_gaussians():
    """Guessed from what a view wanted before: enough, and not much more."""
    step, million = TrainStep(2, torch.device("cpu")), 1_000_000

    def assert_guess(count: int, least: float, most: float):
        assert least * million <= step._guess(0, count) <= most * million

    assert_guess(1000, 0, 0)  # new: to be counted first
    step._entries[0] = 3 * million  # as the GPU writes it, when it gets there
    assert_guess(1000, 3.3, 3.9)
    assert_guess(1800, 1.8 * 3.3, 1.8 * 3.9)
    step._entries[0] = 5 * million
    assert_guess(1800, 5.5, 6.5)
    assert_guess(900, 5.5, 6.5)  # fewer Gaussians need not be fewer pairs
    assert step.skipped == 0
    step._entries[0] = 1 * million  # opacities were reset, and will grow back
    assert_guess(900, 5.0, 6.5)
    for _ in range(30):
        step._guess(0, 900)
    assert_guess(900, 1.1, 1.4)
    step._entries[0] = 2 * million
    assert_guess(900, 2.2, 2.6)
    assert step.skipped == 1
    assert_guess(1350, 3.3, 3.9)
    assert_guess(1350, 2.9, 3.9)  # again, before the GPU has written down how many there were
    step.forget(0)
    assert_guess(1350, 0, 0)
    assert step._guess(1, 900) == 0, "another view"


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
def test_a_step_without_enough_room_is_skipped_and_counted(device):
    scene = training_scene(300)
    target = target_like(scene, torch.uint8).to(device)
    entries = torch.zeros(1, dtype=torch.int64).pin_memory()
    out = train_fused(scene, 2, target, None, device)
    everything = [*out.params, *out.exp_avg, *out.exp_avg_sq, *vars(out.stats).values()]
    before, losses = [t.clone() for t in everything], out.losses.clone()

    fused_step(out, scene, 3, target, None, device, capacity=100, entries=entries)
    torch.cuda.synchronize()
    wanted = entries.item()
    assert wanted > 100
    assert all(torch.equal(a, b) for a, b in zip(everything, before))
    assert torch.equal(out.losses[:3], losses[:3]) and out.losses[3] == 1

    fused_step(out, scene, 3, target, None, device, capacity=wanted, entries=entries)
    torch.cuda.synchronize()
    assert entries.item() == wanted and out.losses[2] == losses[2] + 1 and out.losses[3] == 1
    assert not torch.equal(out.params[0], before[0])


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_named(device):
    scene = training_scene(10)
    target = target_like(scene, torch.uint8).to(device)
    out = fresh(scene, device, torch.float32, False)
    with pytest.raises(ValueError, match=r"target must be \[3, H, W\], got \[48, 64\] uint8"):
        fused_step(out, scene, 1, target[0], None, device)
    with pytest.raises(ValueError, match=r"step must be at least 1, got 0"):
        fused_step(out, scene, 0, target, None, device)
    with pytest.raises(ValueError, match=r"mask must be \[48, 64\] float32 .*, got \[64\] float32"):
        fused_step(out, scene, 1, target, torch.ones(64, device=device), device)
    out.losses = out.losses[:3]
    with pytest.raises(ValueError, match=r"losses must be \[4\] float32 .*, got \[3\] float32"):
        fused_step(out, scene, 1, target, None, device)
    out.params.pop()
    with pytest.raises(ValueError, match=r"params must be means, .* and quats, got 5 tensors"):
        fused_step(out, scene, 1, target, None, device)


# ---- rows that wait (GPU) -----------------------------------------------------------------------------

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="only the GPU lets rows wait")
BEGUN = 2000  # steps before: corrections of Adam's bias change slowly by then


def take_steps(train, out: Outcome, scene: Scene, first: int, last: int, views, eps: float = 1e-15) -> None:
    """Steps first..last of `train`, looking from views(step). Epsilon is small, as in training: rows that
    wait know it only roughly."""
    target = target_like(scene, torch.uint8).to("cuda")
    for step in range(first, last + 1):
        view = camera(scene, 0, "cuda", torch.float32)
        view["world_to_camera"] = views(step).to("cuda", torch.float32)
        rates = [lr * 0.99**step for lr in LRS]
        out.losses += train(
            out.params, out.exp_avg, out.exp_avg_sq, rates, BETAS, eps, BEGUN + step,
            view=0, **view, target=target, mask=None, sh_degree=scene.sh_degree, antialiasing=False,
            lambda_dssim=LAMBDA, stats=out.stats,
        )  # fmt: skip


class DenseStep(TrainStep):
    """Moves all rows in every step."""

    def _account(self, count, step):
        return None, None


def looking(scene: Scene, away: bool) -> Tensor:
    view = scene.world_to_camera.clone()
    view[2, 3] -= 100.0 * away  # everything is behind the camera
    return view


def without_gradients(out: Outcome, first: int, last: int) -> Outcome:
    """Where Adam takes the rows in these steps if no view shows any: in float64."""
    params, exp_avg, exp_avg_sq = (
        [t.double() for t in ts] for ts in (out.params, out.exp_avg, out.exp_avg_sq)
    )
    for step in range(first, last + 1):
        bias1, bias2 = (1 - beta ** (BEGUN + step) for beta in BETAS)
        for p, m, v, lr in zip(params, exp_avg, exp_avg_sq, LRS):
            m *= BETAS[0]
            v *= BETAS[1]
            p -= lr * 0.99**step / bias1 * m / ((v / bias2).sqrt() + 1e-15)
    return Outcome(params, exp_avg, exp_avg_sq, out.stats, out.losses)


def errors(out: Outcome, truth: Outcome, before: list[Tensor]) -> dict[str, float]:
    """Of what has changed since `before`, relative to it, and of the moments."""
    found = {}
    for i, name in enumerate(NAMES):
        old = before[i].double()
        found[name] = relative_error(out.params[i].double() - old, truth.params[i].double() - old)
        found[f"first moments of {name}"] = relative_error(out.exp_avg[i], truth.exp_avg[i])
        found[f"second moments of {name}"] = relative_error(out.exp_avg_sq[i], truth.exp_avg_sq[i])
    return found


def copies(out: Outcome) -> Outcome:
    tensors = ([t.clone() for t in ts] for ts in (out.params, out.exp_avg, out.exp_avg_sq))
    return Outcome(*tensors, ScreenStats.zeros(len(out.params[0]), "cuda"), torch.zeros(4, device="cuda"))


@gpu_only
@pytest.mark.parametrize("missed", [1, 2, 126, 127, 128, 300])
@pytest.mark.parametrize("degree", [3, 1])
def test_rows_that_waited_end_where_dense_adam_takes_them(missed, degree):
    scene = training_scene(300, degree=degree)
    start = fresh(scene, "cuda", torch.float32, False)
    take_steps(DenseStep(1, "cuda"), start, scene, 1, 10, lambda step: looking(scene, False))
    truth = without_gradients(start, 11, 10 + missed)

    dense, waiting, step = copies(start), copies(start), TrainStep(1, "cuda")
    take_steps(DenseStep(1, "cuda"), dense, scene, 11, 10 + missed, lambda step: looking(scene, True))
    take_steps(step, waiting, scene, 11, 10 + missed, lambda step: looking(scene, True))
    if missed < 127:
        assert all(torch.equal(p, q) for p, q in zip(waiting.params, start.params)), "nothing has moved yet"
    step.settle()
    assert torch.equal(waiting.losses, dense.losses) and not waiting.stats.visits.any()
    as_good_as = errors(dense, truth, start.params)
    for what, error in errors(waiting, truth, start.params).items():
        # Parameters are rounded in every step of dense Adam, and once here.
        assert error <= max(1e-5, 2 * as_good_as[what]), f"{what}: {error:.1e}, dense {as_good_as[what]:.1e}"
        assert error < 1e-2


@gpu_only
def test_rows_that_come_into_view_have_caught_up():
    """Now here, now there: the pictures, and so the losses and gradients, are those of dense Adam."""
    scene = training_scene(2000, size=(96, 64))

    def views(step: int) -> Tensor:
        view = scene.world_to_camera.clone()
        view[0, 3] += 1.5 * (step % 5 - 2)
        view[2, 3] -= 1.0 * (step % 3)
        return view

    dense, waiting = (fresh(scene, "cuda", torch.float32, False) for _ in range(2))
    before = [p.clone() for p in dense.params]
    take_steps(DenseStep(1, "cuda"), dense, scene, 1, 12, views, EPS)
    step = TrainStep(1, "cuda")
    take_steps(step, waiting, scene, 1, 12, views, EPS)
    still = [
        (step._moved_at.cpu() < BEGUN + 12).float().mean().item(),
        (dense.stats.visits.cpu() == 12).float().mean().item(),
    ]
    assert still[0] > 0.2 and still[1] < 0.8, "some are seen, and some are not"
    step.settle()
    for what, error in errors(waiting, dense, before).items():
        assert error <= 1e-3, f"{what}: {error:.1e}"
    assert torch.equal(waiting.stats.visits, dense.stats.visits)
    assert relative_error(waiting.losses, dense.losses) <= 1e-5


@gpu_only
def test_rows_near_the_picture_have_caught_up():
    """Of geometry alone, as where colors are on the host."""
    scene, step = training_scene(2000, size=(96, 64)), TrainStep(1, "cuda")
    out = fresh(scene, "cuda", torch.float32, False)

    def views(step: int) -> Tensor:
        view = scene.world_to_camera.clone()
        view[0, 3] += 1.5 * (step % 5 - 2)
        return view

    take_steps(step, out, scene, 1, 12, views, EPS)
    moved_at = step._moved_at.clone()
    near, settled, truth = copies(out), copies(out), copies(out)
    now, geometry = BEGUN + 12, (0, 3, 4, 5)

    def of(outcome: Outcome) -> list[list[Tensor]]:
        kinds = outcome.params, outcome.exp_avg, outcome.exp_avg_sq
        return [[values[i] for i in geometry] for values in kinds]

    operators, behind = torch.ops.tilesplat, (BETAS[1], 1e-15, now)
    everything = truth.params, truth.exp_avg, truth.exp_avg_sq
    operators.settle(*everything, *behind, moved_at.clone(), step._missed)
    operators.settle(*of(settled), *behind, moved_at.clone(), step._missed)
    place, K = (matrix.to("cuda", torch.float32) for matrix in (views(3), scene.K))
    where = moved_at.clone()
    size = scene.width, scene.height
    mask = operators.near_rows(*of(near), *behind, where, step._missed, place, K, *size)
    means, opacities, scales, quats = of(truth)[0]
    shows = rasterize(
        means, quats, scales, opacities, sh_dc=truth.params[1], sh_rest=truth.params[2],
        world_to_camera=place, K=K, width=size[0], height=size[1], sh_degree=3,
        background=torch.zeros(3, device="cuda"), raw=True,
    ).radii > 0  # fmt: skip
    assert not (shows & ~mask).any() and 0.1 < shows.float().mean() and mask.float().mean() < 0.7
    late = moved_at < now
    assert (late & mask).sum() > 10 and (late & ~mask).sum() > 20
    assert torch.equal(where, torch.where(mask, now, moved_at))
    for kinds in zip(of(near), of(settled), of(truth), of(out)):
        for a, b, c, begun in zip(*kinds):
            assert torch.equal(b, c)
            rows = mask.view(-1, *[1] * (c.dim() - 1))
            assert torch.equal(a, torch.where(rows, c, begun)) and not torch.equal(c, begun)


@gpu_only
def test_no_row_is_forgotten_when_steps_are_taken_elsewhere():
    scene = training_scene(200)
    out, step = fresh(scene, "cuda", torch.float32, False), TrainStep(1, "cuda")
    take_steps(step, out, scene, 1, 3, lambda step: looking(scene, True))
    with pytest.raises(RuntimeError, match=r"settle\(\) must be called"):
        take_steps(step, out, scene, 5, 5, lambda step: looking(scene, True))
    step.settle()
    take_steps(step, out, scene, 5, 6, lambda step: looking(scene, False))


@gpu_only
@pytest.mark.parametrize("long", [False, True])
def test_a_step_by_records_is_the_fused_one(long):
    """As of several processes. Where lists are long, their blending leaves less behind, in two calls."""
    scene = training_scene(60_000 if long else 300, size=(1024, 768) if long else (64, 48))
    if long:
        scene = scene.but(scales=scene.scales + 1.5, opacities=scene.opacities - 5)
    target, step = target_like(scene, torch.uint8).cuda(), DealtStep(0, 1, torch.device("cuda"))
    fused, dealt = train_fused(scene, 1, target, None, "cuda"), fresh(scene, "cuda", torch.float32, True)
    view, size = camera(scene, 1, "cuda", torch.float32), (scene.width, scene.height)
    records, counts = step.project(
        dealt.params, dealt.exp_avg, dealt.exp_avg_sq, list(LRS), BETAS, EPS, 1, waits=False, sizes=[size],
        world_to_camera=[view["world_to_camera"]], K=[view["K"]], sh_degree=3,
        antialiasing=scene.antialiasing,
    )  # fmt: skip
    lists = step.lists(records, counts, *size)
    assert records.untyped_storage().nbytes() == 0 and (int(lists[3][0]) > 1 << 23) == long
    losses, grads = step.compare(lists, view["background"], target, None, LAMBDA, True)
    assert (int(lists[3][3]) > scene.width * scene.height / 256) == long, "beyond the first 256 of a list"
    step.move(grads, dealt.stats)
    assert relative_error(losses, fused.losses[:2]) <= 1e-6
    assert torch.equal(dealt.stats.visits, fused.stats.visits)
    for a, b in zip(dealt.exp_avg + dealt.exp_avg_sq, fused.exp_avg + fused.exp_avg_sq):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("i", range(6))
def test_every_parameter_has_a_row_per_gaussian(i, device):
    scene = training_scene(50)
    target = target_like(scene, torch.uint8).to(device)
    out = fresh(scene, device, torch.float32, absolute=False)
    for tensors in (out.params, out.exp_avg, out.exp_avg_sq):
        tensors[i] = tensors[i][:-1].contiguous()
    expected = rf"{NAMES[i or 1]} must be \[{50 if i else 49}, .*\] float32 .*, got \[{49 if i else 50}, "
    with pytest.raises(ValueError, match=expected):
        fused_step(out, scene, 1, target, None, device)
    if device == "cpu":
        return  # where no row waits
    account = (
        torch.zeros(len(out.params[0]), dtype=torch.int32, device=device),
        torch.zeros(128, 8).to(device),
    )
    with pytest.raises(ValueError, match=expected):
        torch.ops.tilesplat.settle(out.params, out.exp_avg, out.exp_avg_sq, BETAS[1], EPS, 1, *account)
