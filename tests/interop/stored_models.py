"""Checkpoints of Qwen3-MoE of any size, written without transformers."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

VOCABULARY = 300


def save_qwen3_moe(folder, *, num_layers, num_experts, hidden, width=1024, dtype=torch.bfloat16):
    """Return the bytes of all tensors, and those of the experts' matrices of one kind in one layer."""
    heads, channels, vocabulary = 4, 16, VOCABULARY
    settings = {
        "model_type": "qwen3_moe",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": channels,
        "hidden_act": "silu",
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    tensors = {name: random(vocabulary, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = random(width)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = random(width)
        for name, number in (("q", heads), ("k", 2), ("v", 2)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = random(number * channels, width)
        tensors[f"{prefix}self_attn.o_proj.weight"] = random(width, heads * channels)
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}self_attn.{name}.weight"] = random(channels)
        tensors[f"{prefix}mlp.gate.weight"] = random(num_experts, width)
        for expert in range(num_experts):
            for name in ("gate", "up", "down"):
                shape = (width, hidden) if name == "down" else (hidden, width)
                tensors[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = random(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values()), num_experts * hidden * width * dtype.itemsize
