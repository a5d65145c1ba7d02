"""Cost of a run with the zeros that its steps measured: the sum, and its continuation after a resume."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsparse_moe.accounting.densities import measured_densities, planned_densities
from qsparse_moe.accounting.flops import training_flops
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.efficiency import Efficiency
from qsparse_moe.metrics.names import is_listed
from tests.metrics.reports import make_context, make_report

CONFIG = RunConfig.model_validate({"model": {"sparsity": {"default": 0.5}}, "training": {"precision": "bf16"}})
MODEL, LENGTH = CONFIG.model, CONFIG.data.sequence_length


def zeros(share):
    return {f"sparsity/{site}/zeros/layer_{layer}": share for layer, site in planned_densities(MODEL)}


def test_costs_of_a_step_follow_the_zeros_that_it_measured(tmp_path):
    found = Efficiency(make_context(tmp_path, CONFIG))(make_report(10), zeros(0.5))
    planned = training_flops(MODEL, LENGTH)
    assert found["efficiency/kept_parameters"] == count_parameters(MODEL).needed
    assert found["efficiency/training_flops_per_token"] == planned.routed
    assert found["efficiency/kept_training_flops_per_token"] == pytest.approx(planned.needed)
    assert found["efficiency/total_training_flops"] == planned.routed * 5120
    assert found["efficiency/weight_bytes_1"] == pytest.approx(2 * count_parameters(MODEL).needed)
    assert found["efficiency/weight_bytes_1"] < found["efficiency/weight_bytes_16"]
    assert all(map(is_listed, found))


def test_costs_are_those_of_the_measured_zeros_and_not_of_the_plan(tmp_path):
    row = {name: 0.25 if "hidden" in name else 0.75 for name in zeros(0.0)}
    densities = measured_densities(MODEL, row)
    assert densities[1, "expert_hidden"][0] == 0.75 and densities[0, "attention_input"] == (0.25,)
    found = Efficiency(make_context(tmp_path, CONFIG))(make_report(10), row)
    read = {batch: total_traffic(weight_traffic(MODEL, batch, densities)).needed for batch in (1, 16)}
    flops = training_flops(MODEL, LENGTH, densities=densities).needed
    assert flops != pytest.approx(training_flops(MODEL, LENGTH).needed, rel=0.01)
    assert found == {
        "efficiency/active_parameters": count_parameters(MODEL).active,
        "efficiency/training_flops_per_token": training_flops(MODEL, LENGTH).routed,
        "efficiency/total_training_flops": training_flops(MODEL, LENGTH).routed * 5120,
        "efficiency/kept_parameters": pytest.approx(count_parameters(MODEL, densities=densities).needed),
        "efficiency/kept_training_flops_per_token": pytest.approx(flops),
        "efficiency/total_kept_training_flops": pytest.approx(flops * 5120),
        "efficiency/weight_bytes_1": pytest.approx(read[1]),
        "efficiency/weight_bytes_16": pytest.approx(read[16]),
    }


def test_a_sum_that_the_last_row_holds_as_null_begins_again(tmp_path):
    total = "efficiency/total_kept_training_flops"
    resumed = Efficiency(make_context(tmp_path, CONFIG, start_step=20), {"tokens": 10240, total: None})
    found = resumed(make_report(30), zeros(0.25))
    assert found[total] == pytest.approx(5120 * found["efficiency/kept_training_flops_per_token"])


def test_without_measured_zeros_the_metrics_that_need_them_are_absent(tmp_path):
    found = Efficiency(make_context(tmp_path, CONFIG))(make_report(10), {})
    assert set(found) == {
        "efficiency/active_parameters", "efficiency/training_flops_per_token", "efficiency/total_training_flops",
    }  # fmt: skip


def test_the_sum_over_steps_is_the_same_after_a_resume(tmp_path):
    shares, total = [0.5, 0.75, 0.25], "efficiency/total_kept_training_flops"
    whole = Efficiency(make_context(tmp_path, CONFIG))
    rows = [whole(make_report(10 * (i + 1)), zeros(share)) for i, share in enumerate(shares)]
    resumed = Efficiency(make_context(tmp_path, CONFIG, start_step=20), rows[1])
    assert resumed(make_report(30), zeros(0.25))[total] == pytest.approx(rows[2][total])
    by_hand = sum(5120 * row["efficiency/kept_training_flops_per_token"] for row in rows)
    assert rows[2][total] == pytest.approx(by_hand)


def test_utilisation_needs_a_known_peak(tmp_path):
    name = "throughput/model_flops_utilisation"
    on_gpu = replace(make_context(tmp_path, CONFIG), device_name="NVIDIA H200", world_size=2)
    found = Efficiency(on_gpu)(make_report(10), {})
    assert found[name] == pytest.approx(training_flops(MODEL, LENGTH).routed * 2048 / (2 * 989e12))
    given = CONFIG.model_copy(update={"metrics": CONFIG.metrics.model_copy(update={"peak_tflops": 0.1})})
    assert Efficiency(make_context(tmp_path, given))(make_report(10), {})[name] == pytest.approx(
        training_flops(MODEL, LENGTH).routed * 2048 / 1e11
    )


def test_a_run_that_resumes_without_a_logged_step_counts_from_its_checkpoint_on(tmp_path):
    resumed = Efficiency(make_context(tmp_path, CONFIG, start_step=20))
    found = resumed(make_report(30), zeros(0.25))
    assert found["efficiency/total_kept_training_flops"] == pytest.approx(
        5120 * found["efficiency/kept_training_flops_per_token"]
    )
    # The sum that every token of the run costs begins with the run.
    assert found["efficiency/total_training_flops"] == found["efficiency/training_flops_per_token"] * 15360


@pytest.mark.parametrize(("precision", "num_bytes"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_bytes_of_weights_are_those_of_the_precision(tmp_path, precision, num_bytes):
    training = CONFIG.training.model_copy(update={"precision": precision})
    config = CONFIG.model_copy(update={"training": training})
    found = Efficiency(make_context(tmp_path, config))(make_report(10), zeros(0.5))
    assert found["efficiency/weight_bytes_1"] == pytest.approx(num_bytes * count_parameters(MODEL).needed)


def test_a_checkpoint_continues_the_sum_from_its_own_tokens(tmp_path):
    whole = Efficiency(make_context(tmp_path, CONFIG))
    whole(make_report(10), zeros(0.5))
    state = whole.state_dict()
    assert state["tokens"] == make_report(10).tokens
    last = whole(make_report(30), zeros(0.25))
    # Another logged step lies between the checkpoint and the resume: the state decides, not the row.
    resumed = Efficiency(make_context(tmp_path, CONFIG, start_step=10), {"tokens": 1, "step": 10})
    resumed.load_state_dict(state)
    assert resumed(make_report(30), zeros(0.25)) == last


def test_operations_are_those_of_the_experts_that_every_step_used_and_their_sum_survives_a_resume(tmp_path):
    sparsity = CONFIG.model.sparsity.model_copy(update={"experts_per_token": 1})
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"sparsity": sparsity})})
    rows = [
        zeros(0.5) | {f"router/experts_per_token/layer_{layer}": used for layer in range(MODEL.num_layers)}
        for used in (2.0, 1.5, 1.0)
    ]
    whole = Efficiency(make_context(tmp_path, config))
    found = [whole(make_report(10 * (i + 1)), row) for i, row in enumerate(rows)]
    dense, planned = training_flops(MODEL, LENGTH).routed, training_flops(config.model, LENGTH).routed
    executed = [one["efficiency/training_flops_per_token"] for one in found]
    assert executed == pytest.approx([dense, (dense + planned) / 2, planned]) and planned < 0.9 * dense
    assert found[2]["efficiency/total_training_flops"] == pytest.approx(5120 * sum(executed))
    assert found[2]["efficiency/active_parameters"] == count_parameters(config.model).active
    resumed = Efficiency(make_context(tmp_path, config, start_step=20), found[1] | {"tokens": 10240})
    assert resumed(make_report(30), rows[2])["efficiency/total_training_flops"] == pytest.approx(5120 * sum(executed))
    stored = Efficiency(make_context(tmp_path, config, start_step=30))
    stored.load_state_dict(whole.state_dict())
    later = stored(make_report(40), rows[2])["efficiency/total_training_flops"]
    assert later == pytest.approx(5120 * (sum(executed) + planned))
