"""What is written of joint allocations: the JSON, the tables, and the figures of a front."""

from __future__ import annotations

import json
from inspect import signature
from types import SimpleNamespace

import pytest

from qsparse_moe.ablation.allocation import joint_run as run_module
from qsparse_moe.ablation.allocation.budget import Budget
from qsparse_moe.ablation.allocation.compare import Difference, PlanComparison, rival_plans
from qsparse_moe.ablation.allocation.decoding import Decoding
from qsparse_moe.ablation.allocation.front_figures import front_drawings
from qsparse_moe.ablation.allocation.joint_plans import plans_of_budget
from qsparse_moe.ablation.allocation.joint_report import (
    DECODE_HEAD,
    HEAD,
    as_dict,
    decode_rows,
    joint_rows,
    markdown,
    routing_table,
    write_fronts,
    write_plans,
)
from qsparse_moe.ablation.allocation.joint_run import BudgetResult, JointAllocation, JointOptions
from qsparse_moe.ablation.allocation.run import allocate_run
from qsparse_moe.ablation.allocation.spent import LossSpent
from qsparse_moe.ablation.cells import cells_of
from qsparse_moe.ablation.sensitivity.joint import PlanParts
from qsparse_moe.cli.allocate import allocate
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config


def comparison(name, loss, cost, gap=0.5):
    return PlanComparison(name, loss, loss - 2.0, (loss - 2.1, loss - 1.9), cost, gap)


def spent_parts(plan) -> PlanParts:
    cells = {cell: 0.001 * (number - 2.5) for number, cell in enumerate(cells_of(plan))}
    return PlanParts(cells, {0: 0.125, 1: -0.0625})


def result(share, *, trained=False, decoding=True) -> BudgetResult:
    plan = SparsityPlan.uniform(config(), 0.5).with_experts({0: 1, 1: 2}).with_top_p({1: 0.7})
    names = {"joint": 1.5, "S alone": 1.6, "uniform": 2.0, "random 0": 9.0, "dense": 1.25}
    found = tuple(
        comparison(name, loss, 100.0 * share, None if name == "dense" else 0.5) for name, loss in names.items()
    )
    less = tuple(Difference("joint", name, 1.5 - names[name], (-1.0, 0.25)) for name in names if name != "joint")
    return BudgetResult(
        budget=Budget("bytes", share, 2),
        target=100.0 * share,
        plans=dict.fromkeys(("joint", "S alone", "uniform", "random 0"), plan),
        left_out={"A alone": "the reason"},
        comparisons=found,
        differences=less,
        decoding={name: Decoding(0.5, 4000.0, 1234.5) for name in names} if decoding else {},
        predicted={"joint": 0.625} if decoding else {},
        after_training=found if trained else (),
        differences_after_training=less if trained else (),
        spent=LossSpent(spent_parts(plan), 0.25),
    )


def allocation(*results) -> JointAllocation:
    return JointAllocation(7, 48, 96, 5, 100.0, 1.25, results)


def test_the_defaults_of_the_command_line_are_those_of_python():
    from_cli = {name: parameter.default for name, parameter in signature(allocate).parameters.items()}
    assert (from_cli["rounds"], from_cli["random"]) == (JointOptions().rounds, JointOptions().num_random)
    for function in (allocate_run, plans_of_budget, rival_plans):
        defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
        assert (defaults["rounds"], defaults["num_random"]) == (from_cli["rounds"], from_cli["random"])


