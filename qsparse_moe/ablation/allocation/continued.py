"""Continue training a finished run with each of several plans, on the same sequences and at the same rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.ablation.allocation.compare import ALLOCATED, DENSE, GREEDY, UNIFORM, PlanComparison, comparisons
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.routing import choices_of, renormalizes
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.config.rules import check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import TrainLoader, load_data
from qsparse_moe.data.packing import Array
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.interop.initial_weights import ExportWeights
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import ModelFolder, find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.training.checkpoint.state import seed_random_states
from qsparse_moe.training.checkpoint.store import Checkpoint
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.evaluate import chosen_checkpoint
from qsparse_moe.training.initial_weights import InitialWeights
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.start import start_engine
from qsparse_moe.training.step import train_step

RATE = 0.1
"""Share of the peak learning rate of the run: the one at which a run ends by default
(``training.min_learning_rate_ratio``)."""


def compare_after_training(
    folder: Path,
    plans: Mapping[str, SparsityPlan],
    held_out: DocumentSequences,
    costs: Costs,
    *,
    steps: int,
    overrides: Sequence[str] = (),
    shard: bool = False,
) -> tuple[PlanComparison, ...]:
    """Continue training with the allocated, the uniform, the greedy, one random plan, and dense.

    Each starts with the weights and the Adam moments of the run and reads the sequences that follow in it. The moments
    of an export are fresh. Its data, and that of ``overrides``, is read from the beginning. The folder is not changed.
    With ``shard``, the ranks divide weights, gradients, and moments among them.

    Raises:
        CheckpointError, TrainingDiverged: under the same conditions as in training.
    """
    # Every plan costs a training of its own, so one random plan represents the others.
    chosen = {name: plans[name] for name in (ALLOCATED, UNIFORM, GREEDY, "random 0") if name in plans}
    chosen[DENSE] = SparsityPlan.uniform(costs.config, 0.0)
    measured = train_with_plans(folder, chosen, held_out, costs, steps=steps, overrides=overrides, shard=shard)
    return comparisons(measured, held_out.labels_C)


def train_with_plans(
    folder: Path,
    plans: Mapping[str, SparsityPlan],
    held_out: DocumentSequences,
    costs: Costs,
    *,
    steps: int,
    overrides: Sequence[str] = (),
    shard: bool = False,
) -> dict[str, tuple[Array, float]]:
    """Return the loss per document and the cost of every plan after ``steps`` steps of training with it.

    The ranks of ``held_out`` train together, and with ``shard`` divide weights, gradients, and moments among them.

    Raises:
        CheckpointError, TrainingDiverged: under the same conditions as in training.
    """
    measured: dict[str, tuple[Array, float]] = {}
    found = find_model(folder)
    config = continued_config(found, overrides, shard=shard)
    data = load_data(config.data)
    for name, plan in plans.items():
        # One at a time: two models with optimizer states may not fit into memory.
        engine = _trained(found, config, plan, steps, data, held_out.distributed, is_own_data=not overrides)
        try:
            measured[name] = _measured(engine, plan, held_out, costs)
        finally:
            engine.close()
    return measured


def continued_config(folder: ModelFolder, overrides: Sequence[str], *, shard: bool) -> RunConfig:
    """Return the config of the run for the engine that continues it, of which any fits its checkpoints."""
    config = load_run_config(folder.config_folder, overrides)
    # Both hold the experts like other parameters: ZeRO-3 divides them as well.
    changed: dict[str, Any] = {"engine": "torch", "expert_parallel_size": 1}
    if shard:
        stage = config.training.deepspeed.model_copy(update={"zero_stage": 3})
        changed |= {"engine": "deepspeed", "deepspeed": stage}
    training = config.training.model_copy(update=changed)
    return config.model_copy(update={"training": training})


def check_continued(folder: ModelFolder, overrides: Sequence[str], distributed: Distributed) -> None:
    """Raise ConfigError unless the ranks can share the global batch of the run evenly."""
    check_world_size(continued_config(folder, overrides, shard=False), distributed.world_size)


def _measured(engine: Engine, plan: SparsityPlan, held_out: DocumentSequences, costs: Costs) -> tuple[Array, float]:
    def forward(batch: Batch) -> ModelOutput:
        # Through the engine, which gathers the weights under ZeRO-3.
        return engine.forward(batch, with_stats=False)

    losses_C = loss_by_document(engine.model, held_out, forward)
    return losses_C, replace(costs, load=measured_load(engine.model, held_out, forward), loads={}).of(plan)


def _trained(
    folder: ModelFolder,
    config: RunConfig,
    plan: SparsityPlan,
    steps: int,
    data: TokenData,
    distributed: Distributed,
    *,
    is_own_data: bool = True,
) -> Engine:
    """Return the engine after ``steps`` further steps under ``plan``, with its model in evaluation mode."""
    checkpoint = _checkpoint(folder, distributed)
    engine = _start(folder, config, data, distributed, checkpoint)
    model = engine.model
    model.set_sparsity(plan)
    keep_idle_routers(model)
    first = 0 if checkpoint is None else checkpoint.progress.step
    # The same random numbers for every plan, so that only the plan differs.
    seed_random_states(config.training.seed, first, distributed.rank)
    loader, guard = (
        TrainLoader(config, data, distributed.rank, distributed.world_size),
        NonFiniteGuard(config.model.num_layers, distributed, engine.loss_scaler),
    )
    # Other data begins where it begins, and so does the data of an export, which does not say what it was trained on.
    if checkpoint is not None and is_own_data:
        loader.load_state_dict(checkpoint.data_state)
    try:
        for step in range(first, first + steps):
            model.train()
            model.set_ste_share(ste_share(config.model.sparsity, step))
            # Constant, so that the comparison does not depend on a schedule of the rate.
            rate = RATE * config.training.learning_rate
            train_step(engine, loader.batches(step), step=step + 1, learning_rate=rate, guard=guard, report=False)
    except BaseException:
        engine.close()
        raise
    model.eval()
    return engine


def _start(
    folder: ModelFolder,
    config: RunConfig,
    data: TokenData,
    distributed: Distributed,
    checkpoint: Checkpoint | None,
) -> Engine:
    hidden_ids = meaningless_ids(config.model, data.tokenizer)
    if checkpoint is not None:
        return start_engine(config, distributed, checkpoint=checkpoint, hidden_ids=hidden_ids)
    initial = InitialWeights(str(folder.path), "export", ExportWeights(folder.path), digest="", changes={})
    return start_engine(config, distributed, initial=initial, hidden_ids=hidden_ids)


def keep_idle_routers(model: Transformer) -> None:
    """Give no gradient to the routers of layers in which every token uses one expert, with a weight of 1.

    The load balance loss would be all that such a router learns from, and in 100 steps it moved the tokens to experts
    that were not made for them: 0.04 nats (docs/lab-log.md, 29 November).
    """
    if not renormalizes(model.config):
        return
    choices = choices_of(model.sparsity_plan, model.config)
    for block in model.blocks():
        if block.moe is None:
            continue
        choice, most = choices[block.layer], model.config.moe.experts_per_token
        # The first of A weights is at least 1 / A of their sum.
        if choice.experts == 1 or choice.top_p <= 1 / most:
            block.moe.router.weight.register_hook(torch.zeros_like)


def _checkpoint(folder: ModelFolder, distributed: Distributed) -> Checkpoint | None:
    """Return the checkpoint with the optimizer's state, which an export does not have."""
    if folder.kind == "export":
        return None
    named = folder.path if folder.kind == "checkpoint" else None
    return chosen_checkpoint(folder.config_folder, named, distributed)
