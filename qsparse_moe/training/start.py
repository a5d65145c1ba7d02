"""The start of an engine: its model is built without memory, and each rank fills only what it keeps of the weights."""

from __future__ import annotations

from collections.abc import Sequence

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.init import RandomWeights
from qsparse_moe.model.transformer import Transformer, build_empty
from qsparse_moe.training.checkpoint.state import load_buffers, restore
from qsparse_moe.training.checkpoint.store import Checkpoint, check_belongs
from qsparse_moe.training.distributed.expert_groups import join_expert_group
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.build import build_engine
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.initial_weights import InitialWeights


def start_engine(
    config: RunConfig,
    distributed: Distributed,
    *,
    checkpoint: Checkpoint | None = None,
    initial: InitialWeights | None = None,
    hidden_ids: Sequence[int] = (),
) -> Engine:
    """Return the engine of a run with the weights of ``checkpoint``, else of ``initial``, else random ones.

    The weights of the first source that is given are the only ones that are computed or read, and each rank reads its
    own part of them. All ranks must call it together.

    Args:
        config: the run.
        distributed: the ranks.
        checkpoint: the checkpoint to continue from, with its optimizer state.
        initial: the weights to start from.
        hidden_ids: see ``Transformer.hide_ids``.

    Raises:
        CheckpointError: the checkpoint belongs to another model, or an initial weight is not finite.
        BackendUnavailable: a backend requested by name is not available.
    """
    # Before the model, which has only the experts of this rank.
    group = join_expert_group(config.training.expert_parallel_size, distributed)
    model = build_empty(config.model, device=distributed.device, expert_group=group)
    model.activation_checkpointing = config.training.activation_checkpointing
    model.hide_ids(hidden_ids)
    if checkpoint is not None:
        return _resumed(config, model, distributed, checkpoint)
    if initial is not None:
        return _started_from(config, model, distributed, initial)
    return build_engine(config, model, distributed, RandomWeights(config.model, config.training.seed))


def _resumed(config: RunConfig, model: Transformer, distributed: Distributed, checkpoint: Checkpoint) -> Engine:
    check_belongs(model, checkpoint)
    load_buffers(model, checkpoint.buffer, checkpoint.buffer_shapes)
    # The weights come first, because the engine copies them; the state that it adds is restored afterwards.
    engine = build_engine(config, model, distributed, checkpoint.weights())
    restore(engine, checkpoint.read, checkpoint.adam_step)
    if engine.loss_scaler is not None and checkpoint.loss_scale is not None:
        engine.loss_scaler.load_state_dict(checkpoint.loss_scale)
    return engine


def _started_from(config: RunConfig, model: Transformer, distributed: Distributed, initial: InitialWeights) -> Engine:
    load_buffers(model, initial.buffer, initial.names)
    engine = build_engine(config, model, distributed, initial)
    if config.training.precision != "fp32":
        initial.restore_masters(engine)
    return engine
