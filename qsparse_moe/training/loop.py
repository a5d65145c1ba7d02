"""A run from its config to its last report: step, evaluate, report, save, until it is done or asked to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from signal import Signals

from torch import Tensor

from qsparse_moe.config.rules import check_config, check_trainable, check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import combine_states
from qsparse_moe.data.token_data import load_data
from qsparse_moe.data.tokenizer import with_vocabulary
from qsparse_moe.errors import CheckpointError, QSparseMoEError, TrainingDiverged
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.runs.folder import check_run_folder, check_steps, run_folder
from qsparse_moe.runs.report import LateEvaluation, Listener, RunContext, StepReport, TrainingResult
from qsparse_moe.sparsity.schedule import scheduled_scale, ste_share
from qsparse_moe.training.checkpoint.full_disk import cannot_write, writing
from qsparse_moe.training.checkpoint.save import save_checkpoint
from qsparse_moe.training.checkpoint.store import ReportState, RunProgress, list_checkpoints
from qsparse_moe.training.distributed.heartbeat import RankWatch
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.interrupt import StopSignals
from qsparse_moe.training.learning_rate import learning_rate
from qsparse_moe.training.listeners import Listeners
from qsparse_moe.training.monitor.choices import ChoiceMemory
from qsparse_moe.training.monitor.dead_experts import DeadExpertWatch
from qsparse_moe.training.monitor.memory import device_name, memory_in_use
from qsparse_moe.training.monitor.non_finite import CANNOT_GO_ON, NonFiniteGuard
from qsparse_moe.training.monitor.phases import PhaseClock
from qsparse_moe.training.monitor.profile import StepProfiler
from qsparse_moe.training.prepare import PreparedRun, prepare_run
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
        watch = RankWatch(distributed, timeout=timeout, way_out=lambda: _how_to_go_on(config))
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
    lock.take()
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
        self._listeners = listeners
        self._guard = NonFiniteGuard(run.config.model.num_layers, run.distributed, run.engine.loss_scaler)
        self._dead_experts = DeadExpertWatch(
            run.config.metrics.dead_expert_window,
            [block.layer for block in run.engine.model.blocks() if block.moe is not None],
            run.distributed,
        )
        self._tokens_per_step = self._training.global_batch_size * run.config.data.sequence_length
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
        self._reported = run.start
        self._validation: dict[str, float] | None = None
        self._choices = ChoiceMemory(run.engine.model.routers(), run.distributed, sequences=run.evaluator.checksum)
        self._choice_agreement_L: Tensor | None = None
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
        self._run.distributed.on_rank_zero(self._begin)
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
            self._validation, self._choice_agreement_L = None, None
            is_due = self._is_due(self._training.evaluation_interval, done)
            if is_due and not stopped_by:
                self._validation = self._evaluate()
            if outcome.losses is None:
                self._dead_experts.add(outcome.rows_LE)
            else:
                self._report(step, outcome)
            if stopped_by or outcome.save or self._is_due(self._training.checkpoint_interval, done):
                self._save(evaluation_pending=is_due and bool(stopped_by))
            if stopped_by:
                break
        if self._run.start.step >= self._training.steps and self._validation is None:
            self._validation = self._evaluate()
        return self._finish(stopped_by)

    def _begin(self) -> None:
        with writing(self._run.folder):
            self._listeners.begin(self._context(), self._run.report_state.listeners)

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
            with self._clock.collectives(self._run.engine.kept_collectives):
                outcome = train_step(
                    self._run.engine,
                    batches,
                    step=step + 1,
                    learning_rate=learning_rate(self._training, step),
                    guard=self._guard,
                    report=self._is_reported(step + 1),
                    layer_gradients=self._run.config.metrics.layer_gradients,
                    earlier_rows_LE=self._dead_experts.rows_LE if self._is_reported(step + 1) else None,
                    stop=CANNOT_GO_ON if self._trouble is not None else self._signals.received,
                    save=self._is_old(),
                    clock=self._clock,
                )
        except TrainingDiverged as error:
            kept = list_checkpoints(self._run.folder)
            raise TrainingDiverged(f"{error}: {kept[-1] if kept else 'there is none yet'}") from None
        before = self._progress
        self._progress = RunProgress(
            step=step + 1,
            tokens=before.tokens + self._tokens_per_step,
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

    def _evaluate(self) -> dict[str, float]:
        engine = self._run.engine

        def forward(batch: Batch) -> ModelOutput:
            return engine.forward(batch, with_stats=False)

        self._set_sparsity(max(0, self._progress.step - 1))
        engine.model.eval()
        try:
            with self._choices.watch() as seen:
                validation = self._run.evaluator(forward)
            self._choice_agreement_L = self._choices.compare(seen, self._run.evaluator.counts_T)
            return validation
        finally:
            engine.model.train()

    def _evaluate_late(self) -> None:
        """Make the evaluation that was due after the last step before the run was stopped, and add it to its report."""
        self._validation = self._evaluate()
        now = self._progress
        late = LateEvaluation(now.step, now.tokens, now.seconds, self._validation, self._choice_agreement_L)

        def tell() -> None:
            self._lock.check()
            with writing(self._run.folder):
                self._listeners.late_evaluation(late)

        self._run.distributed.on_rank_zero(tell)

    def _save(self, *, evaluation_pending: bool) -> None:
        distributed = self._run.distributed
        distributed.on_rank_zero(self._lock.check)
        states = distributed.gather(self._run.loader.state_dict())
        save_checkpoint(
            self._run.folder,
            self._run.engine,
            self._progress,
            combine_states(states),
            keep_last=self._training.keep_last,
            report_state=ReportState(
                listeners=self._listeners.state_dict(),
                monitor={"choices": self._choices.state_dict(), "dead_experts": self._dead_experts.state_dict()},
                evaluation_pending=evaluation_pending,
            ),
        )
        self._saved_at = time.monotonic()

    def _report(self, step: int, outcome: StepResult) -> None:
        assert outcome.losses is not None and outcome.stats is not None
        now, last, scaler = self._progress, self._reported, self._run.engine.loss_scaler
        self._reported = now
        self._dead_experts.look(now.step, outcome.rows_since_report_LE)
        router_bias_LE = self._run.engine.model.router_bias_LE
        report = StepReport(
            step=now.step,
            tokens=now.tokens,
            seconds=now.seconds,
            losses=outcome.losses,
            stats=outcome.stats,
            router_bias_LE=None if router_bias_LE is None else router_bias_LE.cpu(),
            grad_norm=outcome.grad_norm,
            layer_grad_norms=outcome.layer_grad_norms,
            learning_rate=learning_rate(self._training, step),
            sparsity=self._run.engine.model.sparsity_plan.mean,
            step_seconds=(now.seconds - last.seconds) / (now.step - last.step),
            tokens_per_second=(now.tokens - last.tokens) / (now.seconds - last.seconds),
            memory=memory_in_use(self._run.distributed.device),
            validation=self._validation,
            choice_agreement_L=self._choice_agreement_L,
            phase_seconds=dict(self._clock.seconds),
            loss_scale=outcome.loss_scale,
            skipped_steps=None if scaler is None else scaler.skipped_steps,
        )
        # The other ranks are on their way: the next step carries the wish to stop to them, with a checkpoint.
        try:
            self._lock.check()
            self._listeners.report(report)
        except CheckpointError as error:
            # Nor is there a checkpoint then: saving looks at the lock again.
            self._trouble = error
        except OSError as error:
            self._trouble = cannot_write(self._run.folder, error)

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
            device_name=device_name(run.distributed.device),
            backend=run.engine.model.runtime.names.get("model.moe.backend", ""),
        )

    def _end_troubled(self) -> None:
        """Raise on every rank what any of them could not go on with, and say which checkpoint holds the steps done."""
        troubles = [error for error in self._run.distributed.gather(self._trouble) if error is not None]
        if troubles:
            kept = list_checkpoints(self._run.folder)
            raise type(troubles[0])(
                f"{troubles[0]}. The run ended after step {self._progress.step} of {self._training.steps}; "
                f"training.resume=true goes on from {kept[-1]}"
            ) from troubles[0]

    def _end_listeners(self, result: TrainingResult) -> None:
        try:
            self._listeners.end(result)
        except OSError as error:
            self._trouble = self._trouble or cannot_write(self._run.folder, error)

    def _finish(self, stopped_by: int) -> TrainingResult:
        result = TrainingResult(
            run_dir=self._run.folder,
            step=self._progress.step,
            tokens=self._progress.tokens,
            seconds=self._progress.seconds,
            validation=self._validation,
            stopped_by=stopped_by if 0 < stopped_by < CANNOT_GO_ON else None,
        )
        if 0 < stopped_by < CANNOT_GO_ON and self._run.distributed.rank == 0:
            logger.warning(
                "%s: stopped after step %d of %d with a checkpoint; training.resume=true goes on from there",
                Signals(stopped_by).name,
                result.step,
                self._training.steps,
            )
        if self._run.distributed.rank == 0:
            for index, passes in enumerate(self._run.loader.passes()):
                logger.info("data.sources.%d was read %d times to its end, by rank 0", index, passes)
        self._end_listeners(result)
        self._end_troubled()
        return result
