"""Budgets that no plan meets: the message, and its way out, which is accepted when it is typed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest

from qsparse_moe.ablation.allocation.allocate import allocate, uniform_at
from qsparse_moe.ablation.allocation.budget import Budget, parse_budget
from qsparse_moe.ablation.allocation.compare import load_under_uniform, rival_plans
from qsparse_moe.ablation.allocation.cost import Costs, measured_load, measured_loads
from qsparse_moe.ablation.allocation.decoding import DecodeTimes
from qsparse_moe.ablation.allocation.joint_plans import JOINT, plans_of_budget
from qsparse_moe.ablation.allocation.jointly import Texts
from qsparse_moe.ablation.allocation.reach import OutOfReach, check_budget, check_reachable, everywhere
from qsparse_moe.ablation.cells import cells_of
from qsparse_moe.ablation.routing import Choice, routing_choices
from qsparse_moe.cli.allocation_options import requested_budget
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of

NONE = {"sparsity": None, "parameters": None, "flops": None, "bytes": None, "batch": None}


@pytest.fixture(scope="module")
def measured():
    """Return a model, its sequences, and costs with the load under every choice; some experts have far more tokens."""
    model, rows = model_of(config({"bias_update_rate": 0.001}, default=0.0)), rows_of()
    for block in model.blocks():
        block.moe.router.expert_bias[0] += 0.3
    choices = routing_choices(model.config)
    loads = measured_loads(model, rows, choices)
    times = DecodeTimes(dict.fromkeys(model.sparsity_plan.values, 0.0003), 0.0001, 0.0125)
    load = {layer: own[Choice(2)] for layer, own in loads.items()}
    return model, rows, Costs(model.config, load, "bytes", context=10, loads=loads), choices, times


def costs_for(measured, quantity, batch):
    costs = replace(measured[2], quantity=quantity, batch=batch)
    return replace(costs, times=measured[4]) if quantity == "ms" else costs


def refusal(function, *arguments, **options):
    with pytest.raises(OutOfReach) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantity", "batch"), [("bytes", 1), ("bytes", 8), ("flops", 1), ("parameters", 1), ("ms", 1)]
)
def test_the_way_out_of_a_budget_of_both_sparsities_is_accepted_as_it_is_printed(measured, quantity, batch):
    model, rows, _, choices, _ = measured
    costs, dense = costs_for(measured, quantity, batch), model.sparsity_plan
    message = refusal(check_reachable, costs, dense, Budget(quantity, 0.001, batch), choices)
    option, text = shlex.split(re.search(r'--budget "[^"]+"', message)[0])
    pasted = parse_budget(text)
    assert option == "--budget" and (pasted.quantity, pasted.batch) == (quantity, batch) and not pasted.is_share
    share = Budget(quantity, float(re.search(r"which is (\S+) of the dense model's cost$", message)[1]), batch)
    for budget in (pasted, share):
        check_reachable(costs, dense, budget, choices)
        target = budget.target(costs.of(dense))
        made = plans_of_budget(model, Texts(rows, rows), costs, target, choices, rounds=1, num_random=1)
        assert costs.of(made.plans[JOINT]) <= target * (1 + 1e-9)
    # It is the nearest one: less by the quarter that measured times are given, or by two units of a count, is refused.
    less = pasted.value / 1.25 / (1 + 1e-3) if quantity == "ms" else pasted.value - 2
    check = refusal(check_reachable, costs, dense, Budget.of_cost(quantity, less, batch), choices)
    assert f'--budget "{text}"' in check
    assert "," not in re.sub(r"[^\d]+, |, [^\d]+", "", message), "no separators of thousands"


def test_a_budget_of_both_sparsities_is_refused_with_its_text_what_the_model_needs_and_the_way_out(measured):
    model, _, _, choices, _ = measured
    costs, dense = costs_for(measured, "bytes", 8), model.sparsity_plan
    sparsest = replace(dense, values={place: (0.95,) * len(own) for place, own in dense.values.items()})
    least, whole = costs.of(everywhere(sparsest, model.config, Choice(0))), costs.of(dense)
    needed = -int(-least * (1 + 1e-6) // 1)
    reads = (
        "cannot be met: without routed experts and with S = 0.95 at every other site, the model still reads up to "
        f"{needed} bytes per step; "
    )
    share = f"{-(-10000 * needed // whole) / 10000:.4f}"
    budget = parse_budget("bytes=0.01@batch=8")
    assert refusal(check_reachable, costs, dense, budget, choices) == (
        f'--budget (bytes=0.01@batch=8) {reads}ask for --budget "bytes={needed}@batch=8" or more, which is {share} of '
        "the dense model's cost"
    )
    assert refusal(check_reachable, costs, dense, budget, choices, is_of_front=True) == (
        f"--front (bytes=0.01@batch=8) {reads}begin at {share} or more"
    )


def test_the_message_of_a_time_has_its_unit_and_says_that_it_is_measured_again(measured):
    model, _, _, choices, _ = measured
    costs = costs_for(measured, "ms", 1)
    message = refusal(check_reachable, costs, model.sparsity_plan, parse_budget("ms=0.001ms"), choices[1:])
    assert message.startswith(
        "--budget (ms=0.001ms@batch=1) cannot be met: with 1 expert per token and with S = 0.95 at every other site"
    )
    assert re.search(
        r'the model still takes 0\.0\d+ ms per step, predicted; ask for --budget "ms=0\.0\d+ms@batch=1" or more '
        r"\(a quarter above it, because every call measures the times again\), which is 0\.\d{4} of the dense",
        message,
    )
    shares = refusal(check_reachable, costs, model.sparsity_plan, parse_budget("ms=0.001"), choices[-1:])
    assert shares.startswith(
        "--budget (ms=0.001@batch=1) cannot be met: with 2 experts per token that reach 0.9 of the router weight and "
    )


@pytest.mark.parametrize(
    ("quantity", "target", "batch"),
    [("sparsity", 0.99, 1), ("parameters", 10.0, 1), ("flops", 10.0, 1), ("bytes", 10.0, 1), ("bytes", 10.0, 8)],
)
def test_the_way_out_of_a_budget_of_s_alone_is_accepted_as_it_is_printed(measured, quantity, target, batch):
    model, rows, _, _, _ = measured
    costs = Costs(model.config, measured_load(model, rows), quantity, context=10, batch=batch)
    message = refusal(load_under_uniform, model, rows, costs, target)
    typed = shlex.split(re.search(r"ask for (--.+?) or (more|less)", message)[1])
    options = NONE | {
        name.removeprefix("--"): float(value) for name, value in zip(typed[::2], typed[1::2], strict=True)
    }
    assert options.pop("batch") == (batch if quantity == "bytes" else None)
    _, asked = requested_budget(bytes_=options.pop("bytes"), **options)
    own = load_under_uniform(model, rows, costs, asked)
    for plan in rival_plans(model, rows, own, asked, num_random=1, rounds=1).values():
        assert own.total_at(own.of(plan)) <= own.total_at(asked) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("quantity", "target", "message"),
    [
        (
            "sparsity",
            0.99,
            "--sparsity (0.99) cannot be met: an S of 0.95 at every site is a mean S of 0.9375; ask for --sparsity "
            "0.9374 or less",
        ),
        (
            "parameters",
            100.4,
            "--parameters (100.4) cannot be met: with S = 0.95 at every site, the model still needs {} parameters per "
            "token; ask for --parameters {} or more, which is {} of its cost at S = 0",
        ),
        (
            "flops",
            1234.0,
            "--flops (1234) cannot be met: with S = 0.95 at every site, the model still takes {} FLOPs per token; ask "
            "for --flops {} or more, which is {} of its cost at S = 0",
        ),
        (
            "bytes",
            1234.0,
            "--bytes (1234) cannot be met: with S = 0.95 at every site, the model still reads up to {} bytes per step; "
            "ask for --bytes {} --batch 3 or more, which is {} of its cost at S = 0",
        ),
    ],
)
def test_a_budget_of_s_alone_is_refused_with_its_option_and_the_way_out(quantity, target, message):
    even = {0: (0.5,) * 4, 1: (0.5,) * 4}
    costs, plan = Costs(config(), even, quantity, context=10, batch=3), SparsityPlan.uniform(config(), 0.5)
    least, dense = SparsityPlan.uniform(config(), 0.95), SparsityPlan.uniform(config(), 0.0)
    needed = -int(-costs.of(least) * (1 + 1e-6) // 1)
    share = -(-10000 * needed // max(costs.of(dense), 1)) / 10000
    wanted = message.format(needed, needed, f"{share:.4f}")
    assert refusal(check_budget, costs, least, target) == wanted
    assert refusal(uniform_at, plan, costs, target) == wanted
    curves = {cell: [(0.0, 0.0), (0.95, 1.0)] for cell in cells_of(plan)}
    assert refusal(allocate, plan, curves, costs, target) == wanted
    check_budget(costs, least, costs.of(least))
    assert costs.of(uniform_at(plan, costs, costs.of(least))) == pytest.approx(costs.of(least))


def test_near_the_least_budget_of_all_experts_a_round_that_finds_no_plan_ends_the_search(measured):
    model, rows, _, choices, _ = measured
    costs = costs_for(measured, "bytes", 8)
    sparsest = SparsityPlan.uniform(model.config, 0.95)
    target = costs.of(everywhere(sparsest, model.config, Choice(2)))
    # Without the experts that most tokens choose, the load of the sparsest plan is more even and costs more.
    made = plans_of_budget(model, Texts(rows, rows), costs, target, choices, rounds=2, num_random=0)
    assert made.plans["S alone"] == made.plans["uniform"]
