"""Small models whose attention and selections matter, and the logits that all tokens at once give."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import build_model


def config(**settings):
    """Two layers of 64 features; what is not given is small."""
    moe = {"num_experts": 4, "expert_hidden_size": 32, "backend": "loop"} | settings.pop("moe", {})
    sparsity = {"backend": "torch"} | settings.pop("sparsity", {})
    return ModelConfig.model_validate(
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "init_std": 0.2, "moe": moe, "sparsity": sparsity}
        | settings
    )


def model(dtype=torch.float32, seed=3, **settings):
    return build_model(config(**settings), dtype=dtype, seed=seed).eval()


def random_tokens(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def all_at_once(built, tokens_BS, **arguments):
    """``(B, S, V)`` fp32."""
    return built(tokens_BS, with_stats=False, **arguments).logits_BSV.float()
