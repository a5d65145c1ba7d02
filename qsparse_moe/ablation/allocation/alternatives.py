"""Alternatives of the same cost without training: fewer experts per token, smaller experts, pooled selection.

T tokens, A experts per token, N routed rows, E experts, F features of an expert, K selected features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.ablation.allocation.allocate import uniform_at
from qsparse_moe.ablation.allocation.compare import DENSE, UNIFORM, PlanComparison, comparisons
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.allocation.reach import MOST_SPARSE, OutOfReach
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import dense_hidden_size, moe_layers, shared_hidden_size
from qsparse_moe.data.packing import Array
from qsparse_moe.model.block import Block
from qsparse_moe.model.sharded import gathered
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.router import Routing
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.topk import rescale_selected, topk_mask
from qsparse_moe.training.engines.protocol import run_model

logger = logging.getLogger(__name__)


def compare_alternatives(
    model: Transformer,
    sequences: DocumentSequences,
    held_out: DocumentSequences,
    plans: Mapping[str, SparsityPlan],
    costs: Costs,
    target: float,
) -> tuple[PlanComparison, ...]:
    """Compare fewer experts per token, smaller experts, and pooled selection at uniform S on the held-out sequences.

    An alternative that cannot meet the budget is left out, and a log line gives the reason. ``cost`` has the unit of
    the budget. The plan of the model is the same after the call.
    """
    before, uniform, dense = model.sparsity_plan, plans[UNIFORM], SparsityPlan.uniform(model.config, 0.0)
    found: dict[str, tuple[Array, float]] = {}
    try:
        for name, plan in ((UNIFORM, uniform), (DENSE, dense)):
            model.set_sparsity(plan)
            found[name] = loss_by_document(model, held_out), costs.of(plan)
        model.set_sparsity(uniform)
        if uniform.top_p:
            logger.info("pooled selection: the plan has top_p, so that tokens differ in their number of experts")
        else:
            with pooled_selection(model):
                found["pooled over the experts of a token"] = loss_by_document(model, held_out), costs.of(uniform)
        # A itself is the uniform plan; 0 experts would be no MoE layer.
        for num_experts in range(1, model.config.moe.experts_per_token):
            found |= _fewer_experts(model, before, num_experts, sequences, held_out, costs, target)
        # In this alternative the budget is met by smaller experts alone.
        model.set_sparsity(dense)
        found |= _smaller_experts(model, sequences, held_out, costs, target)
    finally:
        model.set_sparsity(before)
    # The differences need these two, which compare() already lists.
    return tuple(one for one in comparisons(found, held_out.labels_C) if one.name not in (UNIFORM, DENSE))


def _fewer_experts(
    model: Transformer,
    before: SparsityPlan,
    num_experts: int,
    sequences: DocumentSequences,
    held_out: DocumentSequences,
    costs: Costs,
    target: float,
) -> dict[str, tuple[Array, float]]:
    fewer = before.with_experts(dict.fromkeys(moe_layers(model.config), num_experts))
    model.set_sparsity(fewer)
    budget = _absolute(costs, target)
    # The load is measured again, because the shares of the experts of a token add up to its number of experts.
    config, load = _moe_changed(model.config, experts_per_token=num_experts), measured_load(model, sequences)
    own = replace(costs, config=config, quantity=budget[0], load=load)
    try:
        plan = uniform_at(fewer, own, budget[1])
    except OutOfReach:
        logger.info("%d experts per token: the model exceeds the budget at S = %g everywhere", num_experts, MOST_SPARSE)
        return {}
    model.set_sparsity(plan)
    name = f"{num_experts} of {model.config.moe.experts_per_token} experts per token, S = {plan.mean:.2f}"
    return {name: (loss_by_document(model, held_out), costs.shown_at(own.of(plan) - own.fixed))}


def _smaller_experts(
    model: Transformer, sequences: DocumentSequences, held_out: DocumentSequences, costs: Costs, target: float
) -> dict[str, tuple[Array, float]]:
    budget, full = _absolute(costs, target), model.config.moe.expert_hidden_size
    # Descending, so that the first that meets the budget keeps the most features.
    for remaining in range(full, 0, -1):
        own = replace(costs, config=_moe_changed(model.config, expert_hidden_size=remaining), quantity=budget[0])
        cost = own.of(SparsityPlan.uniform(own.config, 0.0))
        if cost <= budget[1]:
            with features_dropped(model, sequences, remaining):
                losses_C = loss_by_document(model, held_out)
            return {f"experts of {remaining} of {full} features, S = 0": (losses_C, costs.shown_at(cost - own.fixed))}
    logger.info("smaller experts: the dense model exceeds the budget even with one feature per expert")
    return {}


def _absolute(costs: Costs, target: float) -> tuple[Any, float]:
    """Return the budget in parameters if it is a mean S, which is no cost across models with different weights."""
    if costs.quantity != "sparsity":
        return costs.quantity, target
    counted = replace(costs, quantity="parameters")
    return "parameters", costs.total_at(target) + counted.fixed


def _moe_changed(config: ModelConfig, **changed: int) -> ModelConfig:
    # By default the sizes of dense layers and shared experts depend on what changes, and they stay.
    sizes: dict[str, int] = {}
    if len(moe_layers(config)) < config.num_layers:
        sizes["dense_hidden_size"] = dense_hidden_size(config)
    if config.moe.num_shared_experts:
        sizes["shared_expert_hidden_size"] = shared_hidden_size(config)
    return config.model_copy(update={"moe": config.moe.model_copy(update=sizes | changed)})


@contextmanager
def features_dropped(model: Transformer, sequences: DocumentSequences, remaining: int) -> Iterator[None]:
    """Reduce every expert to its ``remaining`` most important features inside the context.

    The importance of a feature is the mean of its magnitude over the rows of the expert under the current plan, times
    the L2 norm of its row of ``w_down``: its mean contribution to the output. Dropped features are set to 0 in front of
    ``w_down``, and no weight is changed.
    """
    kept: dict[Block, Tensor] = {}
    for block, mean_EF in _mean_magnitudes(model, sequences).items():
        assert block.moe is not None
        with gathered(block.moe.experts), torch.no_grad():
            kept[block] = topk_mask(mean_EF * block.moe.experts.w_down.norm(dim=-1), remaining)

    def drop(block: Block, x_NF: Tensor, expert_ids_N: Tensor | None, sparse_NF: Tensor) -> Tensor:
        assert expert_ids_N is not None
        return sparse_NF * kept[block][expert_ids_N]

    with _hidden_hooks(list(kept), drop):
        yield


@torch.no_grad()
def _mean_magnitudes(model: Transformer, sequences: DocumentSequences) -> dict[Block, Tensor]:
    """Return the mean magnitude of each hidden feature per MoE layer, ``(E, F)``; 0 for an expert without rows."""
    device, num_experts = model.embedding.weight.device, model.config.moe.num_experts
    blocks = [block for block in model.blocks() if block.moe is not None]
    width = model.config.moe.expert_hidden_size
    # The last column counts the rows.
    totals = [torch.zeros(num_experts, width + 1, device=device) for _ in blocks]
    sums: dict[Block, Tensor] = {}

    def add(block: Block, x_NF: Tensor, expert_ids_N: Tensor | None, sparse_NF: Tensor) -> Tensor:
        assert expert_ids_N is not None
        counted_NX = F.pad(x_NF.abs().to(totals[0].dtype), (0, 1), value=1.0)
        sums[block] = torch.zeros_like(totals[0]).index_add_(0, expert_ids_N, counted_NX)
        return sparse_NF

    with _hidden_hooks(blocks, add):
        for turn, batch, _ in sequences.turns():
            run_model(model, batch, device, with_stats=False, layer_hook=None)
            # Batch by batch in their order, so that the sums do not depend on the number of ranks.
            for parts in turn.gather([sums[block].cpu() for block in blocks]):
                for total, part in zip(totals, parts, strict=True):
                    total += part.to(device)
    return {
        block: total[:, :width] / total[:, width:].clamp(min=1) for block, total in zip(blocks, totals, strict=True)
    }


def _hidden_hooks(blocks: list[Block], callback: Any) -> AbstractContextManager[None]:
    """Attach ``callback`` to the hidden site of the experts of every block; its first argument is the block."""
    return site_hooks(
        {b.moe.experts.hidden_site: partial(callback, b) for b in blocks if b.moe is not None}, ranks=True
    )


@contextmanager
def pooled_selection(model: Transformer) -> Iterator[None]:
    """Pool the selection at ``expert_hidden`` over the experts of a token inside the context.

    Of the A F hidden features of a token, each times its router weight, the A K largest are selected. All experts of a
    layer must have the same S.
    """
    blocks = [block for block in model.blocks() if block.moe is not None]
    routings: dict[Block, Routing] = {}

    def remember(block: Block, _router: Any, _given: Any, routing: Routing) -> None:
        routings[block] = routing

    handles = [block.moe.router.register_forward_hook(partial(remember, block)) for block in blocks if block.moe]

    def pool(block: Block, x_NF: Tensor, expert_ids_N: Tensor | None, sparse_NF: Tensor) -> Tensor:
        assert block.moe is not None
        site = block.moe.experts.hidden_site
        # One K per token is the budget that its experts share.
        assert site.ranking.uniform_num_selected is not None, "pooled selection needs the same K for all experts"
        mask_NF = pooled_mask(x_NF, routings[block], site.ranking.uniform_num_selected)
        return rescale_selected(as_format(x_NF, site.number_format) * mask_NF, x_NF, site.settings.rescale)

    try:
        with _hidden_hooks(blocks, pool):
            yield
    finally:
        for handle in handles:
            handle.remove()


def pooled_mask(x_NF: Tensor, routing: Routing, num_selected: int) -> Tensor:
    """Return the mask of the selected features, ``(N, F)`` bool, true A K times per token.

    Args:
        x_NF: rows sorted by expert and within an expert by token; every token has A rows.
        routing: the routing of the T tokens.
        num_selected: K, the mean over the rows of a token.
    """
    per_token = routing.expert_ids_TA.shape[1]
    # The slot of a row is token * A + choice. A stable sort of the slots by expert gives the order of the rows.
    slot_N = routing.expert_ids_TA.flatten().argsort(stable=True)
    weighted_NF = x_NF * routing.weights_TA.flatten()[slot_N, None].to(x_NF.dtype)
    by_token = torch.empty_like(weighted_NF).index_copy_(0, slot_N, weighted_NF).view(-1, per_token * x_NF.shape[1])
    mask = topk_mask(by_token, per_token * num_selected)
    return mask.view(len(x_NF), -1)[slot_N]
