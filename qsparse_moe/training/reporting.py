"""Reports of a run to the listeners of rank 0: its context, its logged steps, and its late evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qsparse_moe.errors import CheckpointError, QSparseMoEError
from qsparse_moe.runs.report import LateEvaluation, RunContext, StepReport, TrainingResult
from qsparse_moe.training.checkpoint.full_disk import cannot_write, writing
from qsparse_moe.training.checkpoint.store import RunProgress
from qsparse_moe.training.listeners import Listeners
from qsparse_moe.training.monitor.memory import device_name, memory_in_use
from qsparse_moe.training.prepare import PreparedRun
from qsparse_moe.training.run_lock import RunFolderLock
from qsparse_moe.training.step import StepResult


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation within a run; the fields are those of ``StepReport``."""

    validation: dict[str, float]
    choice_agreement_L: Tensor | None


class Reporter:
    """Creates reports and passes them to the listeners, which write into the run folder while this process holds it."""

    def __init__(self, run: PreparedRun, listeners: Listeners, lock: RunFolderLock) -> None:
        self._run = run
        self._listeners = listeners
        self._lock = lock
        self._reported = run.start
        self.failure: QSparseMoEError | None = None
        """The error of a listener that could not write. It is not raised here, where the other ranks would not learn of
        it and would wait in their next collective."""

    def begin(self) -> None:
        """Notify the listeners that the run begins and restore their states from the checkpoint.

        Raises:
            CheckpointError: a listener could not write.
        """
        with writing(self._run.folder):
            self._listeners.begin(self._context(), self._run.report_state.listeners)

    def late_evaluation(self, now: RunProgress, found: EvaluationResult) -> None:
        """Report an evaluation that was due after the step from which the run was resumed.

        Raises:
            CheckpointError: a listener could not write, or the run folder was taken over.
        """
        self._lock.check()
        late = LateEvaluation(now.step, now.tokens, now.seconds, found.validation, found.choice_agreement_L)
        with writing(self._run.folder):
            self._listeners.late_evaluation(late)

    def report(
        self,
        now: RunProgress,
        outcome: StepResult,
        *,
        learning_rate: float,
        evaluation: EvaluationResult | None,
        phase_seconds: dict[str, float],
        checkpoint_seconds: float | None,
        skipped_steps: int | None = None,
    ) -> None:
        """Report a logged step; an error is stored in ``failure``.

        Args:
            now: the progress of the run, including the step.
            outcome: the result of the step, with losses and stats.
            learning_rate: the learning rate of the step.
            evaluation: the evaluation after the step, if there was one.
            phase_seconds: the times of the step; see ``StepReport``.
            checkpoint_seconds: the time of checkpoints before the step; see ``StepReport``.
            skipped_steps: number of steps that ``training.skip_steps`` has skipped; None: it skips none.
        """
        assert outcome.losses is not None and outcome.stats is not None
        # Times are means since the last report, so that steps that are not logged count as well.
        last, self._reported = self._reported, now
        engine = self._run.engine
        router_bias_LE, scaler = engine.model.router_bias_LE, engine.loss_scaler
        report = StepReport(
            step=now.step,
            tokens=now.tokens,
            seconds=now.seconds,
            losses=outcome.losses,
            stats=outcome.stats,
            router_bias_LE=None if router_bias_LE is None else router_bias_LE.cpu(),
            grad_norm=outcome.grad_norm,
            layer_grad_norms=outcome.layer_grad_norms,
            learning_rate=learning_rate,
            sparsity=engine.model.sparsity_plan.mean,
            step_seconds=(now.seconds - last.seconds) / (now.step - last.step),
            tokens_per_second=(now.tokens - last.tokens) / (now.seconds - last.seconds),
            memory=memory_in_use(self._run.distributed.device),
            validation=None if evaluation is None else evaluation.validation,
            choice_agreement_L=None if evaluation is None else evaluation.choice_agreement_L,
            phase_seconds=phase_seconds,
            checkpoint_seconds=checkpoint_seconds,
            loss_scale=outcome.loss_scale,
            skipped_steps=_sum_of_known(skipped_steps, None if scaler is None else scaler.skipped_steps),
        )
        try:
            self._lock.check()
            self._listeners.report(report)
        except CheckpointError as error:
            # The lock is lost. Saving checks it again, so that no checkpoint is written either.
            self.failure = error
        except OSError as error:
            self.failure = cannot_write(self._run.folder, error)

    def end(self, result: TrainingResult) -> None:
        """Notify the listeners that the run has ended; an error is stored in ``failure`` unless it has one."""
        try:
            self._listeners.end(result)
        except OSError as error:
            self.failure = self.failure or cannot_write(self._run.folder, error)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the listeners by name; JSON-able."""
        return self._listeners.state_dict()

    def _context(self) -> RunContext:
        run = self._run
        return RunContext(
            run_dir=run.folder,
            config=run.config,
            start_step=run.start.step,
            start_tokens=run.start.tokens,
            start_seconds=run.start.seconds,
            world_size=run.distributed.world_size,
            tokens_per_step=run.tokens_per_step,
            num_parameters=sum(shape.numel() for shape in run.engine.shapes().values()),
            engine=run.engine.name,
            device=run.distributed.device.type,
            device_name=device_name(run.distributed.device),
            backend=run.engine.model.runtime.names.get("model.moe.backend", ""),
        )


def _sum_of_known(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
