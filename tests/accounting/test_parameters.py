"""Counts against the built model: what it stores, and the weights that one token's gradient reaches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qsparse_moe.accounting.flops import forward_flops, training_flops
from qsparse_moe.accounting.parameters import count_by_part, count_parameters, count_with_embedding, model_weights
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan

torch.set_num_threads(1)

MOE = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 24, "activation": "swiglu", "backend": "loop"}
# Values as wide as queries and keys, because the attention pads the narrower ones, which the counts leave out.
LATENT = {"key_value_rank": 12, "nope_head_size": 6, "rope_head_size": 4, "value_head_size": 10}
SHAPES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "grouped queries": {"num_kv_heads": 2},
    "head size of its own": {"head_size": 6},
    "QK-norm": {"qk_norm": True},
    "latent attention": {"latent_attention": LATENT},
    "latent attention with a rank of queries": {"latent_attention": LATENT | {"query_rank": 9}},
    "QK-norm over all heads": {"qk_norm": "all_heads", "num_kv_heads": 2, "head_size": 6},
    "biases of queries, keys and values": {"attention_bias": "qkv", "num_kv_heads": 2, "head_size": 6},
    "all biases": {"attention_bias": "all", "num_kv_heads": 2, "head_size": 6},
    "shared experts": {"moe": MOE | {"num_shared_experts": 2}},
    "dense layers": {"moe": MOE | {"num_dense_layers": 1}},
    "dense layers of their own width": {"moe": MOE | {"num_dense_layers": 1, "dense_hidden_size": 40}},
    "shared experts of their own width": {"moe": MOE | {"num_shared_experts": 2, "shared_expert_hidden_size": 40}},
    "gated shared experts": {"moe": MOE | {"num_shared_experts": 1, "shared_expert_gate": True}},
    "every second layer": {"num_layers": 4, "moe": MOE | {"moe_layer_interval": 2}},
    "every second layer after two dense ones": {
        "num_layers": 4,
        "moe": MOE | {"moe_layer_interval": 2, "num_dense_layers": 2},
    },
    "many small experts": {"moe": MOE | {"num_experts": 32, "experts_per_token": 8, "expert_hidden_size": 8}},
    "no gate": {"moe": MOE | {"num_shared_experts": 1, "num_dense_layers": 1, "activation": "relu2"}},
    "everything": {
        "num_kv_heads": 1,
        "qk_norm": True,
        "tie_embeddings": True,
        "moe": MOE | {"num_shared_experts": 1, "num_dense_layers": 1},
    },
}


def model_config(**settings):
    small = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 264, "moe": MOE}
    return ModelConfig.model_validate(small | settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_of_the_built_model_is_counted_once(shape):
    config = model_config(**SHAPES[shape])
    built = {name: parameter.numel() for name, parameter in build_model(config).named_parameters()}
    counted = {weight.name: weight.stored for weight in model_weights(config) if weight.stored}
    assert counted == built
    assert count_parameters(config).stored == sum(built.values())


def used_by_one_token(config: ModelConfig) -> dict[str, int]:
    """By name: input features that one token's weight gradient reaches, times outputs, over all experts."""
    model = build_model(config, seed=1)
    token = torch.tensor([[7]])
    with torch.no_grad():  # sizes of gradients must not underflow in the residual branches
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    logits = model(token).logits_BSV
    (logits * torch.randn_like(logits)).sum().backward()
    used = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        inputs_first = gradient.transpose(-1, -2) if name.endswith("weight") and gradient.ndim == 2 else gradient
        used[name] = int((inputs_first != 0).any(-1).sum()) * inputs_first.shape[-1]
    return used


@pytest.mark.parametrize(
    "shape",
    ["plain", "shared experts", "gated shared experts", "dense layers", "every second layer", "grouped queries",
     "head size of its own", "latent attention"],
)  # fmt: skip
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("selection", ["topk", "block"])
def test_needed_weights_are_those_that_one_token_s_gradient_reaches(shape, sparsity, selection):
    group = {"topk": 32, "block": 8}[selection]
    # At least one feature is selected in a group of 8.
    sparsity = min(sparsity, 0.875) if selection == "block" else sparsity
    sparse = {"default": sparsity, "selection": selection, "group_size": group, "gradient": "masked"}
    config = model_config(**SHAPES[shape], sparsity=sparse)
    used = used_by_one_token(config)
    compared = [w for w in model_weights(config) if w.is_matrix and w.part not in ("router", "head")]
    assert len(compared) >= 10
    for weight in compared:
        assert weight.needed == pytest.approx(used[weight.name]), weight.name


def test_without_q_sparse_everything_active_is_needed():
    config = model_config()
    counted = count_parameters(config)
    assert counted.needed == counted.active < counted.stored
    experts = count_by_part(config)["experts"]
    assert experts.active == experts.stored * 2 // 4


