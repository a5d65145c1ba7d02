"""Two ranks together compute the same calibration as one rank."""

from __future__ import annotations

import json

import pytest

from tests.distributed.conftest import CALIBRATIONS, Runs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("label", CALIBRATIONS)
def test_the_plan_is_the_same_on_any_number_of_ranks_exactly(runs: Runs, label):
    alone, together = runs(label, 1)["found"], runs(label, 2)["found"]
    assert together["plan"] == alone["plan"]
    assert runs.outcomes[label, 2][0] == runs.outcomes[label, 2][1]
    assert together["sites"] == alone["sites"]
    assert (together["rows"], together["held_out_rows"]) == (CALIBRATIONS[label][0], 11)
    for loss in ("loss_topk", "loss_threshold"):
        assert together[loss] == pytest.approx(alone[loss], rel=1e-12)


def test_the_limit_of_the_sample_and_the_sequences_change_the_plan(runs: Runs):
    plans = [runs(label, 2)["found"]["plan"] for label in CALIBRATIONS]
    assert len(set(plans)) == len(plans)
    thresholds = [value for entry in json.loads(plans[0])["values"] for value in entry["threshold"]]
    assert any(thresholds) and all(value >= 0 for value in thresholds)
