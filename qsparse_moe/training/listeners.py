"""The listeners of a run: who is called, and whose state a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qsparse_moe.runs.report import (
    LateEvaluation,
    Listener,
    RunContext,
    StatefulListener,
    StepReport,
    TrainingResult,
    notify,
)


class Listeners:
    """Calls the listeners in their order, and collects and restores their states.

    Raises:
        ValueError: two of them have the same ``state_name``; a checkpoint could keep the state of one only.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = listeners
        stateful = [listener for listener in listeners if isinstance(listener, StatefulListener)]
        self._stateful = {listener.state_name: listener for listener in stateful}
        if len(self._stateful) < len(stateful):
            names = sorted(listener.state_name for listener in stateful)
            raise ValueError(
                f"listeners: their states have the names {names}, and each must be unique, because a checkpoint keeps "
                "them by name; give each listener another state_name, or pass one of them only"
            )

    def begin(self, context: RunContext, states: Mapping[str, dict[str, Any]]) -> None:
        """Tell them of the run, then hand each its state of the checkpoint, where ``states`` has one."""
        notify(self._listeners, "begin", context)
        for name, listener in self._stateful.items():
            if name in states:
                listener.load_state_dict(states[name])

    def report(self, report: StepReport) -> None:
        """Call them with one logged step."""
        for listener in self._listeners:
            listener(report)

    def late_evaluation(self, evaluation: LateEvaluation) -> None:
        """Tell them of an evaluation whose step was reported without it."""
        notify(self._listeners, "late_evaluation", evaluation)

    def end(self, result: TrainingResult) -> None:
        """Tell them how the run ended."""
        notify(self._listeners, "end", result)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return their states by name; JSON-able."""
        return {name: listener.state_dict() for name, listener in self._stateful.items()}
