"""Reports as training makes them, for the tests of the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, moe_layers, site_width
from qsparse_moe.runs.report import RunContext, StepReport
from qsparse_moe.sparsity.log_counts import MAGNITUDES, PROBABILITIES
from qsparse_moe.sparsity.stats import SITE_FIELDS


def make_report(step: int = 10, **changes: Any) -> StepReport:
    """Return a report in which all numbers differ."""
    values: dict[str, Any] = {
        "step": step,
        "tokens": step * 512,
        "seconds": step * 0.5,
        "losses": {"loss": 3.1 - step / 1000, "lm_loss": 3.0, "load_balance_loss": 1.2, "router_z_loss": 0.7},
        "stats": {},
        "router_bias_LE": None,
        "grad_norm": 0.9,
        "layer_grad_norms": None,
        "learning_rate": 1e-3,
        "sparsity": 0.5,
        "step_seconds": 0.25,
        "tokens_per_second": 2048.0,
        "memory": {"resident": 1e9, "peak_resident": 2e9},
        "validation": None,
        "phase_seconds": {"data": 0.01, "forward": 0.08, "backward": 0.12, "update": 0.03, "communication": 0.02},
    }
    return StepReport(**(values | changes))


def make_context(run_dir: Path, config: RunConfig, *, start_step: int = 0) -> RunContext:
    """Return the run that the reports belong to."""
    return RunContext(
        run_dir=run_dir,
        config=config,
        start_step=start_step,
        start_tokens=start_step * 512,
        start_seconds=start_step * 0.5,
        world_size=1,
        tokens_per_step=512,
        num_parameters=1000,
        engine="torch",
        device="cpu",
        device_name="",
        backend="loop",
    )


def random_stats(model: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Return random sums under every key that the layers of the model have."""
    generator = torch.Generator().manual_seed(seed)

    def counts(*shape: int) -> Tensor:
        return torch.randint(1, 100, shape, generator=generator).double()

    num_moe = len(moe_layers(model))
    stats = {
        "router/routed_LE": counts(num_moe, model.moe.num_experts),
        "router/probability_LE": counts(num_moe, model.moe.num_experts),
        "router/tokens_L": counts(num_moe),
        "router/choice_entropy_L": counts(num_moe),
        "router/first_weight_L": counts(num_moe),
        "router/probability_counts_LH": counts(num_moe, PROBABILITIES.number),
    }
    if model.moe.capacity_factor is not None:
        stats["router/dropped_LE"] = counts(num_moe, model.moe.num_experts)
    sites = [site for layer in range(model.num_layers) for site in layer_sites(model, layer)]
    for site in sorted(set(sites)):
        layers, experts = sites.count(site), model.moe.num_experts if site in EXPERT_SITES else 1
        for field in SITE_FIELDS:
            stats[f"sparsity/{site}/{field}_LE"] = counts(layers, experts)
        stats[f"sparsity/{site}/smallest_counts_LH"] = counts(layers, MAGNITUDES.number)
        stats[f"sparsity/{site}/used_LED"] = counts(layers, experts, site_width(model, site)) > 5
    return stats
