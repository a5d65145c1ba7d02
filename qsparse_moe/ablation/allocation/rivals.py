"""Plans that an allocation is compared with: greedy per layer, as in TEAL, and random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.ablation.allocation.allocate import shifted
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.reach import MOST_SPARSE
from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.config.schema import Site
from qsparse_moe.model.block import Block
from qsparse_moe.model.sharded import gathered
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.engines.protocol import run_model

InOrder = Callable[[Sequence[Tensor]], list[Tensor]]
"""Returns the values of all batches in order from those of this rank; see ``DocumentSequences.in_order``."""
_STEP = 0.05  # the spacing of FINE_VALUES, at which the allocation estimates its curves
RANDOM_SPREAD = 0.3
"""How far S of a random plan may be from the level that meets the budget."""


def random_plan(plan: SparsityPlan, costs: Costs, target: float, seed: int) -> SparsityPlan:
    """Return a plan whose S is drawn uniformly within 0.3 of a level that meets the budget.

    Raises:
        OutOfReach: no such plan meets the budget.
    """
    generator = np.random.default_rng(seed)
    cells = cells_of(plan)
    offsets = generator.uniform(-RANDOM_SPREAD, RANDOM_SPREAD, len(cells))
    return shifted(plan, dict(zip(cells, offsets.tolist(), strict=True)), costs, target)


@torch.no_grad()
def greedy_plan(
    model: Transformer, sequences: DocumentSequences, uniform: SparsityPlan, costs: Costs, target: float
) -> SparsityPlan:
    """Return a plan with one S per layer and site, found layer by layer as in TEAL (arXiv 2408.14690, algorithm 1).

    A layer starts dense. In each iteration, the site with the smallest squared L2 change of the layer output per cost
    saved takes one step of S, until the layer costs as much as under ``uniform``. All experts of a layer have the same
    S. The plan of the model is the same after the call.
    """
    before = model.sparsity_plan
    found: dict[tuple[int, Site], float] = {}
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
    try:
        with _inputs(model) as inputs:
            for _, batch, _ in sequences.turns():
                run_model(model, batch, model.embedding.weight.device, with_stats=False, layer_hook=None)
        for block in model.blocks():
            # Gathered once, because a layer runs for every step that is tried.
            with gathered(block):
                found |= _greedy_layer(block, inputs[block], uniform, costs, sequences.in_order)
    finally:
        model.set_sparsity(before)
    # The layers meet their budgets only to within one step; the shift makes the cost exactly comparable.
    cells = {cell: found[cell.layer, cell.site] for cell in cells_of(uniform)}
    return shifted(uniform, cells, costs, target)


def _greedy_layer(
    block: Block,
    inputs: Sequence[tuple[Any, ...]],
    uniform: SparsityPlan,
    costs: Costs,
    in_order: InOrder,
) -> dict[tuple[int, Site], float]:
    plan = with_cells(uniform, dict.fromkeys(cells_of(uniform), 0.0))
    own = [cell for cell in cells_of(uniform) if cell.layer == block.layer]
    budget = sum(costs.of_cell(cell, sparsity_of(uniform, cell)) for cell in own)
    block.set_sparsity(plan)
    # The inputs of a layer are those of the dense model, so that the layers are independent of each other.
    dense = [block(*arguments).hidden_BSD for arguments in inputs]
    levels = dict.fromkeys(plan.sites(block.layer), 0.0)

    def cost_at(site: Site, level: float) -> float:
        return sum(costs.of_cell(cell, level) for cell in own if cell.site == site)

    # The loop ends: no S of `uniform` is above MOST_SPARSE, so the levels reach its cost, up to rounding.
    while sum(cost_at(site, level) for site, level in levels.items()) > budget * (1 + 1e-9):
        prices = {}
        for site, level in levels.items():
            # 0.05 added up nineteen times is not exactly 0.95.
            if level + _STEP <= MOST_SPARSE + 1e-9:
                saved = cost_at(site, level) - cost_at(site, level + _STEP)
                tried = _with_levels(plan, own, levels | {site: level + _STEP})
                # A step that saves nothing gets a very high price instead of a division by zero.
                prices[site] = _distance(block, tried, inputs, dense, in_order) / max(saved, 1e-12)
        levels[min(prices, key=lambda site: prices[site])] += _STEP
    return {(block.layer, site): level for site, level in levels.items()}


def _with_levels(plan: SparsityPlan, own: Sequence[Cell], levels: dict[Site, float]) -> SparsityPlan:
    return with_cells(plan, {cell: levels[cell.site] for cell in own})


def _distance(
    block: Block,
    plan: SparsityPlan,
    inputs: Sequence[tuple[Any, ...]],
    dense: Sequence[Tensor],
    in_order: InOrder,
) -> float:
    """Return the squared change of the layer's output over the batches of all ranks, the same on every rank."""
    block.set_sparsity(plan)
    distances = [
        # The sum runs over all tokens, and the steps that it ranks may differ little, hence float64.
        (block(*arguments).hidden_BSD - dense_BSD).double().square().sum().cpu()
        for arguments, dense_BSD in zip(inputs, dense, strict=True)
    ]
    return float(torch.stack(in_order(distances)).sum())


@contextmanager
def _inputs(model: Transformer) -> Iterator[dict[Block, list[tuple[Any, ...]]]]:
    """Record the arguments with which every layer is called inside the context."""
    found: dict[Block, list[tuple[Any, ...]]] = {block: [] for block in model.blocks()}

    def remember(block: Any, arguments: tuple[Any, ...]) -> None:
        found[block].append(arguments)

    handles = [block.register_forward_pre_hook(remember) for block in model.blocks()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
