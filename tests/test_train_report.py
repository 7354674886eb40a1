"""What a run tells: smoothed losses, scores, the stopwatch; and that telling it does not hold up the GPU."""

import json
import math
import time

import pytest
import torch

from scene.folder import ModelFolder
from training.report import Deferred, Report, Stopwatch, Summary, memory_in_use, peak_memory, score

CPU = torch.device("cpu")


def test_deferred_values_arrive_once_and_in_order():
    values = Deferred(CPU)
    assert values.receive() == []
    values.put(1, {"a": torch.tensor(0.5), "b": torch.tensor(1.5)})
    values.put(2, {"b": torch.tensor(2.5)})
    values.send()
    values.put(3, {"a": torch.tensor(8.0)})
    assert values.receive() == [(1, {"a": 0.5, "b": 1.5}), (2, {"b": 2.5})]
    assert values.receive() == []
    values.send()
    assert values.receive() == [(3, {"a": 8.0})]


def test_losses_are_smoothed_and_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report(ModelFolder(tmp_path), 1, 25, CPU, quiet=True)
    smooth = 0.0
    for iteration in range(1, 26):
        loss = torch.tensor(1.0 / iteration, requires_grad=True)
        report.step(iteration, {"loss": loss * 2, "l1": loss}, count=7)
        smooth = 0.4 * 2.0 / iteration + 0.6 * smooth
    assert report.history.smooth["loss"] == pytest.approx(smooth, rel=1e-5)
    report.close()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    totals = events.Scalars("train_loss_patches/total_loss")
    expected = [
        sum(2.0 / i for i in rows) / len(rows) for rows in (range(1, 11), range(11, 21), range(21, 26))
    ]
    assert [event.step for event in totals] == [10, 20, 25]
    assert [event.value for event in totals] == pytest.approx(expected, rel=1e-5)
    assert all(event.value > 0 for event in events.Scalars("iter_time"))


def test_a_step_that_was_not_taken_has_no_loss(tmp_path):
    report = Report(ModelFolder(tmp_path), 1, 10, CPU, quiet=True)
    for iteration in range(1, 11):
        loss = torch.tensor(0.0 if iteration == 9 else 0.5)
        report.step(iteration, {"loss": loss, "l1": loss}, count=7)
    assert report.history.smooth["loss"] == pytest.approx(0.5 * (1 - 0.6**9), rel=1e-5)
    report.close()


def test_scores():
    truth = torch.full((3, 8, 8), 102, dtype=torch.uint8)  # 0.4
    brighter, overexposed = torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 7.0)
    scores = score([(brighter, truth, None), (overexposed, truth, None)])  # errors 0.1 and, clamped, 0.6
    assert scores.views == 2
    assert scores.l1 == pytest.approx(0.35, abs=1e-5)
    assert scores.psnr == pytest.approx((20 - 20 * math.log10(0.6)) / 2, abs=1e-3)
    assert scores.psnr_by_channel == pytest.approx(scores.psnr, abs=1e-5)
    assert score([]) is None


def test_stopwatch_leaves_out_what_it_should():
    watch = Stopwatch(CPU)
    time.sleep(0.05)
    with watch.leave_out():
        time.sleep(0.2)
    assert 0.2 <= watch.left_out < 0.3
    assert 0.05 <= watch.seconds() < 0.15


def test_memory_is_that_of_the_process():
    before = memory_in_use(CPU)
    block = torch.ones(30_000_000)  # 120 MB
    assert memory_in_use(CPU) - before > 100e6
    del block
    assert peak_memory(CPU) > before + 100e6


def test_summary_is_written_and_told(tmp_path):
    report = Report(ModelFolder(tmp_path), 1, 1, CPU, quiet=True)
    scores = {"test": {1: score([(torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2), None)])}}
    report.finish(
        Summary(1, 5, scores, 1.5, 0.5, 3.0, 2_000_000, "2 CPU threads", str(tmp_path), "a.ply"),
        ModelFolder(tmp_path),
    )
    report.close()
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["gaussians"] == 5 and told["scores"]["test"]["1"]["psnr"] == pytest.approx(6.0206, abs=1e-3)
    log = (tmp_path / "train.log").read_text()
    for text in ("PSNR test   6.021 dB", "1.5 s optimization", "2 MB", "a.ply"):
        assert text in log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reporting_does_not_wait_for_the_gpu(tmp_path):
    device = torch.device("cuda")
    report = Report(ModelFolder(tmp_path), 1, 1000, device, quiet=True)
    loss = torch.rand((), device=device)
    report.step(1, {"loss": loss, "l1": loss}, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(2, 100):
            report.step(iteration, {"loss": loss, "l1": loss}, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.history.smooth
    report.close()
