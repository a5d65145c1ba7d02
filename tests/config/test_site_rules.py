"""Rules about S at single sites, layers and experts: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from qsparse_moe.config.model_rules import sparse_sites
from qsparse_moe.config.selectors import select
from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message


def override(**settings):
    return {"model.sparsity.overrides": [{"sparsity": 0.5} | settings]}


# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "site of shared experts without any": (
        {"model.sparsity.sites.shared_input": 0.5},
        (
            "model.sparsity.sites.shared_input (0.5)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "site of dense layers without any": (
        {"model.sparsity.sites.dense_hidden": 0.5},
        (
            "model.sparsity.sites.dense_hidden (0.5)",
            "model.moe.num_dense_layers",
            "0",
            "model.moe.moe_layer_interval",
            "1",
            "remove",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.moe_layer_interval": 2},
    ),
    "site of experts without any": (
        {"model.sparsity.sites.expert_input": 0.5, "model.moe.num_dense_layers": 4},
        (
            "model.sparsity.sites.expert_input (0.5)",
            "dense",
            "model.moe.num_dense_layers",
            "4",
            "model.moe.moe_layer_interval",
            "1",
            "remove",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
        ),
        {"model.moe.num_dense_layers": 3},
    ),
    "override of an absent layer": (
        override(layers=4),
        (
            "model.sparsity.overrides.0.layers (4)",
            "4",
            "0-3",
        ),
        override(layers=3),
    ),
    "override of a range that leaves the model": (
        override(layers="2-99999999999"),
        (
            'model.sparsity.overrides.0.layers ("2-99999999999")',
            "99999999999",
            "0-3",
        ),
        override(layers="2-3"),
    ),
    "override of a negative layer": (
        override(layers=[-1, 2]),
        (
            "model.sparsity.overrides.0.layers ([-1, 2])",
            "-1",
            "0-3",
        ),
        override(layers=[1, 2]),
    ),
    "override of no layer": (
        override(layers=[]),
        (
            "model.sparsity.overrides.0.layers ([])",
            "0-3",
        ),
        override(layers=[0]),
    ),
    "override of an empty range": (
        override(layers="3-1"),
        (
            'model.sparsity.overrides.0.layers ("3-1")',
            "0-3",
        ),
        override(layers="1-3"),
    ),
    "override with an invalid selector": (
        override(layers="all"),
        (
            'model.sparsity.overrides.0.layers ("all")',
            "2",
            "0-3",
        ),
        override(layers="2"),
    ),
    "override of an absent expert": (
        override(experts="4-8"),
        (
            'model.sparsity.overrides.0.experts ("4-8")',
            "8",
            "0-7",
        ),
        override(experts="4-7"),
    ),
    "override of experts at a site without experts": (
        override(experts=0, site="attention_input"),
        (
            "model.sparsity.overrides.0.experts (0)",
            "model.sparsity.overrides.0.site (attention_input)",
            "remove",
            "expert_hidden",
            "expert_input",
        ),
        override(experts=0, site="expert_hidden"),
    ),
    "override of a site that the layers lack": (
        override(layers=0, site="expert_input") | {"model.moe.num_dense_layers": 1},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": 0, "site": "expert_input"})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "1",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        override(layers=1, site="expert_input"),
    ),
    "override of the layers between those with experts": (
        override(layers="0-2", site="expert_hidden") | {"model.moe.moe_layer_interval": 4},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": "0-2", "site": "expert_hidden"})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "3",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.moe_layer_interval": 2},
    ),
    "override of experts in dense layers": (
        override(layers=0, experts=[0]) | {"model.moe.num_dense_layers": 1},
        (
            'model.sparsity.overrides.0 ({"sparsity": 0.5, "layers": 0, "experts": [0]})',
            "0",
            "attention_input",
            "attention_output",
            "dense_input",
            "dense_hidden",
            "1",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        override(layers=1, experts=[0]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_repairs_the_settings(case):
    settings, _, repaired = CASES[case]
    assert messages(settings | repaired) == []


def test_zero_at_an_absent_site_is_accepted():
    assert messages({"model.sparsity.sites.shared_input": 0.0}) == []


def test_sparse_sites_follow_default_sites_and_overrides():
    config = build(
        {
            "model.sparsity.sites.expert_input": 0.0,
            "model.sparsity.default": 0.5,
            "model.sparsity.overrides": [
                {"sparsity": 0.0, "site": "attention_input"},
                {"sparsity": 0.0, "site": "attention_output", "layers": 0},
                {"sparsity": 0.3, "site": "expert_input", "experts": 1},
                # The other experts of the site keep their S.
                {"sparsity": 0.0, "site": "expert_hidden", "experts": "1-2"},
            ],
        }
    ).model
    assert sparse_sites(config) == ("attention_output", "expert_input", "expert_hidden")


@pytest.mark.parametrize(("selector", "chosen"), [([2, 0, 1], (2, 0, 1)), ([3], (3,)), ("1-3", (1, 2, 3)), (0, (0,))])
def test_a_selector_gives_its_indices_in_its_own_order(selector, chosen):
    assert select(selector, 4) == chosen


@pytest.mark.parametrize(("selector", "wrong"), [([0, 4, 1], 4), ([1, -1, 2], -1), ([4, 0], 4), ("3-4", 4), (4, 4)])
def test_an_index_outside_is_found_wherever_it_stands_in_a_list(selector, wrong):
    with pytest.raises(ValueError, match=f"^names {wrong}; the valid indices are 0-3$"):
        select(selector, 4)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ([-1, 2, 9], "names 9; the valid indices are 0-3"),
        ("-1", 'is neither an index such as 2 nor a range such as "0-3"'),
        ("1-", 'is neither an index such as 2 nor a range such as "0-3"'),
        ("", 'is neither an index such as 2 nor a range such as "0-3"'),
        ("4", "names 4; the valid indices are 0-3"),
        ("2-1", "names nothing; the valid indices are 0-3"),
        ([], "names nothing; the valid indices are 0-3"),
    ],
)
def test_what_is_wrong_with_a_selector(selector, message):
    with pytest.raises(ValueError) as caught:
        select(selector, 4)
    assert str(caught.value) == message


def test_no_selector_names_all_and_a_range_of_one_index_one():
    assert select(None, 3) == (0, 1, 2)
    assert select("2-2", 4) == select("2", 4) == (2,)
    assert select("0-3", 4) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "sites"),
    [
        ([{"sparsity": 0.5, "experts": 0}], ("expert_input", "expert_hidden")),
        ([{"sparsity": 0.5, "layers": 0}], ("attention_input", "attention_output", "expert_input", "expert_hidden")),
        ([{"sparsity": 0.5}, {"sparsity": 0.0}], ()),
        ([{"sparsity": 0.5, "site": "expert_input"}, {"sparsity": 0.0, "site": "expert_hidden"}], ("expert_input",)),
        ([{"sparsity": 0.5, "site": "expert_input"}, {"sparsity": 0.0, "experts": 0}], ("expert_input",)),
        ([{"sparsity": 0.0}, {"sparsity": 0.5, "layers": 3, "site": "attention_input"}], ("attention_input",)),
    ],
)
def test_an_override_replaces_earlier_values_only_where_it_names_everything(overrides, sites):
    assert sparse_sites(build({"model.sparsity.overrides": overrides}).model) == sites


def test_every_wrong_part_of_every_override_is_reported_under_its_index():
    overrides = [{"sparsity": 0.5}, {"sparsity": 0.5, "layers": 9, "experts": "0-8"}, {"sparsity": 0.5, "layers": "x"}]
    starts = [message.split(" (")[0] for message in messages({"model.sparsity.overrides": overrides})]
    path = "model.sparsity.overrides"
    assert starts == [f"{path}.1.layers", f"{path}.1.experts", f"{path}.2.layers"]


@pytest.mark.parametrize("site", [None, "expert_input", "expert_hidden"])
def test_experts_may_be_named_at_both_of_their_sites_and_at_both_together(site):
    assert messages(override(experts=[0, 7], site=site)) == []


@pytest.mark.parametrize(
    ("site", "dense", "why"),
    [
        ("shared_hidden", 4, "every layer is dense (model.moe.num_dense_layers is 4, model.moe.moe_layer_interval 1)"),
        ("shared_hidden", 0, "model.moe.num_shared_experts is 0"),
        ("dense_input", 0, "model.moe.num_dense_layers is 0 and model.moe.moe_layer_interval 1"),
    ],
)
def test_the_reason_why_a_site_is_absent(site, dense, why):
    settings = {f"model.sparsity.sites.{site}": 0.5, "model.moe.num_dense_layers": dense}
    (message,) = messages(settings)
    assert message.startswith(f"model.sparsity.sites.{site} (0.5) selects nothing: {why}; remove it, or choose from ")
