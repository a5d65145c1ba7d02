"""One training step, the same for every engine. L MoE layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.data.batch import Batch
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.moe.router import bias_update_rate
from qsparse_moe.sparsity.stats import add_stats
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.monitor.layer_gradients import layer_squares
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.monitor.phases import PhaseClock

Sums = dict[str, Tensor]

_ROWS = "router/rows_LE"


@dataclass
class StepTotals:
    """Sums over the micro-batches of one step: of this rank, or after ``reduced`` of all ranks."""

    losses: Sums = field(default_factory=dict)
    """Means over a rank's micro-batches by name, float64; added over the ranks."""
    stats: Sums = field(default_factory=dict)
    """Sums of ``ModelOutput.stats`` by name."""
    layer_squares_L: Tensor | None = None
    """Sums of squares of each layer's gradients."""
    earlier_rows_LE: Tensor | None = None
    """Rows of the experts in the steps since the last report, before this one."""

    def add(self, output: ModelOutput, *, num_micro_batches: int, report: bool) -> None:
        """Add one micro-batch; without a report its stats are no more than the rows of the experts."""
        self.stats = add_stats(self.stats, output.stats)
        if report:
            assert output.loss is not None
            losses = {"loss": output.loss.detach()} | output.losses
            self.losses = add_stats(self.losses, {name: v.double() / num_micro_batches for name, v in losses.items()})

    def reduced(self, distributed: Distributed) -> StepTotals:
        """Return the totals of all ranks, on the CPU; see ``reduce_tensors``. All ranks call it."""
        # By name, because the ranks must agree on the order.
        losses, stats = sorted(self.losses), sorted(self.stats)
        tensors = [self.losses[name] for name in losses] + [self.stats[name] for name in stats]
        tensors += [x for x in (self.layer_squares_L, self.earlier_rows_LE) if x is not None]
        found = iter(reduce_tensors(tensors, distributed))
        return StepTotals(
            losses={name: next(found) for name in losses},
            stats={name: next(found) for name in stats},
            layer_squares_L=None if self.layer_squares_L is None else next(found),
            earlier_rows_LE=None if self.earlier_rows_LE is None else next(found),
        )


@dataclass(frozen=True)
class StepResult:
    """What one step did; all but ``rows_LE`` the same on every rank."""

    losses: dict[str, float] | None
    """Means over the global batch by name; None unless asked for."""
    stats: Sums | None
    """The model's sums over micro-batches and ranks, float64 on the CPU; None unless asked for."""
    rows_LE: Tensor | None
    """Rows of every MoE layer and expert on this rank alone, on the device; None in a model without experts."""
    rows_since_report_LE: Tensor | None
    """Rows of all ranks in this step and those since the last report, on the CPU; None where ``stats`` is, and in a
    model without experts."""
    grad_norm: float
    """Before clipping; infinite in a step that was skipped in fp16."""
    layer_grad_norms: tuple[float, ...] | None
    """Of each layer's matrices, before clipping; None unless asked for, and in a step that was skipped."""
    loss_scale: float | None
    """That every micro-batch's mean loss was multiplied by, in fp16."""
    stop: int
    """A signal that some rank had received when the step's gradients were ready, ``guard.CANNOT_CONTINUE``, or 0."""
    save: bool = False
    """Whether a rank wishes a checkpoint after the step."""


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rate: float,
    guard: NonFiniteGuard,
    report: bool,
    layer_gradients: bool = False,
    earlier_rows_LE: Tensor | None = None,
    stop: int = 0,
    save: bool = False,
    clock: PhaseClock | None = None,
) -> StepResult:
    """Send the micro-batches through and update the weights, and the biases that balance the experts, once.

    Args:
        engine: the model and its optimizer.
        batches: this rank's micro-batches of the step.
        step: counted from 1 as in the reports, for messages.
        learning_rate: of this step.
        guard: looks at every layer.
        report: reduce losses and stats over the ranks; it costs one collective and the model's statistics.
        layer_gradients: where it reports, report the gradient norm of each layer's matrices too.
        earlier_rows_LE: where it reports, the ``rows_LE`` of the steps since the last report, added up: they are
            reduced together with those of this step.
        stop: a signal that this rank has received, ``guard.CANNOT_CONTINUE``, or 0.
        save: whether this rank wishes a checkpoint after the step.
        clock: measures the parts of the step.

    Raises:
        TrainingDiverged: something is not finite. On all ranks, before the weights changed or without a checkpoint
            of them.
    """
    assert len(batches) == engine.num_micro_batches, (len(batches), engine.num_micro_batches)
    clock = clock or PhaseClock(engine.distributed.device)
    totals = StepTotals()
    for index, batch in enumerate(batches):
        with clock.part("forward"):
            output = engine.forward(batch, with_stats=report, layer_hook=guard.layer_hook)
        assert output.loss is not None
        guard.add_loss(output.loss)
        with clock.part("backward"):
            engine.backward(output.loss, is_last=index == len(batches) - 1)
        totals.add(output, num_micro_batches=len(batches), report=report)
    wishes = guard.check(step, stop=stop, save=save)
    if report and layer_gradients:
        totals.layer_squares_L = layer_squares(engine)
    loss_scale = None if engine.loss_scaler is None else engine.loss_scaler.scale
    with clock.part("update"):
        grad_norm = engine.update(learning_rate)
    guard.check_norm(step, grad_norm)
    rows_LE = totals.stats.get(_ROWS)
    totals.earlier_rows_LE = earlier_rows_LE
    reduced = totals.reduced(engine.distributed) if report else None
    _balance(engine, rows_LE, None if reduced is None else reduced.stats.get(_ROWS), step)
    if reduced is None:
        return StepResult(None, None, rows_LE, None, grad_norm, None, loss_scale, *wishes)
    return StepResult(
        {name: value.item() / engine.distributed.world_size for name, value in reduced.losses.items()},
        reduced.stats,
        rows_LE,
        _rows_since_report(reduced),
        grad_norm,
        _layer_norms(reduced, grad_norm),
        loss_scale,
        *wishes,
    )


