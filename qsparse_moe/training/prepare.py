"""Preparation of a run, new or resumed from its newest checkpoint, before its first step."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qsparse_moe.config.schema import DataConfig, RunConfig
from qsparse_moe.data.loader import TrainLoader
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.runs.folder import MANIFEST_FILE, TOKENIZER, run_folder, write_config
from qsparse_moe.runs.manifest import describe_environment, earlier_entry, write_manifest
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.full_disk import writing
from qsparse_moe.training.checkpoint.state import seed_random_states, set_random_states
from qsparse_moe.training.checkpoint.store import (
    Checkpoint,
    ReportState,
    RunProgress,
    newest_checkpoint,
    remove_leftovers,
)
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.build import check_engine
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.evaluate import Evaluator
from qsparse_moe.training.freed_memory import keep_freed_memory
from qsparse_moe.training.initial_weights import InitialWeights
from qsparse_moe.training.monitor.memory import device_name
from qsparse_moe.training.start import start_engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready for its next step, on one rank."""

    config: RunConfig
    folder: Path
    distributed: Distributed
    engine: Engine
    loader: TrainLoader
    evaluator: Evaluator
    plan: SparsityPlan
    """The sparsity at the end of the schedule."""
    start: RunProgress
    """The progress at the start: zero, or that of the checkpoint."""
    report_state: ReportState
    """State of reports from the checkpoint; empty for a new run, or if the checkpoint's state cannot be used."""
    step_filter: dict[str, Any] | None = None
    """State of the step filter from the checkpoint."""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per step over all ranks."""
        return self.config.training.global_batch_size * self.config.data.sequence_length


def prepare_run(
    config: RunConfig,
    distributed: Distributed,
    data: TokenData,
    *,
    resumes: bool,
    initial: InitialWeights | None = None,
) -> PreparedRun:
    """Build the model, engine, and loader, from the newest checkpoint if the run ``resumes``; write the run folder.

    Args:
        config: the run.
        distributed: the ranks, which call it together.
        data: its data.
        resumes: whether the run folder holds a run to continue.
        initial: the weights to start from; None: a checkpoint's, or random ones.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model, or an initial weight is not finite.
        DataError: the checkpoint was made with other data.
        BackendUnavailable: a backend requested by name, or NVMe offload, is not available on this machine.
        ConfigError: the folder for NVMe offload cannot be used.
    """
    # On every rank, since the ranks may run on different machines, and before memory is allocated for a model.
    distributed.on_every_rank(lambda: check_engine(config))
    folder = run_folder(config)
    training = config.training
    loader = TrainLoader(
        config,
        data,
        distributed.rank,
        distributed.world_size,
        reader=_choose_reader(config.data, distributed.device),
        pin_memory=distributed.device.type == "cuda",
    )
    checkpoint = _find_checkpoint(folder, distributed) if resumes else None
    if checkpoint is not None:
        # Before the model is built: it refuses a checkpoint that was made with other data.
        loader.load_state_dict(checkpoint.data_state)
    hidden_ids = meaningless_ids(config.model, data.tokenizer)
    engine = start_engine(config, distributed, checkpoint=checkpoint, initial=initial, hidden_ids=hidden_ids)
    if distributed.device.type == "cpu":
        # Only now: what the build of a model frees should be returned.
        keep_freed_memory()
    start = checkpoint.progress if checkpoint is not None else RunProgress(step=0, tokens=0, seconds=0.0)
    _start_random_states(training.seed, distributed, start, checkpoint)
    evaluator = Evaluator(
        data,
        num_sequences=training.evaluation_rows,
        micro_batch_size=training.micro_batch_size,
        distributed=distributed,
    )

    # After everything that can refuse the run, so that a refused run leaves its folder unchanged.
    def write() -> None:
        if start.step == 0 and (folder / MANIFEST_FILE).exists():
            logger.info("%s has no complete checkpoint: the run starts again at step 0", folder)
        remove_leftovers(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # First, because it marks the folder as a run's if this process ends before the config is written.
            part = _describe_part(config, engine, start_step=start.step, fingerprint=data.fingerprint)
            if data.conversations is not None:
                part["conversations"] = data.conversations
            write_manifest(folder, part | {"initial_weights": _describe_initial(folder, initial, start)})
            write_config(folder, config)
            data.tokenizer.save(folder / TOKENIZER, data.chat_template)
            if config.data.tokenizer == "bytes":
                # A run without checkpoints may have started in this folder with another tokenizer.
                shutil.rmtree(folder / TOKENIZER, ignore_errors=True)

    distributed.on_rank_zero(write)
    if distributed.rank == 0 and config.data.mode == "table":
        _log_epochs(config, loader.epochs(training.steps))
    plan = engine.model.sparsity_plan
    report_state = ReportState() if checkpoint is None else _read_report_state(checkpoint, distributed)
    step_filter = None if checkpoint is None else checkpoint.step_filter
    return PreparedRun(config, folder, distributed, engine, loader, evaluator, plan, start, report_state, step_filter)


def _choose_reader(config: DataConfig, device: torch.device) -> Literal["thread", "process"]:
    """Return what reads the data beside training: ``data.reader``, or by default what suits the device."""
    if config.reader != "auto":
        return config.reader
    # On a CPU a process would take a core from the products; beside a GPU a thread would delay the launch of kernels.
    return "process" if device.type == "cuda" and config.mode == "streaming" else "thread"


def _log_epochs(config: RunConfig, epochs: Sequence[float]) -> None:
    for index, (source, times) in enumerate(zip(config.data.sources, epochs, strict=True)):
        path = source.path if isinstance(source.path, str) else ", ".join(source.path or ())
        logger.info(
            "data.sources.%d (%s): read %.3g times in the %d steps of the run",
            index,
            path or source.kind,
            times,
            config.training.steps,
        )


def _find_checkpoint(folder: Path, distributed: Distributed) -> Checkpoint | None:
    checkpoint = newest_checkpoint(folder, distributed)
    if distributed.rank == 0 and checkpoint is not None:
        logger.info("resuming from %s", checkpoint.path)
    return checkpoint


def _start_random_states(
    seed: int, distributed: Distributed, start: RunProgress, checkpoint: Checkpoint | None
) -> None:
    """Restore the ranks' random states, or seed each rank differently if the number of ranks has changed."""
    # Seeded in any case: a checkpoint without CUDA states leaves that generator to the seed.
    seed_random_states(seed, start.step, distributed.rank)
    if checkpoint is not None and checkpoint.world_size == distributed.world_size:
        set_random_states(checkpoint.random_states(distributed.rank))


