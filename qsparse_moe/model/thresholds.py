"""Calibration: thresholds for the plan of a model from the activations that reach its sparse sites on data.

The work can be split over processes. Each samples its own batches, and the caller merges the samples before thresholds
are derived from them (``training/calibrate.py``).

N rows, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qsparse_moe.config.schema import Site, SitesConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import ConfigError, TrainingDiverged
from qsparse_moe.model.sharded import sharing_weights
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.row_sample import MAX_VALUES, RowSample, calibrated_threshold

logger = logging.getLogger(__name__)
LayerSite = tuple[int, Site]
Samples = dict[LayerSite, list[RowSample]]
"""One sample per (layer, site), or one per expert at the sites of routed experts."""


def calibrate(
    model: Transformer, batches: Iterable[Batch], plan: SparsityPlan | None = None, *, max_values: int = MAX_VALUES
) -> SparsityPlan:
    """Return ``plan`` with calibrated thresholds: a fraction S of the magnitudes at each site lies below its threshold.

    The model runs with exact top-K at the plan's S, so that each site receives the activations that the sparse sites
    before it produce. The sample is limited in size and deterministic. An expert that received no token gets the
    threshold of all rows of its site, and a warning names it. The plan of the model itself does not change.

    Args:
        model: on any device.
        batches: a few thousand tokens per expert, of text like that on which the model was trained.
        plan: the plan to calibrate; None is the plan of the model.
        max_values: maximum number of magnitudes that are stored per threshold.

    Raises:
        ConfigError: the plan was made for another model, or the router reads sparse tokens, which requires one
            selection for all experts.
        TrainingDiverged: a site received a value that is not finite.
    """
    plan = plan or model.sparsity_plan
    return with_calibrated_thresholds(plan, sample_sites(model, _numbered(batches), plan, max_values=max_values))


@torch.no_grad()
def sample_sites(
    model: Transformer, batches: Iterable[tuple[int | None, Batch]], plan: SparsityPlan, *, max_values: int = MAX_VALUES
) -> Samples:
    """Sample the rows that reach every site while the model runs with exact top-K at the S of ``plan``.

    Args:
        model: on any device.
        batches: each with the index of its first token among the tokens of all processes; the rows of a batch without
            one are not sampled. A process without batches returns empty samples.
        plan: a plan that fits the model.
        max_values: maximum number of magnitudes that are stored per threshold.

    Returns:
        Samples of the rows of this process. Merged over the processes, they equal the samples that one process takes of
        all batches: the rows that are stored depend only on the batches and their indices.

    Raises:
        ConfigError: the router reads sparse tokens.
    """
    if model.config.moe.router_input == "sparse":
        raise ConfigError(
            "calibrate: model.moe.router_input (sparse) must be dense, because every expert gets its own threshold at "
            "expert_input, while the router reads only one version of a token; set it to dense"
        )
    with _observed(model, plan, max_values) as recorders:
        for first_token, batch in batches:
            for recorder in recorders.values():
                recorder.first_number = first_token
            device = model.embedding.weight.device
            tokens_BS, positions_BS = batch.tokens_BS.to(device), batch.positions_BS.to(device)
            model(tokens_BS, positions_BS=positions_BS, documents_BS=batch.documents_BS, with_stats=False)
    return {place: recorder.samples for place, recorder in recorders.items()}


def with_calibrated_thresholds(plan: SparsityPlan, samples: Samples) -> SparsityPlan:
    """Return ``plan`` with the thresholds derived from its S and the samples of all processes; see ``calibrate``.

    Raises:
        TrainingDiverged: a site received a value that is not finite.
    """
    return plan.with_thresholds({place: _thresholds(place, samples[place], plan) for place in samples})


def with_thresholds(model: Transformer, plan: SparsityPlan) -> Transformer:
    """Return an evaluation-mode model that shares the weights of ``model`` and selects by the thresholds of ``plan``.

    Number formats and rescale stay the same.
    """
    # Built with S = 0, because the thresholds come with the plan. The preset stays: it also sets the number formats.
    nothing = {"plan": None, "default": 0.0, "sites": SitesConfig(), "overrides": ()}
    sparsity = model.config.sparsity.model_copy(update={"selection": "threshold"} | nothing)
    other = sharing_weights(model, model.config.model_copy(update={"sparsity": sparsity}))
    other.set_sparsity(plan)
    return other


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    first_token = 0
    for batch in batches:
        yield first_token, batch
        first_token += batch.tokens_BS.numel()


@contextmanager
def _observed(model: Transformer, plan: SparsityPlan, max_values: int) -> Iterator[Recorders]:
    """Attach a recorder to every site; forward passes inside the context run with exact top-K."""
    before, was_training = model.sparsity_plan, model.training
    sites = {(block.layer, name): site for block in model.blocks() for name, site in block.sites().items()}
    try:
        model.set_sparsity(without_comparison(plan))
        model.eval()
        with record_rows(sites, max_values=max_values) as recorders:
            yield recorders
    finally:
        model.set_sparsity(before)
        model.train(was_training)


def without_comparison(plan: SparsityPlan) -> SparsityPlan:
    """Return ``plan`` with thresholds of 0, for a model whose sites ``record_rows`` lets rank instead of compare."""
    # A model that selects by threshold refuses a plan without thresholds. These are not used.
    return plan.with_thresholds({place: (0.0,) * len(values) for place, values in plan.values.items()})


@contextmanager
def record_rows(sites: Mapping[LayerSite, SparseSite], *, max_values: int = MAX_VALUES) -> Iterator[Recorders]:
    """Attach a recorder to every site for the duration of the context, in which the sites select by exact top-K."""
    recorders = {place: RowRecorder(site.num_experts, max_values) for place, site in sites.items()}
    with site_hooks({site: recorders[place] for place, site in sites.items()}, ranks=True):
        yield recorders


class RowRecorder:
    """A site hook that adds every row to the sample of its expert.

    A row is numbered by the index of its batch's first token plus its position among the rows of the same expert. An
    expert has at most as many rows as the batch has tokens, so no number occurs twice.
    """

    def __init__(self, num_experts: int, max_values: int) -> None:
        self.samples = [RowSample(max_values) for _ in range(num_experts)]
        self.first_number: int | None = 0
        """Index of the first token of the next batch; None: its rows are not added."""

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Add the rows, and return the sparse ones unchanged."""
        if self.first_number is None:
            return sparse
        if expert_ids_N is None:
            _add(self.samples[0], x.flatten(0, -2), self.first_number)
            return sparse
        for expert, sample in enumerate(self.samples):
            _add(sample, x[expert_ids_N == expert], self.first_number)
        return sparse


def _add(sample: RowSample, rows_ND: Tensor, first_number: int) -> None:
    sample.add(rows_ND, first_number + torch.arange(len(rows_ND), device=rows_ND.device))


Recorders = dict[LayerSite, RowRecorder]


def _thresholds(place: LayerSite, samples: list[RowSample], plan: SparsityPlan) -> tuple[float, ...]:
    magnitudes = [sample.magnitudes() for sample in samples]
    empty = [expert for expert, sample in enumerate(samples) if not sample.num_seen]
    assert len(empty) < len(samples), "calibration received no batch"
    if empty:
        layer, site = place
        logger.warning(
            "layer %d, %s: experts %s received no token; they get the threshold of all rows of the site",
            layer,
            site,
            empty,
        )
    # Only where an expert needs it, because it is a second copy of all samples of the site.
    everything = torch.cat(magnitudes) if empty else torch.empty(0)
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
