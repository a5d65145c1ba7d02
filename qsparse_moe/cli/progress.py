"""Progress of a training run: a bar on a terminal, otherwise one line per report."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from qsparse_moe.runs.report import RunContext, StepReport


class TrainingProgress:
    """A listener for ``train``, and a context manager so that an error leaves no bar on the screen."""

    def __init__(self, num_steps: int) -> None:
        self.last: StepReport | None = None
        """The newest report."""
        self._num_steps = num_steps
        self._bar = _make_bar() if sys.stderr.isatty() else None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, context: RunContext) -> None:
        """Start the bar at the first step of this part of the run."""
        if self._bar is not None:
            # The bar cannot start earlier, because only the loop knows at which step a resumed run begins.
            self._bar.add_task("training", total=self._num_steps, completed=context.start_step, figures="")
            self._bar.start()

    def __call__(self, report: StepReport) -> None:
        """Show one report."""
        self.last = report
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=report.step, figures=figures(report))
        else:
            # Lines, because the updates of a bar would fill a log file with control characters.
            print(f"step {report.step}/{self._num_steps}  {figures(report)}", file=sys.stderr, flush=True)


def figures(report: StepReport) -> str:
    """Return the numbers of a report that the progress line shows."""
    text = f"loss {report.losses['loss']:.4f}  {report.tokens_per_second:,.0f} tokens/s"
    if report.validation is not None:
        text += f"  validation {report.validation['bits_per_byte']:.4f} bits/byte"
    return text


def _make_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    # Standard output belongs to the summary, which may be JSON for another program.
    return Progress(*columns, console=Console(stderr=True))
