"""One training step, the same for every engine. L MoE layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.data.batch import Batch
from qsparse_moe.moe.router import bias_update_rate
from qsparse_moe.sparsity.stats import add_stats
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.monitor.layer_gradients import layer_squares
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.monitor.phases import PhaseClock

Sums = dict[str, Tensor]

_ROWS = "stats/router/rows_LE"


@dataclass(frozen=True)
class StepResult:
    """What one step did; all but ``rows_LE`` the same on every rank."""

    losses: dict[str, float] | None
    """Means over the global batch by name; None unless asked for."""
    stats: Sums | None
    """The model's sums over micro-batches and ranks, float64 on the CPU; None unless asked for."""
    rows_LE: Tensor | None
    """Rows of every MoE layer and expert on this rank alone, on the device; None in a model without experts."""
    grad_norm: float
    """Before clipping; infinite in a step that was skipped in fp16."""
    layer_grad_norms: tuple[float, ...] | None
    """Of each layer's matrices, before clipping; None unless asked for, and in a step that was skipped."""
    loss_scale: float | None
    """That every micro-batch's mean loss was multiplied by, in fp16."""
    stop: int
    """A signal that some rank had received when the step's gradients were ready, ``guard.CANNOT_GO_ON``, or 0."""
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
        stop: a signal that this rank has received, ``guard.CANNOT_GO_ON``, or 0.
        save: whether this rank wishes a checkpoint after the step.
        clock: measures the parts of the step.

    Raises:
        TrainingDiverged: something is not finite. On all ranks, before the weights changed or without a checkpoint
            of them.
    """
    assert len(batches) == engine.num_micro_batches, (len(batches), engine.num_micro_batches)
    clock = clock or PhaseClock(engine.distributed.device)
    totals: Sums = {}
    for index, batch in enumerate(batches):
        with clock.part("forward"):
            output = engine.forward(batch, with_stats=report, layer_hook=guard.layer_hook)
        assert output.loss is not None
        guard.add_loss(output.loss)
        with clock.part("backward"):
            engine.backward(output.loss, is_last=index == len(batches) - 1)
        # Without a report this is no more than the rows of the experts.
        totals = add_stats(totals, {f"stats/{name}": value for name, value in output.stats.items()})
        if report:
            losses = {"loss": output.loss.detach()} | output.losses
            totals = add_stats(totals, {f"losses/{name}": v.double() / len(batches) for name, v in losses.items()})
    wishes = guard.check(step, stop=stop, save=save)
    if report and layer_gradients:
        totals["layer_squares_L"] = layer_squares(engine)
    loss_scale = None if engine.loss_scaler is None else engine.loss_scaler.scale
    with clock.part("update"):
        grad_norm = engine.update(learning_rate)
    guard.check_norm(step, grad_norm)
    rows_LE = totals.get(_ROWS)
    _balance(engine, rows_LE, step)
    if not report:
        return StepResult(None, None, rows_LE, grad_norm, None, loss_scale, *wishes)
    totals = reduce_sums(totals, engine.distributed)
    losses_out = {name: value.item() / engine.distributed.world_size for name, value in _under("losses/", totals)}
    norms_L = totals["layer_squares_L"].sqrt() if layer_gradients and math.isfinite(grad_norm) else None
    norms = None if norms_L is None else tuple(norms_L.tolist())
    return StepResult(losses_out, dict(_under("stats/", totals)), rows_LE, grad_norm, norms, loss_scale, *wishes)


def _balance(engine: Engine, rows_LE: Tensor | None, step: int) -> None:
    """Move the routers' biases, if they have any, by the rows of all ranks; nothing waits for the device.

    Also after a step whose gradients overflowed in fp16: its rows were routed all the same.
    """
    rate = bias_update_rate(engine.model.config.moe, step - 1)
    if rate and rows_LE is not None:
        engine.model.update_router_bias(engine.distributed.all_reduce(rows_LE.clone()), rate)


def reduce_sums(sums: Mapping[str, Tensor], distributed: Distributed) -> Sums:
    """Add the ranks' tensors of the same names, float64 on the CPU; flags, bool, by "or". One collective for each."""
    flags = {name: value for name, value in sums.items() if value.dtype == torch.bool}
    numbers = {name: value.double() for name, value in sums.items() if name not in flags}
    reduced = _reduce(numbers, distributed, dist.ReduceOp.SUM) if numbers else {}
    if flags:
        as_bytes = {name: value.byte() for name, value in flags.items()}
        reduced |= {name: x.bool() for name, x in _reduce(as_bytes, distributed, dist.ReduceOp.MAX).items()}
    return reduced


def _reduce(tensors: Sums, distributed: Distributed, op: dist.ReduceOp.RedOpType) -> Sums:
    """All tensors, of one dtype, reduced over the ranks in one collective; on the CPU."""
    names = sorted(tensors)
    flat = distributed.all_reduce(torch.cat([tensors[name].flatten() for name in names]), op).cpu()
    parts = flat.split([tensors[name].numel() for name in names])
    return {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}


def _under(prefix: str, sums: Sums) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), value) for name, value in sums.items() if name.startswith(prefix)]
