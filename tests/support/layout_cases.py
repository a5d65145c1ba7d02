"""Runs in different layouts, small, in which every part of the memory is large enough to be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import RunConfig
from tests.support.launch import end, start
from tests.support.runs import write_text

MEASURED = Path(__file__).with_name("measured_layouts.py")
STEPS = 4

_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "vocab_size": 4096,
    "moe": {"num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 256, "backend": "grouped"},
    "sparsity": {"default": 0.5, "backend": "torch"},
}
_BUCKETS = {"reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}
_MIXED: dict[str, Any] = {
    "tie_embeddings": True,
    "num_kv_heads": 2,
    "num_layers": 3,
    "moe": {
        "num_experts": 8, "expert_hidden_size": 192, "num_shared_experts": 1, "num_dense_layers": 1,
        "activation": "swiglu", "backend": "grouped",
    },
}  # fmt: skip
_LARGE_VOCABULARY = {"vocab_size": 24_000, "num_layers": 2}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "torch-fp32": ({}, {"engine": "torch"}, (1, 2)),
    "torch-bf16": ({}, {"engine": "torch", "precision": "bf16"}, (1, 2)),
    "zero0-fp32": ({}, {"deepspeed": {"zero_stage": 0}}, (2,)),
    "zero1-fp32": ({}, {"deepspeed": {"zero_stage": 1}}, (1, 2)),
    "zero1-bf16-full": ({}, {"precision": "bf16", "activation_checkpointing": "full", "micro_batch_size": 8}, (2, 4)),
    "zero2-bf16": ({}, {"precision": "bf16", "deepspeed": {"zero_stage": 2}}, (1, 2, 4)),
    "zero2-fp32-vocabulary": (_LARGE_VOCABULARY, {"deepspeed": {"zero_stage": 2}}, (2,)),
    "zero2-offload": ({}, {"precision": "bf16", "deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}}, (2,)),
    "zero2-bf16-ep2": ({}, {"precision": "bf16", "expert_parallel_size": 2, "deepspeed": {"zero_stage": 2}}, (2, 4)),
    "zero3-fp32": ({}, {"deepspeed": {"zero_stage": 3}}, (1, 2, 4)),
    "zero3-bf16-mixed": (_MIXED, {"precision": "bf16", "deepspeed": {"zero_stage": 3}}, (2, 4)),
    "zero3-bf16-ep2": ({}, {"precision": "bf16", "expert_parallel_size": 2, "deepspeed": {"zero_stage": 3}}, (4,)),
}
"""Settings of the model and of training that differ from those of the base, and the numbers of ranks, by name."""


def case_config(folder: Path, name: str, ranks: int) -> RunConfig:
    """Return the run of a case; ``folder`` has the text, the cache and the runs."""
    model, training, _ = CASES[name]
    deepspeed = _BUCKETS | training.get("deepspeed", {"zero_stage": 1})
    micro = training.get("micro_batch_size", 4)
    settings = {
        "model": _MODEL | model,
        "data": {
            "sources": [{"kind": "text", "path": str(folder / "text" / "*.txt")}],
            "sequence_length": 128,
            "validation_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "name": f"{name}-{ranks}",
            "output_dir": str(folder / "runs"),
            "steps": STEPS,
            "global_batch_size": 2 * micro * ranks,
            "micro_batch_size": micro,
            "evaluation_rows": 4,
            "device": "cpu",
        }
        | training
        | {"deepspeed": deepspeed},
        "metrics": {"interval": 2, "tensorboard": False},
    }
    return RunConfig.model_validate(settings)


def run_cases(folder: Path, names: list[str], ranks: int, *, timeout: float = 900) -> dict[str, list[dict[str, Any]]]:
    """Measure cases on ``ranks`` ranks in one start, and return what every rank measured by name."""
    write_text(folder / "text")
    plan = folder / f"plan-{ranks}.json"
    plan.write_text(json.dumps({name: case_config(folder, name, ranks).model_dump(mode="json") for name in names}))
    log = folder / f"log-{ranks}.txt"
    with log.open("w") as output:
        process = start([str(MEASURED), str(plan)], ranks=ranks, output=output)
        try:
            code = process.wait(timeout)
        finally:
            end([process])
    assert not code, f"{ranks} ranks ended with {code}:\n{log.read_text()[-4000:]}"
    return {
        name: [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(ranks)] for name in names
    }
