"""Widths that follow from other settings, written out by hand with factors above 1."""

from __future__ import annotations

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.config.shapes import dense_hidden_size, shared_hidden_size


def test_a_dense_layer_is_as_wide_as_all_experts_of_a_token():
    moe = MoEConfig(num_experts=8, experts_per_token=3, expert_hidden_size=48)
    assert dense_hidden_size(ModelConfig(moe=moe)) == 144
    assert dense_hidden_size(ModelConfig(moe=moe.model_copy(update={"dense_hidden_size": 100}))) == 100


def test_shared_experts_are_as_wide_as_their_number_of_experts():
    moe = MoEConfig(num_experts=8, experts_per_token=2, expert_hidden_size=48, num_shared_experts=3)
    assert shared_hidden_size(ModelConfig(moe=moe)) == 144
