"""What a run reports: its context, its logged steps and its late evaluation, to the listeners of rank 0."""

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
    """What an evaluation within a run found; the fields of ``StepReport`` say what they are."""

    validation: dict[str, float]
    choice_agreement_L: Tensor | None


class Reporter:
    """Hands the listeners what a run reports, while this process owns the run folder that they write into."""

    def __init__(self, run: PreparedRun, listeners: Listeners, lock: RunFolderLock) -> None:
        self._run = run
        self._listeners = listeners
        self._lock = lock
        self._reported = run.start
        self.trouble: QSparseMoEError | None = None
        """Why a listener could not write; it is not raised, because the other ranks are not in a collective then."""

    def begin(self) -> None:
        """Tell the listeners of the run, and hand them what they remembered of its earlier steps.

        Raises:
            CheckpointError: a listener could not write.
        """
        with writing(self._run.folder):
            self._listeners.begin(self._context(), self._run.report_state.listeners)

    def late_evaluation(self, now: RunProgress, found: EvaluationResult) -> None:
        """Add an evaluation to the report of the step before this part of the run.

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
    ) -> None:
        """Report a logged step; what goes wrong becomes ``trouble``.

        Args:
            now: how far the run has come with the step.
            outcome: of the step, with its losses and stats.
            learning_rate: of the step.
            evaluation: that followed the step.
            phase_seconds: of the step; see ``StepReport``.
        """
        assert outcome.losses is not None and outcome.stats is not None
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
            loss_scale=outcome.loss_scale,
            skipped_steps=None if scaler is None else scaler.skipped_steps,
        )
        try:
            self._lock.check()
            self._listeners.report(report)
        except CheckpointError as error:
            # Nor is there a checkpoint then: saving looks at the lock again.
            self.trouble = error
        except OSError as error:
            self.trouble = cannot_write(self._run.folder, error)

    def end(self, result: TrainingResult) -> None:
        """Tell the listeners how the run ended; what goes wrong becomes ``trouble``, unless there is some already."""
        try:
            self._listeners.end(result)
        except OSError as error:
            self.trouble = self.trouble or cannot_write(self._run.folder, error)

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
