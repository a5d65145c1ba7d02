"""Thresholds for a finished run, calibrated on training sequences and measured on validation sequences.

B batch, S sequence, L layers that have a site.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from qsparse_moe.config.schema import RunConfig, Site
from qsparse_moe.config.shapes import model_sites
from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.data.loader import sample_train_sequences
from qsparse_moe.data.packing import Array
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.model.thresholds import Samples, sample_sites, with_calibrated_thresholds, with_thresholds
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan, check_not_dense
from qsparse_moe.sparsity.row_sample import MAX_VALUES, RowSample
from qsparse_moe.sparsity.stats import Stats, add_stats
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.distributed.turns import turns
from qsparse_moe.training.engines.protocol import run_model
from qsparse_moe.training.evaluate import Load, load_run, stored_timeout

logger = logging.getLogger(__name__)
# Calibration ranks magnitudes, even if the run itself selects by thresholds.
_RANKED = "model.sparsity.selection=topk"
_TOKENS_PER_EXPERT = 4096


@dataclass(frozen=True)
class SiteCalibration:
    """The effect of the thresholds of one site, over its layers."""

    layers: int
    """Number of layers that have the site."""
    sparsity: float
    """The requested S, mean over layers and experts."""
    zeros_topk: float
    """Fraction of zeros in front of the matrix under exact top-K, natural ones included, on held-out sequences."""
    zeros_threshold: float
    """The same fraction under the thresholds."""
    largest_gap: float
    """The largest difference between the two fractions in one layer."""
    experts_without_rows: int
    """Number of experts, over all layers, that received no token and use the threshold of all tokens."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated plan and its measured quality."""

    plan: SparsityPlan
    step: int
    """Number of the run's training steps."""
    rows: int
    """Number of training sequences used for the calibration."""
    held_out_rows: int
    """Number of validation sequences used for the measurement."""
    loss_topk: float
    """Loss on the validation sequences, in nats per token, with exact top-K at the plan's S."""
    loss_threshold: float
    """The same loss with the thresholds."""
    sites: dict[Site, SiteCalibration]
    """The effect on each site of the model, by name."""


def calibrate_run(
    run_dir: Path,
    plan: SparsityPlan | None,
    *,
    num_sequences: int | None = None,
    device: str = "auto",
    max_values: int = MAX_VALUES,
    overrides: Sequence[str] = (),
    load: Load = load_run,
    shard: bool | None = None,
) -> Calibration:
    """Calibrate ``plan`` with the newest checkpoint of a run; any number of ranks can call it together.

    All ranks return the same plan, which equals that of a single rank: the batches of a single rank are distributed
    over the ranks in turn.

    Args:
        run_dir: a run folder, or another folder that ``load`` reads.
        plan: the S to calibrate for; it must fit the run's model. None is that of the run's last step.
        num_sequences: number of training sequences; None gives about 4,000 tokens per expert.
        device: ``auto``, ``cpu``, or ``cuda``.
        max_values: the maximum number of magnitudes sampled per (layer, site, expert).
        overrides: settings of the data in place of the run's.
        load: loads the model; ``interop.trained_model.load_trained`` does so from an export, too.
        shard: whether the ranks divide the weights among them; None: as they did in training.

    Raises:
        CheckpointError, ConfigError, DataError: as ``load_run`` and ``load_data`` do.
        ConfigError: S is 0 at every site.
        TrainingDiverged: an input of a site is not finite.
    """
    with open_distributed(device, timeout=stored_timeout(run_dir)) as distributed:
        settings = [_RANKED, *overrides]
        config, model, step = load(
            run_dir, distributed.device, overrides=settings, distributed=distributed, shard=shard
        )
        plan = model.sparsity_plan if plan is None else plan
        check_not_dense(plan, run_dir)
        data, size = load_data(config.data), config.training.micro_batch_size
        model.hide_ids(meaningless_ids(config.model, data.tokenizer))
        train = sample_train_sequences(config, data, num_sequences or default_num_sequences(config))
        held_out = _held_out_tokens(config, data)
        logger.info(
            "calibrating on %d training sequences, measuring on %d validation sequences", len(train), len(held_out)
        )
        # The inputs of a site depend on the sparsity of all sites before it.
        model.set_sparsity(plan)
        local = sample_sites(model, _local_batches(data, train, size, distributed), plan, max_values=max_values)
        samples = _all_gather_samples(local, distributed)
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


