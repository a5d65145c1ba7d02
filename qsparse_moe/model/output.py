"""The output of a forward pass of the Transformer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Logits, losses, and statistics, in tuples and dicts only: DeepSpeed's ZeRO-3 finds tensors in nothing else."""

    logits_BSV: Tensor
    """An empty tensor if the forward pass was asked for none."""
    loss: Tensor | None
    """The language-model loss plus the weighted router losses; None without labels or targets."""
    losses: dict[str, Tensor]
    """The terms of the loss, detached and unweighted: ``lm_loss`` in nats per label, and with MoE layers
    ``load_balance_loss`` and ``router_z_loss``, each the mean over these layers."""
    stats: dict[str, Tensor]
    """Statistics by name: detached float64 sums whose first dim has one entry per layer that has the statistic."""
