"""Small random models of transformers at odd shapes, saved to folders as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.data.test_tokenizer import save_tokenizer

VOCABULARY = 83
NUM_WORDS = 80
"""Size of the tokenizer, which leaves rows of the embedding unused."""
SHAPES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "head_dim": 10,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
# Small lengths, so that the frequencies of a short test are scaled in all the ways there are.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 6.0, "original_max_position_embeddings": 24}
YARN |= {"beta_fast": 2.0, "beta_slow": 0.4}
QWEN = {"num_experts": 5, "moe_intermediate_size": 14, "intermediate_size": 36}
# Its norms are as wide as the model, so the heads must fill it.
OLMOE = {"num_experts": 7, "intermediate_size": 14, "hidden_size": 54, "num_attention_heads": 9}
# A padding id, which the family has by default, would have an embedding of zeros and no gradient.
OLMOE |= {"num_key_value_heads": 3, "head_dim": 6, "pad_token_id": None, "eos_token_id": None}
# Of families without experts. Llama wants heads that could fill the width, although its own may be larger.
DENSE = {"num_experts_per_tok": ..., "experts_implementation": ..., "intermediate_size": 36, "hidden_size": 48}
QWEN2 = QWEN | {"shared_expert_intermediate_size": 22}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "intermediate_size": 14}),
    "mixtral-tied": (
        "Mixtral",
        {"num_local_experts": 7, "intermediate_size": 9, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "mixtral-heads-that-fill-the-width": (
        "Mixtral",
        {"num_local_experts": 4, "intermediate_size": 14, "hidden_size": 40, "num_attention_heads": 5}
        | {"num_key_value_heads": 1, "head_dim": None, "rms_norm_eps": 1e-3},
    ),
    "mixtral-llama3": (
        "Mixtral",
        {"num_local_experts": 5, "intermediate_size": 14, "rope_parameters": LLAMA3},
    ),
    "mixtral-yarn": (
        "Mixtral",
        {"num_local_experts": 5, "intermediate_size": 14, "rope_parameters": YARN},
    ),
    "qwen3_moe-yarn": (
        "Qwen3Moe",
        QWEN | {"rope_parameters": YARN | {"beta_fast": None, "mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN),
    "qwen3_moe-linear": (
        "Qwen3Moe",
        QWEN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
    ),
    "qwen3_moe-renormalized": (
        "Qwen3Moe",
        QWEN | {"norm_topk_prob": True, "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
    ),
    "qwen3_moe-one-expert": ("Qwen3Moe", QWEN | {"num_experts_per_tok": 1}),
    "qwen3_moe-dense-first": ("Qwen3Moe", QWEN | {"mlp_only_layers": [0]}),
    "qwen3_moe-every-second": ("Qwen3Moe", QWEN | {"decoder_sparse_step": 2}),
    "qwen3_moe-only-the-last": ("Qwen3Moe", QWEN | {"mlp_only_layers": [0, 1]}),
    "qwen3_moe-biases": ("Qwen3Moe", QWEN | {"attention_bias": True}),
    "qwen3_moe-tied": ("Qwen3Moe", QWEN | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe-renormalized": (
        "Olmoe",
        OLMOE | {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": None, "rms_norm_eps": 1e-3},
    ),
    "olmoe-tied": ("Olmoe", OLMOE | {"tie_word_embeddings": True, "num_key_value_heads": 1, "num_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", QWEN2),
    "qwen2_moe-renormalized": (
        "Qwen2Moe",
        QWEN2 | {"norm_topk_prob": True, "qkv_bias": False, "hidden_size": 48, "head_dim": ...},
    ),
    "qwen2_moe-dense-first": ("Qwen2Moe", QWEN2 | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 9}),
    "qwen2_moe-every-second": ("Qwen2Moe", QWEN2 | {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "llama": ("Llama", DENSE | {"rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", DENSE | {"attention_bias": True, "num_key_value_heads": None, "head_dim": ...}),
    "llama-tied": ("Llama", DENSE | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", DENSE | {"sliding_window": None}),
    "mistral-short": ("Mistral", DENSE | {"sliding_window": 64, "max_position_embeddings": 64}),
    "qwen2": ("Qwen2", DENSE),
    "qwen3": ("Qwen3", DENSE | {"hidden_size": 44}),
    "qwen3-biases": ("Qwen3", DENSE | {"hidden_size": 44, "attention_bias": True, "tie_word_embeddings": True}),
}


def build(name, **changes):
    """The model of transformers, in fp32, with random norms and biases."""
    import transformers

    family, settings = MODELS[name]
    values = {key: value for key, value in (SHAPES | settings | changes).items() if value is not ...}
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms are ones at first, and the routers of Qwen3-MoE zeros.
            if parameter_name.endswith("norm.weight") or "gate.weight" in parameter_name:
                parameter.normal_(0.7, 0.3)
            # Biases too.
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    return model


def save(model, folder: Path, *, tokenizer=True, **options) -> Path:
    """The folder of a model, with a tokenizer of words unless there shall be none."""
    if tokenizer:
        words = ["<unk>", "</s>", *(f"word{number}" for number in range(NUM_WORDS - 2))]
        save_tokenizer(folder, vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    model.save_pretrained(folder, **options)
    return folder


def change_settings(folder, **settings):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def change_tensors(folder, change):
    """``change`` receives the tensors of ``model.safetensors`` by name and changes them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