def _read_report_state(checkpoint: Checkpoint, distributed: Distributed) -> ReportState:
    """Return the checkpoint's state of reports.

    On another number of ranks than wrote it, the state of the monitors is left out, because it describes the sequences
    and tokens of single ranks.
    """
    if not checkpoint.has_report_state:
        if distributed.rank == 0:
            logger.info(
                "%s was written by an earlier version, which saved no state of metrics: metrics over several steps "
                "(dead experts and features, drift of thresholds, agreement of choices) start with an empty window",
                checkpoint.path,
            )
        return ReportState()
    if checkpoint.world_size == distributed.world_size:
        return checkpoint.report_state(distributed.rank)
    if distributed.rank == 0:
        logger.info(
            "%s was written by %d ranks, and this run has %d: router/choice_agreement starts with the second "
            "evaluation from here, and warnings of dead experts start with an empty window",
            checkpoint.path,
            checkpoint.world_size,
            distributed.world_size,
        )
    # The listeners' states are those of rank 0, whatever the number of ranks.
    return replace(checkpoint.report_state(0), monitor=None)


def _describe_initial(folder: Path, initial: InitialWeights | None, start: RunProgress) -> dict[str, Any] | None:
    if initial is not None:
        return initial.describe()
    # A resumed run has read no initial weights, but it goes back to those of its first part.
    return earlier_entry(folder, "initial_weights") if start.step else None


def _describe_part(config: RunConfig, engine: Engine, *, start_step: int, fingerprint: str) -> dict[str, Any]:
    """Return the manifest's entry for the part of the run that starts now."""
    return describe_environment() | {
        "start_step": start_step,
        "world_size": engine.distributed.world_size,
        "device": device_name(engine.distributed.device) or engine.distributed.device.type,
        "torch_threads": torch.get_num_threads(),
        "backends": engine.model.runtime.names,
        "engine": engine.describe(),
        "seeds": {"weights": config.training.seed, "data": config.training.seed, "noise": config.training.seed},
        "data_fingerprint": fingerprint,
    }
