"""Continue training a finished run with each of several plans, on the same sequences and at the same rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qsparse_moe.ablation.allocation.compare import ALLOCATED, DENSE, GREEDY, UNIFORM, PlanComparison, comparisons
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.data.loader import TrainLoader, load_data
from qsparse_moe.data.packing import Array
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.interop.trained_model import load_trained
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import ModelFolder, find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.training.checkpoint.state import restore, seed_random_states
from qsparse_moe.training.checkpoint.store import Checkpoint, newest_checkpoint, verified_checkpoint
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.engines.torch_engine import TorchEngine
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
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
    device: str,
    overrides: Sequence[str] = (),
) -> tuple[PlanComparison, ...]:
    """Continue training with the allocated, the uniform, the greedy, one random plan, and dense.

    Each starts with the weights and the Adam moments of the run and reads the sequences that follow in it. The moments
    of an export are fresh. Its data, and that of ``overrides``, is read from the beginning. The folder is not changed.

    Raises:
        CheckpointError, TrainingDiverged: under the same conditions as in training.
    """
    # Every plan costs a training of its own, so one random plan represents the others.
    chosen = {name: plans[name] for name in (ALLOCATED, UNIFORM, GREEDY, "random 0") if name in plans}
    chosen[DENSE] = SparsityPlan.uniform(costs.config, 0.0)
    measured = train_with_plans(folder, chosen, held_out, costs, steps=steps, device=device, overrides=overrides)
    return comparisons(measured, held_out.labels_C)


def train_with_plans(
    folder: Path,
    plans: Mapping[str, SparsityPlan],
    held_out: DocumentSequences,
    costs: Costs,
    *,
    steps: int,
    device: str,
    overrides: Sequence[str] = (),
) -> dict[str, tuple[Array, float]]:
    """Return the loss per document and the cost of every plan after ``steps`` steps of training with it.

    Raises:
        CheckpointError, TrainingDiverged: under the same conditions as in training.
    """
    measured: dict[str, tuple[Array, float]] = {}
    with open_distributed(device) as distributed:
        found = find_model(folder)
        data = load_data(load_run_config(found.config_folder, overrides).data)
        for name, plan in plans.items():
            # One at a time: two models with optimizer states may not fit into memory.
            model = _trained(found, plan, steps, data, distributed, overrides)
            losses_C = loss_by_document(model, held_out)
            load = measured_load(model, held_out)
            measured[name] = losses_C, replace(costs, load=load, loads={}).of(plan)
    return measured


def _trained(
    folder: ModelFolder,
    plan: SparsityPlan,
    steps: int,
    data: TokenData,
    distributed: Distributed,
    overrides: Sequence[str] = (),
) -> Transformer:
    # Adam computes in fp32, whatever the type of an export is.
    config, model, _ = load_trained(folder.path, distributed.device, dtype=torch.float32, overrides=overrides)
    checkpoint = _checkpoint(folder)
    model.set_sparsity(plan)
    model.hide_ids(meaningless_ids(config.model, data.tokenizer))
    # Checkpoints fit every engine, and a single process has nothing to shard.
    engine = TorchEngine(config, model, distributed)
    if checkpoint is not None:
        restore(engine, checkpoint.read, checkpoint.adam_step)
    first = 0 if checkpoint is None else checkpoint.progress.step
    # The same random numbers for every plan, so that only the plan differs.
    seed_random_states(config.training.seed, first, distributed.rank)
    loader, guard = (
        # This process reads the whole global batch, whatever the number of ranks of the run was.
        TrainLoader(config, data, 0, 1),
        NonFiniteGuard(config.model.num_layers, distributed, engine.loss_scaler),
    )
    # Other data begins where it begins, and so does the data of an export, which does not say what it was trained on.
    if checkpoint is not None and not overrides:
        loader.load_state_dict(checkpoint.data_state)
    try:
        for step in range(first, first + steps):
            model.train()
            model.set_ste_share(ste_share(config.model.sparsity, step))
            # Constant, so that the comparison does not depend on a schedule of the rate.
            rate = RATE * config.training.learning_rate
            train_step(engine, loader.batches(step), step=step + 1, learning_rate=rate, guard=guard, report=False)
    finally:
        engine.close()
    return model.eval()


def _checkpoint(folder: ModelFolder) -> Checkpoint | None:
    """Return the checkpoint with the optimizer's state, which an export does not have."""
    if folder.kind == "export":
        return None
    return verified_checkpoint(folder.path) if folder.kind == "checkpoint" else newest_checkpoint(folder.path)
