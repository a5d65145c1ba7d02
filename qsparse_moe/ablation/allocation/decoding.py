"""The time of a decode step under a plan: measured with the native engine, and predicted from its table of products.

K selected features of D.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qsparse_moe.ablation.cells import cells_of, with_cells
from qsparse_moe.ablation.routing import with_all_ranks
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.accounting.densities import no_zeros
from qsparse_moe.accounting.parameters import model_weights
from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import EXPERT_SITES, site_width
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.inference import native
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.product_times import Shape, seconds_per_row
from qsparse_moe.inference.weights import own_format
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_selected

STEPS, ROUNDS = 64, 25
"""Tokens per measurement, and measurements, of which the fastest counts: other processes only slow a step down."""
FITTED = (0.0, 0.5, 0.9)
"""The values of S at which the times are fitted to the engine."""


@dataclass(frozen=True)
class Decoding:
    """One plan in the decode engine, on held-out text."""

    milliseconds: float
    """Per step of the batch."""
    tokens_per_second: float
    bytes_read: float
    """Per step, as the engine counts them."""


@dataclass(frozen=True)
class DecodeTimes:
    """The time of a step of one token in milliseconds, as a sum over its sites and a rest."""

    rows: Mapping[tuple[int, Site], float]
    """Milliseconds per chosen row of all matrices behind a site, for one expert."""
    selection: float
    """Milliseconds per row of which some features are selected."""
    fixed: float
    """Milliseconds of everything else, such as attention, routers, the head, and the calls of products."""

    def of_site(self, config: ModelConfig, layer: int, site: Site, sparsity: float) -> float:
        """Return the milliseconds of one row at a site, for one expert."""
        width = site_width(config, site)
        count = site_num_selected(config.sparsity, sparsity, width)
        return self.rows[layer, site] * count + (self.selection if count < width else 0.0)


def _engine_for_any_plan(model: Transformer) -> NativeDecode:
    if model.config.sparsity.selection != "shared":
        return NativeDecode(model, rows="auto")
    # At S = 0, because an engine under a shared selection stores the features of its plan only.
    before = model.sparsity_plan
    try:
        model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
        return NativeDecode(model, rows="auto")
    finally:
        model.set_sparsity(before)


class Decoder:
    """The native engine of one model, and real text that it decodes token by token."""

    def __init__(self, model: Transformer, sequences: DocumentSequences, batch: int) -> None:
        """Store the weights; BackendUnavailable if the engine cannot run the model."""
        _check(model)
        self._model, self._batch = model, batch
        tokens_RS = torch.cat([one.tokens_BS for one in sequences.batches])
        # Every sequence of the batch is another text, because equal tokens would read the same weights.
        self._tokens_BS = tokens_RS[torch.arange(batch) % len(tokens_RS), :STEPS]
        self._engine = _engine_for_any_plan(model)

    @cached_property
    def steps(self) -> int:
        """Number of tokens per measurement."""
        return self._tokens_BS.shape[1]

    def measure(self, plans: Mapping[str, SparsityPlan]) -> dict[str, Decoding]:
        """Return the time of every plan, measured in turns. The plan of the model is the same after the call."""
        engines = self.engines(plans)
        best = dict.fromkeys(engines, (float("inf"), 0.0))
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                best[name] = min(best[name], self._run(engine))
        return {name: Decoding(1e3 * seconds, self._batch / seconds, read) for name, (seconds, read) in best.items()}

    def why_not(self, plan: SparsityPlan) -> str | None:
        """Return the reason why the engine cannot run the model under ``plan``; None if it can."""
        before = self._model.sparsity_plan
        try:
            self._model.set_sparsity(plan)
            return native.why_not(self._model)
        finally:
            self._model.set_sparsity(before)

    def engines(self, plans: Mapping[str, SparsityPlan]) -> dict[str, NativeDecode]:
        """Return an engine per plan over the same weights; BackendUnavailable if it cannot run one of the plans."""
        before, found = self._model.sparsity_plan, {}
        try:
            for name, plan in plans.items():
                self._model.set_sparsity(plan)
                _check(self._model)
                found[name] = self._engine.with_plan_of(self._model)
            return found
        finally:
            self._model.set_sparsity(before)

    @torch.no_grad()
    def _run(self, engine: NativeDecode) -> tuple[float, float]:
        """Return the seconds and the bytes read per step."""
        cache = KeyValueCache.allocate(self._model.config, batch=self._batch, capacity=self.steps, dtype=torch.float32)
        read, start = 0, time.perf_counter()
        for step in range(self.steps):
            engine.decode(self._tokens_BS[:, step].contiguous(), cache)
            read += engine.bytes_read
        return (time.perf_counter() - start) / self.steps, read / self.steps

    def times(self) -> DecodeTimes:
        """Return the table of this model, fitted to the engine with S = 0, 0.5, and 0.9 everywhere."""
        dense = with_all_ranks(SparsityPlan.uniform(self._model.config, 0.0))
        plans = {str(value): with_cells(dense, dict.fromkeys(cells_of(dense), value)) for value in FITTED}
        measured = self.measure(plans)
        return fitted_times(_rows(self._model), self._model.config, [measured[name].milliseconds for name in plans])


def fitted_times(
    rows: Mapping[tuple[int, Site], float], config: ModelConfig, milliseconds: Sequence[float]
) -> DecodeTimes:
    """Return the times that explain those of the engine at S of ``FITTED``.

    The table of rows is multiplied by one number, because the matrices of the table and of the model are read from
    different caches. What S = 0 takes beyond its rows is the rest, and what S = 0.5 takes beyond both is the selection.
    """
    bare = DecodeTimes(rows, 0.0, 0.0)
    dense, half, few = (_over_sites(bare, config, value) for value in FITTED)
    scale = max(0.0, milliseconds[1] - milliseconds[2]) / (half - few)
    rest = max(0.0, milliseconds[0] - scale * dense)
    selection = max(0.0, milliseconds[1] - scale * half - rest) / _num_selections(config, rows)
    return DecodeTimes({place: scale * own for place, own in rows.items()}, selection, rest)


def _check(model: Transformer) -> None:
    reason = native.why_not(model)
    if reason is not None:
        raise BackendUnavailable(f"the time of decoding is that of the engine native, which cannot run here: {reason}")


def _rows(model: Transformer) -> dict[tuple[int, Site], float]:
    config = model.config
    shapes: dict[tuple[int, Site], list[Shape]] = {}
    for weight in model_weights(config, densities=no_zeros(config)):
        if weight.site is not None:
            rows = site_width(config, weight.site)
            ranks = config.moe.experts_per_token if weight.site in EXPERT_SITES else 1
            shapes.setdefault((weight.layer, weight.site), []).append((rows, weight.active // ranks // rows))
    seconds = seconds_per_row(own_format(model), [shape for own in shapes.values() for shape in own])
    return {place: 1e3 * sum(seconds[shape] for shape in own) for place, own in shapes.items()}


def _over_sites(times: DecodeTimes, config: ModelConfig, sparsity: float) -> float:
    return sum(
        times.of_site(config, layer, site, sparsity) * (config.moe.experts_per_token if site in EXPERT_SITES else 1)
        for layer, site in times.rows
    )


def _num_selections(config: ModelConfig, sites: Iterable[tuple[int, Site]]) -> int:
    """Return the number of rows of a token at which features are selected, with all experts in use."""
    return sum(config.moe.experts_per_token if site in EXPERT_SITES else 1 for _, site in sites)
