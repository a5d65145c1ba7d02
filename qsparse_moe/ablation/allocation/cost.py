"""The cost of a plan per token under a given expert load: parameters, operations, or bytes, cell by cell.

E experts, A experts per token, K selected features, B tokens per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from qsparse_moe.ablation.allocation.budget import Quantity
from qsparse_moe.ablation.allocation.decoding import DecodeTimes
from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of
from qsparse_moe.ablation.routing import Choice, choices_of, with_all_ranks
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.listeners import ChoiceLoad
from qsparse_moe.ablation.sensitivity.routed_layer import routed_layers
from qsparse_moe.accounting.densities import no_zeros
from qsparse_moe.accounting.flops import forward_flops
from qsparse_moe.accounting.parameters import Weight, model_weights
from qsparse_moe.accounting.traffic import union
from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import EXPERT_SITES, site_width, vocab_size
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_selected
from qsparse_moe.training.evaluate import Forward, model_forward

Load = Mapping[int, tuple[float, ...]]
"""For every MoE layer, the share of tokens that use each expert: between 0 and 1, A in total."""
Loads = Mapping[int, Mapping[Choice, tuple[float, ...]]]
"""The same for every MoE layer and choice of ranks."""


@dataclass(frozen=True)
class Costs:
    """A cost model for one quantity under one expert load.

    ``parameters``: parameters that a token uses and whose input is selected, as in ``accounting.parameters`` but
    weighted by the expert load. ``sparsity``: the share of the elements behind sites whose input is not selected, which
    is a mean S with each matrix weighted by its use. ``flops``: operations of the forward pass at ``context`` tokens,
    including the selection of every sparse row. ``bytes``: weights read in a step of ``batch`` independent tokens.
    ``ms``: milliseconds of a step of one token in the native decode engine, predicted from its table.
    """

    config: ModelConfig
    load: Load
    quantity: Quantity
    context: int = 1
    batch: int = 1
    bytes_per_weight: float = 4.0
    loads: Loads = field(default_factory=dict)
    """The load under each choice of ranks; empty: ``load`` is that of every plan whose cost is asked for."""
    times: DecodeTimes | None = None
    """The table of the decode engine, for ``ms``."""

    def of(self, plan: SparsityPlan) -> float:
        """Return the cost of the whole model under ``plan``; for ``sparsity``, its mean S."""
        choices = choices_of(plan, self.config)
        total = sum(self.of_cell(cell, sparsity_of(plan, cell), choices.get(cell.layer)) for cell in cells_of(plan))
        if self.quantity == "sparsity":
            return 1.0 - total / self._behind_sites
        return total + self.fixed

    def total_at(self, target: float) -> float:
        """Return the sum of ``of_cell`` over all cells at which a plan exactly meets ``target``."""
        return (1.0 - target) * self._behind_sites if self.quantity == "sparsity" else target - self.fixed

    def shown_at(self, total: float) -> float:
        """Return the budget that a sum over cells meets: the inverse of ``total_at``."""
        return 1.0 - total / self._behind_sites if self.quantity == "sparsity" else total + self.fixed

    def of_cell(self, cell: Cell, sparsity: float, choice: Choice | None = None) -> float:
        """Return the cost of one cell at S: parameters (also for ``sparsity``), operations, bytes, or milliseconds.

        ``choice`` is that of the layer; None: the load that was measured.
        """
        if self.quantity == "ms":
            assert self.times is not None, "ms needs the table of the decode engine"
            return self.used(cell, choice) * self.times.of_site(self.config, cell.layer, cell.site, sparsity)
        width = site_width(self.config, cell.site)
        num_selected = site_num_selected(self.config.sparsity, sparsity, width)
        used, size = self.used(cell, choice), self._size(cell.layer, cell.site)
        if self.quantity == "bytes":
            # Tokens of a step share the rows that they read: each counts once.
            return self.bytes_per_weight * size * union(used * num_selected / width, self.batch)
        parameters = used * size * num_selected / width
        if self.quantity != "flops":
            return parameters
        # A dense row needs no selection, which takes about two operations per feature.
        return 2 * parameters + (2 * width * used if num_selected < width else 0.0)

    def used(self, cell: Cell, choice: Choice | None = None) -> float:
        """Return the share of tokens that use the cell, under a choice of ranks if their loads are known."""
        if cell.expert is None:
            return 1.0
        own = self.load[cell.layer] if choice is None or not self.loads else self.loads[cell.layer][choice]
        return own[cell.expert]

    def _size(self, layer: int, site: Site) -> int:
        return self._sizes[layer, site]

    @cached_property
    def _sizes(self) -> dict[tuple[int, Site], int]:
        """Number of elements of the matrices behind every site, for one expert."""
        found: dict[tuple[int, Site], int] = {}
        for weight in self._weights:
            if weight.site is not None:
                # model_weights counts the A experts of a token together.
                share = self.config.moe.experts_per_token if weight.site in EXPERT_SITES else 1
                key = (weight.layer, weight.site)
                found[key] = found.get(key, 0) + weight.active // share
        return found

    @cached_property
    def _weights(self) -> list[Weight]:
        # Of all A experts of the model: a choice of ranks multiplies what one expert costs by its own load.
        return list(model_weights(self.config, densities=no_zeros(self.config)))

    @cached_property
    def _behind_sites(self) -> float:
        # All ranks of a layer add up to A experts per token, whatever the load of each is.
        ranks = self.config.moe.experts_per_token
        return float(sum(size * (ranks if site in EXPERT_SITES else 1) for (_, site), size in self._sizes.items()))

    @cached_property
    def fixed(self) -> float:
        """The cost that no plan changes: embedding, norms, routers, head, and attention scores."""
        if self.times is not None:
            return self.times.fixed
        others = [weight for weight in self._weights if weight.site is None]
        if self.quantity == "bytes":
            # Each token reads its own row of the embedding; one row is in the count of active parameters already.
            embedding = self.config.hidden_size * (min(self.batch, vocab_size(self.config)) - 1)
            return self.bytes_per_weight * (sum(weight.active for weight in others) + embedding)
        if self.quantity == "flops":
            scores = forward_flops(self.config, self.context).attention_scores
            return 2 * sum(weight.active for weight in others if weight.is_matrix) + scores
        return float(sum(weight.active for weight in others))


@torch.no_grad()
def measured_load(model: Transformer, sequences: DocumentSequences, forward: Forward | None = None) -> Load:
    """Return the share of the tokens of ``sequences`` that use each expert under the plan of the model.

    ``forward`` runs the model in place of its own call. All ranks return the same bits.
    """
    forward = forward or model_forward(model)
    layers = [block.layer for block in model.blocks() if block.moe is not None]
    counts = [forward(batch).stats["router/routed_LE"].cpu() for _, batch, _ in sequences.turns() if layers]
    if not layers:
        return {}
    # Over a layer the shares add up to its mean number of experts per token.
    num_tokens = sum(batch.tokens_BS.numel() for batch in sequences.batches)
    shares_LE = torch.stack(sequences.in_order(counts)).sum(0) / num_tokens
    return {layer: tuple(shares_E) for layer, shares_E in zip(layers, shares_LE.tolist(), strict=True)}


@torch.no_grad()
def measured_loads(model: Transformer, sequences: DocumentSequences, choices: Sequence[Choice]) -> Loads:
    """Return the load of every MoE layer under each of ``choices`` there, while the other layers keep their own."""
    plan = model.sparsity_plan
    try:
        model.set_sparsity(with_all_ranks(plan))
        with routed_layers(model, choices_of(plan, model.config)) as routed:
            counters = {layer: ChoiceLoad(place, choices) for layer, place in routed.items()}
            forward = model_forward(model)
            for turn, batch, _ in sequences.turns():
                for counter in counters.values():
                    counter.counts = not turn.is_spare
                forward(batch)
        return {layer: counter.shares(sequences.distributed) for layer, counter in counters.items()}
    finally:
        model.set_sparsity(plan)
