"""Exports of models whose plan uses fewer experts per token than their router chooses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.drop_in.plans import check_fits
from qsparse_moe.interop.export_source import open_source
from qsparse_moe.interop.families.expressible import with_plan_as_setting
from qsparse_moe.interop.family_export import export_family, family_of, no_family
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.model_card import _experts_text
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.interop.auto_models import config
from tests.interop.hugging_face_models import VOCABULARY, build, save

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The import of a Mixtral model with three layers and three experts per token."""
    root = tmp_path_factory.mktemp("imported")
    import_model(save(build("mixtral"), root / "theirs"), root / "ours")
    return root / "ours"


def test_one_number_in_all_layers_is_the_number_of_a_mixtral_model(imported, tmp_path):
    source = open_source(imported)
    source = replace(source, plan=source.plan.with_experts({0: 2, 1: 2, 2: 2}).with_top_p({1: 1.0}))
    assert family_of(source) == "mixtral"
    export_family(source, tmp_path / "out", "mixtral", dtype="auto")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager"
    )
    assert opened.config.num_experts_per_tok == 2
    ours = load_export(imported)[1]
    ours.set_sparsity(source.plan)
    tokens = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, found = ours(tokens).logits_BSV, opened(tokens).logits
    assert (found - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize(
    ("experts", "top_p", "named"),
    [
        ({0: 2}, {}, r"experts_per_token of the sparsity plan, by layer \(\{.*0.*2.*\}\), which must be one number"),
        ({0: 0, 1: 0, 2: 0}, {}, "experts_per_token of the sparsity plan, .* of at least 1"),
        ({0: 2, 1: 2, 2: 2}, {1: 0.5}, "top_p of the sparsity plan, .* no share"),
    ],
)
def test_other_plans_have_no_family(imported, experts, top_p, named):
    source = open_source(imported)
    source = replace(source, plan=source.plan.with_experts(experts).with_top_p(top_p))
    assert family_of(source) is None
    with pytest.raises(type(no_family(source)), match=named):
        raise no_family(source)


@pytest.mark.parametrize(
    ("router", "mode", "is_one_number"),
    [
        ("topk_softmax", "renormalized", True),
        ("topk_softmax", "kept", False),
        ("softmax_topk", "kept", True),
        ("softmax_topk", "renormalized", False),
        ("sigmoid_topk_renormalized", "router", True),
    ],
)
def test_weights_that_no_router_of_that_many_experts_has_are_no_setting(router, mode, is_one_number):
    model = config(moe={"router": router, "fewer_experts_weights": mode, "num_shared_experts": 0})
    plan = SparsityPlan.uniform(model, 0.0).with_experts({1: 2, 2: 2})
    changed, left = with_plan_as_setting(model, plan)
    assert (changed.moe.experts_per_token, left.experts_per_token) == ((2, {}) if is_one_number else (3, {1: 2, 2: 2}))
    # Its width follows from the A of the model, which was 3.
    assert (changed.moe.dense_hidden_size == 3 * 14) == is_one_number


def test_a_card_says_how_many_experts_a_token_uses():
    model = config()
    plan = SparsityPlan.uniform(model, 0.0)

    def text(plan):
        return _experts_text(SimpleNamespace(config=SimpleNamespace(model=model), plan=plan))

    assert text(plan) == "3"
    assert text(plan.with_experts({1: 2, 2: 2})) == "2 (of 3 that the router chooses)"
    assert text(plan.with_experts({1: 0})) == "0 to 3 by layer (of 3 that the router chooses)"
    assert text(plan.with_top_p({1: 0.5, 2: 0.75})) == (
        "at most 3, as many as have a share of 0.5 of the router weights or more, (of 3 that the router chooses)"
    )


def test_the_routers_of_a_model_of_transformers_keep_their_number():
    plan = SparsityPlan({(0, "expert_hidden"): (0.5,)}).with_top_p({0: 0.5})
    with pytest.raises(
        ConfigError, match=r"experts per token of the layers \[0\], .* leave experts_per_token and top_p out"
    ):
        check_fits(plan, {}, SparsityConfig())
