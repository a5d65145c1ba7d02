"""Thresholds for a finished run: calibrated on training rows by all ranks together, and measured on validation rows.

B batch, S sequence, L layers that have a site.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from qsparse_moe.config.schema import RunConfig, Site
from qsparse_moe.config.shapes import model_sites
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import sample_train_rows
from qsparse_moe.data.packing import Array
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.model.thresholds import Samples, sample_sites, with_calibrated_thresholds, with_thresholds
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.row_sample import MAX_VALUES, RowSample
from qsparse_moe.sparsity.stats import Stats, add_stats
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.engines.protocol import run_model
from qsparse_moe.training.evaluate import load_run, stored_timeout

logger = logging.getLogger(__name__)
# Under this setting thresholds are found, whatever the run selects by.
_RANKED = "model.sparsity.selection=topk"
_TOKENS_PER_EXPERT = 4096


@dataclass(frozen=True)
class SiteCalibration:
    """What the thresholds of one site do, over its layers."""

    layers: int
    """That have the site."""
    sparsity: float
    """S that was asked for, mean over layers and experts."""
    zeros_topk: float
    """Share of zeros in front of the matrix under exact top-K, natural ones among them, on the held-out rows."""
    zeros_threshold: float
    """The same under the thresholds."""
    largest_gap: float
    """The largest difference between the two in one layer."""
    experts_without_rows: int
    """Experts, over all layers, that saw no row and took the threshold of all rows."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated plan and how good it is."""

    plan: SparsityPlan
    step: int
    """Steps that the run was trained."""
    rows: int
    """Training rows that it was calibrated on."""
    held_out_rows: int
    """Validation rows that it was measured on."""
    loss_topk: float
    """On those, nats a token, with exact top-K at the plan's S."""
    loss_threshold: float
    """The same with the thresholds."""
    sites: dict[Site, SiteCalibration]
    """By name, of every site that the model has."""


def calibrate_run(
    run_dir: Path,
    plan: SparsityPlan,
    *,
    num_rows: int | None = None,
    device: str = "auto",
    max_values: int = MAX_VALUES,
) -> Calibration:
    """Calibrate ``plan`` with the newest checkpoint of a run; any number of ranks may call it together.

    All of them get the same, and the plan is the one that a single rank would make: the rows are cut into the batches
    of one rank, which the ranks take in turn.

    Args:
        run_dir: a run folder.
        plan: the S to calibrate for; fits the run's model.
        num_rows: training rows; None takes some 4,000 tokens an expert.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_values: the most magnitudes that are kept of one (layer, site, expert).

    Raises:
        CheckpointError, ConfigError, DataError: as ``load_run`` and ``load_data`` do.
        TrainingDiverged: a site saw a value that is not finite.
    """
    with open_distributed(device, timeout=stored_timeout(run_dir)) as distributed:
        config, model, step = load_run(run_dir, distributed.device, overrides=[_RANKED])
        data, size = load_data(config.data), config.training.micro_batch_size
        model.hide_ids(meaningless_ids(config.model, data.tokenizer))
        train = sample_train_rows(config, data, num_rows or default_num_rows(config))
        held_out = _held_out_rows(config, data)
        logger.info("calibrating on %d training rows, measuring on %d validation rows", len(train), len(held_out))
        model.set_sparsity(plan)
        own = sample_sites(model, _share(data, train, size, distributed), plan, max_values=max_values)
        samples = _merged(own, distributed)
        calibrated = with_calibrated_thresholds(plan, samples)
        by_rank = _measure(model, data, held_out, size, distributed)
        by_threshold = _measure(with_thresholds(model, calibrated), data, held_out, size, distributed)
    return Calibration(
        plan=calibrated,
        step=step,
        rows=len(train),
        held_out_rows=len(held_out),
        loss_topk=_loss(by_rank),
        loss_threshold=_loss(by_threshold),
        sites={site: _site(site, plan, samples, by_rank, by_threshold) for site in model_sites(config.model)},
    )


def default_num_rows(config: RunConfig) -> int:
    """Training rows that give every expert some 4,000 tokens if they are spread evenly."""
    moe = config.model.moe
    return math.ceil(_TOKENS_PER_EXPERT * moe.num_experts / (moe.experts_per_token * config.data.sequence_length))


def _held_out_rows(config: RunConfig, data: TokenData) -> Array:
    table, indices = data.evaluation_rows(config.training.evaluation_rows)
    return table.tokens(indices)


def _share(data: TokenData, rows: Array, size: int, distributed: Distributed) -> Iterator[tuple[int, Batch]]:
    """This rank's batches, every R-th of those of a single rank, each with the number of its first token."""
    tokens_per_row = rows.shape[1] - 1
    for begin in range(distributed.rank * size, len(rows), distributed.world_size * size):
        yield begin * tokens_per_row, data.batch(rows[begin : begin + size])


def _merged(own: Samples, distributed: Distributed) -> Samples:
    """The samples of all ranks as one, on every rank."""
    return {place: reduce(_merge, distributed.all_gather(samples)) for place, samples in own.items()}


def _merge(samples: list[RowSample], more: list[RowSample]) -> list[RowSample]:
    for sample, other in zip(samples, more, strict=True):
        sample.merge(other)
    return samples


@torch.no_grad()
def _measure(model: Transformer, data: TokenData, rows: Array, size: int, distributed: Distributed) -> Stats:
    """The sums of the model over these rows of all ranks, with ``loss`` and ``labels`` among them; on the CPU."""
    total: Stats = {}
    for _, batch in _share(data, rows, size, distributed):
        output = run_model(model, batch, distributed.device, with_stats=True, layer_hook=None)
        num_labels = torch.tensor(batch.targets_BS.numel(), dtype=torch.float64)  # all rows of a table are full
        loss = output.losses["lm_loss"].double().cpu() * num_labels
        sums = {name: value.cpu() for name, value in output.stats.items()}
        total = add_stats(total, sums | {"loss": loss, "labels": num_labels})
    return reduce(add_stats, distributed.all_gather(total))


def _loss(sums: Stats) -> float:
    return float(sums["loss"] / sums["labels"])


def _site(site: Site, plan: SparsityPlan, samples: Samples, by_rank: Stats, by_threshold: Stats) -> SiteCalibration:
    places = [place for place in plan.values if place[1] == site]
    topk_L, threshold_L = (_zeros(sums, site) for sums in (by_rank, by_threshold))
    return SiteCalibration(
        layers=len(places),
        sparsity=sum(plan.sparsity(*place) for place in places) / len(places),
        zeros_topk=float(topk_L.mean()),
        zeros_threshold=float(threshold_L.mean()),
        largest_gap=float((threshold_L - topk_L).abs().max()),
        experts_without_rows=sum(not sample.num_seen for place in places for sample in samples[place]),
    )


def _zeros(sums: Stats, site: Site) -> Tensor:
    """Share of zeros by layer, ``(L,)``; at expert sites of the rows that experts read."""
    rows_L, nonzero_L = (sums[f"sparsity/{site}/{name}_LE"].sum(-1) for name in ("rows", "nonzero"))
    return 1 - nonzero_L / (rows_L * sums[f"sparsity/{site}/used_LED"].shape[-1])
