"""Rules about the router: every message is produced here, and its way out is tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import check_trainable
from qsparse_moe.errors import ConfigError
from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message

REPOSITORY = Path(__file__).parents[2]

SPARSE_INPUT = {"model.moe.router_input": "sparse"}
FORCED = {"model.moe.force_uniform_routing": True}


def groups(experts, groups, chosen, **more):
    sizes = {"num_experts": experts, "num_expert_groups": groups, "groups_per_token": chosen} | more
    return {f"model.moe.{name}": value for name, value in sizes.items()}


# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "groups that do not divide": (
        groups(8, 3, 1),
        (
            "model.moe.num_expert_groups (3)",
            "model.moe.num_experts (8)",
            "2",
            "4",
        ),
        {"model.moe.num_expert_groups": 4},
    ),
    "more groups per token than there are": (
        groups(8, 4, 5),
        (
            "model.moe.groups_per_token (5)",
            "model.moe.num_expert_groups (4)",
        ),
        {"model.moe.groups_per_token": 4},
    ),
    "groups per token without groups": (
        {"model.moe.groups_per_token": 2},
        (
            "model.moe.groups_per_token (2)",
            "model.moe.num_expert_groups (1)",
        ),
        {"model.moe.num_expert_groups": 2},
    ),
    "groups that hold too few experts": (
        groups(16, 8, 2, experts_per_token=5),
        (
            "model.moe.groups_per_token (2)",
            "4",
            "model.moe.num_experts (16)",
            "model.moe.num_expert_groups (8)",
            "model.moe.experts_per_token (5)",
            "3",
        ),
        {"model.moe.groups_per_token": 3},
    ),
    "the two best experts of groups of one": (
        groups(4, 4, 2),
        (
            "model.moe.group_score (top2_sum)",
            "2",
            "model.moe.num_expert_groups (4)",
            "1",
            "model.moe.num_experts (4)",
            "max",
        ),
        {"model.moe.group_score": "max"},
    ),
    "a score of groups without groups": (
        {"model.moe.group_score": "max"},
        (
            "model.moe.group_score (max)",
            "model.moe.num_expert_groups",
            "1",
            "remove",
        ),
        {"model.moe.num_expert_groups": 2, "model.moe.groups_per_token": 2},
    ),
    "an end of bias updates without a rate": (
        {"model.moe.bias_update_steps": 10},
        (
            "model.moe.bias_update_steps (10)",
            "model.moe.bias_update_rate",
            "0",
            "remove",
        ),
        {"model.moe.bias_update_rate": 0.001},
    ),
    "forced routing in groups": (
        FORCED | groups(8, 4, 2),
        (
            "model.moe.force_uniform_routing (true)",
            "model.moe.num_expert_groups (4)",
            "1",
            "1",
        ),
        {"model.moe.num_expert_groups": 1, "model.moe.groups_per_token": 1},
    ),
    "forced routing with biases": (
        FORCED | {"model.moe.bias_update_rate": 0.001},
        (
            "model.moe.force_uniform_routing (true)",
            "model.moe.bias_update_rate (0.001)",
            "0",
            "0",
        ),
        {"model.moe.force_uniform_routing": False},
    ),
    "a router of sparse tokens and experts that differ": (
        SPARSE_INPUT | {"model.sparsity.overrides": [{"sparsity": 0.5, "layers": 2, "experts": "0-3"}]},
        (
            "model.moe.router_input (sparse)",
            "expert_input",
            "model.sparsity.overrides",
            "2",
            "0.0",
            "0.5",
            "dense",
        ),
        {"model.sparsity.overrides": [{"sparsity": 0.5, "layers": 2, "experts": "0-7"}]},
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


def test_a_router_of_sparse_tokens_refuses_thresholds(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    settings = SPARSE_INPUT | {"model.sparsity.selection": "threshold", "model.sparsity.plan": str(plan)}
    parts = ("model.moe.router_input (sparse)", "model.sparsity.selection (threshold)", "router_input to dense")
    assert_one_message(messages(settings), parts)
    assert messages(settings | {"model.moe.router_input": "dense"}) == []


def test_a_router_of_sparse_tokens_requires_nothing_of_other_sites_and_of_dense_layers():
    hidden = {"sparsity": 0.5, "site": "expert_hidden", "experts": 0}
    assert messages(SPARSE_INPUT | {"model.sparsity.overrides": [hidden]}) == []
    undone = [{"sparsity": 0.5, "experts": 0}, {"sparsity": 0.25, "site": "expert_input"}]
    assert messages(SPARSE_INPUT | {"model.sparsity.overrides": undone}) == []


def test_a_problem_of_another_rule_is_reported_by_that_rule_alone():
    assert len(messages(SPARSE_INPUT | {"model.sparsity.overrides": [{"sparsity": 0.5, "experts": 99}]})) == 1
    assert len(messages(groups(8, 4, 1, experts_per_token=9))) == 1


def test_deepseek_v3s_router_breaks_no_rule():
    settings = groups(256, 8, 4, experts_per_token=8, router="sigmoid_topk_renormalized", router_scaling_factor=2.5)
    assert messages(settings | {"model.moe.bias_update_rate": 0.001}) == []


@pytest.mark.parametrize(
    ("router", "way_out"),
    [
        ("softmax_topk_renormalized", "softmax_topk"),
        ("topk_softmax", "softmax_topk"),
        ("sigmoid_topk_renormalized", "sigmoid_topk"),
    ],
)
def test_a_router_whose_only_weight_is_always_1_can_be_read_but_not_trained(router, way_out):
    one = {"model.moe.experts_per_token": 1, "model.moe.router": router}
    assert messages(one) == []
    with pytest.raises(ConfigError) as error:
        check_trainable(build(one))
    assert str(error.value) == (
        f"model.moe.router ({router}) gives a token's experts weights that sum to 1, so with "
        "model.moe.experts_per_token (1) the weight is always 1 and the loss gives the router no gradient: only the "
        f"balance losses move it; choose model.moe.router={way_out}, or use at least 2 experts per token"
    )
    check_trainable(build(one | {"model.moe.router": way_out}))
    check_trainable(build(one | {"model.moe.experts_per_token": 2}))
    check_trainable(build(one | {"model.moe.num_experts": 1}))  # nothing to choose
    check_trainable(build(one | {"model.moe.num_dense_layers": 4}))  # no router


def test_every_shipped_config_trains_its_router():
    files = [*(REPOSITORY / "configs").glob("*.yaml"), *(REPOSITORY / "configs" / "recipes").glob("*.yaml")]
    assert len(files) >= 9
    for file in files:
        check_trainable(load_config(file))
