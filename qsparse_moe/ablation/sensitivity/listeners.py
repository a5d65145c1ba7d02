"""Listeners of a backward pass: one per sparse site, and one per MoE layer for its choice of ranks.

N routed rows, T tokens, D width, E experts, A ranks of choice, O choices, X values of S, P pieces of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from qsparse_moe.ablation.routing import Choice, used_ranks
from qsparse_moe.ablation.sensitivity.routed_layer import RoutedLayer
from qsparse_moe.ablation.sensitivity.row_changes import row_changes, row_order
from qsparse_moe.ablation.sensitivity.sums import PieceSums
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import site_num_selected
from qsparse_moe.training.distributed.ranks import Distributed


class SiteListener:
    """A hook at one site that sums g.d of its cells, at the sites of the routed experts for each choice of ranks.

    The change ``expert * O + choice`` has the row weights of that choice, so the sums of a cell hold for a plan with
    another choice than the current one as well.
    """

    def __init__(
        self,
        site: SparseSite,
        values: Sequence[float],
        choices: Sequence[Choice],
        routed: RoutedLayer | None,
        num_documents: int,
        *,
        keep: bool,
    ) -> None:
        self._site, self._choices, self._routed = site, choices, routed
        # K and not S enters the estimate: several S may round to one K.
        self._counts = [site_num_selected(site.settings, value, site.num_features) for value in values]
        num_changes = 1 if routed is None else site.num_experts * len(choices)
        self.sums = PieceSums(num_changes, len(values), num_documents, keep=keep)

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Listen to the gradient of the sparse rows."""
        # The pieces are read during the backward pass, because one forward pass serves several of them.
        sparse.register_hook(partial(self._add, _Rows(self._site, x, sparse, expert_ids_N)))
        return sparse

    def _add(self, rows: _Rows, grad: Tensor) -> None:
        change_NX = row_changes(
            self._site, rows.x_ND, rows.sparse_ND, grad.flatten(0, -2), self._counts, rows.order_NGF
        )
        expert_ids_N = rows.expert_ids_N
        piece_T = self.sums.pieces.of_token_T
        if self._routed is None:
            self.sums.add(torch.zeros_like(piece_T), piece_T, change_NX)
            return
        routed = self._routed.routed
        assert expert_ids_N is not None and routed is not None
        piece_N, num_choices = piece_T[routed.token_N.long()], len(self._choices)
        # The gradient has weight 1 for every rank (RoutedLayer).
        weights_NO = torch.stack(
            [self._routed.weights_of(choice).flatten()[routed.slot_N] for choice in self._choices], -1
        )
        change_NO = expert_ids_N.long()[:, None] * num_choices + torch.arange(num_choices, device=change_NX.device)
        terms_NOX = weights_NO[..., None] * change_NX[:, None]
        self.sums.add(change_NO.flatten(), piece_N[:, None].expand_as(change_NO).flatten(), terms_NOX.flatten(0, 1))


class _Rows:
    """The rows of a site in one forward pass, sorted once for all backward passes."""

    def __init__(self, site: SparseSite, x: Tensor, sparse: Tensor, expert_ids_N: Tensor | None) -> None:
        self._site, self.expert_ids_N = site, expert_ids_N
        self.x_ND, self.sparse_ND = x.detach().flatten(0, -2), sparse.detach().flatten(0, -2)

    @cached_property
    def order_NGF(self) -> Tensor:
        """The order of the features; the sort is the most expensive part of a pass."""
        return row_order(self._site, self.x_ND)


class ChoiceLoad:
    """Counts, in every forward pass of one MoE layer, the tokens that use each expert under each choice of ranks."""

    def __init__(self, layer: RoutedLayer, choices: Sequence[Choice]) -> None:
        self._layer, self._choices = layer, choices
        self._tokens_OE = torch.zeros(len(choices), layer.num_experts, dtype=torch.float64)
        self._num_tokens = 0
        self.counts = True
        """Whether the next forward pass is counted: not the recomputation of a layer, and not a spare batch."""
        layer.on_output = self._count

    def shares(self, distributed: Distributed) -> dict[Choice, tuple[float, ...]]:
        """Return the share of the tokens of all ranks so far that use each expert, per choice."""
        counted = distributed.all_gather((self._tokens_OE, self._num_tokens))
        tokens_OE = torch.stack([tokens_OE for tokens_OE, _ in counted]).sum(0)
        shares_OE = tokens_OE / max(sum(num_tokens for _, num_tokens in counted), 1)
        return {choice: tuple(shares_E) for choice, shares_E in zip(self._choices, shares_OE.tolist(), strict=True)}

    def _count(self) -> None:
        if not self.counts:
            return
        routed, weights_TA = self._layer.routed, self._layer.router_weights_TA
        assert routed is not None
        self._num_tokens += len(weights_TA)
        for number, choice in enumerate(self._choices):
            used_N = used_ranks(weights_TA, choice).flatten()[routed.slot_N]
            self._tokens_OE[number].index_add_(0, routed.expert_N.cpu(), used_N.double().cpu())


class RoutingListener:
    """A hook at the output of one MoE layer that sums g.(y(choice) - y) for every choice of ranks."""

    def __init__(self, layer: RoutedLayer, choices: Sequence[Choice], num_documents: int, *, keep: bool) -> None:
        self._layer, self._choices = layer, choices
        self.sums = PieceSums(len(choices), 1, num_documents, keep=keep)
        layer.on_gradient = self._add

    def _add(self, grad_TD: Tensor) -> None:
        wide = torch.promote_types(grad_TD.dtype, torch.float32)
        along_TA = torch.einsum("tad,td->ta", self._layer.rows_TAD.to(wide), grad_TD.to(wide))
        piece_T = self.sums.pieces.of_token_T
        for number, choice in enumerate(self._choices):
            change_T = ((self._layer.weights_of(choice) - self._layer.used_TA) * along_TA).sum(-1)
            self.sums.add(torch.full_like(piece_T, number), piece_T, change_T[:, None])
