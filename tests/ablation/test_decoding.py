"""The time of decoding: the table of products, the prediction from it, and what the engine itself measures."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.ablation.allocation import decoding as decoding_module
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.decoding import Decoder, DecodeTimes, Decoding, fitted_times
from qsparse_moe.ablation.allocation.joint_run import _runnable
from qsparse_moe.ablation.routing import Choice
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.inference import product_times as product_module
from qsparse_moe.inference.product_times import measure_row, seconds_per_row
from qsparse_moe.kernels import native
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of

needs_compiler = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)


def test_the_time_of_a_row_is_what_more_rows_take(monkeypatch):
    monkeypatch.setattr(product_module, "_seconds", lambda stored, rows_K: 3.0 + 0.5 * len(rows_K))
    assert measure_row("fp32", (16, 8)) == pytest.approx(0.5)
    # A product that takes no longer with more rows has no time per row, and none is negative.
    monkeypatch.setattr(product_module, "_seconds", lambda stored, rows_K: 5.0 - 0.1 * len(rows_K))
    assert measure_row("fp32", (16, 8)) == 0.0


@needs_compiler
def test_a_row_of_a_wide_matrix_takes_a_measurable_time():
    assert 0.0 < measure_row("fp32", (64, 2048)) < 1e-4


def test_products_are_measured_once_per_machine_and_shape(monkeypatch, tmp_path):
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path))
    asked = []

    def measure(weight_format, shape):
        asked.append(shape)
        return 2e-9

    monkeypatch.setattr(product_module, "measure_row", measure)
    assert seconds_per_row("fp32", [(16, 8), (16, 8), (8, 16)]) == {(16, 8): 2e-9, (8, 16): 2e-9}
    assert seconds_per_row("fp32", [(8, 16)]) == {(8, 16): 2e-9} and asked == [(16, 8), (8, 16)]
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text())["fp32 seconds per row 16x8"] == [2e-9]


def times_of(settings) -> DecodeTimes:
    sites = SparsityPlan.uniform(settings, 0.0).values
    return DecodeTimes(dict.fromkeys(sites, 0.2), 0.25, 7.0)


def test_milliseconds_are_rows_and_selections_of_the_experts_in_use_and_the_rest():
    settings = config()
    load = {0: (0.9, 0.5, 0.4, 0.2), 1: (0.5,) * 4}
    costs = Costs(settings, load, "ms", times=times_of(settings))
    # 16 features at every site; two sites without experts and two with two experts, in two layers.
    rows = 2 * (2 + 2 * 2)
    assert costs.of(SparsityPlan.uniform(settings, 0.0)) == pytest.approx(7.0 + rows * 16 * 0.2)
    assert costs.of(SparsityPlan.uniform(settings, 0.5)) == pytest.approx(7.0 + rows * (8 * 0.2 + 0.25))
    assert replace(costs, load={0: (0.0,) * 4, 1: (0.0,) * 4}).of(SparsityPlan.uniform(settings, 0.0)) == (
        pytest.approx(7.0 + 4 * 16 * 0.2)
    )


@pytest.fixture(scope="module")
def decoder():
    model = model_of(config(default=0.0)).float()
    return Decoder(model, rows_of(), 2), model


@needs_compiler
def test_the_engine_reads_fewer_bytes_under_a_sparser_plan_and_the_model_keeps_its_plan(decoder):
    one, model = decoder
    plan = model.sparsity_plan
    found = one.measure({"dense": plan, "sparse": SparsityPlan.uniform(model.config, 0.75)})
    assert model.sparsity_plan is plan and one.steps == 10
    assert 0 < found["sparse"].bytes_read < 0.8 * found["dense"].bytes_read
    for timed in found.values():
        assert timed.tokens_per_second == pytest.approx(2e3 / timed.milliseconds)


def test_times_are_fitted_to_the_engine_at_three_values_of_s():
    settings, table = config(), times_of(config()).rows
    rows = 2 * (2 + 2 * 2)
    # 16 features, of which S = 0, 0.5, and 0.9 select 16, 8, and 2; the table is too slow by a factor of 2.
    measured = [7.0 + rows * 16 * 0.1, 7.0 + rows * (8 * 0.1 + 0.25), 7.0 + rows * (2 * 0.1 + 0.25)]
    found = fitted_times(table, settings, measured)
    assert (found.fixed, found.selection) == (pytest.approx(7.0), pytest.approx(0.25))
    assert found.rows == pytest.approx(dict.fromkeys(table, 0.1))
    # Noise cannot make anything negative.
    noisy = fitted_times(table, settings, [1.0, 1.0, 2.0])
    assert noisy.fixed == 1.0 and noisy.selection == 0.0 and not any(noisy.rows.values())


@needs_compiler
def test_the_times_of_a_model_explain_its_dense_step(decoder, monkeypatch):
    one, model = decoder
    seen = []

    def measure(plans):
        seen.extend(plan.mean for plan in plans.values())
        return {name: Decoding(9.0 - float(name), 1.0, 1.0) for name in plans}

    monkeypatch.setattr(one, "measure", measure)
    monkeypatch.setattr(decoding_module, "_rows", lambda model: times_of(model.config).rows)
    found = one.times()
    assert seen == pytest.approx([0.0, 0.5, 0.9]) and model.sparsity_plan.mean == 0.0
    costs = Costs(model.config, {0: (0.5,) * 4, 1: (0.5,) * 4}, "ms", times=found)
    assert costs.of(model.sparsity_plan) == pytest.approx(9.0)


def test_a_model_that_the_engine_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(decoding_module.native, "why_not", lambda model: "no compiler; use another engine")
    with pytest.raises(BackendUnavailable, match="the time of decoding is that of the engine native, .*: no compiler;"):
        Decoder(model_of(config()), rows_of(), 1)


def test_choices_that_the_engine_cannot_run_are_left_out_of_a_budget_of_time_and_refused_otherwise(caplog):
    settings = config()
    dense, choices = SparsityPlan.uniform(settings, 0.0), [Choice(1), Choice(2, 0.7), Choice(2)]
    fake = SimpleNamespace(why_not=lambda plan: "no top_p; use another" if plan.top_p else None)
    with caplog.at_level("INFO"):
        assert _runnable(fake, settings, dense, choices, required=False) == [Choice(1), Choice(2)]
    assert "A 2, top-p 0.7 is left out, because the engine native cannot run it: no top_p;" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"--decode: plans may choose A 2, top-p 0.7, which the engine"):
        _runnable(fake, settings, dense, choices, required=True)
    assert _runnable(fake, settings, dense, choices[:1], required=True) == choices[:1]


@needs_compiler
def test_the_reason_of_a_plan_is_that_of_the_model_with_it(decoder, monkeypatch):
    one, model = decoder
    plan = model.sparsity_plan
    monkeypatch.setattr(decoding_module.native, "why_not", lambda model: f"mean {model.sparsity_plan.mean}")
    assert one.why_not(SparsityPlan.uniform(model.config, 0.5)) == "mean 0.5" and model.sparsity_plan is plan


@needs_compiler
def test_the_table_has_every_matrix_behind_a_site_in_its_shape(decoder, monkeypatch):
    _, model = decoder
    monkeypatch.setattr(
        decoding_module,
        "seconds_per_row",
        lambda form, shapes: {shape: shape[0] + 100.0 * shape[1] for shape in shapes},
    )
    found = decoding_module._rows(model)
    assert found[0, "attention_input"] == 1e3 * (16 + 4800) and found[1, "attention_output"] == 1e3 * (16 + 1600)
    assert found[0, "expert_input"] == 2e3 * (16 + 1600) and found[1, "expert_hidden"] == 1e3 * (16 + 1600)
