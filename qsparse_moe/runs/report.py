"""What a run tells its listeners, and what it returns. L MoE layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from qsparse_moe.config.schema import RunConfig


@dataclass(frozen=True)
class RunContext:
    """What holds for the whole run; given to ``listener.begin``."""

    run_dir: Path
    config: RunConfig
    start_step: int
    """Steps that were done before: 0, or where the checkpoint stands. What a listener has of later steps is void."""
    start_tokens: int
    start_seconds: float
    world_size: int
    tokens_per_step: int
    """Over all ranks."""
    num_parameters: int
    engine: str
    """``torch``, or ``deepspeed`` with the ZeRO stage."""
    device: str
    """``cpu`` or ``cuda``."""
    device_name: str
    """That CUDA gives to the device of rank 0; empty on a CPU."""
    backend: str
    """The experts' backend that ``model.moe.backend`` came to; empty without experts."""


@dataclass(frozen=True)
class StepReport:
    """One logged step: every ``metrics.interval``-th, the last one, and those followed by an evaluation."""

    step: int
    """Steps done, from 1."""
    tokens: int
    """Over all ranks since the run began."""
    seconds: float
    """Spent in steps since the run began, resumed parts added up; evaluations and checkpoints are not in it."""
    losses: dict[str, float]
    """``loss``, ``lm_loss``, …: means over this step's global batch."""
    stats: dict[str, Tensor]
    """The model's sums over this step's micro-batches and ranks, float64 on the CPU."""
    router_bias_LE: Tensor | None
    """The biases that balance the experts after this step, fp32 on the CPU; None without them."""
    grad_norm: float
    """Before clipping; infinite where the step was skipped in fp16."""
    layer_grad_norms: tuple[float, ...] | None
    """L2 norm, before clipping, of the gradient of each layer's matrices (attention, experts, shared and dense
    feed-forwards; no router, no norm); None unless ``metrics.layer_gradients``."""
    learning_rate: float
    sparsity: float
    """Mean S of the plan in this step."""
    step_seconds: float
    """Mean over the steps since the last report."""
    tokens_per_second: float
    """Over all ranks, in the steps since the last report."""
    memory: dict[str, float]
    """Bytes of rank 0 by name: ``resident``, ``peak_resident``, and on CUDA ``allocated``, ``peak_allocated``."""
    validation: dict[str, float] | None
    """``loss``, ``perplexity``, ``bits_per_byte`` where an evaluation followed this step."""
    choice_agreement_L: Tensor | None = None
    """Share of the experts that the tokens of the evaluation which followed this step chose in the one before too;
    None without an evaluation, and in the first one of a run."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Of this step on rank 0, by part: ``data``, ``forward``, ``backward``, ``update``; and ``communication``,
    which lies within these, but on CUDA."""
    loss_scale: float | None = None
    """That this step's loss was multiplied by, in fp16."""
    skipped_steps: int | None = None
    """Steps skipped since the run began because the gradient overflowed, in fp16."""


@dataclass(frozen=True)
class LateEvaluation:
    """An evaluation that was due after the step at which the run was stopped, made when the run is resumed.

    A run that is asked to stop saves at once and leaves its evaluation to the part of the run that follows. The report
    of that step went to the listeners before the stop, without these values.
    """

    step: int
    """The step after which it was due: that of the checkpoint."""
    tokens: int
    """As in ``StepReport``, of that step."""
    seconds: float
    """As in ``StepReport``, of that step."""
    validation: dict[str, float]
    """As in ``StepReport``."""
    choice_agreement_L: Tensor | None
    """As in ``StepReport``."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    run_dir: Path
    step: int
    """Steps done."""
    tokens: int
    seconds: float
    validation: dict[str, float] | None
    """Of the evaluation at the end; None for a run that a signal stopped."""
    stopped_by: int | None
    """The signal that stopped the run before its last step, with a checkpoint: 2 Ctrl-C, 10 SIGUSR1, 15 SIGTERM."""

    @property
    def exit_code(self) -> int:
        """What a shell expects of the process: 0, or 128 plus the signal."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


Listener = Callable[[StepReport], None]
"""Called on rank 0 with every report. Its methods ``begin(context)``, ``late_evaluation(evaluation)`` and
``end(result)`` are called if it has them. One that remembers anything over reports is a ``StatefulListener``."""


@runtime_checkable
class StatefulListener(Protocol):
    """A listener with a state that checkpoints keep, so that a resumed run reports what an unbroken one would.

    ``state_dict`` is called when a checkpoint is saved, after the report of its step; ``load_state_dict`` when the run
    is resumed, after ``begin``, and not at all where the checkpoint holds no state of that name.
    """

    state_name: str
    """Name of the state in the checkpoint; unique among the listeners of a run."""

    def __call__(self, report: StepReport) -> None:
        """Take in one logged step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, which ``state_dict`` returned in an earlier part of the run."""


def notify(listeners: Iterable[Listener], moment: str, news: RunContext | LateEvaluation | TrainingResult) -> None:
    """Call ``begin``, ``late_evaluation`` or ``end`` of every listener that has it."""
    for listener in listeners:
        method = getattr(listener, moment, None)
        if method is not None:
            method(news)
