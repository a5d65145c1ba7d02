"""Continue training a finished run with each of several plans, on the same sequences and at the same rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qsparse_moe.ablation.allocation.compare import ALLOCATED, DENSE, GREEDY, UNIFORM, PlanComparison, comparisons
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.data.loader import TrainLoader, load_data
from qsparse_moe.data.packing import Array
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.model.transformer import Transformer, build_model
from qsparse_moe.runs.folder import load_run_config, no_checkpoint
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import ste_share
from qsparse_moe.training.checkpoint.state import restore, seed_random_states
from qsparse_moe.training.checkpoint.store import load_checkpoint, newest_checkpoint
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.engines.torch_engine import TorchEngine
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.step import train_step

RATE = 0.1
"""Share of the peak learning rate of the run: the one at which a run ends by default
(``training.min_learning_rate_ratio``)."""


def compare_after_training(
    run_dir: Path,
    plans: Mapping[str, SparsityPlan],
    held_out: DocumentSequences,
    costs: Costs,
    steps: int,
    device: str,
) -> tuple[PlanComparison, ...]:
    """Continue from the newest checkpoint with the allocated, the uniform, the greedy, one random plan, and dense.

    Each starts with the weights and the Adam moments of the run and reads the sequences that follow in it. The run
    folder is not changed.

    Raises:
        CheckpointError, TrainingDiverged: under the same conditions as in training.
    """
    # Every plan costs a training of its own, so one random plan represents the others.
    chosen = {name: plans[name] for name in (ALLOCATED, UNIFORM, GREEDY, "random 0") if name in plans}
    chosen[DENSE] = SparsityPlan.uniform(costs.config, 0.0)
    found: dict[str, tuple[Array, float]] = {}
    with open_distributed(device) as distributed:
        data = load_data(load_run_config(run_dir).data)
        for name, plan in chosen.items():
            # One at a time: two models with optimizer states may not fit into memory.
            model = _trained(run_dir, plan, steps, data, distributed)
            losses_C = loss_by_document(model, held_out)
            found[name] = losses_C, replace(costs, load=measured_load(model, held_out)).of(plan)
    return comparisons(found, held_out.labels_C)


def _trained(run_dir: Path, plan: SparsityPlan, steps: int, data: TokenData, distributed: Distributed) -> Transformer:
    config, checkpoint = load_run_config(run_dir), newest_checkpoint(run_dir)
    if checkpoint is None:
        raise no_checkpoint(run_dir)
    model = build_model(config.model, device=distributed.device, seed=config.training.seed)
    load_checkpoint(model, checkpoint)
    model.set_sparsity(plan)
    model.hide_ids(meaningless_ids(config.model, data.tokenizer))
    # Checkpoints fit every engine, and a single process has nothing to shard.
    engine = TorchEngine(config, model, distributed)
    restore(engine, checkpoint.tensor, checkpoint.adam_step)
    first = checkpoint.progress.step
    # The same random numbers for every plan, so that only the plan differs.
    seed_random_states(config.training.seed, first, distributed.rank)
    loader, guard = (
        # This process reads the whole global batch, whatever the number of ranks of the run was.
        TrainLoader(config, data, 0, 1),
        NonFiniteGuard(config.model.num_layers, distributed, engine.loss_scaler),
    )
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
