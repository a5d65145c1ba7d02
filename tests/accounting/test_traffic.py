"""Bytes of weights that a step reads: the formula against tokens that really choose, and its limits."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.accounting.densities import measured_densities, no_zeros, planned_densities
from qsparse_moe.accounting.traffic import Traffic, total_traffic, union, weight_traffic
from tests.accounting.test_parameters import MOE, SHAPES, model_config

EXPERT = 32 * 24  # elements of one matrix of one expert


def experts(config, batch, **settings):
    return weight_traffic(config, batch, bytes_per_weight=1.0, **settings)["experts"]


def test_the_union_of_independent_tokens_is_one_minus_a_power():
    assert union(0.5, 1) == pytest.approx(0.5)
    assert union(0.5, 4) == pytest.approx(1 - 0.5**4)
    assert union(1.0, 3) == 1.0
    assert union(0.0, 9) == 0.0
    assert union(1e-12, 10) == pytest.approx(1e-11, rel=1e-9)  # no cancellation


def test_one_token_reads_what_is_counted_as_needed():
    from qsparse_moe.accounting.parameters import count_by_part

    config = model_config(**SHAPES["everything"], sparsity={"default": 0.5})
    parts, counted = weight_traffic(config, 1, bytes_per_weight=2.0), count_by_part(config)
    for part in counted:
        assert parts[part].routed == pytest.approx(2 * counted[part].active), part
        assert parts[part].needed == pytest.approx(2 * counted[part].needed), part


def test_many_tokens_read_everything_except_what_no_token_needs():
    config = model_config(sparsity={"default": 0.5})
    total = total_traffic(weight_traffic(config, 100_000))
    assert total.routed == pytest.approx(total.stored)
    assert total.needed == pytest.approx(total.stored)


def test_a_step_reads_one_row_of_the_embedding_per_token_and_at_most_all():
    config = model_config()
    rows = {
        batch: weight_traffic(config, batch, bytes_per_weight=1.0)["embedding"].routed / 32 for batch in (1, 7, 263)
    }
    assert rows == {1: 1, 7: 7, 263: 263}
    for batch in (264, 265, 4096):
        embedding = weight_traffic(config, batch, bytes_per_weight=1.0)["embedding"]
        assert embedding.routed == embedding.needed == embedding.stored == 264 * 32


def test_at_half_sparsity_four_tokens_read_94_percent_of_a_dense_model_and_less_of_an_expert():
    config = model_config(sparsity={"default": 0.5}, moe=MOE | {"num_experts": 64, "experts_per_token": 1})
    parts = weight_traffic(config, 4, bytes_per_weight=1.0)
    attention = parts["attention"]
    assert attention.needed / attention.routed == pytest.approx(0.9375)
    assert parts["experts"].needed / parts["experts"].routed == pytest.approx(0.506, abs=0.002)


def simulated(num_experts, per_token, density, gate, batch, rounds=2000):
    """Return the fractions of gate's rows and of up's elements that a token of the batch needs, by drawing tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = elements = 0.0
    for _ in range(rounds):
        chosen = torch.rand(batch, num_experts, generator=generator).argsort(-1)[:, :per_token]
        kept = torch.rand(batch, 1, 16, generator=generator) < density
        positive = torch.rand(batch, per_token, 16, generator=generator) < gate
        needed = torch.zeros(num_experts, 16, 16, dtype=torch.bool)
        touched = torch.zeros(num_experts, 16, dtype=torch.bool)
        for token in range(batch):
            for choice, expert in enumerate(chosen[token].tolist()):
                touched[expert] |= kept[token, 0]
                needed[expert] |= kept[token, 0, :, None] & positive[token, choice, None, :]
        rows += touched.double().mean().item() / rounds
        elements += needed.double().mean().item() / rounds
    return rows, elements


