"""The listener that keeps a run's metrics: ``metrics.jsonl`` and, unless it is switched off, TensorBoard's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.derive import derive_metrics, layers_with
from qsparse_moe.metrics.efficiency import Efficiency
from qsparse_moe.metrics.experts import expert_values
from qsparse_moe.metrics.jsonl import MetricsFile, read_metrics
from qsparse_moe.metrics.window import Window
from qsparse_moe.runs.report import RunContext, StepReport, TrainingResult

if TYPE_CHECKING:
    from qsparse_moe.metrics.tensorboard import TensorBoardFiles


class Recorder:
    """Records every report of a run; give it to ``train`` among the listeners.

    Files are opened by ``begin`` and closed by ``end``. Each report is on its way to the disk when the call returns,
    so a run that is killed loses none.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._file: MetricsFile | None = None
        self._board: TensorBoardFiles | None = None
        # A window of so many steps, in logged ones.
        self._window = Window(expert_length=-(-config.metrics.dead_expert_window // config.metrics.interval))
        self._efficiency: Efficiency | None = None
        self._step = 0
        self._last_logged: int | None = None

    def begin(self, context: RunContext) -> None:
        """Open the run folder's files after ``context.start_step``; what they hold of later steps is dropped."""
        path = context.run_dir / "metrics.jsonl"
        self._step = context.start_step
        self._file = MetricsFile(path, start_step=context.start_step)
        before = read_metrics(path)
        self._last_logged = before[-1]["step"] if before else None
        self._efficiency = Efficiency(context, before[-1] if before else None)
        if self._config.metrics.tensorboard:
            # Imported here: it takes seconds, and not every run wants it.
            from qsparse_moe.metrics.tensorboard import TensorBoardFiles

            self._board = TensorBoardFiles(
                context.run_dir / "tensorboard", self._config, start_step=context.start_step, before=before
            )

    def __call__(self, report: StepReport) -> None:
        """Record one logged step."""
        assert self._file is not None and self._efficiency is not None, "begin comes before the first report"
        metrics = derive_metrics(report, self._config.model, self._window)
        metrics["throughput/rows_per_second"] = report.tokens_per_second / self._config.data.sequence_length
        metrics |= self._efficiency(report, metrics)
        self._step = report.step
        self._file.write(report.step, report.tokens, report.seconds, metrics, self._experts(report))
        self._last_logged = report.step
        if self._board is not None:
            self._board.write(report.step, metrics, report.stats)

    def _experts(self, report: StepReport) -> dict[str, Any]:
        """Return the values of every expert in the first logged step of each image interval, and in the last step.

        It depends on the steps alone, so that a resumed run writes what an unbroken one does.
        """
        interval = self._config.metrics.image_interval
        if not interval or "router/rows_LE" not in report.stats:
            return {}
        is_first = self._last_logged is None or (report.step - 1) // interval != (self._last_logged - 1) // interval
        if not is_first and report.step != self._config.training.steps:
            return {}
        return expert_values(report.stats, layers_with("router/rows", self._config.model))

    def end(self, result: TrainingResult) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.write_end(self._step)
            self._board.close()
