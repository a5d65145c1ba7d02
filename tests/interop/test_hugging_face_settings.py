"""A config.json: the settings of published files are known, and absent ones have the defaults of their family."""

from __future__ import annotations

import pytest

from qsparse_moe.config.shapes import has_experts, head_size, num_kv_heads
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from tests.interop.hugging_face_models import LLAMA3, build, change_settings, save

pytest.importorskip("transformers")


def test_the_settings_of_published_files_are_all_known(tmp_path):
    """The keys of mistralai/Mixtral-8x7B-v0.1 and of Qwen/Qwen3-30B-A3B, in the older form of the rotary settings."""
    mixtral = save(build("mixtral"), tmp_path / "mixtral")
    older = {"rope_parameters": ..., "rope_theta": 777.0, "torch_dtype": "bfloat16", "dtype": ..., "head_dim": ...}
    change_settings(mixtral, **older | {"head_dim": 10})
    assert HuggingFaceWeights(mixtral).model.rope_theta == 777.0
    qwen = save(build("qwen3_moe"), tmp_path / "qwen")
    published = {"max_window_layers": 48, "rope_scaling": None, "sliding_window": 4096, "use_sliding_window": False}
    change_settings(qwen, **published | older | {"head_dim": 10, "num_experts": 5, "num_local_experts": ...})
    model = HuggingFaceWeights(qwen).model
    assert (model.rope_theta, model.qk_norm, model.head_size) == (777.0, "per_head", 10)


def test_scaled_frequencies_in_the_older_form_are_read_alike(tmp_path):
    folder = save(build("mixtral-llama3"), tmp_path / "model")
    new = HuggingFaceWeights(folder).model
    older = {name: value for name, value in LLAMA3.items() if name not in ("rope_theta", "rope_type")}
    change_settings(folder, rope_parameters=..., rope_theta=50.0, rope_scaling=older | {"type": "llama3"})
    assert HuggingFaceWeights(folder).model == new
    del older["original_max_position_embeddings"]
    change_settings(folder, rope_scaling=older | {"type": "llama3"}, max_position_embeddings=32)
    assert HuggingFaceWeights(folder).model == new


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-renormalized", "olmoe", "qwen2_moe"])
def test_absent_settings_have_the_defaults_of_transformers(tmp_path, name):
    from transformers import AutoConfig

    folder = save(build(name), tmp_path / "model")
    absent = [
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
        "attention_bias",
        "sliding_window",
    ]
    absent += ["clip_qkv", "qkv_bias", "layer_types", "max_window_layers"]
    absent += ["decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "use_sliding_window", "attention_dropout"]
    change_settings(folder, **dict.fromkeys(absent, ...))
    theirs, ours = AutoConfig.from_pretrained(folder), HuggingFaceWeights(folder).model
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.norm_epsilon, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert (theirs.hidden_act, theirs.attention_dropout) == ("silu", 0)
    assert not getattr(theirs, "sliding_window", None) and getattr(theirs, "clip_qkv", None) is None
    biases = "qkv" if getattr(theirs, "qkv_bias", False) else "all" if getattr(theirs, "attention_bias", 0) else "none"
    assert ours.attention_bias == biases == ("qkv" if name.startswith("qwen2_moe") else "none")
    renormalizes = getattr(theirs, "norm_topk_prob", True)
    assert ours.moe.router == ("softmax_topk_renormalized" if renormalizes else "softmax_topk")
    assert all(has_experts(ours, layer) for layer in range(ours.num_layers))


PUBLISHED = {
    # meta-llama/Llama-3.1-8B, HuggingFaceTB/SmolLM2-135M, huggyllama/llama-7b
    "llama": {
        "pretraining_tp": 1,
        "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        "mlp_bias": False,
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "max_sequence_length": 2048,
    },
    # mistralai/Mistral-7B-v0.3
    "mistral": {"sliding_window": None},
    # Qwen/Qwen2.5-7B
    "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    # Qwen/Qwen3-8B
    "qwen3": {"attention_bias": False, "rope_scaling": None, "sliding_window": None, "max_window_layers": 36},
    # allenai/OLMoE-1B-7B-0924
    "olmoe": {"clip_qkv": None, "rope_scaling": None, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen2_moe": {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "qkv_bias": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_of_published_files_of_other_families_are_all_known(tmp_path, name):
    folder = save(build(name), tmp_path / "model")
    older = {"rope_parameters": ..., "rope_theta": 50.0, "torch_dtype": "bfloat16", "dtype": ..., "layer_types": ...}
    change_settings(folder, **older | PUBLISHED[name])
    model = HuggingFaceWeights(folder).model
    assert (model.rope_theta, model.rope_scaling.type) == (50.0, "llama3" if name == "llama" else "none")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_absent_settings_of_dense_families_have_the_defaults_of_transformers(tmp_path, name):
    from transformers import AutoConfig

    folder = save(build(name, head_dim=128 if name == "qwen3" else 8, rope_parameters=None), tmp_path / "model")
    absent = ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"]
    absent += ["head_dim", "pretraining_tp", "use_sliding_window", "sliding_window", "layer_types", "attention_dropout"]
    change_settings(folder, **dict.fromkeys(absent, ...))
    theirs, ours = AutoConfig.from_pretrained(folder), HuggingFaceWeights(folder).model
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.norm_epsilon, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert head_size(ours) == getattr(theirs, "head_dim", 48 // 6)
    assert not any(has_experts(ours, layer) for layer in range(ours.num_layers))


def test_heads_of_keys_are_those_of_queries_in_an_olmoe_that_does_not_say_otherwise(tmp_path):
    folder = save(build("olmoe", num_key_value_heads=9), tmp_path / "model")
    change_settings(folder, num_key_value_heads=...)
    assert num_kv_heads(HuggingFaceWeights(folder).model) == 9
