from __future__ import annotations

import math

import pytest

from qsparse_moe.config.schema import TrainingConfig
from qsparse_moe.training.learning_rate import learning_rate

PEAK = 2e-3
SCHEDULES = ["cosine", "linear", "warmup_stable_decay", "constant"]


def rates(schedule: str, *, steps: int = 100, warmup: int = 10, floor: float = 0.1) -> list[float]:
    decay = 20 if schedule == "warmup_stable_decay" else 0
    config = TrainingConfig(
        steps=steps,
        learning_rate=PEAK,
        learning_rate_schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay,
        min_learning_rate_ratio=floor,
    )
    return [learning_rate(config, step) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_the_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([PEAK * part / 10 for part in range(1, 11)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_step_has_the_final_ratio_and_nothing_lies_outside(schedule):
    values = rates(schedule)
    assert values[-1] == pytest.approx(PEAK if schedule == "constant" else 0.1 * PEAK)
    assert max(values) == pytest.approx(PEAK)
    after = values[9:]
    assert after == sorted(after, reverse=True)


def test_cosine_and_linear_schedules_have_their_values_at_a_quarter_of_the_decay():
    # 90 steps decay after the 10 of warm-up; a third of them ends with the 40th step.
    assert rates("linear")[39] == pytest.approx(PEAK * (0.1 + 0.9 * 2 / 3))
    assert rates("cosine")[39] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3))))


def test_warmup_stable_decay_holds_the_peak_and_falls_over_the_last_steps():
    values = rates("warmup_stable_decay")
    assert values[9:80] == pytest.approx([PEAK] * 71)
    assert values[89] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warm_up_starts_near_the_peak_and_a_floor_of_zero_ends_there(schedule):
    values = rates(schedule, warmup=0, floor=0.0)
    assert values[0] > 0.98 * PEAK
    assert values[-1] == pytest.approx(PEAK if schedule == "constant" else 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [100, 140])
def test_behind_its_end_a_run_keeps_the_rate_of_its_last_step(schedule, step):
    decay = 20 if schedule == "warmup_stable_decay" else 0
    config = TrainingConfig(
        steps=100, learning_rate=PEAK, learning_rate_schedule=schedule, warmup_steps=10, decay_steps=decay
    )
    assert learning_rate(config, step) == learning_rate(config, 99)


def test_rates_without_a_warm_up_by_hand():
    assert rates("linear", steps=4, warmup=0, floor=0.5) == pytest.approx([PEAK * x for x in (0.875, 0.75, 0.625, 0.5)])
    half = 0.5**0.5 / 2
    found = rates("cosine", steps=4, warmup=0, floor=0.0)
    assert found == pytest.approx([PEAK * x for x in (0.5 + half, 0.5, 0.5 - half, 0.0)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_shorter_than_its_warm_up_is_the_beginning_of_a_longer_one(schedule):
    assert rates(schedule, steps=6) == rates(schedule)[:6] == pytest.approx([PEAK * step / 10 for step in range(1, 7)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_warm_up_only_ends_at_the_peak(schedule):
    assert rates(schedule, steps=10)[-1] == pytest.approx(PEAK)
