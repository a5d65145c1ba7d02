"""Latent attention against the equations of the paper, head by head; and what training needs of it."""

from __future__ import annotations

import copy

import pytest
import torch

from qsparse_moe.config.rotary_schema import RopeScalingConfig
from qsparse_moe.config.schema import LatentAttentionConfig, SparsityConfig
from qsparse_moe.model.document_attention import DocumentAttention
from qsparse_moe.model.documents import document_mask
from qsparse_moe.model.rope import rotation_at
from qsparse_moe.sparsity.topk import topk_sparsify
from tests.model.small_model import RECOMPUTED, make, tokens

SIZES = {"key_value_rank": 10, "nope_head_size": 5, "rope_head_size": 6, "value_head_size": 7}
SHAPES = {
    "queries from the input": SIZES,
    "queries from a vector": SIZES | {"query_rank": 9},
    "values wider than keys": SIZES | {"value_head_size": 13},
    "values as wide as keys": SIZES | {"value_head_size": 11},
}


def latent(shape, sparsity=0.0, **changes):
    settings = SparsityConfig(default=sparsity, backend="torch")
    built = make(latent_attention=LatentAttentionConfig(**shape), sparsity=settings, num_heads=3, **changes).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if "norm" in name else 0.3))
    return built


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x_SR, theta=10000.0):
    """Channel i and i + R/2 of every position turned by position * theta^(-2i/R)."""
    half = x_SR.shape[-1] // 2
    angles = torch.arange(len(x_SR))[:, None].double() * theta ** (-torch.arange(half).double() / half)
    first, second = x_SR[:, :half], x_SR[:, half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def by_hand(part, x_SD, shape, num_kept, allowed_SS):
    """Equations 37 to 47 of arXiv 2405.04434, appendix C, for one sequence; K features at each of the two sites."""
    rank, plain, rotated, value = (shape[name] for name in SIZES)
    x_SD = topk_sparsify(x_SD, num_kept[0])
    down = x_SD @ part.down.weight.T
    queries, vector, key = down[:, : -rank - rotated], down[:, -rank - rotated : -rotated], down[:, -rotated:]
    if "query_rank" in shape:
        queries = normed(queries, part.query_latent_norm.weight) @ part.query_up.weight.T
    vector, key = normed(vector, part.latent_norm.weight), turned(key)
    heads = []
    for head in range(3):
        query = queries[:, head * (plain + rotated) :][:, : plain + rotated]
        weight = part.latent_up.weight[head * (plain + value) :][: plain + value]
        keys = torch.cat((vector @ weight[:plain].T, key), -1)
        scores = torch.cat((query[:, :plain], turned(query[:, plain:])), -1) @ keys.T / (plain + rotated) ** 0.5
        heads.append(scores.masked_fill(~allowed_SS, -torch.inf).softmax(-1) @ (vector @ weight[plain:].T))
    return topk_sparsify(torch.cat(heads, -1), num_kept[1]) @ part.output.weight.T


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_output_is_that_of_the_paper_and_both_sites_select(shape, sparsity):
    built = latent(shape, sparsity)
    part = built.layers[0].attention
    x_BSD = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    documents_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    mask = document_mask(documents_BS)
    rotation = rotation_at(torch.arange(8)[None], built.config, torch.float64)
    attend = DocumentAttention(documents_BS, part.scale, "auto")
    found, *_ = part(x_BSD, rotation, with_stats=False, attend=attend)
    widths = 32, 3 * shape["value_head_size"]
    num_kept = [max(1, round((1 - sparsity) * width)) for width in widths]
    want = torch.stack([by_hand(part, x, shape, num_kept, mask[row, 0]) for row, x in enumerate(x_BSD)])
    # The angles are formed in fp32.
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    causal, *_ = part(x_BSD[1:], rotation, with_stats=False)
    torch.testing.assert_close(causal, want[1:], rtol=1e-5, atol=1e-5)


def test_the_score_factor_of_yarn_multiplies_the_scores():
    shape = SHAPES["queries from a vector"]
    yarn = {"type": "yarn", "factor": 4.0, "original_length": 30, "attention_factor": 1.0, "score_factor": 1.7}
    plain, scaled = (
        latent(shape, rope_scaling=RopeScalingConfig(**yarn | {"score_factor": factor})) for factor in (1.0, 1.7)
    )
    x_BSD = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    rotation = rotation_at(torch.arange(8)[None], plain.config, torch.float64)
    with torch.no_grad():
        plain.layers[0].attention.query_up.weight.mul_(1.7)
    found, want = (built.layers[0].attention(x_BSD, rotation, with_stats=False)[0] for built in (scaled, plain))
    torch.testing.assert_close(found, want)


def test_the_norms_have_the_epsilon_of_published_models_whatever_that_of_the_model_is():
    part = latent(SHAPES["queries from a vector"], norm_epsilon=0.1).layers[0].attention
    assert part.latent_norm.eps == part.query_latent_norm.eps == 1e-6


def test_every_parameter_has_a_gradient_and_norms_begin_at_one():
    sizes = LatentAttentionConfig(**SHAPES["queries from a vector"])
    built = make(latent_attention=sizes, num_heads=3, num_layers=4)
    part = built.layers[1].attention
    assert part.latent_norm.weight.eq(1).all() and part.query_latent_norm.weight.eq(1).all()
    # Drawn smaller where it writes into the residual stream.
    assert part.output.weight.std() < 0.5 * part.latent_up.weight.std()
    built(tokens(), tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_recomputation_changes_no_gradient(mode):
    plain = latent(SHAPES["queries from a vector"], 0.5)
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing = mode
    for built in (plain, recomputed):
        built(tokens(), tokens()).loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
