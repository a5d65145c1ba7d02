"""Small models of every kind that model type ``qsparse_moe`` must carry, at odd shapes."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan

VOCABULARY = 83
MOE = {
    "num_experts": 5,
    "experts_per_token": 3,
    "expert_hidden_size": 14,
    "num_shared_experts": 1,
    "shared_expert_gate": True,
    "num_dense_layers": 1,
    "backend": "loop",
}
SPARSE = {"default": 0.5, "backend": "torch"}
MODELS = {
    "sparse": {"qk_norm": "per_head", "moe": {"bias_update_rate": 0.01}},
    "tied": {"tie_embeddings": True, "num_heads": 4, "num_kv_heads": None, "moe": {"shared_expert_gate": False}},
    "int8": {"sparsity": {"quantization": {"activations": "int8"}, "rescale": "unit"}},
    "ternary": {"sparsity": {"quantization": {"weights": "ternary"}}},
    "per-expert": {"sparsity": {"overrides": [{"sparsity": 0.75, "site": "expert_hidden", "experts": [1, 3]}]}},
    "threshold": {"sparsity": {"default": None, "selection": "threshold"}},
    "relu2": {
        "moe": {"activation": "relu2", "router": "sigmoid_topk", "num_shared_experts": 2, "shared_expert_gate": False}
    },
    "latent": {
        "num_kv_heads": None,
        "head_size": None,
        "qk_norm": "none",
        "latent_attention": {
            "key_value_rank": 12,
            "query_rank": 20,
            "nope_head_size": 8,
            "rope_head_size": 6,
            "value_head_size": 10,
        },
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_length": 16},
    },
    "biased": {"attention_bias": "qkv", "qk_norm": "all_heads"},
    "fewer-experts": {
        "moe": {"fewer_experts_weights": "kept"},
        "sparsity": {
            "experts_per_token": 2,
            "routing_overrides": [{"layers": 2, "experts_per_token": 3, "top_p": 0.6}],
        },
    },
    "sparse-router": {"moe": {"router_input": "sparse", "load_balance_scope": "micro_batch"}},
}


def config(name="sparse", **changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 44,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_size": 10,
        "init_std": 0.2,
    }
    chosen = MODELS[name] | changes
    parts = {part: base | chosen.get(part, {}) for part, base in (("moe", MOE), ("sparsity", SPARSE))}
    return ModelConfig.model_validate(settings | chosen | parts)


def build(name="sparse", **changes):
    """Return the model in evaluation mode, with random norms and router biases, and thresholds where it needs them."""
    model = build_model(config(name, **changes), seed=1).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(0.6 + 0.8 * torch.rand(parameter.shape, generator=draw))
            if parameter_name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        for router in model.routers():
            if router.expert_bias is not None:
                router.expert_bias.copy_(0.2 * torch.randn(router.expert_bias.shape, generator=draw))
    if name == "threshold":
        model.set_sparsity(threshold_plan(model))
    return model


def threshold_plan(model):
    """Return a plan with an S and a threshold per place, and per expert where there are some."""
    places = SparsityPlan.from_config(model.config).values
    values = {place: tuple(0.5 for _ in old) for place, old in places.items()}
    found = {place: tuple(0.1 + 0.02 * i for i in range(len(old))) for place, old in places.items()}
    return SparsityPlan(values).with_thresholds(found)


def random_ids(rows=2, length=12, seed=5):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Return ids and mask of a batch of sequences of different lengths, padded in front with an id of its own."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, length - len(row) :] = torch.as_tensor(row)
        mask[place, length - len(row) :] = 1
    return ids, mask
