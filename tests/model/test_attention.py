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


def by_hand(attention, x, norm):
    """Attention of four query heads of eight channels that share two of keys and values, in plain PyTorch."""
    joint = x @ attention.qkv.weight.T + (0 if attention.qkv.bias is None else attention.qkv.bias)
    query, key, value = joint.split([32, 16, 16], -1)
    query, key = norm(query, attention.query_norm), norm(key, attention.key_norm)
    cos, sin = rotation_at(torch.arange(x.shape[1])[None], ModelConfig(head_size=8), torch.float32)

    def turned(rows):
        heads = rows.view(1, x.shape[1], -1, 8).transpose(1, 2)
        first, second = heads[..., :4], heads[..., 4:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    key = turned(key).repeat_interleave(2, 1)
    value = value.view(1, x.shape[1], 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    scores = turned(query) @ key.mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(1, x.shape[1], 32)
    return mixed @ attention.output.weight.T + (0 if attention.output.bias is None else attention.output.bias)


def norm_of_heads(rows, norm):
    heads = rows.view(*rows.shape[:-1], -1, 8)
    return (heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight).flatten(-2)


def norm_of_all(rows, norm):
    return rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def without_norm(rows, norm):
    assert norm is None
    return rows


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
@pytest.mark.parametrize(
    ("qk_norm", "norm"), [("per_head", norm_of_heads), ("all_heads", norm_of_all), ("none", without_norm)]
)
def test_queries_and_keys_get_their_bias_and_are_normed_before_their_rotation(qk_norm, norm, bias):
    """By hand; weights of the norms that differ between the two channels of a pair do not commute with its rotation."""
    model = make(qk_norm=qk_norm, attention_bias=bias, num_kv_heads=2, num_layers=1)
    attention = model.layers[0].attention
    assert [(part.bias is not None) for part in (attention.qkv, attention.output)] == [bias != "none", bias == "all"]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            drawn = torch.rand(parameter.shape, generator=generator) * 2
            parameter.copy_(drawn + 0.1 if "norm" in name else drawn - 1)
    x = torch.randn(1, 6, 32, generator=generator)
    rotation = rotation_at(torch.arange(6)[None], model.config, torch.float32)
    got, _, _ = attention(x, rotation, with_stats=False)
    torch.testing.assert_close(got, by_hand(attention, x, norm), rtol=1e-4, atol=1e-5)


def test_one_head_is_all_heads():
    settings = {"num_heads": 1, "num_layers": 1}
    one, every = (make(qk_norm=name, **settings).layers[0].attention for name in ("per_head", "all_heads"))
    x, rotation = torch.randn(1, 6, 32), rotation_at(torch.arange(6)[None], ModelConfig(head_size=32), torch.float32)
    assert one(x, rotation, with_stats=False)[0].equal(every(x, rotation, with_stats=False)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_far_positions_are_accurate_in_every_dtype(dtype):
    """bf16 has no 1,001, nor the frequencies: angles are formed in fp32, and only their cosines are rounded."""
    rotation = rotation_at(torch.tensor([[1001, 4093]]), ModelConfig(head_size=8), dtype)
    angles = [[position * 10000.0 ** (-2 * i / 8) for i in range(4)] for position in (1001, 4093)]
    wide = torch.tensor(angles, dtype=torch.float64)[None, None]
    for got, want in zip(rotation, (wide.cos(), wide.sin()), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=2**-8 if dtype == torch.bfloat16 else 5e-4)
