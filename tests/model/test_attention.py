"""Attention: rotary positions and the norms of queries and keys."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.rope import rotate, rotation_at
from tests.model.small_model import make

ROTARY = ModelConfig(head_size=8, rope_theta=100.0)


def test_rotation_depends_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at_q, at_k):
        turned = [
            rotate(x, rotation_at(torch.tensor([[at]]), ROTARY, torch.float32)) for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(12, 10))
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_queries_and_keys_are_normalised_before_their_rotation():
    """By hand; weights of the norms that differ between the two channels of a pair do not commute with its rotation."""
    model = make(qk_norm=True, num_layers=1)
    attention = model.layers[0].attention
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in (attention.query_norm, attention.key_norm):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 2 + 0.1)
        attention.qkv.weight.copy_(torch.randn(attention.qkv.weight.shape, generator=generator))
    x = torch.randn(1, 6, 32, generator=generator)
    rotation = rotation_at(torch.arange(6)[None], model.config, torch.float32)
    query, key, value = (attention.qkv(x).view(1, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)).unbind(0)

    def normed_and_turned(heads, norm):
        scaled = heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        cos, sin = rotation
        first, second = scaled[..., :4], scaled[..., 4:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    query, key = normed_and_turned(query, attention.query_norm), normed_and_turned(key, attention.key_norm)
    scores = (query @ key.mT / 8**0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(1, 6, 32)
    got, _, _ = attention(x, rotation, None, with_stats=False)
    torch.testing.assert_close(got, mixed @ attention.output.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_far_positions_are_accurate_in_every_dtype(dtype):
    """bf16 has no 1,001, nor the frequencies: angles are formed in fp32, and only their cosines are rounded."""
    rotation = rotation_at(torch.tensor([[1001, 4093]]), ModelConfig(head_size=8), dtype)
    angles = [[position * 10000.0 ** (-2 * i / 8) for i in range(4)] for position in (1001, 4093)]
    wide = torch.tensor(angles, dtype=torch.float64)[None, None]
    for got, want in zip(rotation, (wide.cos(), wide.sin()), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=2**-8 if dtype == torch.bfloat16 else 5e-4)
