"""Metrics of several logged steps."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe.metrics.window import Window

SITE = "sparsity/expert_hidden"


def step(rows, used, smallest):
    return {
        "router/routed_LE": torch.tensor([rows], dtype=torch.float64),
        f"{SITE}/rows_LE": torch.tensor([rows], dtype=torch.float64),
        f"{SITE}/smallest_LE": torch.tensor([smallest], dtype=torch.float64),
        f"{SITE}/used_LED": torch.tensor([used]),
    }


def test_dead_experts_and_features_are_unused_in_every_step_of_a_full_window():
    window = Window(length=2)
    first = window.update(step([4, 0, 0], [[True, False], [False, False], [False, False]], [2, 0, 0]))
    assert "router/dead_experts_window" not in first and f"{SITE}/dead_features" not in first
    second = window.update(step([2, 2, 0], [[True, False], [False, True], [False, False]], [1, 1, 0]))
    assert second["router/dead_experts_window"].tolist() == [1]
    assert second[f"{SITE}/dead_features"].tolist() == [4 / 6]
    third = window.update(step([0, 2, 2], [[False, False], [False, True], [True, True]], [0, 1, 1]))
    assert third["router/dead_experts_window"].tolist() == [0]
    assert third[f"{SITE}/dead_features"].tolist() == [2 / 6]


def test_the_window_is_ten_logged_steps_and_counts_are_per_layer():
    used = torch.tensor([[[True, False], [False, False]], [[False, False], [True, True]]])
    stats = {
        "router/routed_LE": torch.tensor([[4.0, 0.0], [0.0, 0.0]]),
        f"{SITE}/rows_LE": torch.ones(2, 2), f"{SITE}/smallest_LE": torch.ones(2, 2), f"{SITE}/used_LED": used,
    }  # fmt: skip
    window = Window()
    for number in range(1, 11):
        found = window.update(stats)
        assert ("router/dead_experts_window" in found) == (f"{SITE}/dead_features" in found) == (number == 10)
    assert found["router/dead_experts_window"].tolist() == [1, 2]
    assert found[f"{SITE}/dead_features"].tolist() == [0.75, 0.5]
    alone = Window(length=1)
    assert alone.update(stats)["router/dead_experts_window"].tolist() == [1, 2], "as long as that of features"


def test_drift_is_relative_to_the_previous_step():
    window = Window()
    used = [[True]]
    assert f"{SITE}/threshold_drift" not in window.update(step([4], used, [2.0]))
    assert window.update(step([2], used, [1.5]))[f"{SITE}/threshold_drift"].tolist() == [pytest.approx(0.5)]
    assert window.update(step([2], used, [1.5]))[f"{SITE}/threshold_drift"].tolist() == [0.0]
    assert window.update(step([4], used, [1.5]))[f"{SITE}/threshold_drift"].tolist() == [-0.5]


def test_a_window_without_experts_counts_features_all_the_same():
    window = Window(length=1, expert_length=0)
    found = window.update(step([3, 1], [[True, False], [False, False]], [3, 1]))
    assert "router/dead_experts_window" not in found and found[f"{SITE}/dead_features"].tolist() == [0.75]


def test_the_threshold_of_a_layer_is_over_the_routed_tokens_of_all_its_experts():
    window = Window()
    window.update(step([3, 1], [[True], [True]], [3.0, 3.0]))  # 6 over 4 rows, not 1 and 3 over 2 experts
    drift = window.update(step([1, 1], [[True], [True]], [1.0, 5.0]))[f"{SITE}/threshold_drift"]
    assert drift.tolist() == [pytest.approx(1.0)]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_window_continues_from_its_state_in_a_checkpoint_also_where_a_layer_had_no_token(stop):
    used = [[True, False], [False, False]]
    steps = [
        step([4, 2], used, [3.0, 1.0]),
        step([0, 0], [[False] * 2] * 2, [0.0, 0.0]),  # no token: the threshold is 0 / 0
        step([2, 0], used, [5.0, 0.0]),
        step([0, 3], [[False, False], [False, True]], [0.0, 2.0]),
    ]
    whole = Window(length=3, expert_length=2)
    expected = [whole.update(stats) for stats in steps]
    before, after = Window(length=3, expert_length=2), Window(length=3, expert_length=2)
    for stats in steps[:stop]:
        before.update(stats)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    for stats, want in zip(steps[stop:], expected[stop:], strict=True):
        found = after.update(stats)
        assert found.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=0, atol=0, equal_nan=True)
