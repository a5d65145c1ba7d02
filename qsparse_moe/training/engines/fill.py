"""Weights for a model on the meta device, of which each rank keeps all but the experts of other ranks."""

from __future__ import annotations

import torch
from torch import nn

from qsparse_moe.model.init import WeightSource, materialize
from qsparse_moe.training.distributed.ranks import Distributed


def materialize_together(model: nn.Module, source: WeightSource, distributed: Distributed, dtype: torch.dtype) -> None:
    """Give every parameter memory in ``dtype`` and the rank's shard of its weights. All ranks must call it together."""
    # One rank may meet a damaged tensor that the others do not read, and must not leave them waiting.
    distributed.on_every_rank(lambda: materialize(model, source, device=distributed.device, dtype=dtype))
