"""Q-Sparse is refused, with the reason and the way out, where it would have no effect or a wrong one."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.interop import drop_in
from qsparse_moe.interop.drop_in.model import current_plan, densify, set_sparsity, sites_of, sparsify
from tests.interop.drop_in_models import build, uniform_plan

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    return build("mixtral")


def refused(match, model, *arguments, **settings):
    with pytest.raises(ConfigError, match=match):
        sparsify(model, *(arguments or (0.5,)), **settings)
    assert not sites_of(model), "a refused model must stay as it was"


def test_models_that_are_no_supported_decoder():
    refused(r"Linear contains 0 decoders of transformers, and exactly one is needed", nn.Linear(2, 2))
    two = nn.ModuleList([build("llama"), build("qwen3")])
    refused(r"ModuleList contains 2 decoders", two)
    settings = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**settings, num_key_value_heads=1, intermediate_size=8, head_dim=8)
    )
    refused(r"model_type \(\"gemma\"\) is not a family .*llama, mistral, mixtral, olmoe", gemma)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_is_expert_parallel", True, r"is_expert_parallel = True, which the sparse experts do not support"),
        ("is_transposed", True, r"is_transposed = True"),
        ("has_bias", True, r"has_bias = True"),
        ("is_concatenated", False, r"is_concatenated = False"),
    ],
)
def test_experts_in_another_layout(model, name, value, message):
    setattr(model.model.layers[1].mlp.experts, name, value)
    refused(rf"layer 1, MixtralExperts has {message}", model)


def test_experts_in_another_number_format(model):
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 48, 48, dtype=torch.int8), requires_grad=False)
    refused(r"layer 0, MixtralExperts holds its matrices in a form of its own .*torch.int8", model)
    model = build("mixtral")
    model.config._experts_implementation_internal = "deepgemm_megamoe"
    refused(r"experts_implementation is \"deepgemm_megamoe\".*grouped_mm, batched_mm, or eager", model)


def test_experts_outside_of_the_interface(model):
    class Own(nn.Module):
        def forward(self, x, ids, weights):
            return x

    model.model.layers[0].mlp.experts = Own()
    refused(r"layer 0, Own does not go through transformers' experts interface", model)


def test_tensor_parallel_models(model):
    model.model._tp_size = 2
    refused(r"tp_size is 2\), and a site needs whole rows; load it without tp_plan", model)


def test_plans_and_settings_that_do_not_fit(model):
    refused(
        r"\"expert_inputs\" is not a site of this model; choose from attention_input,", model, {"expert_inputs": 0.5}
    )
    refused(r"\"shared_input\" is not a site of this model", model, 0.5, sites=["shared_input"])
    refused(r"S = \[1\.0\]; each must lie in \[0, 1\)", model, 1.0)
    refused(r"layer 0, dense_hidden has 1 values, but the model needs 0", model, uniform_plan(build("qwen3_moe")))
    refused(r"group_size \(20\) must divide", model, 0.5, selection="block", group_size=20)
    refused(r"no threshold, which selection \(threshold\) needs; make the plan with", model, 0.5, selection="threshold")
    refused(r"sparsify: gradient \(\"blend\"\) must be ste or masked", model, 0.5, gradient="blend")
    refused(r"sparsify: selection \(\"top\"\) is not valid: Input should be 'topk', 'block'", model, selection="top")
    refused(r"nothing\.json cannot be read as a sparsity plan", model, "nothing.json")
    with pytest.raises(ConfigError, match="contains no plan"):
        sparsify(model)
    model.config.qsparse_moe = {"selection": "topk"}
    with pytest.raises(ConfigError, match=r"config.json: qsparse_moe is not readable .*Remove it"):
        sparsify(model)


def test_calls_in_the_wrong_order(model):
    for call, name in ((densify, "densify"), (current_plan, "current_plan")):
        with pytest.raises(ConfigError, match=rf"{name}: MixtralForCausalLM is not sparse; call sparsify first"):
            call(model)
    with pytest.raises(ConfigError, match="set_sparsity: MixtralForCausalLM is not sparse"):
        set_sparsity(model, 0.5)
    sparsify(model, 0.5)
    with pytest.raises(ConfigError, match=r"is sparse already; change its S with set_sparsity, or call densify first"):
        sparsify(model, 0.5)
    with pytest.raises(ConfigError, match=r"layer 0, dense_hidden has 1 values, but the model needs 0"):
        set_sparsity(model, uniform_plan(build("llama")))
    assert current_plan(model).mean == 0.5


def test_without_transformers_or_its_interface(model, monkeypatch):
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "transformers.integrations.moe", None)
        # Imported by the other tests already.
        hidden.delitem(sys.modules, "qsparse_moe.interop.drop_in.experts", raising=False)
        hidden.delattr(drop_in, "experts", raising=False)
        with pytest.raises(BackendUnavailable, match=r"an experts interface, version 5 or later .*'transformers>=5'"):
            sparsify(model, 0.5)
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "transformers", None)
        with pytest.raises(BackendUnavailable, match=r"transformers, which is not installed; pip install 'qsparse-moe"):
            sparsify(model, 0.5)
    assert not sites_of(model)
