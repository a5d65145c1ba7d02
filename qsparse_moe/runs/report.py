"""The reports of a run to its listeners, and its result. L MoE layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from qsparse_moe.config.schema import RunConfig


@dataclass(frozen=True)
class RunContext:
    """Facts that are constant over the run; passed to ``listener.begin``."""

    run_dir: Path
    config: RunConfig
    start_step: int
    """Steps done before this part of the run: 0, or those of the checkpoint. Anything that a listener recorded of later
    steps is invalid."""
    start_tokens: int
    start_seconds: float
    world_size: int
    tokens_per_step: int
    """Number of tokens per step over all ranks."""
    num_parameters: int
    engine: str
    """``torch``, or ``deepspeed`` with the ZeRO stage."""
    device: str
    """``cpu`` or ``cuda``."""
    device_name: str
    """Name of the CUDA device of rank 0; empty on a CPU."""
    backend: str
    """The backend of the experts that ``model.moe.backend`` selected; empty without experts."""


@dataclass(frozen=True)
class StepReport:
    """The report of a logged step: every ``metrics.interval``-th, the last, and those followed by an evaluation."""

    step: int
    """Number of steps done, including this one."""
    tokens: int
    """Number of tokens over all ranks since the run began."""
    seconds: float
    """Seconds spent in steps since the run began, over all its parts, without evaluations and checkpoints."""
    losses: dict[str, float]
    """Means over the global batch of this step: ``loss``, ``lm_loss``, …"""
    stats: dict[str, Tensor]
    """The model's sums over this step's micro-batches and ranks, float64 on the CPU."""
    router_bias_LE: Tensor | None
    """The biases that balance the experts after this step, fp32 on the CPU; None without them."""
    grad_norm: float
    """Gradient norm before clipping; infinite if the step was skipped in fp16, and perhaps not finite if it was skipped
    by ``training.skip_steps``."""
    layer_grad_norms: tuple[float, ...] | None
    """L2 norm, before clipping, of the gradient of each layer's matrices (attention, experts, shared and dense
    feed-forwards; no router, no norm); None unless ``metrics.layer_gradients``."""
    learning_rate: float
    sparsity: float
    """Mean S of the plan in this step."""
    step_seconds: float
    """Mean seconds per step since the last report."""
    tokens_per_second: float
    """Tokens per second over all ranks since the last report."""
    memory: dict[str, float]
    """Bytes of rank 0 by name: ``resident``, ``peak_resident``, and on CUDA ``allocated``, ``peak_allocated``."""
    validation: dict[str, float] | None
    """``loss``, ``perplexity``, ``bits_per_byte`` if an evaluation followed this step, else None."""
    choice_agreement_L: Tensor | None = None
    """Fraction of the experts chosen in the evaluation after this step that the same tokens chose in the previous one;
    None without an evaluation and for the first one of a run."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of this step on rank 0 by part: ``data``, ``forward``, ``backward``, ``update``; and ``communication``,
    which is contained in these except on CUDA."""
    checkpoint_seconds: float | None = None
    """Seconds that training waited for checkpoints since the last report, on rank 0; None if none was saved."""
    loss_scale: float | None = None
    """Factor of the loss in this step, in fp16."""
    skipped_steps: int | None = None
    """Number of steps skipped since the run began, in fp16 and with ``training.skip_steps``; else None."""


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
    """The result of a run."""

    run_dir: Path
    step: int
    """Steps done."""
    tokens: int
    seconds: float
    validation: dict[str, float] | None
    """Values of the evaluation at the end; None for a run that a signal stopped."""
    stopped_by: int | None
    """The signal that stopped the run before its last step, with a checkpoint: 2 Ctrl-C, 10 SIGUSR1, 15 SIGTERM."""

    @property
    def exit_code(self) -> int:
        """Exit code by the convention of shells: 0, or 128 plus the number of the signal."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


Listener = Callable[[StepReport], None]
"""Called on rank 0 with every report. Its methods ``begin(context)``, ``late_evaluation(evaluation)`` and
``end(result)`` are called if it has them. A listener with state across reports is a ``StatefulListener``."""


@runtime_checkable
class StatefulListener(Protocol):
    """A listener whose state is saved in checkpoints, so that a resumed run reports the same as an unbroken one.

    ``state_dict`` is called when a checkpoint is saved, after the report of its step; ``load_state_dict`` when the run
    is resumed, after ``begin``, and only if the checkpoint contains a state of this name.
    """

    state_name: str
    """Name of the state in the checkpoint; unique among the listeners of a run."""

    def __call__(self, report: StepReport) -> None:
        """Process the report of one logged step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, which ``state_dict`` returned in an earlier part of the run."""


def notify(listeners: Iterable[Listener], moment: str, news: RunContext | LateEvaluation | TrainingResult) -> None:
    """Call ``begin``, ``late_evaluation``, or ``end`` of every listener that has this method."""
    for listener in listeners:
        method = getattr(listener, moment, None)
        if method is not None:
            method(news)
