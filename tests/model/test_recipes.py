"""The shipped recipes, made small: their routers, balance and Q-Sparse settings train together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qsparse_moe.config.load import load_config
from qsparse_moe.model.transformer import build_model

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
SMALL = [
    "model.vocab_size=264",
    "model.hidden_size=32",
    "model.num_layers=5",
    "model.head_size=4",
    "model.init_std=0.1",
    "model.moe.expert_hidden_size=16",
]

# Instead of the head size.
DEEPSEEK = [
    "model.num_heads=4",
    "model.latent_attention.key_value_rank=12",
    "model.latent_attention.query_rank=16",
    "model.latent_attention.nope_head_size=6",
    "model.latent_attention.rope_head_size=4",
    "model.latent_attention.value_head_size=6",
    "model.moe.dense_hidden_size=32",
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_parameter_of_a_small_recipe_has_a_gradient(path):
    small = [*SMALL[:-3], *DEEPSEEK, *SMALL[-2:]] if path.stem.startswith("deepseek") else SMALL
    # Those of the paper's dense models: all layers.
    is_dense = load_config(path).model.moe.num_dense_layers == load_config(path).model.num_layers
    layers = ["model.moe.num_dense_layers=5", "model.moe.dense_hidden_size=32"] if is_dense else []
    config = load_config(path, [*small, *layers, "model.moe.backend=loop"])
    tokens_BS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(1))
    model = build_model(config.model, seed=1)
    output = model(tokens_BS, tokens_BS)
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert is_dense == ("router/routed_LE" not in output.stats)
    if not is_dense:
        assert output.stats["router/routed_LE"].sum(-1).eq(48 * config.model.moe.experts_per_token).all()
