"""Runs that take a second: a tiny model on a tiny text, in every layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import RunConfig

STEPS = 6
"""Of every run; it is stopped after ``STOP_STEP`` of them where it shall resume."""
STOP_STEP = 4

LAYOUTS: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "zero0": {"engine": "deepspeed", "deepspeed": {"zero_stage": 0}},
    "zero1": {"engine": "deepspeed", "deepspeed": {"zero_stage": 1}},
    "zero2": {"engine": "deepspeed", "deepspeed": {"zero_stage": 2}},
    "zero3": {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}},
}
"""Engines and ZeRO stages by name: the training settings that choose them."""

OFFLOADED: dict[str, dict[str, Any]] = {
    "zero1_cpu": {"engine": "deepspeed", "deepspeed": {"zero_stage": 1, "offload_optimizer": "cpu"}},
    "zero2_cpu": {"engine": "deepspeed", "deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}},
    "zero3_cpu": {
        "engine": "deepspeed",
        "deepspeed": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    },
}
"""The same with a part of it in host memory, by DeepSpeed's offload code even where the device is the host."""

LOSS_SCALE = {"initial_power": 18, "window": 2, "hysteresis": 1}
"""In fp16: a run overflows in its first step, and again in the fifth, which its doubled scale reaches."""


def write_text(folder: Path) -> Path:
    """A file of words whose frequencies differ, enough for some hundred rows; the same on every call."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(2, 7))) for _ in range(200)]
    documents = [" ".join(words.choices(vocabulary, k=400)) for _ in range(40)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"text-{index:02d}.txt" for index in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(document)
    return folder


MIXED_MODEL: dict[str, Any] = {
    "tie_embeddings": True,
    "num_kv_heads": 1,
    "qk_norm": "all_heads",
    "attention_bias": "all",
    "moe": {
        "num_experts": 4,
        "expert_hidden_size": 24,
        "backend": "loop",
        "num_shared_experts": 1,
        "shared_expert_hidden_size": 40,
        "shared_expert_gate": True,
        "num_dense_layers": 1,
        "router": "topk_softmax",
        "activation": "swiglu",
    },
}
"""What the tiny model lacks: a tied head, grouped queries, biases, norms over all heads, a dense layer, a gated shared
expert, the loop over experts."""

LATENT_MODEL: dict[str, Any] = {
    "head_size": None,
    "qk_norm": "none",
    "latent_attention": {"key_value_rank": 14, "nope_head_size": 6, "rope_head_size": 4, "value_head_size": 7},
}
"""Latent attention in place of the tiny model's own."""

CAPACITY_MODEL: dict[str, Any] = {
    "num_layers": 4,
    **LATENT_MODEL,
    "moe": {
        "num_experts": 4,
        "expert_hidden_size": 24,
        "backend": "grouped",
        "num_dense_layers": 2,
        "moe_layer_interval": 2,
        "capacity_factor": 0.75,
    },
}
"""One layer with experts, the last of four, in which at least a quarter of the routed tokens exceeds the capacity; with
latent attention, which makes queries from the input."""

BALANCED_MODEL: dict[str, Any] = {
    "moe": {
        "num_experts": 8,
        "expert_hidden_size": 24,
        "backend": "grouped",
        "router": "sigmoid_topk_renormalized",
        "router_scaling_factor": 2.5,
        "num_expert_groups": 4,
        "groups_per_token": 2,
        "load_balance_scope": "global_batch",
        "load_balance_coefficient": 0.1,
        "bias_update_rate": 0.01,
    },
}
"""What balances over ranks and micro-batches: a loss over the global batch, and biases; with groups and sigmoids."""


def tiny_config(folder: Path, name: str, *, model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    """A run of ``STEPS`` steps in ``folder/runs/name`` that reports every step.

    It has Q-Sparse at S = 0.5 that is still growing where the run stops, accumulation, clipping that bites, a learning
    rate that moves, and norms in a parameter group of their own.

    Args:
        folder: holds ``text/``, the cache and the runs.
        name: of the run.
        model: settings of ``model`` that differ.
        training: settings of ``training`` that differ.
    """
    schedule = {"shape": "linear", "warmup_steps": 1, "ramp_steps": 4}
    settings: dict[str, Any] = {
        "model": {
            "hidden_size": 40,
            "num_layers": 2,
            "num_heads": 2,
            "head_size": 10,
            "qk_norm": True,
            "vocab_size": 257,
            "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "grouped"},
            "sparsity": {
                "default": 0.5,
                "backend": "torch",
                # It must fit into the run.
                "schedule": schedule if training.get("steps", STEPS) >= 5 else {},
            },
        }
        | (model or {}),
        "data": {
            "sources": [{"kind": "text", "path": str(folder / "text" / "*.txt")}],
            "sequence_length": 24,
            "validation_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "name": name,
            "output_dir": str(folder / "runs"),
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "gradient_clipping": 0.5,
            "evaluation_rows": 11,
            "device": "cpu",
        }
        | training,
        "metrics": {"interval": 1},
    }
    return RunConfig.model_validate(settings)
