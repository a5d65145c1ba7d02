"""All plans of one budget that a joint plan is compared with: one sparsity alone, uniform, greedy, and random."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qsparse_moe.ablation.allocation.allocate import shifted, uniform_at
from qsparse_moe.ablation.allocation.budget import Budget
from qsparse_moe.ablation.allocation.compare import GREEDY, UNIFORM
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.ablation.allocation.jointly import Texts, allocate_jointly, allocate_routing, best_of
from qsparse_moe.ablation.allocation.reach import MOST_SPARSE, OutOfReach, check_reachable, everywhere
from qsparse_moe.ablation.allocation.rivals import RANDOM_SPREAD, greedy_plan
from qsparse_moe.ablation.cells import cells_of
from qsparse_moe.ablation.routing import Choice, with_all_ranks, with_choices
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

logger = logging.getLogger(__name__)

JOINT, S_ALONE, A_ALONE, UNIFORM_BOTH = "joint", "S alone", "A alone", "uniform both"
# Greedy evaluates every layer about 150 times, and the plan that it finds is far worse than uniform S anyway.
_GREEDY_SEQUENCES = 16
_TRIES = 50


@dataclass(frozen=True)
class BudgetPlans:
    """The plans of one budget by name."""

    plans: dict[str, SparsityPlan]
    left_out: dict[str, str]
    """The reason why a plan does not exist at this budget."""


def plans_of_budget(
    model: Transformer,
    texts: Texts,
    costs: Costs,
    target: float,
    choices: Sequence[Choice],
    *,
    rounds: int = ROUNDS,
    num_random: int = NUM_RANDOM,
    greedy: bool = True,
) -> BudgetPlans:
    """Return the joint plan and its rivals. ``costs`` has the load of the dense model under every choice.

    Uniform and random plans meet the budget under that load, and a plan of several rounds under the load of the plan
    before its last move. Under its own load, a plan has exceeded the budget by up to 1 %.

    Raises:
        OutOfReach: no plan meets the budget; the least that can be met is named.
    """
    config, dense = model.config, with_all_ranks(SparsityPlan.uniform(model.config, 0.0))
    check_reachable(costs, dense, Budget.of_cost(costs.quantity, target, costs.batch), choices)
    uniform = _uniform_plans(config, dense, costs, target, choices)
    left_out: dict[str, str] = {}
    plans: dict[str, SparsityPlan] = {}
    full = Choice(config.moe.experts_per_token)
    by_layer = dict.fromkeys(moe_layers(config), choices)
    best_uniform = best_of(model, texts.judge, list(uniform.values()))
    # Rounds that begin at uniform plans of both sparsities end lower at small budgets, rounds that begin at S alone at
    # large ones (docs/lab-log.md, 29 November).
    begins = [best_uniform]
    if full in uniform:
        only_s = dict.fromkeys(moe_layers(config), [full])
        plans[UNIFORM] = uniform[full]
        logger.info("S alone, for a cost of %.6g", target)
        plans[S_ALONE] = allocate_jointly(model, texts, costs, target, uniform[full], only_s, rounds=rounds)
        begins = [plans[S_ALONE]] if best_uniform is uniform[full] else [best_uniform, plans[S_ALONE]]
    else:
        reason = f"S of {MOST_SPARSE:g} everywhere exceeds the budget while all experts are used"
        left_out |= {UNIFORM: f"{reason}; differences and gaps are from *{UNIFORM_BOTH}*", S_ALONE: reason}
    logger.info("both sparsities, from %d beginning(s)", len(begins))
    ends = [allocate_jointly(model, texts, costs, target, begin, by_layer, rounds=rounds) for begin in begins]
    plans[JOINT] = best_of(model, texts.judge, ends)
    starts = [plan for choice in choices if costs.of(plan := everywhere(dense, config, choice)) <= target]
    if starts:
        # Around the dense model and one expert per token: around no experts at all, every estimate is far off.
        bases = [dense, everywhere(dense, config, Choice(1))]
        logger.info("A alone")
        plans[A_ALONE] = allocate_routing(model, texts, costs, target, starts, bases, by_layer)
    else:
        left_out[A_ALONE] = "without experts the model still exceeds the budget at S = 0"
    plans[UNIFORM_BOTH] = best_uniform
    if greedy and full in uniform:
        own = replace(costs, loads={}, load={layer: costs.loads[layer][full] for layer in costs.loads})
        logger.info("greedy by layer")
        few = texts.fit.first(_GREEDY_SEQUENCES)
        plans[GREEDY] = greedy_plan(model, few, uniform[full], own, target)
    for seed in range(num_random):
        plans[f"random {seed}"] = random_joint_plan(dense, config, costs, target, choices, seed)
    return BudgetPlans(plans, left_out)


def _uniform_plans(
    config: ModelConfig, dense: SparsityPlan, costs: Costs, target: float, choices: Sequence[Choice]
) -> dict[Choice, SparsityPlan]:
    """Return the uniform plan of every choice that meets the budget."""
    found = {}
    for choice in choices:
        try:
            found[choice] = uniform_at(everywhere(dense, config, choice), costs, target)
        except OutOfReach:
            # Another choice meets it: check_reachable has found one.
            continue
    return found


def random_joint_plan(
    dense: SparsityPlan, config: ModelConfig, costs: Costs, target: float, choices: Sequence[Choice], seed: int
) -> SparsityPlan:
    """Return a plan with random choices of ranks, and S drawn uniformly within 0.3 of a level that meets the budget."""
    generator, cells = np.random.default_rng(seed), cells_of(dense)
    cheapest = min(choices, key=lambda choice: costs.of(everywhere(dense, config, choice)))
    for number in range(_TRIES):
        drawn = {layer: choices[int(generator.integers(len(choices)))] for layer in moe_layers(config)}
        offsets = generator.uniform(-RANDOM_SPREAD, RANDOM_SPREAD, len(cells)).tolist()
        if number == _TRIES - 1:
            drawn = dict.fromkeys(drawn, cheapest)
        try:
            return shifted(with_choices(dense, drawn), dict(zip(cells, offsets, strict=True)), costs, target)
        except OutOfReach:
            # These choices alone exceed a small budget; others are drawn.
            continue
    raise AssertionError("check_reachable has found a plan with the cheapest choice")
