"""A small model with byte-like tokens, built with any settings changed."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.model.transformer import build_model

VOCAB = 40


RECOMPUTED = ("full", "selective", "attention", "feed_forward")


def make(seed=0, **changes):
    moe = {"num_experts": 4, "expert_hidden_size": 16} | changes.pop("moe", {})
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 3, "num_heads": 4} | changes
    return build_model(ModelConfig(moe=MoEConfig(**moe), **settings), seed=seed)


def tokens(rows=2, length=12):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
