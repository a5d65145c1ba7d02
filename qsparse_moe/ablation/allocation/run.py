"""Allocate a plan for a run and a budget, and compare it with other plans of the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsparse_moe.ablation.allocation.alternatives import compare_alternatives
from qsparse_moe.ablation.allocation.compare import ALLOCATED, PlanComparison, compare, load_under_uniform, rival_plans
from qsparse_moe.ablation.allocation.continued import check_continued, compare_after_training
from qsparse_moe.ablation.allocation.cost import Costs, Quantity, measured_load
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.ablation.sensitivity.documents import training_documents, validation_documents
from qsparse_moe.ablation.sensitivity.measure import load_ranked
from qsparse_moe.data.loader import load_data
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.model.sharded import is_sharded
from qsparse_moe.runs.find import find_model
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.calibrate import default_num_sequences
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.evaluate import stored_timeout


@dataclass(frozen=True)
class Allocation:
    """The allocated plan and its comparisons."""

    plan: SparsityPlan
    quantity: Quantity
    target: float
    planned: float
    """Cost of the plan under the expert load of the sequences that it was made from."""
    step: int
    """Number of training steps of the checkpoint."""
    num_sequences: int
    """Number of training sequences that the plans were made from."""
    num_held_out: int
    """Number of validation sequences that the plans were compared on."""
    comparisons: tuple[PlanComparison, ...]
    """The plans without further training."""
    alternatives: tuple[PlanComparison, ...]
    """Other models of the same cost, without further training."""
    train_steps: int
    after_training: tuple[PlanComparison, ...]
    """The plans after ``train_steps`` steps each; empty if there was no further training."""


def allocate_run(
    folder: Path,
    quantity: Quantity,
    target: float,
    *,
    batch: int = 1,
    num_sequences: int | None = None,
    rounds: int = ROUNDS,
    num_random: int = NUM_RANDOM,
    train_steps: int = 0,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    shard: bool | None = None,
) -> Allocation:
    """Allocate a plan for a trained model, and compare it on validation sequences.

    Any number of ranks can call it together: they take the batches in turn, and all of them return the same result.

    Args:
        folder: a run, whose newest checkpoint is used, one checkpoint, or an export.
        quantity: the quantity that the budget limits.
        target: the budget.
        batch: number of tokens per step, for a budget of bytes.
        num_sequences: number of training sequences for the plans; None means about 4,000 tokens per expert.
        rounds: number of rounds of estimating and allocating.
        num_random: number of random plans to compare with.
        train_steps: number of steps of continued training per plan; 0 means none.
        device: ``cpu`` or ``cuda``.
        overrides: settings of the data in place of the run's.
        shard: whether the ranks divide the weights among them; None: as they did in training.

    Raises:
        ConfigError: the budget cannot be met, the run does not select by rank, or the ranks cannot train it further.
        CheckpointError: under the same conditions as in ``load_trained``.
    """
    with open_distributed(device, timeout=stored_timeout(folder)) as distributed:
        if train_steps:
            check_continued(find_model(folder), overrides, distributed)
        config, model, step = load_ranked(folder, distributed, None, overrides, shard)
        data, size = load_data(config.data), config.training.micro_batch_size
        model.hide_ids(meaningless_ids(config.model, data.tokenizer))
        # A plan fits the documents that it was made from: made from 64 validation sequences, it closed 0.6 of the gap
        # to dense on these and 0.2 to 0.3 on others (docs/lab-log.md, 27 November). Training text has many more
        # documents.
        sequences = training_documents(
            config,
            data,
            num_sequences=num_sequences or default_num_sequences(config),
            batch_size=size,
            distributed=distributed,
        )
        held_out = validation_documents(
            data, num_sequences=config.training.evaluation_rows, batch_size=size, distributed=distributed
        )
        costs = Costs(
            config.model,
            measured_load(model, sequences),
            quantity,
            context=config.data.sequence_length,
            batch=batch,
            bytes_per_weight=4.0 if config.training.precision == "fp32" else 2.0,
        )
        # The load at the budget, because the dense model may route differently.
        costs = load_under_uniform(model, sequences, costs, target)
        plans = rival_plans(model, sequences, costs, target, num_random=num_random, rounds=rounds)
        comparisons = compare(model, held_out, plans, costs)
        alternatives = compare_alternatives(model, sequences, held_out, plans, costs, target)
        is_divided = is_sharded(model)
        # Its memory is needed for the models with optimizer state.
        del model
        after_training: tuple[PlanComparison, ...] = ()
        if train_steps:
            after_training = compare_after_training(
                folder, plans, held_out, costs, steps=train_steps, overrides=overrides, shard=is_divided
            )
    return Allocation(
        plan=plans[ALLOCATED],
        quantity=quantity,
        target=target,
        planned=costs.of(plans[ALLOCATED]),
        step=step,
        num_sequences=sequences.num_sequences,
        num_held_out=held_out.num_sequences,
        comparisons=comparisons,
        alternatives=alternatives,
        train_steps=train_steps,
        after_training=after_training,
    )
