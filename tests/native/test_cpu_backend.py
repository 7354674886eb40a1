"""What only the CPU backend promises: the same bits for any number of threads, and every instruction set
right."""

import os
import re
import subprocess
import sys

import pytest
import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, knn_mean_dist2, photometric_loss, rasterize
from diff_gaussian_rasterization import __main__ as self_check

from tests.native.scenes import assert_not_blank, make_scene, relative_error, run
from tests.native.test_accuracy import compare

ISAS = torch.ops.tilesplat.cpu_isas()


@pytest.fixture
def restore():
    """Leave threads and instruction set as they were."""
    threads, isa = torch.get_num_threads(), torch.ops.tilesplat.cpu_isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.tilesplat.set_cpu_isa(isa)


def everything(dtype):
    """One bit pattern of each operator."""
    scene = make_scene(3000, (150, 110), seed=8, scale=0.06)
    stats = ScreenStats.zeros(3000, "cpu", absolute=True)
    out, grads = run(rasterize, scene, dtype, stats=stats)
    assert_not_blank(out.image, 0.1)
    image = out.image.clone().requires_grad_()
    loss, l1 = photometric_loss(image, out.image.flip(2).contiguous(), 0.2)
    loss.backward()
    param = torch.nn.Parameter(scene.sh_rest.to(dtype))
    param.grad = grads["sh_rest"].clone()
    FusedAdam([param], lr=0.01).step()
    neighbors = knn_mean_dist2(scene.means.to(dtype))
    return [*out, *grads.values(), stats.grad_norm_sum, stats.abs_grad_norm_sum, loss.detach(), l1,
            image.grad,
            param.detach(), neighbors]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_any_number_of_threads_gives_the_same_bits(dtype, restore):
    torch.set_num_threads(1)
    one = everything(dtype)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(one, everything(dtype)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_accurate(isa, restore):
    torch.ops.tilesplat.set_cpu_isa(isa)
    assert torch.ops.tilesplat.cpu_isa() == isa
    assert_not_blank(compare(make_scene(400, (75, 53), seed=3), "cpu").image, 0.05)
    compare(make_scene(200, (33, 20), seed=4, scale=0.02, degree=1).but(antialiasing=True), "cpu")


@pytest.mark.parametrize("isa", ISAS)
def test_every_operator_is_right_on_every_instruction_set(isa, restore):
    truth = everything(torch.float64)
    torch.ops.tilesplat.set_cpu_isa(isa)
    for a, t in zip(everything(torch.float32), truth):
        assert relative_error(a, t) < 1e-4


def test_the_environment_chooses_the_instruction_set():
    code = "import torch, diff_gaussian_rasterization; print(torch.ops.tilesplat.cpu_isa())"
    if "TILESPLAT_ISA" not in os.environ:
        assert torch.ops.tilesplat.cpu_isa() == ISAS[0]
    env = {**os.environ, "TILESPLAT_ISA": ISAS[-1]}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == ISAS[-1], out.stderr


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match=f"{ISAS[0]}.*got sse17"):
        torch.ops.tilesplat.set_cpu_isa("sse17")


def test_the_self_check_looks_at_every_instruction_set(monkeypatch, capsys):
    def wrong_for_the_last(*args, **settings):
        out = rasterize(*args, **settings)
        wrong = torch.ops.tilesplat.cpu_isa() == ISAS[-1]
        return out._replace(image=out.image * 1.001) if wrong else out

    monkeypatch.setattr(self_check, "rasterize", wrong_for_the_last)
    assert self_check.main() == 1
    verdicts = dict(re.findall(r"self-check   cpu (\w+): (\w+)", capsys.readouterr().out))
    assert verdicts == dict.fromkeys(ISAS, "ok") | {ISAS[-1]: "FAILED"}
