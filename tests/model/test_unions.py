"""Measured unions against a loop over tokens, and against the formula where tokens are independent."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.accounting.traffic import union
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.model.unions import layer_needs, measured_unions

torch.set_num_threads(1)
E, A, D, F = 6, 2, 32, 24


def make(**sparsity):
    moe = {"num_experts": E, "experts_per_token": A, "expert_hidden_size": F, "num_dense_layers": 1}
    settings = {"backend": "torch", "sites": {"expert_input": 0.5, "expert_hidden": 0.5}} | sparsity
    shape = {"vocab_size": 64, "hidden_size": D, "num_layers": 3, "moe": moe, "sparsity": settings}
    return build_model(ModelConfig.model_validate(shape), seed=3)


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (24, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("overrides", [(), ({"site": "expert_input", "experts": 1, "sparsity": 0.75},)])
def test_needs_of_a_sequence_are_those_of_its_last_token_alone(tokens, overrides):
    model = make(overrides=overrides)
    needs = layer_needs(model, tokens)
    assert len(needs) == 2  # the first layer has no experts
    seen = {}
    layer = model.layers[1].moe
    layer.register_forward_pre_hook(lambda module, inputs: seen.setdefault("x", inputs[0]))
    model.eval()(tokens, with_stats=False)
    for row in (0, 7, 23):
        x = seen["x"][row, -1]
        experts = layer.router(x[None]).expert_ids_TA[0]
        assert experts.tolist() == needs[0].experts_RA[row].tolist()
        for choice, expert in enumerate(experts.tolist()):
            kept = 8 if overrides and expert == 1 else 16
            sparse = x * (x.abs() >= x.abs().topk(kept).values[-1])
            assert torch.equal(needs[0].input_RAD[row, choice], sparse != 0)
            gate = sparse @ layer.experts.w_gate[expert]
            hidden = gate.relu().square() * (sparse @ layer.experts.w_up[expert])
            assert torch.equal(needs[0].gate_RAF[row, choice], hidden != 0)
            assert needs[0].hidden_RAF[row, choice].sum() == min(12, (hidden != 0).sum())


def test_one_token_reads_its_own_fraction_and_all_tokens_read_the_union(tokens):
    model = make()
    one, everything = measured_unions(model, tokens, [1, 24], draws=24)
    assert one.routed == pytest.approx(A / E)
    assert one.input_rows == pytest.approx(A / E / 2)
    assert one.up_elements == pytest.approx(A / E / 4, rel=0.3)  # the input's half and the gate's half
    assert 0.1 < one.hidden_rows < A / E / 2  # ReLU leaves some rows fewer than K
    needs = layer_needs(model, tokens)
    expected = []
    for layer in needs:
        used = torch.zeros(E, D, dtype=torch.bool)
        for row in range(24):
            for choice, expert in enumerate(layer.experts_RA[row].tolist()):
                used[expert] |= layer.input_RAD[row, choice]
        expected.append(used.float().mean().item())
    assert everything.input_rows == pytest.approx(sum(expected) / 2)


def test_the_mean_is_over_the_layers_and_the_random_choices_of_the_seed(tokens):
    from qsparse_moe.model.unions import _shares

    model = make()
    layers = layer_needs(model, tokens)
    found = measured_unions(model, tokens, [3, 5], draws=4, seed=7)
    draw = torch.Generator().manual_seed(7)
    for batch, one in zip((3, 5), found, strict=True):
        choices = [torch.randperm(24, generator=draw)[:batch] for _ in range(4)]
        by_hand = sum(_shares(layer, chosen, E) for chosen in choices for layer in layers) / 8
        assert one.batch == batch
        torch.testing.assert_close(
            torch.tensor([one.routed, one.input_rows, one.up_elements, one.hidden_rows]), by_hand
        )
    assert found == measured_unions(model, tokens, [3, 5], draws=4, seed=7)
    assert found != measured_unions(model, tokens, [3, 5], draws=4)
    assert measured_unions(model, tokens, [3]) == measured_unions(model, tokens, [3], draws=16, seed=0)


@pytest.mark.parametrize("batch", [0, 25])
def test_a_step_has_at_least_one_and_at_most_all_of_the_sequences(tokens, batch):
    with pytest.raises(AssertionError, match=rf"\({batch}, 24\)"):
        measured_unions(make(), tokens, [batch])


def test_independent_tokens_follow_the_formula(tokens):
    from qsparse_moe.model.unions import LayerNeeds, _shares

    generator = torch.Generator().manual_seed(1)
    shares = []
    for _ in range(300):
        experts = torch.rand(4, E, generator=generator).argsort(-1)[:, :A]
        masks = [torch.rand(4, A, width, generator=generator) < 0.5 for width in (D, F, F)]
        shares.append(_shares(LayerNeeds(experts, *masks), torch.arange(4), E))
    routed, input_rows, up, hidden = torch.stack(shares).mean(0).tolist()
    assert routed == pytest.approx(union(A / E, 4), rel=0.03)
    assert input_rows == pytest.approx(union(A / E / 2, 4), rel=0.03)
    assert hidden == pytest.approx(union(A / E / 2, 4), rel=0.03)
    assert up == pytest.approx(union(A / E / 4, 4), rel=0.03)


def test_fractions_read_per_step_by_hand_where_the_masks_in_front_of_the_three_matrices_differ():
    from qsparse_moe.model.unions import LayerNeeds, _shares

    # Both tokens use expert 2 of 5; D = 4, F = 5. Input, gate and hidden masks have different densities.
    experts = torch.tensor([[2], [2]])
    inputs = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 0]]]).bool()
    gate = torch.tensor([[[1, 1, 1, 1, 0]], [[0, 0, 0, 1, 1]]]).bool()
    hidden = torch.tensor([[[1, 0, 0, 0, 0]], [[0, 0, 0, 0, 0]]]).bool()
    shares = _shares(LayerNeeds(experts, inputs, gate, hidden), torch.arange(2), 5)
    # Of up, token 0 needs (0; 0-3) and token 1 (0-1; 3-4): together 4 + 1 + 2 of 20 elements.
    expected = torch.tensor([1, 2 / 4, 7 / 20, 1 / 5]) / 5
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_fused_pass_is_suspended_while_hooks_are_set(tokens, backend):
    model = make(backend=backend)
    plain = layer_needs(make(), tokens)
    before = model(tokens).logits_BSV
    for found, wanted in zip(layer_needs(model, tokens), plain, strict=True):
        assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in vars(wanted))
    assert all(site.hook is None for block in model.blocks() for site in block.sites().values())
    assert torch.equal(model(tokens).logits_BSV, before)
