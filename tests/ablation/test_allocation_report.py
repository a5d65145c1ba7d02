"""The arithmetic of an allocation on small curves, the words of its refusals, and what is written of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.allocation import compare as compare_module
from qsparse_moe.ablation.allocation import run as run_module
from qsparse_moe.ablation.allocation.allocate import (
    FINE_VALUES,
    MOST_SPARSE,
    _partly,
    _Step,
    _steps,
    allocate,
    lower_hull,
    shifted,
    uniform_at,
)
from qsparse_moe.ablation.allocation.compare import DENSE, UNIFORM, PlanComparison, comparisons
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.report import as_dict, comparison_rows, markdown
from qsparse_moe.ablation.allocation.run import Allocation
from qsparse_moe.ablation.cells import Cell, cells_of
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config

EVEN = {0: (0.5,) * 4, 1: (0.5,) * 4}
ATTENTION = Cell(0, "attention_input", None)


def costs_of(quantity):
    return Costs(config(), EVEN, quantity, context=10, batch=3)


def test_the_hull_has_no_point_on_a_straight_line_between_two_others_and_the_lowest_of_equal_x():
    points = [(2.0, 5.0), (3.0, -2.5), (0.0, 0.0), (1.0, -1.0), (2.0, -2.0), (4.0, 7.0)]
    assert lower_hull(points) == [(0.0, 0.0), (2.0, -2.0), (3.0, -2.5), (4.0, 7.0)]
    assert lower_hull([(1.0, 2.0)]) == [(1.0, 2.0)] and lower_hull([(1.0, 2.0), (1.0, 1.0)]) == [(1.0, 1.0)]


def test_curves_are_estimated_at_every_twentieth_up_to_the_largest_s():
    assert [round(value * 20, 9) for value in FINE_VALUES] == list(range(20)) and FINE_VALUES[3] == 0.15
    assert FINE_VALUES[-1] == MOST_SPARSE


def test_a_step_has_the_loss_per_cost_saved_and_ends_at_the_sparsest_s_of_its_cost():
    costs = costs_of("parameters")
    # 16 features: 0.5 and 0.52 keep 8 of them, 0.75 keeps 4; behind the site stand three matrices.
    curve = [(0.0, 0.0), (0.5, 1.0), (0.52, 1.0), (0.75, 3.0)]
    whole = costs.of_cell(ATTENTION, 0.0)
    assert [costs.of_cell(ATTENTION, s) for s, _ in curve] == [whole, whole / 2, whole / 2, whole / 4]
    assert _steps(ATTENTION, curve, costs) == [
        _Step(1.0 / (whole / 2), ATTENTION, 0.0, 0.52),
        _Step(2.0 / (whole / 4), ATTENTION, 0.52, 0.75),
    ]
    unused = Costs(config(), {0: (0.0, 1.0, 0.5, 0.5), 1: (0.5,) * 4}, "parameters")
    assert _steps(Cell(0, "expert_hidden", 0), curve, unused) == []


def test_the_last_step_goes_as_far_as_the_budget_and_no_further():
    costs = costs_of("parameters")
    whole = costs.of_cell(ATTENTION, 0.0)
    step = _Step(1.0, ATTENTION, 0.25, 0.75)
    found = _partly(costs, step, whole * 10 / 16)
    assert costs.of_cell(ATTENTION, found) == whole * 10 / 16
    # One feature more would exceed it.
    assert costs.of_cell(ATTENTION, found - 1e-6) == whole * 11 / 16
    assert _partly(costs, step, whole) == pytest.approx(0.25, abs=1e-9)


def test_cells_take_their_steps_in_the_order_of_the_price_and_the_others_keep_their_s():
    costs = costs_of("parameters")
    plan = SparsityPlan.uniform(config(), 0.25)
    one, other = ATTENTION, Cell(1, "attention_input", None)
    curves = {one: [(0.0, 0.0), (0.5, 1.0), (0.75, 9.0)], other: [(0.0, 0.0), (0.5, 2.0), (0.75, 2.5)]}
    whole = costs.of_cell(one, 0.0)
    others = sum(costs.of_cell(cell, 0.25) for cell in cells_of(plan) if cell not in curves)

    # The hull of the other goes straight to 0.75: 2.5 over three quarters is dearer than 1 over a half.
    def found(left):
        result = allocate(plan, curves, costs, costs.fixed + others + left * whole)
        return result.values[0, "attention_input"][0], result.values[1, "attention_input"][0]

    assert found(2.0) == (0.0, 0.0)
    # K is 8 from S = 7.5/16 on, and 4 from 11.5/16 on.
    assert found(1.5) == (pytest.approx(7.5 / 16), 0.0)
    first, second = found(1.0)
    assert first == 0.5 and costs.of_cell(other, second) == whole / 2
    assert found(0.75) == (0.5, pytest.approx(11.5 / 16))
    assert found(0.5) == (pytest.approx(11.5 / 16), 0.75)
    result = allocate(plan, curves, costs, costs.fixed + others + whole)
    assert result.values[0, "expert_hidden"] == (0.25,) * 4


def test_a_shifted_plan_keeps_its_differences_where_no_cell_is_at_an_end_and_uniform_s_has_none():
    costs, plan = costs_of("sparsity"), SparsityPlan.uniform(config(), 0.5)
    offsets = {cell: 0.25 if cell.layer else 0.0 for cell in cells_of(plan)}
    found = shifted(plan, offsets, costs, 0.5)
    low, high = found.values[0, "expert_hidden"][0], found.values[1, "expert_hidden"][0]
    assert high - low == pytest.approx(0.25) and costs.of(found) == pytest.approx(0.5, abs=1 / 16)
    even = uniform_at(plan, costs, 0.5)
    # The least S that keeps 8 of 16.
    assert {round(value, 6) for values in even.values.values() for value in values} == {7.5 / 16}


def test_a_comparison_divides_by_the_labels_and_the_gap_by_the_distance_between_uniform_and_dense():
    labels_C = np.array([4.0, 6.0])
    found = {
        "one": (np.array([19.0, 28.0]), 5.0),
        UNIFORM: (np.array([20.0, 30.0]), 6.0),
        DENSE: (np.array([16.0, 24.0]), 7.0),
    }
    one, uniform, dense = comparisons(found, labels_C)
    assert [found.name for found in (one, uniform, dense)] == ["one", UNIFORM, DENSE]
    assert (one.loss, one.against_uniform, one.cost, one.gap_closed) == (4.7, -0.3, 5.0, 0.3)
    assert (uniform.interval, uniform.gap_closed, dense.gap_closed) == ((0.0, 0.0), 0.0, 1.0)
    # -1 of 4 and -2 of 6: whatever is drawn, the mean lies between the two.
    assert one.interval == pytest.approx((-2 / 6, -1 / 4))


def comparison(name, loss, gap):
    return PlanComparison(name, loss, loss - 2.0, (loss - 2.1, loss - 1.9), 123456.7, gap)


def allocation(**changes):
    plan = SparsityPlan({(0, "attention_input"): (0.25,), (1, "attention_input"): (0.75,)})
    given = {"quantity": "bytes", "target": 1234567.0, "planned": 1200000.0, "step": 8, "num_sequences": 24}
    given |= {"num_held_out": 12, "comparisons": (comparison("allocated", 1.9, 0.25),), "train_steps": 0}
    given |= {"alternatives": (comparison("1 of 2", 2.5, None),), "after_training": ()}
    return Allocation(plan=plan, **given | changes)


def test_a_report_of_an_allocation_has_its_budget_its_tables_and_its_plan():
    rows = [
        "| allocated | 1.9000 | -0.1000 | -0.2000 to +0.0000 | 1.2346e+05 | 0.25 |",
        "| 1 of 2 | 2.5000 | +0.5000 | +0.4000 to +0.6000 | 1.2346e+05 | gap not distinguishable from 0 |",
    ]
    title, budget, first, said, plan = markdown(allocation(), title="mine").split("\n\n", 4)
    assert (title, said) == ("# mine", "S of the plan:")
    assert budget.startswith(
        "Budget: bytes 1.23457e+06; the plan costs 1.2e+06 under the expert load of the sequences that it was made "
        "from. Checkpoint of step 8; 24 training sequences for the plans, 12 validation sequences for the comparison."
    )
    assert first.splitlines()[2:] == rows and "0.75" in plan
    after = allocation(train_steps=5, after_training=(comparison("dense", 1.5, 1.0),))
    *_, said, table, _, _ = markdown(after, title="mine").split("\n\n", 6)
    assert said == "After 5 steps of training with each plan:"
    assert table.splitlines()[2:] == ["| dense | 1.5000 | -0.5000 | -0.6000 to -0.4000 | 1.2346e+05 | 1.00 |"]
    assert comparison_rows([vars(comparison("x", 2.0, 0.0))])[0][-1] == "0.00"


def test_an_allocation_as_json_has_every_value_under_its_public_key():
    found = as_dict(allocation(train_steps=5), run_dir="runs/x", output="out")
    assert {key: value for key, value in found.items() if key not in ("outcomes", "alternatives")} == {
        "format": "qsparse_moe.allocation/1",
        "run_dir": "runs/x",
        "output": "out",
        "quantity": "bytes",
        "target": 1234567.0,
        "planned": 1200000.0,
        "step": 8,
        "rows": 24,
        "held_out_rows": 12,
        "train_steps": 5,
        "after_training": [],
    }
    assert [one["name"] for key in ("outcomes", "alternatives") for one in found[key]] == ["allocated", "1 of 2"]


def test_rival_plans_have_as_many_random_ones_as_asked_for_each_with_its_own_seed(monkeypatch):
    seeds, rounds_ = [], []
    model = SimpleNamespace(sparsity_plan="own")
    monkeypatch.setattr(compare_module, "uniform_at", lambda plan, costs, target: f"uniform {plan} {target}")

    def allocate_for(*_, rounds):
        rounds_.append(rounds)
        return "allocated"

    monkeypatch.setattr(compare_module, "allocate_for", allocate_for)
    monkeypatch.setattr(compare_module, "greedy_plan", lambda model, sequences, uniform, *_: f"greedy {uniform}")
    monkeypatch.setattr(compare_module, "random_plan", lambda uniform, costs, target, seed: seeds.append(seed) or seed)
    found = compare_module.rival_plans(model, None, None, 0.5, num_random=2, rounds=7)
    assert found == {
        "allocated": "allocated",
        "uniform": "uniform own 0.5",
        "greedy by layer": "greedy uniform own 0.5",
        "random 0": 0,
        "random 1": 1,
    }
    assert (seeds, rounds_) == ([0, 1], [7])


@pytest.mark.parametrize(("precision", "bytes_per_weight"), [("fp32", 4.0), ("bf16", 2.0)])
def test_plans_are_made_from_training_and_compared_on_validation_sequences(monkeypatch, precision, bytes_per_weight):
    training = SimpleNamespace(micro_batch_size=3, evaluation_rows=11, precision=precision)
    settings = SimpleNamespace(model=config(), data=SimpleNamespace(sequence_length=48), training=training)
    model, asked = SimpleNamespace(hide_ids=lambda ids: asked.update(hidden=ids)), {}

    def documents(name, count):
        def of(*_, num_sequences, batch_size, distributed):
            assert distributed.world_size == 1
            asked[name] = (num_sequences, batch_size)
            return SimpleNamespace(num_sequences=count, name=name)

        return of

    def rivals(model, sequences, costs, target, *, num_random, rounds):
        asked["rivals"] = (sequences.name, costs, target, num_random, rounds)
        return {"allocated": SparsityPlan.uniform(config(), 0.5)}

    monkeypatch.setattr(
        run_module, "load_ranked", lambda folder, ranks, sparsity, overrides, shard: (settings, model, 77)
    )
    monkeypatch.setattr(run_module, "stored_timeout", lambda folder: 60.0)
    monkeypatch.setattr(run_module, "is_sharded", lambda model: False)
    monkeypatch.setattr(run_module, "find_model", lambda folder: folder)
    monkeypatch.setattr(run_module, "check_continued", lambda *values: asked.update(checked=values[:2]))
    monkeypatch.setattr(run_module, "load_data", lambda data: SimpleNamespace(tokenizer="tokenizer"))
    monkeypatch.setattr(run_module, "meaningless_ids", lambda model, tokenizer: (tokenizer, 5))
    monkeypatch.setattr(run_module, "default_num_sequences", lambda config: 99)
    monkeypatch.setattr(run_module, "training_documents", documents("training", 24))
    monkeypatch.setattr(run_module, "validation_documents", documents("validation", 10))
    monkeypatch.setattr(run_module, "measured_load", lambda model, sequences: EVEN)
    monkeypatch.setattr(run_module, "load_under_uniform", lambda model, sequences, costs, target: costs)
    monkeypatch.setattr(run_module, "rival_plans", rivals)
    monkeypatch.setattr(run_module, "compare", lambda model, sequences, plans, costs: (sequences.name,))
    monkeypatch.setattr(
        run_module,
        "compare_alternatives",
        lambda model, one, other, plans, costs, target: (one.name, other.name, target),
    )
    monkeypatch.setattr(run_module, "compare_after_training", lambda *values, **named: (values[2].name, named))
    assert "checked" not in asked
    found = run_module.allocate_run("runs/x", "parameters", 4e4, batch=5, num_random=2, rounds=6)
    assert asked["training"] == (99, 3) and asked["validation"] == (11, 3) and asked["hidden"] == ("tokenizer", 5)
    costs = Costs(config(), EVEN, "parameters", context=48, batch=5, bytes_per_weight=bytes_per_weight)
    assert asked["rivals"] == ("training", costs, 4e4, 2, 6)
    assert (found.step, found.num_sequences, found.num_held_out, found.after_training) == (77, 24, 10, ())
    assert found.planned == costs.of(found.plan) and found.comparisons == ("validation",)
    assert found.alternatives == ("training", "validation", 4e4)
    trained = run_module.allocate_run("runs/x", "bytes", 4e4, num_sequences=7, train_steps=4, overrides=["a=b"])
    assert asked["training"] == (7, 3) and asked["rivals"][3:] == (5, 3)
    assert trained.after_training == ("validation", {"steps": 4, "overrides": ["a=b"], "shard": False})
    assert asked["checked"] == ("runs/x", ["a=b"])
    assert trained.train_steps == 4
