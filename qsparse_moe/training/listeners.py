"""The listeners of a run and their states in checkpoints."""

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
    """Calls the listeners in order, and collects and restores their states.

    Raises:
        ValueError: two listeners have the same ``state_name``, so that a checkpoint could contain only one state.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = listeners
        stateful = [listener for listener in listeners if isinstance(listener, StatefulListener)]
        self._stateful = {listener.state_name: listener for listener in stateful}
        if len(self._stateful) < len(stateful):
            names = sorted(listener.state_name for listener in stateful)
            raise ValueError(
                f"listeners: their states have the names {names}, but names must be unique, because a checkpoint "
                "stores states by name; give each listener another state_name, or pass only one of them"
            )

    def begin(self, context: RunContext, states: Mapping[str, dict[str, Any]]) -> None:
        """Call ``begin`` of every listener, then load each state that ``states`` contains."""
        notify(self._listeners, "begin", context)
        for name, listener in self._stateful.items():
            if name in states:
                listener.load_state_dict(states[name])

    def report(self, report: StepReport) -> None:
        """Call every listener with the report of a logged step."""
        for listener in self._listeners:
            listener(report)

    def late_evaluation(self, evaluation: LateEvaluation) -> None:
        """Call ``late_evaluation`` of every listener."""
        notify(self._listeners, "late_evaluation", evaluation)

    def end(self, result: TrainingResult) -> None:
        """Call ``end`` of every listener."""
        notify(self._listeners, "end", result)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the listeners by name; JSON-able."""
        return {name: listener.state_dict() for name, listener in self._stateful.items()}
