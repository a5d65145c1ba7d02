"""A run from its config to its last report: step, evaluate, report, save, until it is done or asked to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from signal import Signals

from qsparse_moe.config.rules import check_config, check_trainable, check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import combine_states
from qsparse_moe.data.token_data import load_data
from qsparse_moe.data.tokenizer import with_vocabulary
from qsparse_moe.errors import QSparseMoEError, TrainingDiverged
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.runs.folder import check_run_folder, check_steps, run_folder
from qsparse_moe.runs.report import Listener, TrainingResult
from qsparse_moe.sparsity.schedule import scheduled_scale, ste_share
from qsparse_moe.training.checkpoint.save import save_checkpoint
from qsparse_moe.training.checkpoint.store import ReportState, RunProgress, list_checkpoints
from qsparse_moe.training.distributed.heartbeat import RankMonitor
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.interrupt import StopSignals
from qsparse_moe.training.learning_rate import learning_rate
from qsparse_moe.training.listeners import Listeners
from qsparse_moe.training.monitor.choices import ChoiceMemory
from qsparse_moe.training.monitor.dead_experts import DeadExpertMonitor
from qsparse_moe.training.monitor.non_finite import CANNOT_CONTINUE, NonFiniteGuard
from qsparse_moe.training.monitor.phases import PhaseClock
from qsparse_moe.training.monitor.profile import StepProfiler
from qsparse_moe.training.prepare import PreparedRun, prepare_run
from qsparse_moe.training.reporting import EvaluationResult, Reporter
from qsparse_moe.training.run_lock import RunFolderLock
from qsparse_moe.training.step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(config: RunConfig, listeners: Sequence[Listener] = ()) -> TrainingResult:
    """Train the run that ``config`` describes, in this process and the other ranks that its launcher started.

    Every rank calls it with the same config. It writes ``config.yaml``, ``manifest.json`` and ``checkpoints/`` into the
    run folder, and tells the listeners of rank 0 of every logged step. SIGTERM, SIGUSR1 or Ctrl-C ends it after the
    step at work, with a checkpoint; before the first step is done they have the effect that they had before the call.

    Args:
        config: a complete run; with ``training.resume`` an existing run folder is continued.
        listeners: called with every ``StepReport``; see ``runs.report``.

    Raises:
        ValueError: two listeners have the same ``state_name``.
        ConfigError: a rule is broken, or the run to resume was made with other settings.
        CheckpointError: the run folder is in use or was taken over, a checkpoint is damaged, or a file cannot be
            written.
        DataError: the data cannot be used, or is another than the checkpoint's. In the middle of a stream the steps
            done are saved first.
        BackendUnavailable: the device or a backend asked for by name is not there.
        TrainingDiverged: a loss, an activation or a gradient is not finite; the checkpoints before it are kept.
        RankLost: another rank is gone; it is named, and said by every rank that is left.
    """
    told = Listeners(listeners)
    check_config(config)
    timeout = config.training.collective_timeout
    # Rank 0 holds the folder until its engine is closed.
    with open_distributed(config.training.device, timeout=timeout) as distributed, _lock_of(config) as lock:
        check_world_size(config, distributed.world_size)
        config = distributed.on_every_rank(lambda: with_vocabulary(config))[distributed.rank]
        resumes = distributed.on_rank_zero(lambda: _take_folder(config, lock))
        if not resumes:
            check_trainable(config)
        data = load_data(config.data)
        watch = RankMonitor(distributed, timeout=timeout, way_out=lambda: _how_to_go_on(config))
        with watch:
            run = prepare_run(config, distributed, data, resumes=resumes)
            try:
                return _Loop(run, told if distributed.rank == 0 else Listeners(), lock).run()
            except RuntimeError as error:
                watch.expect_end(error)
                raise
            finally:
                run.engine.close()


def _lock_of(config: RunConfig) -> RunFolderLock:
    return RunFolderLock(run_folder(config))


def _take_folder(config: RunConfig, lock: RunFolderLock) -> bool:
    lock.acquire()
    resumes = check_run_folder(config)
    check_steps(config)
    return resumes


def _how_to_go_on(config: RunConfig) -> str:
    kept = list_checkpoints(run_folder(config))
    return f"training.resume=true goes on from {kept[-1]}" if kept else "The run has no checkpoint yet"


class _Loop:
    """The steps of a prepared run, and what happens between them."""

    def __init__(self, run: PreparedRun, listeners: Listeners, lock: RunFolderLock) -> None:
        self._run = run
        self._lock = lock
        self._training = run.config.training
        self._signals = StopSignals()
        self._reporter = Reporter(run, listeners, lock)
        self._guard = NonFiniteGuard(run.config.model.num_layers, run.distributed, run.engine.loss_scaler)
        self._dead_experts = DeadExpertMonitor(
            run.config.metrics.dead_expert_window,
            [block.layer for block in run.engine.model.blocks() if block.moe is not None],
            run.distributed,
        )
        self._clock = PhaseClock(run.distributed.device)
        self._profiler = StepProfiler(
            run.config.metrics,
            run.folder,
            start_step=run.start.step,
            device=run.distributed.device,
            records=run.distributed.rank == 0,
        )
        # The model was built under the whole plan.
        self._scale = 1.0
        self._progress = run.start
        self._evaluation: EvaluationResult | None = None
        self._choices = ChoiceMemory(run.engine.model.routers(), run.distributed, sequences=run.evaluator.checksum)
        self._trouble: QSparseMoEError | None = None
        self._saved_at = time.monotonic()
        if run.report_state.monitor is not None:
            self._choices.load_state_dict(run.report_state.monitor["choices"])
            self._dead_experts.load_state_dict(run.report_state.monitor["dead_experts"])

    def run(self) -> TrainingResult:
        """Take the steps that are left."""
        try:
            return self._run_steps()
        finally:
            self._profiler.close()
            self._signals.release()

    def _run_steps(self) -> TrainingResult:
        self._run.distributed.on_rank_zero(self._reporter.begin)
        if self._run.report_state.evaluation_pending:
            self._evaluate_late()
        stopped_by = 0
        if self._run.start.step < self._training.steps:
            # All ranks have their first batch, or none begins.
            self._run.distributed.on_every_rank(self._read_first)
        for step in range(self._run.start.step, self._training.steps):
            with self._profiler.step(step + 1):
                outcome = self._step(step)
            # Before that nothing would be lost, and a first step may take minutes: a signal ends the process.
            self._signals.catch()
            done = step + 1
            stopped_by = outcome.stop if done < self._training.steps else 0
            self._evaluation = None
            is_due = self._is_due(self._training.evaluation_interval, done)
            if is_due and not stopped_by:
                self._evaluation = self._evaluate()
            if outcome.losses is None:
                self._dead_experts.add(outcome.rows_LE)
            else:
                self._report(step, outcome)
            if stopped_by or outcome.save or self._is_due(self._training.checkpoint_interval, done):
                self._save(evaluation_pending=is_due and bool(stopped_by))
            if stopped_by:
                break
        if self._run.start.step >= self._training.steps and self._evaluation is None:
            self._evaluation = self._evaluate()
        return self._finish(stopped_by)

    def _read_first(self) -> None:
        if (error := self._run.loader.read_ahead()) is not None:
            raise error

    def _read_ahead(self, step: int) -> None:
        """Read the rows of the step after ``step``: where there are none, the run can still stop after this one."""
        if step + 1 < self._training.steps:
            self._trouble = self._run.loader.read_ahead() or self._trouble

    def _is_old(self) -> bool:
        """Whether the last checkpoint is ``training.checkpoint_minutes`` old, by the clock of rank 0."""
        minutes = self._training.checkpoint_minutes
        return minutes > 0 and self._run.distributed.rank == 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _step(self, step: int) -> StepResult:
        """Take the step numbered ``step`` from 0, and count its tokens and seconds."""
        begin = time.perf_counter()
        self._set_sparsity(step)
        self._clock.begin(measures=self._is_reported(step + 1), traces=self._profiler.is_on)
        with self._clock.part("data"):
            batches = self._run.loader.batches(step)
            self._read_ahead(step)
        try:
            with self._clock.collectives(self._run.engine.collective_aliases):
                outcome = train_step(
                    self._run.engine,
                    batches,
                    step=step + 1,
                    learning_rate=learning_rate(self._training, step),
                    guard=self._guard,
                    report=self._is_reported(step + 1),
                    layer_gradients=self._run.config.metrics.layer_gradients,
                    earlier_rows_LE=self._dead_experts.rows_LE if self._is_reported(step + 1) else None,
                    stop=CANNOT_CONTINUE if self._trouble is not None else self._signals.received,
                    save=self._is_old(),
                    clock=self._clock,
                )
        except TrainingDiverged as error:
            kept = list_checkpoints(self._run.folder)
            raise TrainingDiverged(f"{error}: {kept[-1] if kept else 'there is none yet'}") from None
        before = self._progress
        self._progress = RunProgress(
            step=step + 1,
            tokens=before.tokens + self._run.tokens_per_step,
            seconds=before.seconds + time.perf_counter() - begin,
        )
        return outcome

    def _set_sparsity(self, step: int) -> None:
        settings = self._run.config.model.sparsity
        self._run.engine.model.set_ste_share(ste_share(settings, step))
        scale = scheduled_scale(settings.schedule, step)
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

    def _evaluate(self) -> EvaluationResult:
        engine = self._run.engine

        def forward(batch: Batch) -> ModelOutput:
            return engine.forward(batch, with_stats=False)

        self._set_sparsity(max(0, self._progress.step - 1))
        engine.model.eval()
        try:
            with self._choices.watch() as seen:
                validation = self._run.evaluator(forward)
            return EvaluationResult(validation, self._choices.compare(seen, self._run.evaluator.counts_T))
        finally:
            engine.model.train()

    def _evaluate_late(self) -> None:
        """Make the evaluation that was due after the last step before the run was stopped, and add it to its report."""
        self._evaluation = found = self._evaluate()
        self._run.distributed.on_rank_zero(lambda: self._reporter.late_evaluation(self._progress, found))

    def _save(self, *, evaluation_pending: bool) -> None:
        distributed = self._run.distributed
        distributed.on_rank_zero(self._lock.check)
        states = distributed.all_gather(self._run.loader.state_dict())
        save_checkpoint(
            self._run.folder,
            self._run.engine,
            self._progress,
            combine_states(states),
            keep_last=self._training.keep_last,
            report_state=ReportState(
                listeners=self._reporter.state_dict(),
                monitor={"choices": self._choices.state_dict(), "dead_experts": self._dead_experts.state_dict()},
                evaluation_pending=evaluation_pending,
            ),
        )
        self._saved_at = time.monotonic()

    def _report(self, step: int, outcome: StepResult) -> None:
        self._dead_experts.look(self._progress.step, outcome.rows_since_report_LE)
        self._reporter.report(
            self._progress,
            outcome,
            learning_rate=learning_rate(self._training, step),
            evaluation=self._evaluation,
            phase_seconds=dict(self._clock.seconds),
        )
        # The other ranks are on their way: the next step carries the wish to stop to them, with a checkpoint.
        self._trouble = self._reporter.trouble or self._trouble

    def _end_troubled(self) -> None:
        """Raise on every rank what any of them could not go on with, and say which checkpoint holds the steps done."""
        troubles = [error for error in self._run.distributed.all_gather(self._trouble) if error is not None]
        if troubles:
            kept = list_checkpoints(self._run.folder)
            raise type(troubles[0])(
                f"{troubles[0]}. The run ended after step {self._progress.step} of {self._training.steps}; "
                f"training.resume=true goes on from {kept[-1]}"
            ) from troubles[0]

    def _finish(self, stopped_by: int) -> TrainingResult:
        result = TrainingResult(
            run_dir=self._run.folder,
            step=self._progress.step,
            tokens=self._progress.tokens,
            seconds=self._progress.seconds,
            validation=None if self._evaluation is None else self._evaluation.validation,
            stopped_by=stopped_by if 0 < stopped_by < CANNOT_CONTINUE else None,
        )
        if 0 < stopped_by < CANNOT_CONTINUE and self._run.distributed.rank == 0:
            logger.warning(
                "%s: stopped after step %d of %d with a checkpoint; training.resume=true goes on from there",
                Signals(stopped_by).name,
                result.step,
                self._training.steps,
            )
        if self._run.distributed.rank == 0:
            for index, passes in enumerate(self._run.loader.passes()):
                logger.info("data.sources.%d was read %d times to its end, by rank 0", index, passes)
        self._reporter.end(result)
        self._trouble = self._trouble or self._reporter.trouble
        self._end_troubled()
        return result