def test_the_json_has_everything_under_its_public_key(tmp_path):
    written = as_dict(allocation(result(0.5, trained=True), result(0.75)), run_dir=tmp_path, output=tmp_path / "p.json")
    found = json.loads(json.dumps(written))
    assert {name: found[name] for name in ("format", "quantity", "batch", "step", "rows", "held_out_rows")} == {
        "format": "qsparse_moe.allocation/2",
        "quantity": "bytes",
        "batch": 2,
        "step": 7,
        "rows": 48,
        "held_out_rows": 96,
    }
    assert found["train_steps"] == 5 and found["dense"] == {"cost": 100.0, "loss": 1.25}
    first, second = found["budgets"]
    assert set(first) == {
        *("budget", "share", "target", "outcomes", "joint_less", "decoding", "after_training"),
        *("joint_less_after_training", "left_out", "plans", "spent"),
    }
    spent = first["spent"]
    assert spent["routing_evaluated"] is True
    assert (spent["evaluated"], spent["routing"][1]) == (0.25, {"layer": 1, "change": -0.0625})
    assert spent["cells"][3] == {"layer": 0, "site": "expert_input", "expert": 1, "change": 0.0005}
    assert spent["estimated"] == pytest.approx(sum(one["change"] for one in spent["cells"] + spent["routing"]))
    assert (first["budget"], first["share"], first["target"]) == ("bytes=0.5@batch=2", 0.5, 50.0)
    assert first["decoding"]["joint"] == {
        "milliseconds": 0.5,
        "tokens_per_second": 4000.0,
        "bytes_read": 1234.5,
        "predicted_milliseconds": 0.625,
    }
    assert first["decoding"]["dense"]["predicted_milliseconds"] is None and second["after_training"] == []
    # Random plans are not kept: a seed makes them again.
    assert set(first["plans"]) == {"joint", "S alone", "uniform"} and first["left_out"] == {"A alone": "the reason"}
    assert SparsityPlan.from_json(json.dumps(first["plans"]["joint"])).top_p == {1: 0.7}


def test_every_plan_of_a_budget_that_is_not_random_has_a_file(tmp_path):
    made = result(0.75)
    files = write_plans(made, tmp_path)
    assert [file.name for file in files] == [
        f"bytes-0.75-{name.replace(' ', '-')}.json" for name in made.plans if not name.startswith("random")
    ]
    assert SparsityPlan.load(tmp_path / "bytes-0.75-joint.json") == made.plans["joint"]


def test_rows_have_the_difference_of_the_joint_plan_and_shares_of_the_dense_cost():
    found = as_dict(allocation(result(0.5)), run_dir="r", output="p")
    (budget,) = found["budgets"]
    joint, alone, *_, dense = joint_rows(budget, 100.0)
    assert joint == ("joint", "1.5000", "-0.5000", "", "", "0.500", "0.50") and len(joint) == len(HEAD)
    assert alone == ("S alone", "1.6000", "-0.4000", "-0.1000", "-1.0000 to +0.2500", "0.500", "0.50")
    assert dense[-1] == "gap not distinguishable from 0"
    assert decode_rows(budget)[0] == ("joint", "4,000", "0.500", "0.625", "1,234") and len(DECODE_HEAD) == 5
    assert decode_rows(budget)[1][3] == ""


def test_a_report_in_words_has_all_budgets_and_the_first_joint_plan(tmp_path):
    text = markdown(allocation(result(0.5, trained=True), result(0.75)), title="Plans", figures=["front.png"])
    for part in (
        "# Plans\n",
        "48 training sequences for the plans, 96 validation sequences for the comparison",
        "costs 100 bytes per step and has a loss of 1.2500 nats per token",
        "![front](front.png)",
        "## bytes=0.75@batch=2",
        "No plan *A alone*: the reason.",
        "After 5 steps of training with each plan:",
        "Decoding of held-out text with the engine native:",
        "| 1 | 2 | 0.7 |",
        "S of the first joint plan:",
    ):
        assert part in text, part
    assert text.count("After 5 steps") == 1
    assert routing_table(result(0.5).plans["joint"]).splitlines()[2:] == ["| 0 | 1 | 1 |", "| 1 | 2 | 0.7 |"]


@pytest.mark.parametrize("decoding", [False, True])
def test_a_front_is_drawn_over_the_cost_and_over_tokens_per_second_if_they_were_measured(tmp_path, decoding):
    found = allocation(result(0.5, decoding=decoding), result(0.75, decoding=decoding))
    drawings = front_drawings(as_dict(found, run_dir="r", output="p"))
    files = write_fronts(drawings, tmp_path)
    assert [file.name for file in files] == ["front.png", "front-decoding.png"][: 1 + decoding]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)


def test_a_model_without_routed_experts_is_refused_before_any_plan_is_made(monkeypatch):
    monkeypatch.setattr(run_module, "moe_layers", lambda _: ())
    settings = SimpleNamespace(model=config())
    monkeypatch.setattr(run_module, "load_ranked", lambda *_: (settings, None, 7))
    with pytest.raises(
        ConfigError, match="runs/x has no layers with routed experts; give --bytes or --flops for a plan"
    ):
        run_module._allocate("runs/x", [Budget("bytes", 0.5)], None, None, (), None, None)
