"""A run from its config to its run folder. It reads from the top: prepare, step, evaluate, save, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from qsparse_moe.config.rules import check_config, check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import TrainLoader, combine_states
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint import (
    Checkpoint,
    Progress,
    list_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from qsparse_moe.training.distributed import Distributed, open_distributed
from qsparse_moe.training.engine import Engine, build_engine
from qsparse_moe.training.evaluate import Evaluator
from qsparse_moe.training.guard import NonFiniteGuard
from qsparse_moe.training.interrupt import StopSignals
from qsparse_moe.training.learning_rate import learning_rate
from qsparse_moe.training.manifest import write_manifest
from qsparse_moe.training.memory import memory_in_use
from qsparse_moe.training.portable_state import (
    check_shapes,
    load_weights,
    restore,
    seed_random_states,
    set_random_states,
)
from qsparse_moe.training.report import Listener, RunContext, StepReport, TrainingResult, tell
from qsparse_moe.training.run_folder import check_run_folder, run_folder, write_config
from qsparse_moe.training.step import StepOutcome, train_step

logger = logging.getLogger(__name__)


def train(config: RunConfig, listeners: Sequence[Listener] = ()) -> TrainingResult:
    """Train the run that ``config`` describes, in this process and the other ranks that its launcher started.

    Every rank calls it with the same config. It writes ``config.yaml``, ``manifest.json`` and ``checkpoints/`` into the
    run folder, and tells the listeners of rank 0 of every logged step. SIGTERM or Ctrl-C ends it after the step at
    work, with a checkpoint.

    Args:
        config: a complete run; with ``training.resume`` an existing run folder is continued.
        listeners: called with every ``StepReport``; see ``training.report``.

    Raises:
        ConfigError: a rule is broken, or the run to resume was made with other settings.
        CheckpointError: the run folder is in use, or a checkpoint is damaged or cannot be written.
        DataError: the data cannot be used, or is another than the checkpoint's.
        BackendUnavailable: the device or a backend asked for by name is not there.
        TrainingDiverged: a loss, an activation or a gradient is not finite; the checkpoints before it are kept.
    """
    check_config(config)
    with open_distributed(config.training.device) as distributed:
        check_world_size(config, distributed.world_size)
        resumes = distributed.on_rank_zero(lambda: check_run_folder(config))
        data = load_data(config.data)
        with StopSignals() as signals:
            run = _prepare(config, distributed, data, resumes=resumes)
            try:
                return _Loop(run, signals, listeners if distributed.rank == 0 else ()).run()
            finally:
                run.engine.close()


@dataclass(frozen=True)
class _Run:
    """Everything that is made before the first step."""

    config: RunConfig
    folder: Path
    distributed: Distributed
    engine: Engine
    loader: TrainLoader
    evaluator: Evaluator
    plan: SparsityPlan
    start: Progress


def _prepare(config: RunConfig, distributed: Distributed, data: TokenData, *, resumes: bool) -> _Run:
    """Build model, engine and loader, from the newest checkpoint where there is one, and write the run folder."""
    folder = run_folder(config)
    training = config.training
    loader = TrainLoader(config, data, distributed.rank, distributed.world_size)
    checkpoint = _find_checkpoint(folder, distributed) if resumes else None
    model = build_model(config.model, device=distributed.device, seed=training.seed)
    model.activation_checkpointing = training.activation_checkpointing == "full"
    plan = model.sparsity_plan
    if checkpoint is not None:
        check_shapes({n: p.shape for n, p in model.named_parameters()}, checkpoint.shapes, str(checkpoint.index_file))
        loader.load_state_dict(checkpoint.data_state)
        load_weights(model, checkpoint.tensor)
    engine = build_engine(config, model, distributed)
    start = checkpoint.progress if checkpoint is not None else Progress(step=0, tokens=0, seconds=0.0)
    seed_random_states(training.seed, start.step, distributed.rank)
    if checkpoint is not None:
        restore(engine, checkpoint.tensor, checkpoint.adam_step)
        if checkpoint.world_size == distributed.world_size:
            set_random_states(checkpoint.random_states(distributed.rank))
    evaluator = Evaluator(
        data, num_rows=training.evaluation_rows, micro_batch_size=training.micro_batch_size, distributed=distributed
    )

    def write() -> None:
        write_config(folder, config)
        write_manifest(folder, config, engine, start_step=start.step, fingerprint=data.fingerprint)

    distributed.on_rank_zero(write)
    return _Run(config, folder, distributed, engine, loader, evaluator, plan, start)


def _find_checkpoint(folder: Path, distributed: Distributed) -> Checkpoint | None:
    distributed.on_rank_zero(lambda: remove_leftovers(folder))
    checkpoint = newest_checkpoint(folder, distributed)
    if distributed.rank == 0:
        if checkpoint is None:
            logger.info("%s has no complete checkpoint: the run begins again at step 0", folder)
        else:
            logger.info("resuming from %s", checkpoint.path)
    return checkpoint


class _Loop:
    """The steps of a prepared run, and what happens between them."""

    def __init__(self, run: _Run, signals: StopSignals, listeners: Sequence[Listener]) -> None:
        self._run = run
        self._training = run.config.training
        self._signals = signals
        self._listeners = listeners
        self._guard = NonFiniteGuard(run.config.model.num_layers, run.distributed)
        self._tokens_per_step = self._training.global_batch_size * run.config.data.sequence_length
        self._scale: float | None = None
        self._progress = run.start
        self._reported = run.start
        self._validation: dict[str, float] | None = None

    def run(self) -> TrainingResult:
        """Take the steps that are left."""
        tell(self._listeners, "begin", self._context())
        stopped_by = 0
        for step in range(self._run.start.step, self._training.steps):
            outcome = self._step(step)
            done = step + 1
            stopped_by = outcome.stop if done < self._training.steps else 0
            self._validation = None
            if not stopped_by and self._is_due(self._training.evaluation_interval, done):
                self._validation = self._evaluate()
            if outcome.losses is not None:
                self._report(step, outcome)
            if stopped_by or self._is_due(self._training.checkpoint_interval, done):
                self._save()
            if stopped_by:
                break
        if self._run.start.step >= self._training.steps:
            self._validation = self._evaluate()
        return self._finish(stopped_by)

    def _step(self, step: int) -> StepOutcome:
        """Take the step numbered ``step`` from 0, and count its tokens and seconds."""
        begin = time.perf_counter()
        self._set_sparsity(step)
        try:
            outcome = train_step(
                self._run.engine,
                self._run.loader.batches(step),
                step=step + 1,
                learning_rate=learning_rate(self._training, step),
                guard=self._guard,
                report=self._is_reported(step + 1),
                stop=self._signals.received,
            )
        except TrainingDiverged as error:
            kept = list_checkpoints(self._run.folder)
            raise TrainingDiverged(f"{error}: {kept[-1] if kept else 'there is none yet'}") from None
        before = self._progress
        self._progress = Progress(
            step=step + 1,
            tokens=before.tokens + self._tokens_per_step,
            seconds=before.seconds + time.perf_counter() - begin,
        )
        return outcome

    def _set_sparsity(self, step: int) -> None:
        scale = scheduled_scale(self._run.config.model.sparsity.schedule, step)
        if scale != self._scale:
            self._run.engine.model.set_sparsity(self._run.plan.scaled(scale))
            self._scale = scale

    def _is_due(self, interval: int, done: int) -> bool:
        """At every ``interval``-th step, if there is an interval, and at the last."""
        return done == self._training.steps or (interval > 0 and done % interval == 0)

    def _is_reported(self, done: int) -> bool:
        return self._is_due(self._run.config.metrics.interval, done) or self._is_due(
            self._training.evaluation_interval, done
        )

    def _evaluate(self) -> dict[str, float]:
        engine = self._run.engine

        def forward(batch: Batch) -> ModelOutput:
            return engine.forward(batch, with_stats=False)

        self._set_sparsity(max(0, self._progress.step - 1))
        engine.model.eval()
        try:
            return self._run.evaluator(forward)
        finally:
            engine.model.train()

    def _save(self) -> None:
        distributed = self._run.distributed
        states = distributed.gather(self._run.loader.state_dict())
        save_checkpoint(
            self._run.folder,
            self._run.engine,
            self._progress,
            combine_states(states),
            keep_last=self._training.keep_last,
        )

    def _report(self, step: int, outcome: StepOutcome) -> None:
        assert outcome.losses is not None and outcome.stats is not None
        now, last = self._progress, self._reported
        self._reported = now
        report = StepReport(
            step=now.step,
            tokens=now.tokens,
            seconds=now.seconds,
            losses=outcome.losses,
            stats=outcome.stats,
            grad_norm=outcome.grad_norm,
            learning_rate=learning_rate(self._training, step),
            sparsity=self._run.engine.model.sparsity_plan.mean,
            step_seconds=(now.seconds - last.seconds) / (now.step - last.step),
            tokens_per_second=(now.tokens - last.tokens) / (now.seconds - last.seconds),
            memory=memory_in_use(self._run.distributed.device),
            validation=self._validation,
        )
        for listener in self._listeners:
            listener(report)

    def _context(self) -> RunContext:
        run = self._run
        return RunContext(
            run_dir=run.folder,
            config=run.config,
            start_step=run.start.step,
            start_tokens=run.start.tokens,
            start_seconds=run.start.seconds,
            world_size=run.distributed.world_size,
            tokens_per_step=self._tokens_per_step,
            num_parameters=sum(shape.numel() for shape in run.engine.shapes().values()),
            engine=run.engine.name,
            device=run.distributed.device.type,
            backend=run.engine.model.runtime.names.get("model.moe.backend", ""),
        )

    def _finish(self, stopped_by: int) -> TrainingResult:
        result = TrainingResult(
            run_dir=self._run.folder,
            step=self._progress.step,
            tokens=self._progress.tokens,
            seconds=self._progress.seconds,
            validation=self._validation,
            stopped_by=stopped_by or None,
        )
        if stopped_by and self._run.distributed.rank == 0:
            logger.warning(
                "%s: stopped after step %d of %d with a checkpoint; training.resume=true goes on from there",
                Signals(stopped_by).name,
                result.step,
                self._training.steps,
            )
        tell(self._listeners, "end", result)
        return result
