"""A model without weights, for the names and shapes of its tensors."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.runtime import choices_unlogged


def empty_model(config: ModelConfig) -> Transformer:
    """Return the model on the meta device, with implementations that every machine has."""
    moe = config.moe.model_copy(update={"backend": "loop"})
    sparsity = config.sparsity.model_copy(update={"backend": "torch"})
    with torch.device("meta"), choices_unlogged():
        return Transformer(config.model_copy(update={"moe": moe, "sparsity": sparsity}))
