"""Thresholds for a model's plan, from the activations that its sites see on data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qsparse_moe.config.schema import Site
from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import ConfigError, TrainingDiverged
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.calibrate import MAX_VALUES, RowSample, calibrated_threshold
from qsparse_moe.sparsity.plan import SparsityPlan

logger = logging.getLogger(__name__)
Place = tuple[int, Site]


@torch.no_grad()
def calibrate(
    model: Transformer, batches: Iterable[Batch], plan: SparsityPlan | None = None, *, max_values: int = MAX_VALUES
) -> SparsityPlan:
    """``plan`` with the threshold of every (layer, site, expert), so that the share S of the magnitudes lies below.

    The model runs with exact top-K at the plan's S, so that each site sees the activations that sparse sites before it
    leave. The sample is bounded and has no randomness in it. An expert to which no row was routed takes the threshold
    of all the rows that the site saw, and a log line names it. The model keeps the plan that it had.

    Args:
        model: on any device; only the rows of this process count.
        batches: evaluation batches of ``data.loader``; a few thousand tokens an expert.
        plan: the S to calibrate for; None is the model's own.
        max_values: the most magnitudes that are kept of one place.

    Raises:
        ConfigError: the plan was made for another model, or the router sees the sparse tokens, of which there is not
            one alone where thresholds differ between experts.
        TrainingDiverged: a site saw a value that is not finite.
    """
    plan = plan or model.sparsity_plan
    if model.config.moe.router_input == "sparse":
        raise ConfigError(
            "calibrate: model.moe.router_input (sparse) must be dense, because every expert gets a threshold of its "
            "own at expert_input and the router would have to see one token; set it to dense"
        )
    with _observed(model, plan, max_values) as samples:
        num_batches = 0
        for batch in batches:
            tensors = [None if part is None else part.to(model.embedding.weight.device) for part in batch]
            tokens_BS, _, positions_BS, documents_BS = tensors
            assert tokens_BS is not None
            model(tokens_BS, positions_BS=positions_BS, documents_BS=documents_BS, with_stats=False)
            num_batches += 1
    assert num_batches, "calibrate was given no batch"
    return plan.with_thresholds({place: _thresholds(place, samples[place], plan) for place in samples})


@contextmanager
def _observed(model: Transformer, plan: SparsityPlan, max_values: int) -> Iterator[dict[Place, list[RowSample]]]:
    """The samples of every place, one an expert, filled by the forwards inside; they run with exact top-K."""
    before, was_training = model.sparsity_plan, model.training
    samples = {place: [RowSample(max_values) for _ in values] for place, values in plan.values.items()}
    sites = {(block.layer, name): site for block in model.blocks() for name, site in block.sites().items()}
    try:
        for place, site in sites.items():
            site.observer = _Recorder(samples.get(place, []))
        model.set_sparsity(plan.with_thresholds({place: (0.0,) * len(v) for place, v in plan.values.items()}))
        model.eval()
        yield samples
    finally:
        for site in sites.values():
            site.observer = None
        model.set_sparsity(before)
        model.train(was_training)


class _Recorder:
    """Shows every row of a site to the sample of its expert."""

    def __init__(self, samples: list[RowSample]) -> None:
        self._samples = samples

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None) -> None:
        if expert_ids_N is None:
            self._samples[0].add(x.flatten(0, -2))
            return
        for expert, sample in enumerate(self._samples):
            sample.add(x[expert_ids_N == expert])


def _thresholds(place: Place, samples: list[RowSample], plan: SparsityPlan) -> tuple[float, ...]:
    magnitudes = [sample.magnitudes() for sample in samples]
    unseen = [expert for expert, values in enumerate(magnitudes) if not len(values)]
    if unseen:
        layer, site = place
        logger.warning("layer %d, %s: no row for experts %s; they take the threshold of all rows", layer, site, unseen)
    everything = torch.cat(magnitudes) if unseen else torch.empty(0)
    try:
        return tuple(
            calibrated_threshold(values if len(values) else everything, sparsity)
            for values, sparsity in zip(magnitudes, plan.values[place], strict=True)
        )
    except ValueError as error:
        layer, site = place
        raise TrainingDiverged(
            f"calibration: layer {layer}, {site}: {error}; calibrate a checkpoint from before the run diverged"
        ) from None