def test_formula_is_the_mean_over_tokens_that_choose_independently():
    config = model_config(
        sparsity={"sites": {"expert_input": 0.75}}, moe=MOE | {"activation": "relu2glu"}, num_layers=1
    )
    without = experts(config, 3)
    with_gate = experts(config, 3, gate_density=0.4)
    rows, elements = simulated(4, 2, 0.25, 0.4, 3)
    down = union(0.5, 3)
    assert without.needed == pytest.approx(4 * EXPERT * (2 * rows + down), rel=0.02)
    assert with_gate.needed == pytest.approx(4 * EXPERT * (rows + elements + down), rel=0.02)


def test_gate_first_saves_nothing_where_the_gate_has_no_relu():
    config = model_config()  # swiglu
    assert experts(config, 2, gate_density=0.1) == experts(config, 2)


def test_experts_with_their_own_s_are_read_by_their_own_s():
    overrides = [{"sparsity": 0.5, "site": "expert_hidden", "experts": "0-1"}]
    config = model_config(sparsity={"overrides": overrides}, num_layers=1)
    routed = union(0.5, 2)
    down = (2 * union(0.25, 2) + 2 * routed) / 4
    assert experts(config, 2).needed == pytest.approx(4 * EXPERT * (2 * routed + down))


def test_totals_are_sums_over_the_parts():
    parts = {"a": Traffic(3, 2, 1), "b": Traffic(30, 20, 10)}
    assert total_traffic(parts) == Traffic(33, 22, 11)


@pytest.mark.parametrize("activation", ["relu2glu", "reglu", "drelu"])
def test_gate_first_reads_the_elements_of_up_behind_positive_gates(activation):
    config = model_config(moe=MOE | {"activation": activation}, num_layers=1)
    rows, elements = union(0.5, 2), union(0.5 * 0.25, 2)
    assert experts(config, 2, gate_density=0.25).needed == pytest.approx(4 * EXPERT * (2 * rows + elements))


def test_a_tied_head_is_read_once_per_step_and_weights_have_two_bytes_by_default():
    parts = weight_traffic(model_config(tie_embeddings=True), 3)
    assert parts["head"] == Traffic(0.0, 2 * 264 * 32, 2 * 264 * 32)
    assert parts["embedding"] == Traffic(2 * 264 * 32, 2 * 3 * 32, 2 * 3 * 32)
    assert parts["router"] == Traffic(*[2 * 2 * 4 * 32] * 3)


def test_zeros_of_every_layer_and_site_are_its_own():
    config = model_config(**SHAPES["dense layers"])
    places = list(planned_densities(config))
    row = {f"sparsity/{site}/zeros/layer_{layer}": n / 16 for n, (layer, site) in enumerate(places)}
    densities = measured_densities(config, row)
    for n, place in enumerate(places):
        assert densities[place] == (1 - n / 16,) * (4 if "expert" in place[1] else 1), place
        name = f"sparsity/{place[1]}/zeros/layer_{place[0]}"
        assert measured_densities(config, {key: value for key, value in row.items() if key != name}) is None
    whole = no_zeros(config)
    assert set(whole) == set(places) and set(whole.values()) == {(1.0,)}


def test_a_logged_step_gives_measured_densities_or_none():
    config = model_config(**SHAPES["dense layers"])
    row = {f"sparsity/{site}/zeros/layer_{layer}": 0.25 for layer, site in planned_densities(config)}
    densities = measured_densities(config, row)
    assert densities.keys() == planned_densities(config).keys()
    assert densities[1, "expert_hidden"] == (0.75,) * 4
    assert densities[0, "dense_hidden"] == (0.75,)
    assert measured_densities(config, {}) is None


def test_a_batch_reads_no_more_of_a_shared_set_than_one_token():
    sparsity = {"default": 0.5, "selection": "shared"}
    one, many = (weight_traffic(model_config(sparsity=sparsity), batch)["experts"] for batch in (1, 64))
    for found in (one, many):
        # A quarter of gate and up, half of down.
        assert found.needed == pytest.approx(found.routed / 3)
    assert many.routed > one.routed
    assert weight_traffic(model_config(sparsity=sparsity), 64)["attention"].needed == pytest.approx(
        weight_traffic(model_config(), 64)["attention"].routed / 2
    )
