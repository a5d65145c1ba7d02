"""The listener that records a run's metrics in ``metrics.jsonl`` and, unless it is switched off, for TensorBoard."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.derive import derive_metrics, evaluation_metrics, layers_with
from qsparse_moe.metrics.efficiency import Efficiency
from qsparse_moe.metrics.experts import expert_values
from qsparse_moe.metrics.jsonl import MetricsFile, read_metrics
from qsparse_moe.metrics.window import Window
from qsparse_moe.runs.report import LateEvaluation, RunContext, StepReport, TrainingResult

if TYPE_CHECKING:
    from qsparse_moe.metrics.tensorboard import TensorBoardFiles


logger = logging.getLogger(__name__)


class Recorder:
    """Records every report of a run; give it to ``train`` among the listeners.

    ``begin`` opens the files and ``end`` closes them. Each report is handed to the operating system before the call
    returns, so a run that is killed loses none. State that spans several logged steps is part of the checkpoints
    (``StatefulListener``).
    """

    state_name = "metrics"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._file: MetricsFile | None = None
        self._board: TensorBoardFiles | None = None
        # The setting counts steps, the window logged steps: rounded up, so that it spans at least the setting.
        self._window = Window(expert_length=-(-config.metrics.dead_expert_window // config.metrics.interval))
        self._efficiency: Efficiency | None = None
        self._step = 0
        self._last_logged: int | None = None

    def begin(self, context: RunContext) -> None:
        """Open the files of the run folder; values of steps after ``context.start_step`` are dropped."""
        path = context.run_dir / "metrics.jsonl"
        self._step = context.start_step
        self._file = MetricsFile(path, start_step=context.start_step)
        # Read after later steps were dropped: an image interval and the sum of costs continue from the last step left.
        before = read_metrics(path)
        self._last_logged = before[-1]["step"] if before else None
        self._efficiency = Efficiency(context, before[-1] if before else None)
        if self._config.metrics.tensorboard:
            # Imported here because it takes seconds, and a run may do without TensorBoard.
            from qsparse_moe.metrics.tensorboard import TensorBoardFiles

            self._board = TensorBoardFiles(
                context.run_dir / "tensorboard", self._config, start_step=context.start_step, before=before
            )

    def __call__(self, report: StepReport) -> None:
        """Record one logged step."""
        assert self._file is not None and self._efficiency is not None, "begin comes before the first report"
        metrics = derive_metrics(report, self._config.model, self._window)
        # Here and not in derive_metrics: a report does not know the length of the sequences.
        metrics["throughput/rows_per_second"] = report.tokens_per_second / self._config.data.sequence_length
        # After the ratios, which hold the measured zeros that its costs follow from.
        metrics |= self._efficiency(report, metrics)
        self._step = report.step
        images = self._is_image_step(report.step)
        self._file.write(report.step, report.tokens, report.seconds, metrics, self._experts(report) if images else None)
        self._last_logged = report.step
        if self._board is not None:
            self._board.write(report.step, metrics, report.stats, images=images)

    def late_evaluation(self, evaluation: LateEvaluation) -> None:
        """Add the values of an evaluation to the step that was logged without them before the run was stopped."""
        assert self._file is not None, "begin comes before the first evaluation"
        metrics = evaluation_metrics(evaluation, self._config.model)
        self._file.amend(evaluation.step, evaluation.tokens, evaluation.seconds, metrics)
        if self._board is not None:
            self._board.write_scalars(evaluation.step, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; JSON-able."""
        assert self._efficiency is not None, "begin comes before the first checkpoint"
        return {
            "interval": self._config.metrics.interval,
            "window": self._window.state_dict(),
            "efficiency": self._efficiency.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the window, which counts logged steps, only at the same ``metrics.interval``."""
        assert self._efficiency is not None, "begin comes before the state"
        self._efficiency.load_state_dict(state["efficiency"])
        before, now = state["interval"], self._config.metrics.interval
        if before == now:
            self._window.load_state_dict(state["window"])
        else:
            logger.info(
                "metrics.interval was %d before the resume and is %d: the metrics of several logged steps (dead "
                "experts and features, drift of thresholds) start with an empty window",
                before,
                now,
            )

    def _is_image_step(self, step: int) -> bool:
        """Return whether ``step`` is the first logged one of its image interval, or the last step of the run.

        Only the steps decide, so that a resumed run draws the same pictures as an uninterrupted one.
        """
        interval = self._config.metrics.image_interval
        if not interval:
            return False
        is_first = self._last_logged is None or (step - 1) // interval != (self._last_logged - 1) // interval
        return is_first or step == self._config.training.steps

    def _experts(self, report: StepReport) -> dict[str, Any]:
        if "router/routed_LE" not in report.stats:
            return {}
        return expert_values(report.stats, layers_with("router/routed", self._config.model))

    def end(self, result: TrainingResult) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.write_end(self._step)
            self._board.close()
