"""Allocate both sparsities of a run for one budget or a front of budgets, and compare the plans on held-out text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsparse_moe.ablation.allocation.budget import Budget, check_decoding
from qsparse_moe.ablation.allocation.compare import (
    DENSE,
    UNIFORM,
    Difference,
    PlanComparison,
    comparisons,
    differences,
    evaluated,
)
from qsparse_moe.ablation.allocation.continued import check_continued, train_with_plans
from qsparse_moe.ablation.allocation.cost import Costs, measured_loads
from qsparse_moe.ablation.allocation.decoding import Decoder, Decoding
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.ablation.allocation.joint_plans import (
    A_ALONE,
    JOINT,
    S_ALONE,
    UNIFORM_BOTH,
    plans_of_budget,
)
from qsparse_moe.ablation.allocation.jointly import Texts
from qsparse_moe.ablation.allocation.reach import check_reachable, everywhere
from qsparse_moe.ablation.allocation.spent import LossSpent, dense_terms, loss_spent
from qsparse_moe.ablation.routing import Choice, routing_choices, with_all_ranks
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, training_documents, validation_documents
from qsparse_moe.ablation.sensitivity.joint import PlanTerms
from qsparse_moe.ablation.sensitivity.measure import load_ranked
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.data.loader import load_data
from qsparse_moe.data.packing import Array
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.model.sharded import is_sharded
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import find_model
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.calibrate import default_num_sequences
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.evaluate import stored_timeout

logger = logging.getLogger(__name__)

# Every plan costs a training of its own.
_TRAINED = (JOINT, S_ALONE, A_ALONE, UNIFORM, UNIFORM_BOTH, DENSE)


@dataclass(frozen=True)
class BudgetResult:
    """The plans of one budget and their comparison."""

    budget: Budget
    target: float
    """The limit in the unit of the quantity."""
    plans: Mapping[str, SparsityPlan]
    left_out: Mapping[str, str]
    """The reason why a rival does not exist at this budget."""
    comparisons: tuple[PlanComparison, ...]
    differences: tuple[Difference, ...]
    """Of the joint plan and every other plan."""
    decoding: Mapping[str, Decoding]
    """The time of decoding with each plan; empty if it was not asked for."""
    predicted: Mapping[str, float]
    """For a budget of ms, the predicted milliseconds of the same plans."""
    after_training: tuple[PlanComparison, ...]
    differences_after_training: tuple[Difference, ...]
    spent: LossSpent
    """Where the joint plan spends loss."""


@dataclass(frozen=True)
class JointAllocation:
    """The results of all budgets of one run."""

    step: int
    """Number of training steps of the checkpoint."""
    num_sequences: int
    """Number of training sequences that the plans were made from."""
    num_held_out: int
    """Number of validation sequences that the plans were compared on."""
    train_steps: int
    dense_cost: float
    """Cost of the dense model with all its experts per token, in the unit of the budget."""
    dense_loss: float
    results: tuple[BudgetResult, ...]


@dataclass(frozen=True)
class JointOptions:
    """How plans are made and compared."""

    num_sequences: int | None = None
    """Number of training sequences for the plans, half of them to choose between plans; None means about 4,000 tokens
    per expert."""
    num_held_out: int | None = None
    """Number of validation sequences for the comparison; None means that of the run's evaluation."""
    rounds: int = ROUNDS
    num_random: int = NUM_RANDOM
    greedy: bool = True
    decode: bool = False
    """Whether to measure the time of decoding with every plan."""
    train_steps: int = 0
    """Number of steps of continued training per plan at the first budget; 0 means none."""


@dataclass(frozen=True)
class _Setting:
    model: Transformer
    sequences: DocumentSequences
    held_out: DocumentSequences
    costs: Costs
    choices: list[Choice]
    dense: SparsityPlan
    decoder: Decoder | None
    terms: PlanTerms
    """Around the dense model, on the held-out sequences."""


def allocate_budgets(
    folder: Path,
    budgets: Sequence[Budget],
    options: JointOptions,
    *,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    shard: bool | None = None,
    notify: Callable[[JointAllocation], None] = lambda found: None,
) -> JointAllocation:
    """Allocate a joint plan for every budget, and compare it on validation sequences.

    Any number of ranks can call it together: they take the batches in turn, and all of them return the same result.

    Args:
        folder: a run, whose newest checkpoint is used, one checkpoint, or an export.
        budgets: budgets of one quantity and batch.
        options: how plans are made and compared.
        device: ``cpu`` or ``cuda``.
        overrides: settings of the data in place of the run's.
        shard: whether the ranks divide the weights among them; None: as they did in training.
        notify: called after each budget with all results so far.

    Raises:
        ConfigError: a budget cannot be met, or the run does not select by rank.
        CheckpointError: under the same conditions as in ``load_trained``.
    """
    check_decoding(budgets[0], decode=options.decode)
    with open_distributed(device, timeout=stored_timeout(folder)) as distributed:
        if options.train_steps:
            check_continued(find_model(folder), overrides, distributed)
        return _allocate(folder, budgets, options, distributed, overrides, shard, notify)


