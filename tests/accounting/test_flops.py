"""Training operations, and operations by site, against sums by hand."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting.densities import Densities
from qsparse_moe.accounting.flops import flops_by_site, forward_flops, training_flops
from qsparse_moe.config.shapes import site_width
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.accounting.test_parameters import SHAPES, model_config


def test_training_takes_three_products_of_which_the_straight_through_input_gradient_stays_dense():
    dense = model_config()
    forward, training = forward_flops(dense, 16), training_flops(dense, 16)
    assert training.routed == training.needed == 3 * forward.routed
    behind_sites = forward.routed - forward.attention_scores - 2 * (2 * 4 * 32 + 264 * 32)
    for gradient, left in (("ste", (2 * 0.5 + 1) / 3), ("masked", 0.5)):
        half = model_config(sparsity={"default": 0.5, "gradient": gradient})
        trained, selected = training_flops(half, 16), forward_flops(half, 16).selection
        assert trained.routed == training.routed  # what dense kernels execute does not change
        saved = training.routed - (trained.needed - selected)
        assert saved == pytest.approx(3 * behind_sites * (1 - left))


def test_training_counts_6_per_weight_and_6_h_2c_s_per_layer():
    config = model_config(head_size=6, num_kv_heads=2)
    forward = forward_flops(config, 0).routed  # 2 per weight
    assert training_flops(config, 100).routed == 3 * forward + 2 * 6 * 4 * (6 + 6) * 100


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sites_add_up_to_the_whole(shape, sparsity):
    config = model_config(**SHAPES[shape], sparsity={"default": sparsity})
    whole, parts = forward_flops(config, 16), flops_by_site(config, 16)
    for name in ("routed", "needed", "attention_scores", "selection"):
        assert sum(getattr(part, name) for part in parts.values()) == pytest.approx(getattr(whole, name)), name
    assert {"router", "head", "attention_scores", "expert_input", "expert_hidden"} <= parts.keys()


def test_measured_densities_replace_those_of_the_plan_in_training_too():
    config = model_config(sparsity={"default": 0.5})
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden")
    densities = Densities(
        {(layer, site): (0.25,) * (4 if "expert" in site else 1) for layer in range(2) for site in sites}
    )
    forward = forward_flops(config, 16)
    behind_sites = forward.routed - forward.attention_scores - 2 * (2 * 4 * 32 + 264 * 32)
    for gradient, left in (("ste", (2 * 0.25 + 1) / 3), ("masked", 0.25)):
        config = model_config(sparsity={"default": 0.5, "gradient": gradient})
        found = training_flops(config, 16, densities=densities)
        assert found.routed - (found.needed - found.selection) == pytest.approx(3 * behind_sites * (1 - left))
        # The scores have a backward of two products more, and the masks of the forward serve the backward.
        assert (found.attention_scores, found.selection) == (3 * forward.attention_scores, forward.selection)
    assert forward.selection > 0 and forward.attention_scores == 2 * 2 * 4 * 2 * 8 * 16


def test_measured_densities_replace_those_of_the_plan():
    config = model_config(sparsity={"default": 0.5})
    densities = Densities({(layer, site): (0.25,) * (4 if "expert" in site else 1) for layer in range(2) for site in (
        "attention_input", "attention_output", "expert_input", "expert_hidden")})  # fmt: skip
    planned, measured = (flops_by_site(config, 16, densities=d)["expert_hidden"] for d in (None, densities))
    assert planned.needed - planned.selection == pytest.approx(0.5 * planned.routed)
    assert measured.needed - measured.selection == pytest.approx(0.25 * measured.routed)


def test_a_selection_costs_two_operations_per_feature_of_every_token_that_it_reads():
    """By hand: A 2 of E 4; a K that differs between the experts makes one selection per expert at their input."""
    config = model_config()
    input_width, hidden_width = (site_width(config, site) for site in ("expert_input", "expert_hidden"))
    assert config.moe.experts_per_token == 2 and config.moe.num_experts == 4
    dense = SparsityPlan.uniform(config, 0.0).values

    def selected(values):
        parts = flops_by_site(config, 16, SparsityPlan(dense | values))
        return {site: part.selection for site, part in parts.items() if part.selection}

    assert selected({}) == {}
    assert selected({(1, "expert_input"): (0.5,) * 4}) == {"expert_input": 2 * input_width}
    assert selected({(1, "expert_input"): (0.0, 0.5, 0.5, 0.5)}) == {"expert_input": 2 * 2 * input_width}
    assert selected({(1, "expert_hidden"): (0.5,) * 4}) == {"expert_hidden": 2 * 2 * hidden_width}
    assert selected({(1, "attention_input"): (0.5,)}) == {"attention_input": 2 * site_width(config, "attention_input")}


def test_a_blended_gradient_counts_as_straight_through():
    counts = {
        gradient: training_flops(model_config(sparsity={"default": 0.5, "gradient": gradient}), 16)
        for gradient in ("ste", "blend", "masked")
    }
    assert counts["blend"] == counts["ste"]
    assert counts["masked"].needed < counts["ste"].needed


def test_a_selection_that_serves_all_experts_of_a_token_is_counted_once_per_token_and_others_once_per_routed_token():
    # 2 layers of D 32, F 24, A 2; a magnitude and a comparison per feature.
    same = flops_by_site(model_config(sparsity={"default": 0.5}), 16)
    once = {"attention_input": 32, "attention_output": 32, "expert_input": 32, "expert_hidden": 2 * 24}
    assert {site: same[site].selection for site in once} == {site: 2 * 2 * width for site, width in once.items()}
    one_other = {"default": 0.5, "overrides": [{"site": "expert_input", "experts": 1, "sparsity": 0.75}]}
    assert flops_by_site(model_config(sparsity=one_other), 16)["expert_input"].selection == 2 * 2 * 2 * 32


SHARED = {"default": 0.5, "selection": "shared", "gradient": "masked"}


def test_features_that_tokens_share_leave_columns_of_gate_and_up_out_as_well():
    dense, half = model_config(), model_config(sparsity=SHARED | {"shared": {"measure_interval": 4}})
    routed = flops_by_site(dense, 16)
    attention = {name: routed[f"attention_{name}"].routed for name in ("input", "output")}
    inner, down = routed["expert_input"].routed, routed["expert_hidden"].routed
    others = forward_flops(dense, 16).routed - sum(attention.values()) - inner - down
    forward, training = forward_flops(half, 16), training_flops(half, 16)
    # Attention is masked: its zeros are shared too, but multiplied.
    assert forward.routed == others + sum(attention.values()) + inner / 4 + down / 2
    assert forward.needed == others + sum(attention.values()) / 2 + inner / 4 + down / 2
    assert training.needed == 3 * forward.needed
    # One step in four measures the energies of all hidden features.
    assert training.routed == 3 * (others + sum(attention.values()) + (3 * inner / 4 + inner / 2) / 4 + down / 2)


@pytest.mark.parametrize(
    ("changes", "inner", "down"),
    [
        ({"shared": {"sets": "step"}}, 3 / 2, 3 / 2),
        # The straight-through gradient of the input reads whole rows.
        ({"gradient": "ste"}, 1 + 1, 1 + 1),
        ({"shared": {"products": "masked"}}, 3, 3),
    ],
    ids=["step", "ste", "masked"],
)
def test_what_gathered_products_execute_depends_on_the_sets_and_on_the_gradient(changes, inner, down):
    dense, shared = model_config(), model_config(sparsity=SHARED | changes)
    sites = flops_by_site(dense, 16)
    saved = training_flops(dense, 16).routed - training_flops(shared, 16).routed
    want = (3 - inner) * sites["expert_input"].routed + (3 - down) * sites["expert_hidden"].routed
    assert saved == pytest.approx(want)
