"""Synthetic results: runs whose losses follow a known law, with noise."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from qsparse_moe.ablation.law.forms import Form
from qsparse_moe.ablation.law.observations import Observations

WIDTHS = (64, 96, 128, 192)
EXPERTS = ((4, 2), (8, 2), (16, 1))
SPARSITIES = (0.0, 0.3, 0.5, 0.7)
EVALUATIONS = 5


def observations_of(
    form: Form,
    constants: dict[str, float],
    *,
    noise: float = 0.0,
    run_noise: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
    widths=WIDTHS,
    experts=EXPERTS,
    sparsities=SPARSITIES,
    scale: float = 1.0,
    final_tokens: float = 2e7,
) -> Observations:
    """Observations of a grid of models. ``noise`` and ``run_noise`` are standard deviations of the log loss, per
    observation and per run; ``scale`` multiplies the parameters, for laws of larger models."""
    random = np.random.default_rng(seed)
    grid = [
        (configuration, *place)
        for configuration, place in enumerate(itertools.product(widths, experts, sparsities))
        for _ in range(seeds)
    ]
    rows = []
    for run, (configuration, width, (num_experts, per_token), sparsity) in enumerate(grid):
        finer = 1 + EXPERTS.index((num_experts, per_token))  # expert widths differ, so that G does
        attention, expert = 4 * 4 * width**2, 4 * 3 * width * 2 * width / finer
        active = attention + per_token * expert
        for evaluation in range(1, EVALUATIONS + 1):
            rows.append(
                {
                    "total": scale * (attention + num_experts * expert),
                    "active": scale * active,
                    "needed": scale * active * (1 - sparsity),
                    "experts": num_experts,
                    "experts_per_token": per_token,
                    "granularity": 2.0 * finer,
                    "sparsity": sparsity,
                    "tokens": final_tokens * evaluation / EVALUATIONS,
                    "loss": np.nan,
                    "backbone": 4 * width**2,
                    "run": run,
                    "configuration": configuration,
                }
            )
    whole = {"run", "configuration"}
    points = Observations(
        **{k: np.array([r[k] for r in rows], np.int64 if k in whole else np.float64) for k in rows[0]}
    )
    offsets = noise * random.standard_normal(len(points)) + run_noise * random.standard_normal(len(grid))[points.run]
    return replace(points, loss=form.loss(constants, points) * np.exp(offsets))


def rows_of(points: Observations, **changes) -> list[dict]:
    """Return the records of a results file with these observations as curves, in nats per token; tokens are bytes."""
    rows = []
    for run in np.unique(points.run):
        own = points.where(points.run == run)
        curve = [[int(t), float(v), float(v / np.log(2))] for t, v in zip(own.tokens, own.loss, strict=True)]
        width = float(np.sqrt(own.backbone[0] / 4))
        rows.append(
            {
                "version": 2,
                "grid": "synthetic",
                "id": f"run{run}",
                "variant": f"c{own.configuration[0]}",
                "seed": int(run),
                "settings": {"training.seed": int(run)},
                "finished": True,
                "error": None,
                "tokens": curve[-1][0],
                "loss": curve[-1][1],
                "bits_per_byte": curve[-1][2],
                "curve": curve,
                "total_parameters": own.total[0],
                "embedding_parameters": 2 * 257 * width,
                # 258 rows of embedding and head that a token uses; Q-Sparse does not apply to them.
                "active_parameters": own.active[0] + 258 * width,
                "kept_parameters": own.needed[0] + 258 * width,
                "hidden_size": width,
                "num_layers": 4,
                "num_experts": int(own.experts[0]),
                "experts_per_token": int(own.experts_per_token[0]),
                "expert_hidden_size": 4 * width / own.granularity[0],
                "sparsity": own.sparsity[0],
                "active_weights_by_part": {"attention": 1000.0, "experts_active": own.active[0] - 1000.0},
                "steps": 100,
                "training_flops_per_token": 1.0,
                "kept_training_flops_per_token": 1.0,
                "weight_bytes_1": 1.0,
                "weight_bytes_16": 1.0,
                "tokens_per_second": None,
                "layer_grad_norms": None,
            }
            | changes
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A results file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