def _allocate(
    folder: Path,
    budgets: Sequence[Budget],
    options: JointOptions,
    distributed: Distributed,
    overrides: Sequence[str],
    shard: bool | None,
    notify: Callable[[JointAllocation], None],
) -> JointAllocation:
    config, model, step = load_ranked(folder, distributed, None, overrides, shard)
    if not moe_layers(config.model):
        raise ConfigError(f"{folder} has no layers with routed experts; give --bytes or --flops for a plan of S alone")
    setting = _setting(config, model, budgets[0], options, distributed)
    dense_cost = setting.costs.of(setting.dense)
    # All of them before the first plan, which takes minutes.
    for number, budget in enumerate(budgets):
        check_reachable(setting.costs, setting.dense, budget, setting.choices, is_of_front=number > 0)
    dense = evaluated(model, setting.held_out, {DENSE: setting.dense}, setting.costs)
    found = JointAllocation(
        step=step,
        num_sequences=setting.sequences.num_sequences,
        num_held_out=setting.held_out.num_sequences,
        train_steps=options.train_steps,
        dense_cost=dense_cost,
        dense_loss=float(dense[DENSE][0].sum() / setting.held_out.labels_C.sum()),
        results=(),
    )
    for number, budget in enumerate(budgets):
        # Greedy plans and training take longer than all else, so the other budgets of a front have neither.
        own = options if number == 0 else replace(options, greedy=False, train_steps=0)
        result = _at_budget(setting, budget, budget.target(dense_cost), own, dense)
        if own.train_steps:
            result = _trained(setting, result, folder, own.train_steps, overrides)
        found = replace(found, results=(*found.results, result))
        notify(found)
    return found


def _setting(
    config: RunConfig, model: Transformer, budget: Budget, options: JointOptions, distributed: Distributed
) -> _Setting:
    data, size = load_data(config.data), config.training.micro_batch_size
    model.hide_ids(meaningless_ids(config.model, data.tokenizer))
    # As in run.py: a plan that is made from few documents fits them and little else.
    sequences = training_documents(
        config,
        data,
        num_sequences=options.num_sequences or default_num_sequences(config),
        batch_size=size,
        distributed=distributed,
    )
    held_out = validation_documents(
        data,
        num_sequences=options.num_held_out or config.training.evaluation_rows,
        batch_size=size,
        distributed=distributed,
    )
    choices, dense = routing_choices(config.model), with_all_ranks(SparsityPlan.uniform(config.model, 0.0))
    model.set_sparsity(dense)
    decoder = Decoder(model, held_out, budget.batch) if options.decode or budget.quantity == "ms" else None
    if decoder is not None:
        choices = _runnable(decoder, config.model, dense, choices, required=budget.quantity != "ms")
    loads = measured_loads(model, sequences, choices)
    costs = Costs(
        config.model,
        {layer: own[Choice(config.model.moe.experts_per_token)] for layer, own in loads.items()},
        budget.quantity,
        context=config.data.sequence_length,
        batch=budget.batch,
        bytes_per_weight=4.0 if config.training.precision == "fp32" else 2.0,
        loads=loads,
        times=decoder.times() if decoder is not None and budget.quantity == "ms" else None,
    )
    terms = dense_terms(model, held_out, dense, choices)
    return _Setting(model, sequences, held_out, costs, choices, dense, decoder, terms)


def _runnable(
    decoder: Decoder, config: ModelConfig, dense: SparsityPlan, choices: list[Choice], *, required: bool
) -> list[Choice]:
    """Return the choices that the engine can run; BackendUnavailable if it is ``required`` to run all and does not.

    Called before any plan is made, because that takes minutes.
    """
    reasons = {choice: decoder.why_not(everywhere(dense, config, choice)) for choice in choices}
    for choice, reason in reasons.items():
        if reason is not None and required:
            raise BackendUnavailable(
                f"--decode: plans may choose {choice.name}, which the engine native cannot run: {reason}; leave "
                "--decode out"
            )
        if reason is not None:
            logger.info("%s is left out, because the engine native cannot run it: %s", choice.name, reason)
    return [choice for choice, reason in reasons.items() if reason is None]


def _at_budget(
    setting: _Setting, budget: Budget, target: float, options: JointOptions, dense: Mapping[str, tuple[Array, float]]
) -> BudgetResult:
    made = plans_of_budget(
        setting.model,
        Texts(*setting.sequences.halves()),
        setting.costs,
        target,
        setting.choices,
        rounds=options.rounds,
        num_random=options.num_random,
        greedy=options.greedy,
    )
    found = {**evaluated(setting.model, setting.held_out, made.plans, setting.costs), **dense}
    labels_C, decoder = setting.held_out.labels_C, setting.decoder
    timed = {**made.plans, DENSE: setting.dense}
    added = float((found[JOINT][0] - found[DENSE][0]).sum() / labels_C.sum())
    return BudgetResult(
        budget=budget,
        target=target,
        plans=made.plans,
        left_out=made.left_out,
        comparisons=comparisons(found, labels_C, against=_baseline(found)),
        differences=differences(found, JOINT, labels_C),
        decoding={} if decoder is None else decoder.measure(timed),
        predicted={name: found[name][1] for name in timed} if budget.quantity == "ms" else {},
        after_training=(),
        differences_after_training=(),
        spent=loss_spent(setting.terms, setting.model, setting.held_out, made.plans[JOINT], added),
    )


def _baseline(found: Mapping[str, tuple[Array, float]]) -> str:
    # A small budget may not have uniform S with all experts, while uniform plans of both sparsities meet it.
    return UNIFORM if UNIFORM in found else UNIFORM_BOTH


def _trained(
    setting: _Setting, found: BudgetResult, folder: Path, steps: int, overrides: Sequence[str]
) -> BudgetResult:
    plans = {**found.plans, DENSE: setting.dense}
    chosen = {name: plans[name] for name in _TRAINED if name in plans}
    after = train_with_plans(
        folder,
        chosen,
        setting.held_out,
        setting.costs,
        steps=steps,
        overrides=overrides,
        shard=is_sharded(setting.model),
    )
    labels_C = setting.held_out.labels_C
    return replace(
        found,
        after_training=comparisons(after, labels_C, against=_baseline(after)),
        differences_after_training=differences(after, JOINT, labels_C),
    )
