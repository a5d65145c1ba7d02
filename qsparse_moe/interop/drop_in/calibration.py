"""Thresholds for a model of transformers, from the activations that its sites receive on a user's tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsparse_moe.errors import ConfigError, DataError
from qsparse_moe.interop.drop_in.model import current_plan, densify, set_sparsity, site_places, sites_of, sparsify
from qsparse_moe.interop.drop_in.plans import Requested, requested_plan
from qsparse_moe.model.thresholds import record_rows, with_calibrated_thresholds, without_comparison
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.row_sample import MAX_VALUES

TokenBatch = Tensor | Mapping[str, Any]
"""Token ids ``(B, S)``, or a mapping with ``input_ids`` as a tokenizer or a data loader returns it."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    sparsity: Requested | None = None,
    *,
    sites: Collection[str] | None = None,
    max_values: int = MAX_VALUES,
) -> SparsityPlan:
    """Return a plan with thresholds, below which a fraction S of the magnitudes at each site lies.

    The model runs with exact top-K at the requested S, so that each site receives the activations that the sparse sites
    before it produce. The sample is limited in size and deterministic. An expert that received no token gets the
    threshold of all rows of its site, and a warning names it. The model is left as it was: dense, or with its own plan.
    The plan is used with ``sparsify(model, plan, selection="threshold")``.

    Args:
        model: a model of transformers, dense or sparse.
        batches: a few thousand tokens per expert, of text like that on which the model is used, without padding.
        sparsity: S as ``sparsify`` takes it; None: the plan of a sparse model.
        sites: as in ``sparsify``.
        max_values: maximum number of magnitudes that are stored per threshold.

    Raises:
        ConfigError: S is 0 everywhere, or does not fit the model.
        DataError: there is no batch, or one has padding.
        TrainingDiverged: a site received a value that is not finite.
    """
    device, first_token = next(model.parameters()).device, 0
    with _sparse(model, sparsity, sites) as plan, record_rows(sites_of(model), max_values=max_values) as recorders:
        for batch in batches:
            tokens_BS = _tokens(batch).to(device)
            for recorder in recorders.values():
                recorder.first_number = first_token
            model(input_ids=tokens_BS, use_cache=False)
            first_token += tokens_BS.numel()
    if not first_token:
        raise DataError("calibrate: there is no batch; pass batches of token ids, a few thousand tokens per expert")
    return with_calibrated_thresholds(plan, {place: recorder.samples for place, recorder in recorders.items()})


@contextmanager
def _sparse(model: nn.Module, sparsity: Requested | None, sites: Collection[str] | None) -> Iterator[SparsityPlan]:
    """Let the model run with the requested S in evaluation mode, and yield the plan."""
    was_sparse, was_training = bool(sites_of(model)), model.training
    if sparsity is None and not was_sparse:
        raise ConfigError("calibrate: the model is dense, so sparsity must be given; for example 0.5")
    before = current_plan(model) if was_sparse else sparsify(model, 0.0)
    try:
        plan = requested_plan(before if sparsity is None else sparsity, site_places(model), sites)
        if not plan.mean:
            raise ConfigError("calibrate: S is 0 at every site, so there is no threshold to find; give S above 0")
        set_sparsity(model, without_comparison(plan))
        model.eval()
        yield plan
    finally:
        model.train(was_training)
        if was_sparse:
            set_sparsity(model, before)
        else:
            densify(model)


def _tokens(batch: TokenBatch) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    mask = batch.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise DataError(
            "calibrate: attention_mask contains 0, so the batch has padding, whose activations would count; pass "
            "batches of full sequences"
        )
    return torch.as_tensor(batch["input_ids"])
