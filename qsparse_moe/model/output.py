"""What a forward pass of the Transformer returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Tensors only, in tuples and dicts: DeepSpeed's ZeRO-3 follows gradients through nothing else."""

    logits_BSV: Tensor
    loss: Tensor | None
    """lm_loss plus the coefficients times the other losses; None without labels or targets."""
    losses: dict[str, Tensor]
    """Detached and unscaled: ``lm_loss`` (nats a label), and with a MoE layer ``load_balance_loss`` and
    ``router_z_loss``, means over those layers."""
    stats: dict[str, Tensor]
    """Detached float64 sums by name, one entry of the first dim a layer that has the thing."""
