"""Numbers that change over a run, against values worked out by hand, and the order in which views are
shown."""

import math

import pytest

from training.queue import ViewQueue, spread
from utils.schedules import log_linear, sh_degree_at


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1.6e-4),
        (7_500, 1.6e-4 * 10**-0.5),  # a quarter of two decades
        (15_000, 1.6e-5),
        (30_000, 1.6e-6),
        (40_000, 1.6e-6),  # held
    ],
)
def test_position_learning_rate(step, expected):
    assert log_linear(step, 1.6e-4, 1.6e-6, 30_000) == pytest.approx(expected, rel=1e-12)


def test_depth_weight_halfway_is_the_geometric_mean():
    assert log_linear(15_000, 1.0, 0.01, 30_000) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(
    "step, factor",
    [(0, 1e-3), (2_500, 1e-3 + 0.999 * math.sin(math.pi / 4)), (5_000, 1.0), (9_000, 1.0)],
)
def test_exposure_eases_in(step, factor):
    # full_eval's settings: 1e-3 to 1e-4, 5000 delay steps, delay mult 1e-3
    plain = log_linear(step, 1e-3, 1e-4, 30_000)
    assert log_linear(step, 1e-3, 1e-4, 30_000, 5_000, 1e-3) == pytest.approx(factor * plain, rel=1e-12)


def test_off():
    assert log_linear(10, 0.0, 0.0, 100) == 0.0
    assert log_linear(-1, 1.0, 0.1, 100) == 0.0
    with pytest.raises(ValueError, match="must run between positive values, got 1.0 to 0.0"):
        log_linear(10, 1.0, 0.0, 100)


@pytest.mark.parametrize(
    "iteration, degree", [(1, 0), (999, 0), (1000, 1), (2000, 2), (2999, 2), (3000, 3), (9000, 3)]
)
def test_sh_degree(iteration, degree):
    assert sh_degree_at(iteration, 3) == degree


def test_sh_degree_stops_at_the_models():
    assert sh_degree_at(5000, 1) == 1 and sh_degree_at(5000, 0) == 0


def test_each_view_once_per_round_and_rounds_differ():
    queue = ViewQueue(20, seed=0)
    rounds = [[queue.next() for _ in range(20)] for _ in range(5)]
    assert all(sorted(order) == list(range(20)) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 5


def test_views_are_uniform():
    first = [ViewQueue(4, seed).next() for seed in range(2000)]
    assert all(440 < first.count(view) < 560 for view in range(4))  # 500 +- 3 sigma (58)


def test_queue_is_seeded_and_independent_of_other_randomness():
    import random

    def order(disturb):
        queue = ViewQueue(50, seed=7)
        return [queue.next() for _ in range(100) if disturb is None or random.seed(disturb) is None]

    assert order(None) == order(1) != [view for view in range(50)] * 2


def test_queue_resumes_in_the_middle_of_a_round():
    import io

    import torch

    queue = ViewQueue(30, seed=3)
    for _ in range(47):
        queue.next()
        assert queue.peek() == queue.peek()
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed = ViewQueue(30, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [queue.next() for _ in range(100)] == [resumed.next() for _ in range(100)]


def test_train_sample():
    assert spread(list(range(100))) == [5, 10, 15, 20, 25]
    assert spread(["a", "b", "c"]) == ["c", "b", "a", "c", "b"]
    assert spread([]) == []