def _rows_since_report(reduced: StepTotals) -> Tensor | None:
    rows_LE, earlier_LE = reduced.stats.get(_ROWS), reduced.earlier_rows_LE
    return rows_LE if rows_LE is None or earlier_LE is None else rows_LE + earlier_LE


def _layer_norms(reduced: StepTotals, grad_norm: float) -> tuple[float, ...] | None:
    squares_L = reduced.layer_squares_L
    return tuple(squares_L.sqrt().tolist()) if squares_L is not None and math.isfinite(grad_norm) else None


def _balance(engine: Engine, rows_LE: Tensor | None, reduced_LE: Tensor | None, step: int) -> None:
    """Move the routers' biases, if they have any, by the rows of all ranks; nothing waits for the device.

    Also after a step whose gradients overflowed in fp16: its rows were routed all the same. ``reduced_LE`` are those of
    all ranks where a report has added them already.
    """
    rate = bias_update_rate(engine.model.config.moe, step - 1)
    if rate and rows_LE is not None:
        all_LE = engine.distributed.all_reduce(rows_LE.clone()) if reduced_LE is None else reduced_LE.to(rows_LE)
        engine.model.update_router_bias(all_LE, rate)


def reduce_tensors(tensors: Sequence[Tensor], distributed: Distributed) -> list[Tensor]:
    """Add the ranks' tensors of the same places, float64 on the CPU; flags, bool, by "or".

    All numbers travel in one collective, and all flags in another; a rank that has none of a kind calls none.
    """
    flags = [x for x in tensors if x.dtype == torch.bool]
    numbers = [x.double() for x in tensors if x.dtype != torch.bool]
    added = iter(_reduce(numbers, distributed, dist.ReduceOp.SUM))
    either = iter(_reduce([x.byte() for x in flags], distributed, dist.ReduceOp.MAX))
    return [next(either).bool() if x.dtype == torch.bool else next(added) for x in tensors]


def _reduce(tensors: Sequence[Tensor], distributed: Distributed, op: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Reduce all tensors, of one dtype, over the ranks in one collective; on the CPU."""
    if not tensors:
        return []
    flat = distributed.all_reduce(torch.cat([x.flatten() for x in tensors]), op).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
