"""Initial values: norms, standard deviations of every kind of matrix, and the cut of their tails."""

from __future__ import annotations

import math

import pytest

from tests.model.small_model import make

STD, LAYERS = 0.04, 3


@pytest.fixture(scope="module")
def parameters():
    model = make(
        hidden_size=64,
        num_layers=LAYERS,
        init_std=STD,
        qk_norm=True,
        attention_bias="all",
        moe={"num_experts": 4, "expert_hidden_size": 96, "num_shared_experts": 1, "num_dense_layers": 1},
    )
    return dict(model.named_parameters())


def test_norms_are_one(parameters):
    norms = [value for name, value in parameters.items() if "norm" in name]
    assert len(norms) == 1 + 4 * LAYERS
    assert all((value == 1).all() for value in norms)


def test_biases_are_zero(parameters):
    biases = [value for name, value in parameters.items() if name.endswith("bias")]
    assert len(biases) == 2 * LAYERS
    assert all((value == 0).all() for value in biases)


def test_matrices_have_their_standard_deviation_and_those_into_the_residual_one_for_the_depth(parameters):
    into_residual = [name for name in parameters if name.endswith(("w_down", "attention.output.weight"))]
    assert len(into_residual) == LAYERS + 1 + 2 * 2, "attention, one dense layer, two with experts and shared experts"
    # A normal distribution that is cut at three standard deviations has this share of its own deviation.
    cut = 0.98658
    for name, value in parameters.items():
        if "norm" in name or name.endswith("bias"):
            continue
        std = STD / math.sqrt(2 * LAYERS) if name in into_residual else STD
        assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name
        assert value.std().item() / std == pytest.approx(cut, abs=4 / math.sqrt(2 * value.numel())), name
        assert value.abs().max().item() <= 3 * std, name
        if value.numel() >= 10_000:
            assert value.abs().max().item() > 2.8 * std, name
