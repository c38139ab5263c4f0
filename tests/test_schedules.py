import math
import random

import pytest
import torch

from fastvae.training.schedules import capacity_factor, kl_factor, lr_factor


@pytest.fixture
def total(seed):
    return random.randrange(200, 100_000)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_linearly_from_0(schedule, total):
    warmup = total // 7
    assert lr_factor(0, total, schedule, warmup) == 0
    for step in range(warmup + 1):
        assert lr_factor(step, total, schedule, warmup) == pytest.approx(step / warmup)


def test_a_constant_learning_rate(total):
    assert all(lr_factor(step, total) == 1 for step in range(total + 1))
    assert all(lr_factor(step, total, "constant", 9) == 1 for step in range(9, total + 1))


def test_the_cosine_falls_from_1_to_0_as_torch_s(seed):
    total, warmup = random.randrange(200, 2000), random.randrange(100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup)
    for step in range(warmup, total + 1):
        ours = lr_factor(step, total, "cosine", warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()
    assert lr_factor(warmup, total, "cosine", warmup) == 1
    assert lr_factor(total, total, "cosine", warmup) == 0
    assert lr_factor(total + 5, total, "cosine", warmup) == 0


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_as_long_as_the_training(schedule):
    assert [lr_factor(step, 4, schedule, 4) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    assert [lr_factor(step, 2, schedule, 4) for step in range(2)] == [0, 0.25]


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.25), ("cosine", (1 - math.sqrt(0.5)) / 2)])
def test_beta_rises_once(schedule, quarter):
    warmup = 4 * random.randrange(10, 100)
    factors = [kl_factor(step, 10 * warmup, schedule, warmup) for step in range(2 * warmup)]
    assert factors[0] == 0
    assert factors[warmup // 4] == pytest.approx(quarter)
    assert factors[warmup // 2] == pytest.approx(0.5)
    assert factors[3 * warmup // 4] == pytest.approx(1 - quarter)
    assert factors[warmup:] == [1] * warmup
    assert factors == sorted(factors)


def test_beta_rises_in_the_first_half_of_each_cycle():
    half = random.randrange(5, 100)
    cycle = [kl_factor(step, 20 * half, "cyclical", 2 * half) for step in range(2 * half)]
    assert cycle[:half] == pytest.approx([step / half for step in range(half)])
    assert cycle[half:] == [1] * half
    later = [kl_factor(step, 20 * half, "cyclical", 2 * half) for step in range(6 * half, 8 * half)]
    assert later == cycle


def test_beta_as_it_is(total):
    assert kl_factor(0, total) == kl_factor(0, total, "none", 5) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_tenth_of_the_training_is_the_default(schedule, total):
    tenth = math.ceil(total / 10)
    assert kl_factor(tenth - 1, total, schedule) < 1
    assert kl_factor(tenth, total, schedule) == 1


def test_ten_cycles_are_the_default_and_the_last_is_not_left_at_its_start(total):
    starts = [step for step in range(total) if kl_factor(step, total, "cyclical") == 0]
    assert len(starts) == 10
    assert kl_factor(total - 1, total, "cyclical") == 1
    assert any(kl_factor(step, 1, "cyclical") == 1 for step in range(2))


def test_the_capacity_rises_linearly(total):
    steps = total // 3
    assert [capacity_factor(step, total, steps) for step in (0, steps, total)] == [0, 1, 1]
    assert capacity_factor(steps // 5, total, steps) == pytest.approx((steps // 5) / steps)
    assert capacity_factor(0, total) == 0
    assert capacity_factor(total // 4, total) == pytest.approx(0.5, abs=2 / total)
    assert capacity_factor(math.ceil(total / 2), total) == 1
    assert capacity_factor(1, 1) == 1