def test_one_embedding_row_is_active_and_a_tied_head_is_stored_once():
    free, tied = model_config(), model_config(tie_embeddings=True)
    table = 264 * 32
    assert count_by_part(free)["embedding"].active == 32
    assert count_parameters(free).stored - count_parameters(tied).stored == table
    assert count_parameters(free).active == count_parameters(tied).active
    assert (count_by_part(tied)["head"].stored, count_by_part(tied)["head"].active) == (0, table)


def test_experts_with_different_k_count_at_equal_load():
    config = model_config(sparsity={"overrides": [{"sparsity": 0.5, "site": "expert_hidden", "experts": "0-1"}]})
    down = next(weight for weight in model_weights(config) if weight.name == "layers.0.moe.experts.w_down")
    assert (down.active, down.needed) == (2 * 24 * 32, 2 * (12 + 12 + 24 + 24) / 4 * 32)


def test_plan_replaces_that_of_the_config():
    config = model_config(sparsity={"default": 0.5})
    dense = SparsityPlan.uniform(config, 0.0)
    assert count_parameters(config, dense).needed == count_parameters(config).active


def test_parts_add_up_to_the_whole():
    config = model_config(**SHAPES["everything"], sparsity={"default": 0.5})
    whole, parts = count_parameters(config), count_by_part(config).values()
    assert whole.stored == sum(part.stored for part in parts)
    assert whole.active == sum(part.active for part in parts)
    assert whole.needed == pytest.approx(sum(part.needed for part in parts))


def test_finer_experts_have_the_same_size_and_a_larger_router():
    coarse = count_by_part(model_config(sparsity={"default": 0.5}))
    finer = {"num_experts": 16, "experts_per_token": 8, "expert_hidden_size": 6}
    fine = count_by_part(model_config(moe=MOE | finer, sparsity={"default": 0.5}))
    assert fine["experts"] == coarse["experts"]
    assert fine["router"].stored == 4 * coarse["router"].stored


@pytest.mark.parametrize("tied", [False, True])
def test_whole_embedding_is_active_once(tied):
    config = model_config(tie_embeddings=tied, sparsity={"default": 0.5})
    counted, whole = count_parameters(config), count_with_embedding(config)
    others = [part for name, part in count_by_part(config).items() if name not in ("embedding", "head")]
    tables = 264 * 32 * (1 if tied else 2)
    assert whole.stored == counted.stored
    assert whole.active == sum(part.active for part in others) + tables
    assert whole.needed == sum(part.needed for part in others) + tables


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_of_the_matrix_products_that_torch_counts(shape):
    config = model_config(**SHAPES[shape])
    # The counter knows plain products only: float64 and the mathematical attention go through them.
    model, length = build_model(config, dtype=torch.float64), 16
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.randint(0, 257, (1, length)), with_stats=False)
    assert counter.get_total_flops() == length * forward_flops(config, length).routed


@pytest.mark.parametrize("narrow", ["value_head_size", "nope_head_size"])
def test_flops_of_latent_attention_leave_out_the_zeros_that_widen_heads_to_one_size(narrow):
    config = model_config(latent_attention=LATENT | {narrow: LATENT[narrow] - 3})
    model, length = build_model(config, dtype=torch.float64), 16
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.randint(0, 257, (1, length)), with_stats=False)
    added = 2 * 2 * 4 * 3 * length
    assert counter.get_total_flops() == length * (forward_flops(config, length).routed + added)


@pytest.mark.parametrize(
    "shape", ["plain", "everything", "latent attention with a rank of queries", "gated shared experts", "dense layers"]
)
def test_training_flops_are_those_that_torch_counts_forward_and_backward(shape):
    config = model_config(**SHAPES[shape])
    model, length = build_model(config, dtype=torch.float64), 16
    tokens_BS = torch.randint(0, 257, (1, length))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logits_BSV = model(tokens_BS, with_stats=False).logits_BSV
        (logits_BSV * torch.randn_like(logits_BSV)).sum().backward()
    assert counter.get_total_flops() == length * training_flops(config, length).routed


def test_flops_fall_with_sparsity_and_include_scores_and_selection():
    dense = forward_flops(model_config(), 16)
    assert (dense.needed, dense.selection) == (dense.routed, 0)
    assert dense.attention_scores == 2 * 4 * 32 * 16
    half = forward_flops(model_config(sparsity={"default": 0.5}), 16)
    assert half.routed == dense.routed
    # Two operations a feature: three sites of width 32 once, the experts' hidden 24 for both experts; two layers.
    assert half.selection == 2 * 2 * (3 * 32 + 2 * 24)
    parts = count_by_part(model_config())
    halved = parts["attention"].active + parts["experts"].active
    assert half.needed == dense.routed - halved + half.selection


def test_selection_is_made_per_expert_where_k_differs():
    config = model_config(sparsity={"overrides": [{"sparsity": 0.5, "site": "expert_input", "experts": 0}]})
    assert forward_flops(config, 16).selection == 2 * 2 * (2 * 32)
