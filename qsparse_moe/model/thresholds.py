"""Thresholds for a model's plan, from the activations that its sites see on data.

Several processes may share the work: each samples its own batches, and the samples are merged before thresholds are
made of them. Who they are and how they meet is their owner's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qsparse_moe.config.schema import Site, SitesConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import ConfigError, TrainingDiverged
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.row_sample import MAX_VALUES, RowSample, calibrated_threshold

logger = logging.getLogger(__name__)
LayerSite = tuple[int, Site]
Samples = dict[LayerSite, list[RowSample]]
"""Of every (layer, site): one sample, or one an expert."""


def calibrate(
    model: Transformer, batches: Iterable[Batch], plan: SparsityPlan | None = None, *, max_values: int = MAX_VALUES
) -> SparsityPlan:
    """``plan`` with the threshold of every (layer, site, expert), so that the share S of the magnitudes lies below.

    The model runs with exact top-K at the plan's S, so that each site sees the activations that sparse sites before it
    leave. The sample is bounded and has no randomness in it. An expert to which no row was routed takes the threshold
    of all the rows that the site saw, and a log line names it. The model keeps the plan that it had.

    Args:
        model: on any device.
        batches: a few thousand tokens an expert, of the text that the model was trained on.
        plan: the S to calibrate for; None is the model's own.
        max_values: the most magnitudes that are kept of one place.

    Raises:
        ConfigError: the plan was made for another model, or the router sees the sparse tokens, of which there is not
            one alone where thresholds differ between experts.
        TrainingDiverged: a site saw a value that is not finite.
    """
    plan = plan or model.sparsity_plan
    return with_calibrated_thresholds(plan, sample_sites(model, _numbered(batches), plan, max_values=max_values))


@torch.no_grad()
def sample_sites(
    model: Transformer, batches: Iterable[tuple[int, Batch]], plan: SparsityPlan, *, max_values: int = MAX_VALUES
) -> Samples:
    """What every site is given while the model runs with exact top-K at the S of ``plan``.

    Args:
        model: on any device.
        batches: each with the number of its first token among all tokens that are shown, in whatever process; none is
            a process without a share of the work.
        plan: the S; fits the model.
        max_values: the most magnitudes that are kept of one place.

    Returns:
        Samples of the rows of this process. Those of several, merged place by place, are the ones that a single
        process makes of all batches: which rows are kept depends on the batches and on their numbers only.

    Raises:
        ConfigError: the router sees the sparse tokens.
    """
    if model.config.moe.router_input == "sparse":
        raise ConfigError(
            "calibrate: model.moe.router_input (sparse) must be dense, because every expert gets a threshold of its "
            "own at expert_input and the router would have to see one token; set it to dense"
        )
    with _observed(model, plan, max_values) as recorders:
        for first_token, batch in batches:
            for recorder in recorders.values():
                recorder.first_number = first_token
            tensors = [None if part is None else part.to(model.embedding.weight.device) for part in batch]
            tokens_BS, _, positions_BS, documents_BS = tensors
            assert tokens_BS is not None
            model(tokens_BS, positions_BS=positions_BS, documents_BS=documents_BS, with_stats=False)
    return {place: recorder.samples for place, recorder in recorders.items()}


def with_calibrated_thresholds(plan: SparsityPlan, samples: Samples) -> SparsityPlan:
    """``plan`` with the thresholds that its S and the samples of all processes give; see ``calibrate``.

    Raises:
        TrainingDiverged: a site saw a value that is not finite.
    """
    return plan.with_thresholds({place: _thresholds(place, samples[place], plan) for place in samples})


def with_thresholds(model: Transformer, plan: SparsityPlan) -> Transformer:
    """A model on the same weights, which are not copied, that selects by the thresholds of ``plan``; for evaluation.

    Number formats and rescale stay as they are.
    """
    # S = 0 until the plan is set; the preset stays, because number formats come from it too.
    nothing = {"plan": None, "default": 0.0, "sites": SitesConfig(), "overrides": ()}
    sparsity = model.config.sparsity.model_copy(update={"selection": "threshold"} | nothing)
    device = model.embedding.weight.device
    other = Transformer(model.config.model_copy(update={"sparsity": sparsity}), device=device)
    other.load_state_dict(model.state_dict(), assign=True)
    other.to(device)  # what is no weight
    other.set_sparsity(plan)
    return other.eval()


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    first_token = 0
    for batch in batches:
        yield first_token, batch
        first_token += batch.tokens_BS.numel()


@contextmanager
def _observed(model: Transformer, plan: SparsityPlan, max_values: int) -> Iterator[dict[LayerSite, _Recorder]]:
    """Recorders of every place, shown its rows by the forwards inside; these run with exact top-K."""
    before, was_training = model.sparsity_plan, model.training
    recorders = {place: _Recorder([RowSample(max_values) for _ in values]) for place, values in plan.values.items()}
    sites = {(block.layer, name): site for block in model.blocks() for name, site in block.sites().items()}
    try:
        model.set_sparsity(plan.with_thresholds({place: (0.0,) * len(v) for place, v in plan.values.items()}))
        model.eval()
        with site_hooks({site: recorders[place] for place, site in sites.items()}, ranks=True):
            yield recorders
    finally:
        model.set_sparsity(before)
        model.train(was_training)


class _Recorder:
    """Shows every row of a site to the sample of its expert, numbered as it comes in its batch.

    Of an expert that is the place among its own rows of the batch: fewer than the batch's tokens, so that no number
    occurs twice.
    """

    def __init__(self, samples: list[RowSample]) -> None:
        self.samples = samples
        self.first_number = 0
        """Of the batch that comes next."""

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        if expert_ids_N is None:
            self._show(self.samples[0], x.flatten(0, -2))
            return sparse
        for expert, sample in enumerate(self.samples):
            self._show(sample, x[expert_ids_N == expert])
        return sparse

    def _show(self, sample: RowSample, rows_ND: Tensor) -> None:
        sample.add(rows_ND, self.first_number + torch.arange(len(rows_ND), device=rows_ND.device))


def _thresholds(place: LayerSite, samples: list[RowSample], plan: SparsityPlan) -> tuple[float, ...]:
    magnitudes = [sample.magnitudes() for sample in samples]
    unseen = [expert for expert, sample in enumerate(samples) if not sample.num_seen]
    assert len(unseen) < len(samples), "calibration was given no batch"
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
