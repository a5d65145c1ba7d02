"""Bytes of activations, compared with the tensors that autograd really stores in a forward pass."""

from __future__ import annotations

import gc

import pytest
import torch

from qsparse_moe.accounting.activations import activation_memory, logits_memory
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.transformer import build_model
from tests.support.measured_layouts import live_bytes

ROWS, LENGTH = 2, 64
MODES = ["none", "attention", "feed_forward", "full"]
LATENT = {
    "key_value_rank": 40, "query_rank": 56, "nope_head_size": 24, "rope_head_size": 12, "value_head_size": 20,
}  # fmt: skip
MODELS = {
    "gated": {"moe": {"activation": "swiglu"}},
    "non-gated": {"moe": {"activation": "relu2"}},
    "dense layer": {"moe": {"num_dense_layers": 1, "dense_hidden_size": 320}},
    "shared": {"moe": {"num_shared_experts": 2}},
    "norms of every head": {"qk_norm": "per_head"},
    "norms over all heads and biases": {"qk_norm": "all_heads", "attention_bias": "all", "num_kv_heads": 2},
    "few key-value heads": {"num_kv_heads": 1, "head_size": 48},
    "latent attention": {"latent_attention": LATENT},
    "latent attention with wide values": {"latent_attention": LATENT | {"query_rank": None, "value_head_size": 48}},
    "latent attention of one size": {"latent_attention": LATENT | {"value_head_size": 36}},
}


def run(changes, sparsity=0.5):
    moe = {"num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 96, "backend": "loop"} | changes["moe"]
    model = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 128} | changes
    model |= {"moe": moe, "sparsity": {"default": sparsity}}
    training = {"micro_batch_size": ROWS, "global_batch_size": ROWS}
    return RunConfig.model_validate({"model": model, "training": training, "data": {"sequence_length": LENGTH}})


def bytes_saved(config, mode):
    """Count every storage that autograd packs and no parameter owns once."""
    model = build_model(config.model)
    model.activation_checkpointing = mode
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BS = torch.randint(0, 128, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens_BS, tokens_BS, with_stats=False)
    assert output.loss.requires_grad  # the graph, and with it every storage, lives until here
    return sum(found.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [{"moe": {}} | changes for changes in MODELS.values()], ids=MODELS)
def test_bytes_are_those_that_autograd_stores(changes, mode):
    config = run(changes)
    assert activation_memory(config, mode).saved == pytest.approx(bytes_saved(config, mode), rel=0.02)


def bytes_held(config, mode):
    """Count what a forward pass leaves alive, which includes the results that checkpointing stores by itself."""
    model = build_model(config.model)
    model.activation_checkpointing = mode
    tokens_BS = torch.randint(0, 128, (ROWS, LENGTH))
    gc.collect()
    before = live_bytes()
    # As packed tensors, so that Python has an object for everything that autograd stores.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        output = model(tokens_BS, tokens_BS, with_stats=False)
    return live_bytes() - before - output.logits_BSV.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("gated", "none"), *((name, "selective") for name in ("gated", "dense layer", "shared", "latent attention"))],
)
def test_selective_recomputation_holds_the_results_of_products(name, mode):
    config = run({"moe": {}} | MODELS[name])
    assert activation_memory(config, mode).saved == pytest.approx(bytes_held(config, mode), rel=0.04)


def test_sites_with_all_features_selected_store_as_much_as_counted():
    config = run(MODELS["gated"], sparsity=0.0)
    assert activation_memory(config).saved == pytest.approx(bytes_saved(config, "none"), rel=0.02)


def test_recomputing_moves_bytes_from_all_layers_to_one():
    config = run(MODELS["gated"])
    by_mode = {mode: activation_memory(config, mode) for mode in MODES}
    assert by_mode["none"].recomputed == 0
    assert by_mode["full"].saved < by_mode["attention"].saved < by_mode["none"].saved
    saved = by_mode["none"].saved - by_mode["full"].saved
    inputs = ROWS * LENGTH * 4 * 64
    assert 3 * (by_mode["full"].recomputed + inputs) == pytest.approx(saved)
    assert by_mode["full"].total < by_mode["none"].total


def test_half_precision_takes_half_except_for_router_and_loss():
    config = run(MODELS["gated"])
    training = config.training.model_copy(update={"precision": "bf16"})
    half = activation_memory(config.model_copy(update={"training": training}))
    fp32_values = ROWS * LENGTH * (3 * (2 * 8 + 8 * 2) + 128)
    router_inputs = ROWS * LENGTH * 3 * 64
    assert half.saved == pytest.approx(activation_memory(config).saved / 2 + 2 * fp32_values + 4 * router_inputs)


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 4.0), ("bf16", 3.5), ("fp16", 12.0)])
def test_many_logits_take_at_most_four_bytes_each_except_in_fp16(precision, peak):
    config = run({"moe": {}, "vocab_size": 400_000})
    training = config.training.model_copy(update={"precision": precision})
    found = logits_memory(config.model_copy(update={"training": training}))
    assert found.peak - found.kept == peak * ROWS * LENGTH * 400_000
    # Few logits are computed at once.
    assert logits_memory(run({"moe": {}})).peak == 12 * ROWS * LENGTH * 128
