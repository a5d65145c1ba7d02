"""A small model in double precision, and the sequences on which its sensitivities are measured."""

from __future__ import annotations

import numpy as np
import torch

from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.data.batch import make_batch
from qsparse_moe.model.transformer import build_model

VOCABULARY = 31


def config(moe=None, **sparsity) -> ModelConfig:
    settings = {"num_experts": 4, "expert_hidden_size": 16, "backend": "loop"} | (moe or {})
    return ModelConfig.model_validate(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": VOCABULARY,
            "moe": settings,
            "sparsity": {"backend": "torch"} | sparsity,
        }
    )


def model_of(settings: ModelConfig, *, sharpness: float = 4.0):
    model = build_model(settings, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that the loss depends on the layers at all
                parameter.mul_(sharpness)
    return model.eval()


def rows_of(num_sequences=3, length=10, seed=0) -> DocumentSequences:
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, (num_sequences, length + 1))
    tokens[:, 0] = tokens[1, 4] = 0
    batch = make_batch(tokens, document_token=0, attend_across_documents=False)
    documents = torch.cumsum((batch.tokens_BS == 0).flatten().long(), 0).view_as(batch.tokens_BS) - 1
    return DocumentSequences((batch,), (documents,), int(documents.max()) + 1)