def default_num_sequences(config: RunConfig) -> int:
    """Return the number of training sequences that give every expert about 4,000 tokens under an even load."""
    moe = config.model.moe
    return math.ceil(_TOKENS_PER_EXPERT * moe.num_experts / (moe.experts_per_token * config.data.sequence_length))


def _held_out_tokens(config: RunConfig, data: TokenData) -> Array:
    table, indices = data.evaluation_sequences(config.training.evaluation_rows)
    return table.tokens(indices)


def _local_batches(
    data: TokenData, tokens: Array, size: int, distributed: Distributed
) -> Iterator[tuple[int | None, Batch]]:
    """Yield this rank's batches in turn, each with the index of its first token; None where it does not count."""
    # A packed sequence has one token more than the model reads, as the last label.
    tokens_per_sequence = tokens.shape[1] - 1
    for turn in turns(math.ceil(len(tokens) / size), distributed):
        begin = turn.index * size
        first_token = None if turn.is_spare else begin * tokens_per_sequence
        yield first_token, data.batch(tokens[begin : begin + size])


def _all_gather_samples(local: Samples, distributed: Distributed) -> Samples:
    """Return the merged samples of all ranks, on every rank."""
    # Site by site, so that a rank never holds the other ranks' samples of all sites.
    return {key: reduce(_merge, distributed.all_gather(samples)) for key, samples in local.items()}


def _merge(samples: list[RowSample], more: list[RowSample]) -> list[RowSample]:
    for sample, other in zip(samples, more, strict=True):
        sample.merge(other)
    return samples


@torch.no_grad()
def _measure(model: Transformer, data: TokenData, tokens: Array, size: int, distributed: Distributed) -> Stats:
    """Return the model's sums over ``tokens``, on the CPU and over all ranks, with ``loss`` and ``labels`` added."""
    total: Stats = {}
    for first_token, batch in _local_batches(data, tokens, size, distributed):
        output = run_model(model, batch, distributed.device, with_stats=True, layer_hook=None)
        if first_token is None:
            continue
        num_labels = (batch.targets_BS != IGNORED_LABEL).sum().double()
        loss = output.losses["lm_loss"].double().cpu() * num_labels
        sums = {name: value.cpu() for name, value in output.stats.items()}
        total = add_stats(total, sums | {"loss": loss, "labels": num_labels})
    # Added in the order of ranks, so that all ranks get the same bits.
    return reduce(add_stats, distributed.all_gather(total))


def _loss(sums: Stats) -> float:
    return float(sums["loss"] / sums["labels"])


def _site(site: Site, plan: SparsityPlan, samples: Samples, by_rank: Stats, by_threshold: Stats) -> SiteCalibration:
    cells = [cell for cell in plan.values if cell[1] == site]
    topk_L, threshold_L = (_zeros(sums, site) for sums in (by_rank, by_threshold))
    return SiteCalibration(
        layers=len(cells),
        sparsity=sum(plan.sparsity(*cell) for cell in cells) / len(cells),
        zeros_topk=float(topk_L.mean()),
        zeros_threshold=float(threshold_L.mean()),
        largest_gap=float((threshold_L - topk_L).abs().max()),
        experts_without_rows=sum(not sample.num_seen for cell in cells for sample in samples[cell]),
    )


def _zeros(sums: Stats, site: Site) -> Tensor:
    """Return the fraction of zeros per layer, ``(L,)``; at expert sites over the routed tokens."""
    rows_L, nonzero_L = (sums[f"sparsity/{site}/{name}_LE"].sum(-1) for name in ("rows", "nonzero"))
    return 1 - nonzero_L / (rows_L * sums[f"sparsity/{site}/used_LED"].shape[-1])
