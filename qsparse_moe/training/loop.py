"""The loop of a run: step, evaluate, report, and save, until the run is finished or asked to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from signal import Signals

from qsparse_moe.config.rules import check_config, check_trainable, check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import combine_states
from qsparse_moe.data.token_data import load_data
from qsparse_moe.data.tokenizer import with_vocabulary
from qsparse_moe.errors import CheckpointError, QSparseMoEError, TrainingDiverged
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.runs.folder import check_run_folder, check_steps, init_from, run_folder
from qsparse_moe.runs.report import Listener, TrainingResult
from qsparse_moe.sparsity.schedule import scheduled_scale, ste_share
from qsparse_moe.training.checkpoint.save import CheckpointWriter
from qsparse_moe.training.checkpoint.store import ReportState, RunProgress, list_checkpoints
from qsparse_moe.training.distributed.heartbeat import RankMonitor
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.initial_weights import InitialWeights, read_initial_weights
from qsparse_moe.training.interrupt import StopSignals
from qsparse_moe.training.learning_rate import learning_rate
from qsparse_moe.training.listeners import Listeners
from qsparse_moe.training.monitor.choices import ChoiceAgreement
from qsparse_moe.training.monitor.dead_experts import DeadExpertMonitor
from qsparse_moe.training.monitor.non_finite import CANNOT_CONTINUE, NonFiniteGuard, Requests
from qsparse_moe.training.monitor.phases import PhaseClock
from qsparse_moe.training.monitor.profile import StepProfiler
from qsparse_moe.training.monitor.skipped_steps import build_step_filter
from qsparse_moe.training.named_tensors import OpenWeights, open_checkpoint
from qsparse_moe.training.prepare import PreparedRun, prepare_run
from qsparse_moe.training.reporting import EvaluationResult, Reporter
from qsparse_moe.training.run_lock import RunFolderLock
from qsparse_moe.training.start_checks import check_memory, check_same_config
from qsparse_moe.training.step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(
    config: RunConfig, listeners: Sequence[Listener] = (), *, open_weights: OpenWeights = open_checkpoint
) -> TrainingResult:
    """Train the run that ``config`` describes, in this process and the other ranks that its launcher started.

    ``interop.training.train``, the public ``qsparse_moe.train``, calls it with the readers of all formats.

    All ranks must call it with the same config. It writes ``config.yaml``, ``manifest.json``, and ``checkpoints/`` into
    the run folder, and calls the listeners on rank 0 with every logged step. SIGTERM, SIGUSR1, or Ctrl-C ends the run
    after the current step with a checkpoint; before the end of the first step, signals have the effect that they had
    before the call.

    Args:
        config: a complete run; with ``training.resume`` an existing run folder is continued.
        listeners: called with every ``StepReport``; see ``runs.report``.
        open_weights: opens what ``training.init_from`` names; the default reads runs and checkpoints.

    Raises:
        ValueError: two listeners have the same ``state_name``.
        ConfigError: a rule is broken, the ranks have different configs, the run does not fit into the memory of its
            machine, the run to resume was made with other settings, or the initial weights do not fit the run.
        CheckpointError: the run folder is in use or was taken over, a checkpoint is damaged, or a file cannot be
            written.
        DataError: the data cannot be used, or differs from the checkpoint's. If a stream fails in the middle of a run,
            the completed steps are saved first.
        BackendUnavailable: the device, or a backend requested by name, is not available.
        TrainingDiverged: a loss, an activation, or a gradient is not finite; earlier checkpoints remain.
        RankLost: another rank is gone; every remaining rank logs its name and raises the error.
    """
    all_listeners = Listeners(listeners)
    check_config(config)
    timeout = config.training.collective_timeout
    # Rank 0 holds the lock until its engine is closed: no other run may start while this one can still write.
    with open_distributed(config.training.device, timeout=timeout) as distributed, _lock_of(config) as lock:
        # First of all: where the ranks differ, any other check might raise on some of them only.
        check_same_config(config, distributed)
        # Only here: the number of ranks is known once they have joined.
        check_world_size(config, distributed.world_size)
        config = distributed.on_every_rank(lambda: with_vocabulary(config))[distributed.rank]
        # The size of the model is known with its vocabulary; a refused run writes nothing.
        distributed.on_every_rank(lambda: check_memory(config, distributed))
        resumes = distributed.on_rank_zero(lambda: _acquire_folder(config, lock))
        # An existing run may continue with settings that earlier versions accepted.
        if not resumes:
            check_trainable(config)
        initial = _read_initial(config, distributed, open_weights, resumes=resumes)
        data = load_data(config.data)
        monitor = RankMonitor(distributed, timeout=timeout, way_out=lambda: _how_to_continue(config))
        with monitor:
            run = prepare_run(config, distributed, data, resumes=resumes, initial=initial)
            try:
                # All ranks have the same totals, so one of them reports.
                return _Loop(run, all_listeners if distributed.rank == 0 else Listeners(), lock).run()
            except RuntimeError as error:
                # Before the engine is closed: signals must not end this process before the lost rank is named.
                monitor.expect_end(error)
                raise
            finally:
                run.loader.close()
                run.engine.close()


def _lock_of(config: RunConfig) -> RunFolderLock:
    return RunFolderLock(run_folder(config))


def _acquire_folder(config: RunConfig, lock: RunFolderLock) -> bool:
    lock.acquire()
    resumes = check_run_folder(config)
    check_steps(config)
    return resumes


def _read_initial(
    config: RunConfig, distributed: Distributed, open_weights: OpenWeights, *, resumes: bool
) -> InitialWeights | None:
    # Before the data, whose preparation may take hours.
    weights = distributed.on_rank_zero(lambda: init_from(config, resumes=resumes))
    return None if weights is None else read_initial_weights(config, weights, distributed, open_weights)


def _how_to_continue(config: RunConfig) -> str:
    saved = list_checkpoints(run_folder(config))
    return f"training.resume=true continues from {saved[-1]}" if saved else "The run has no checkpoint yet"


class _Loop:
    """The steps of a prepared run, and the evaluations, reports, and checkpoints between them."""

    def __init__(self, run: PreparedRun, listeners: Listeners, lock: RunFolderLock) -> None:
        self._run = run
        self._lock = lock
        self._training = run.config.training
        self._signals = StopSignals()
        self._reporter = Reporter(run, listeners, lock)
        self._step_filter = build_step_filter(self._training.skip_steps)
        if self._step_filter is not None and run.step_filter is not None:
            self._step_filter.load_state_dict(run.step_filter)
        self._guard = NonFiniteGuard(
            run.config.model.num_layers,
            run.distributed,
            run.engine.loss_scaler,
            raises=self._step_filter is None,
        )
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
        # The model was built with the full plan.
        self._scale = 1.0
        self._progress = run.start
        self._evaluation: EvaluationResult | None = None
        self._choices = ChoiceAgreement(run.engine.model.routers(), run.distributed, sequences=run.evaluator.checksum)
        self._failure: QSparseMoEError | None = None
        self._saved_at = time.monotonic()
        self._writer = CheckpointWriter(
            run.folder,
            run.engine,
            keep_last=self._training.keep_last,
            is_async=self._training.checkpoint_async,
            check_folder=lock.check,
        )
        self._stall: float | None = None
        if run.report_state.monitor is not None:
            self._choices.load_state_dict(run.report_state.monitor["choices"])
            self._dead_experts.load_state_dict(run.report_state.monitor["dead_experts"])

    def run(self) -> TrainingResult:
        """Run the remaining steps."""
        try:
            return self._run_steps()
        finally:
            self._writer.close()
            self._profiler.close()
            self._signals.release()

    def _run_steps(self) -> TrainingResult:
        self._run.distributed.on_rank_zero(self._reporter.begin)
        if self._run.report_state.evaluation_pending:
            self._make_pending_evaluation()
        stopped_by = 0
        if self._run.start.step < self._training.steps:
            # Before any rank begins: a rank without a first batch would leave the others waiting in a collective.
            self._run.distributed.on_every_rank(self._read_first)
        for step in range(self._run.start.step, self._training.steps):
            with self._profiler.step(step + 1):
                outcome = self._step(step)
            # Only now: during the first step, which may take minutes, a signal may end the process without loss.
            self._signals.catch()
            done = step + 1
            # After the last step a request to stop has no effect: the run is finished anyway.
            stopped_by = outcome.stop if done < self._training.steps else 0
            self._evaluation = None
            is_due = self._is_due(self._training.evaluation_interval, done)
            # Not when stopped: an evaluation may take longer than the 30 s after which the launcher kills the ranks.
            if is_due and not stopped_by:
                self._evaluation = self._evaluate()
            if outcome.losses is None:
                self._dead_experts.add(outcome.routed_LE)
            else:
                self._report(step, outcome)
            # After the report: the listeners' states in the checkpoint must include this step.
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

    def _requests(self, step: int) -> Requests:
        """Return this rank's requests after ``step``, counted from 0.

        The data of the next step must be there by then, so that a run whose data fails can still save a checkpoint.
        """
        if step + 1 < self._training.steps:
            with self._clock.part("data"):
                self._failure = self._run.loader.read_ahead() or self._failure
        stop = CANNOT_CONTINUE if self._failure is not None else self._signals.received
        return Requests(stop, self._is_checkpoint_overdue())

    def _is_checkpoint_overdue(self) -> bool:
        """Return whether the last checkpoint is ``training.checkpoint_minutes`` old, by the clock of rank 0."""
        minutes = self._training.checkpoint_minutes
        return minutes > 0 and self._run.distributed.rank == 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _step(self, step: int) -> StepResult:
        """Run step ``step``, counted from 0, and add its tokens and seconds to the progress."""
        begin = time.perf_counter()
        # The reduction of this step carries a failure of the writer to the other ranks.
        self._failure = self._failure or self._writer.take_failure()
        self._set_sparsity(step)
        self._clock.begin(measures=self._is_reported(step + 1), traces=self._profiler.is_on)
        with self._clock.part("data"):
            batches = self._run.loader.batches(step)
        try:
            with self._clock.collectives(self._run.engine.collective_aliases):
                outcome = train_step(
                    self._run.engine,
                    batches,
                    step=step + 1,
                    learning_rate=learning_rate(self._training, step),
                    guard=self._guard,
                    step_filter=self._step_filter,
                    report=self._is_reported(step + 1),
                    layer_gradients=self._run.config.metrics.layer_gradients,
                    earlier_routed_LE=self._dead_experts.routed_LE if self._is_reported(step + 1) else None,
                    weighs_targets=self._run.loader.has_ignored_targets,
                    requests=lambda: self._requests(step),
                    clock=self._clock,
                )
        except TrainingDiverged as error:
            # The message of the guard ends with the last checkpoint, which the guard does not know.
            raise TrainingDiverged(f"{error}: {self._finish_saving() or 'there is none yet'}") from None
        before = self._progress
        self._progress = RunProgress(
            step=step + 1,
            tokens=before.tokens + self._run.tokens_per_step,
            seconds=before.seconds + time.perf_counter() - begin,
        )
        return outcome

    def _set_sparsity(self, step: int) -> None:
        settings, most_experts = self._run.config.model.sparsity, self._run.config.model.moe.experts_per_token
        self._run.engine.model.set_ste_share(ste_share(settings, step))
        # By the number of the step, so that a resumed run measures in the same steps. A first step that was skipped has
        # left nothing, so that the next one measures too.
        is_due = step % settings.shared.measure_interval == 0
        self._run.engine.model.measure_energies(is_due or not self._run.engine.model.has_averages)
        scale = scheduled_scale(settings.schedule, step)
        # Only on a change: setting a plan copies its values to the device.
        if scale != self._scale:
            self._run.engine.model.set_sparsity(self._run.plan.scaled(scale, most_experts))
            self._scale = scale

    def _is_due(self, interval: int, done: int) -> bool:
        """Return whether ``done`` steps are a multiple of ``interval`` (0 disables it), or all steps of the run."""
        return done == self._training.steps or (interval > 0 and done % interval == 0)

    def _is_reported(self, done: int) -> bool:
        return self._is_due(self._run.config.metrics.interval, done) or self._is_due(
            self._training.evaluation_interval, done
        )

    def _evaluate(self) -> EvaluationResult:
        engine = self._run.engine

        def forward(batch: Batch) -> ModelOutput:
            return engine.forward(batch, with_stats=False)

        # Under the sparsity of the last step, also directly after a resume.
        self._set_sparsity(max(0, self._progress.step - 1))
        engine.model.eval()
        try:
            with self._choices.record() as chosen:
                validation = self._run.evaluator(forward)
            return EvaluationResult(validation, self._choices.compare(chosen, self._run.evaluator.counts_T))
        finally:
            # eval() turned off the router's jitter and the capacity, which belong to training.
            engine.model.train()

    def _make_pending_evaluation(self) -> None:
        """Make the evaluation that was due after the last step before the run was stopped, and report it."""
        self._evaluation = found = self._evaluate()
        self._run.distributed.on_rank_zero(lambda: self._reporter.late_evaluation(self._progress, found))

    def _save(self, *, evaluation_pending: bool) -> None:
        begin = time.perf_counter()
        states = self._run.distributed.all_gather(self._run.loader.state_dict())
        self._writer.save(
            self._progress,
            combine_states(states),
            ReportState(
                listeners=self._reporter.state_dict(),
                monitor={"choices": self._choices.state_dict(), "dead_experts": self._dead_experts.state_dict()},
                evaluation_pending=evaluation_pending,
            ),
            step_filter=None if self._step_filter is None else self._step_filter.state_dict(),
        )
        self._saved_at = time.monotonic()
        self._stall = (self._stall or 0.0) + time.perf_counter() - begin

    def _finish_saving(self) -> Path | None:
        """Finish the checkpoint that is being written, when the run fails on all ranks, and return the newest one."""
        try:
            self._writer.finish()
        except CheckpointError as error:
            # The run ends with the error that came first.
            logger.error("%s", error)
        saved = list_checkpoints(self._run.folder)
        return saved[-1] if saved else None

    def _report(self, step: int, outcome: StepResult) -> None:
        self._dead_experts.check(self._progress.step, outcome.routed_since_report_LE)
        self._reporter.report(
            self._progress,
            outcome,
            learning_rate=learning_rate(self._training, step),
            evaluation=self._evaluation,
            phase_seconds=dict(self._clock.seconds),
            skipped_steps=None if self._step_filter is None else self._step_filter.num_skipped,
            checkpoint_seconds=self._stall,
        )
        self._stall = None
        # Other ranks are in the next step already, whose reduction carries the request to stop to them.
        self._failure = self._reporter.failure or self._failure

    def _raise_failures(self) -> None:
        """Raise the first failure of any rank on every rank, and name the checkpoint that has the completed steps."""
        failures = [error for error in self._run.distributed.all_gather(self._failure) if error is not None]
        if failures:
            saved = list_checkpoints(self._run.folder)
            raise type(failures[0])(
                f"{failures[0]}. The run ended after step {self._progress.step} of {self._training.steps}; "
                f"training.resume=true continues from {saved[-1]}"
            ) from failures[0]

    def _finish(self, stopped_by: int) -> TrainingResult:
        self._writer.finish()
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
                "%s: stopped after step %d of %d with a checkpoint; training.resume=true continues from %s",
                Signals(stopped_by).name,
                result.step,
                self._training.steps,
                list_checkpoints(self._run.folder)[-1],
            )
        if self._run.distributed.rank == 0:
            for index, passes in enumerate(self._run.loader.passes()):
                logger.info("data.sources.%d: rank 0 read it to its end %d times", index, passes)
        self._reporter.end(result)
        self._failure = self._failure or self._reporter.failure
        self._raise_failures()
        return result
