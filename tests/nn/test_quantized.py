"""Quantised Q-Sparse inside the layers: where formats apply, in which order, and what stays at full precision."""

import pytest
import torch

from qsparse_moe.config.schema import SITES, ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.model.transformer import build_model
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import fake_quantize
from qsparse_moe.sparsity.topk import rescale_selected, topk_mask

torch.set_num_threads(1)
E, D = 3, 24


def sparsity_config(**settings):
    return SparsityConfig.model_validate(settings)


def site(*values, **settings):
    made = SparseSite("expert_hidden", D, sparsity_config(**settings), select_rows_torch, num_experts=len(values))
    made.set_sparsity(values)
    return made


@pytest.mark.parametrize("number_format", ["int8", "int4"])
@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("rescale", ["none", "unit", "preserve"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_site_masks_by_the_unrounded_row_then_rounds_then_rescales(number_format, gradient, rescale, group_size):
    group = {"selection": "block", "group_size": group_size} if group_size else {}
    made = site(0.5, 0.5, gradient=gradient, rescale=rescale, quantization={"activations": number_format}, **group)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, D, dtype=torch.float64)
    got, stats = made(x, with_stats=True)
    mask = topk_mask(x, D // 2, group_size=group_size)
    rounded = fake_quantize(x.detach(), number_format)
    through = x if gradient == "ste" else x * mask
    selected = through + (rounded * mask - through).detach()  # value Q(x) * M, gradient of `through`
    want = rescale_selected(selected, x, rescale)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    assert stats["selected_E"] == mask.sum()
    assert stats["nonzero_E"] == torch.count_nonzero(rounded * mask)


def test_a_site_without_selection_still_rounds_and_counts_what_rounding_zeroed():
    made = site(0.0, quantization={"activations": "int4"})
    x = torch.randn(50, D)
    got, stats = made(x, with_stats=True)
    assert torch.equal(got, fake_quantize(x, "int4"))
    assert stats["selected_E"] == x.numel()
    assert stats["nonzero_E"] == torch.count_nonzero(got) < x.numel()
    assert stats["energy_E"].item() == pytest.approx(x.square().sum().item(), rel=1e-5)
    assert stats["kept_energy_E"].item() == pytest.approx(got.square().sum().item(), rel=1e-5)
    assert abs(stats["kept_energy_E"] / stats["energy_E"] - 1).item() > 1e-3


def test_experts_with_their_own_k_are_rounded_alike():
    made = site(0.0, 0.5, 0.75, quantization={"activations": "int8"})
    x, experts = torch.randn(6, D), torch.tensor([0, 0, 1, 1, 2, 2])
    got, stats = made(x, experts, with_stats=True)
    num_selected = torch.tensor([24, 24, 12, 12, 6, 6])
    assert torch.equal(got, fake_quantize(x, "int8") * topk_mask(x, num_selected))
    assert stats["selected_E"] == num_selected.sum()


def test_a_site_with_its_own_format_leaves_the_common_format_to_the_others():
    settings = {"activations": "int8", "sites": {"expert_hidden": "none", "attention_input": "int4"}}
    config = sparsity_config(quantization=settings)
    formats = {name: SparseSite(name, D, config, select_rows_torch).number_format for name in SITES}
    assert formats.pop("expert_hidden") == "none"
    assert formats.pop("attention_input") == "int4"
    assert set(formats.values()) == {"int8"}


def model(preset=None, **quantization):
    moe = MoEConfig(num_experts=E, expert_hidden_size=16, num_shared_experts=1, num_dense_layers=1)
    sparsity = sparsity_config(preset=preset, quantization=quantization)
    return build_model(ModelConfig(vocab_size=40, hidden_size=32, num_layers=2, moe=moe, sparsity=sparsity))


PROJECTIONS = ("qkv.weight", "output.weight", "w_gate", "w_up", "w_down")


def test_ternary_weights_are_read_in_every_projection_and_nowhere_else():
    tokens = torch.randint(0, 40, (2, 9))
    ternary, full = model(weights="ternary"), model()
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name.endswith(PROJECTIONS):
                parameter.copy_(fake_quantize(parameter, "ternary"))
    outputs = [made(tokens, tokens) for made in (ternary, full)]
    assert torch.equal(outputs[0].logits_BSV, outputs[1].logits_BSV)
    assert not torch.equal(outputs[0].logits_BSV, model()(tokens).logits_BSV)
    for out in outputs:
        out.loss.backward()
    # Straight through: the gradient of the ternary value is that of the weight behind it.
    for (name, mine), theirs in zip(ternary.named_parameters(), full.parameters(), strict=True):
        assert mine.grad is not None, name
        assert torch.equal(mine.grad, theirs.grad), name


def test_without_a_format_nothing_is_computed_differently():
    tokens = torch.randint(0, 40, (2, 9))
    made = model()
    experts, seen = made.layers[1].moe.experts, []
    weight = experts.w_up

    def product(rows, weights, counts):
        seen.append(weights)
        return rows.new_zeros(len(rows), weights.shape[2])

    experts.matmul = product
    experts.matmul_pair = lambda rows, gate, up, counts: (product(rows, gate, counts), product(rows, up, counts))
    made(tokens)
    assert seen[1] is weight


@pytest.mark.parametrize(
    "quantization",
    [{"activations": "int8"}, {"activations": "int4", "weights": "ternary"}, {"preset": "a4.8", "weights": "ternary"}],
)
def test_a_quantised_model_learns(quantization):
    torch.manual_seed(0)
    made, tokens = model(**quantization), torch.randint(0, 40, (4, 16))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = made(tokens, tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
