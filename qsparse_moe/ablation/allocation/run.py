"""A run's plan for a budget, and how it does against other ways to spend the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qsparse_moe.ablation.allocation.alternatives import compare_alternatives
from qsparse_moe.ablation.allocation.compare import ALLOCATED, PlanComparison, compare, load_under_uniform, rival_plans
from qsparse_moe.ablation.allocation.continued import compare_after_training
from qsparse_moe.ablation.allocation.cost import Costs, Quantity, measured_load
from qsparse_moe.ablation.sensitivity.documents import training_documents, validation_documents
from qsparse_moe.ablation.sensitivity.measure import load_ranked
from qsparse_moe.data.loader import load_data
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.calibrate import default_num_rows


@dataclass(frozen=True)
class Allocation:
    """The plan and the comparison."""

    plan: SparsityPlan
    quantity: Quantity
    target: float
    planned: float
    """What the plan costs with the load of the rows that it was made from."""
    step: int
    """Steps that the run was trained."""
    num_sequences: int
    """Training rows that the plans were made from."""
    num_held_out: int
    """Validation rows that they were compared on."""
    comparisons: tuple[PlanComparison, ...]
    """Without training."""
    alternatives: tuple[PlanComparison, ...]
    """Other ways to the same cost, without training."""
    train_steps: int
    after_training: tuple[PlanComparison, ...]
    """The allocated, the uniform and the greedy plan and one random one, after as many steps each; else empty."""


def allocate_run(
    run_dir: Path,
    quantity: Quantity,
    target: float,
    *,
    batch: int = 1,
    num_sequences: int | None = None,
    rounds: int = 3,
    num_random: int = 5,
    train_steps: int = 0,
    device: str = "cpu",
) -> Allocation:
    """Allocate for a budget with a run's newest checkpoint, and compare on validation rows.

    Args:
        run_dir: a run folder.
        quantity: what the budget bounds.
        target: the budget.
        batch: tokens of a step, where bytes are bounded.
        num_sequences: training rows that the plans are made from; None takes some 4,000 tokens an expert.
        rounds: passes that the plan is improved in.
        num_random: random plans to compare with.
        train_steps: of continued training with each plan; 0: none.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the budget cannot be met, with the nearest that can; or the run does not select by rank.
        CheckpointError: as ``load_run``.
    """
    config, model, step = load_ranked(run_dir, torch.device(device), None)
    data, size = load_data(config.data), config.training.micro_batch_size
    model.hide_ids(meaningless_ids(config.model, data.tokenizer))
    sequences = training_documents(
        config, data, num_sequences=num_sequences or default_num_rows(config), batch_size=size
    )
    held_out = validation_documents(data, num_sequences=config.training.evaluation_rows, batch_size=size)
    costs = Costs(
        config.model,
        measured_load(model, sequences),
        quantity,
        context=config.data.sequence_length,
        batch=batch,
        bytes_per_weight=4.0 if config.training.precision == "fp32" else 2.0,
    )
    costs = load_under_uniform(model, sequences, costs, target)
    plans = rival_plans(model, sequences, costs, target, num_random=num_random, rounds=rounds)
    without = compare(model, held_out, plans, costs)
    return Allocation(
        plan=plans[ALLOCATED],
        quantity=quantity,
        target=target,
        planned=costs.of(plans[ALLOCATED]),
        step=step,
        num_sequences=sequences.num_sequences,
        num_held_out=held_out.num_sequences,
        comparisons=without,
        alternatives=compare_alternatives(model, sequences, held_out, plans, costs, target),
        train_steps=train_steps,
        after_training=compare_after_training(run_dir, plans, held_out, costs, train_steps, device)
        if train_steps
        else (),
    )
