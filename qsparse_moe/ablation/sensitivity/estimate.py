"""Estimate the change of the loss for another S in one cell, for all cells and many S from a single forward pass.

A site turns a row x into a sparse row y(S), the K largest features of x (rescaled if the run does so). Let g be the
gradient of the summed loss with respect to the sparse row at the current S0, and d = y(S) - y(S0). To second order, the
loss of a cell changes by

    the sum over its rows of g.d,  plus half of d' G d  over all its rows together

G is the Gauss-Newton matrix of the loss with respect to the sparse rows, which is the Fisher information: d' G d is the
expectation of (sum over the rows of g*.d)^2, where g* is the gradient for labels drawn from the model. Tokens of one
document in one sequence attend to each other, so their terms are summed before squaring; pieces of different documents
are independent. One draw is enough because a batch has many pieces. A single sort of |x| gives g.y(S) for every S: the
running sums of g x and x^2 in descending order of |x|, read at K.

N routed rows, D features, X values of S, E experts, C documents, P pieces of documents in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, token_losses
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.data.packing import Array
from qsparse_moe.model.block import Block
from qsparse_moe.model.transformer import IGNORED_LABEL, Transformer
from qsparse_moe.moe.router import UNUSED
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import site_num_selected
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.training.engines.protocol import run_model


@dataclass(frozen=True)
class Estimate:
    """Both terms of the estimate, summed over the labels of each document, per cell and S."""

    first: dict[Cell, Array]
    """``(X, C)`` nats: the first-order term."""
    second: dict[Cell, Array]
    """``(X, C)`` nats: the second-order term, never below 0."""

    def total(self, cell: Cell) -> Array:
        """Return the sum of both terms, ``(X, C)``."""
        return self.first[cell] + self.second[cell]


# The whole straight-through gradient ranks better than half of it: 0.966 against 0.952 over the decided points
# (docs/lab-log.md, 27 November).
STE_SHARE = 1.0
DRAWS = 1
"""Number of label draws for the second-order term. Two draws changed the Spearman correlation by 0.004 (results.md)."""


def estimate(
    model: Transformer,
    sequences: DocumentSequences,
    values: Sequence[float],
    *,
    ste_share: float = STE_SHARE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Estimate both terms for every cell at each S of ``values``, from one forward and ``1 + draws`` backward passes.

    The plan, the weights, and the ``requires_grad`` flags of the model are the same after the call.

    Args:
        model: a model that selects by rank, on any device.
        sequences: the sequences to measure on, with their documents.
        values: the X values of S.
        ste_share: the share of the gradient that the other sites pass to the features they dropped. With 0, the first
            order is the derivative of the loss for fixed selections. A finite change, however, moves features over the
            thresholds of later sites. The straight-through gradient includes that effect, the derivative does not.
        draws: number of labels drawn per position from the predictions of the model.
        seed: the seed of the draws.
    """
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with _listening(model, sequences.num_documents, values, ste_share) as listeners:
        for batch, documents_BS in sequences:
            pieces = _Pieces.of(documents_BS.to(device))
            # The caller may run under no_grad.
            with torch.enable_grad():
                logits_BSV = run_model(model, batch, device, with_stats=False, layer_hook=None).logits_BSV
                labels_BS = batch.targets_BS.to(device)
                _backward(logits_BSV, labels_BS, pieces, listeners, weight=None, keep=draws > 0)
                for draw in range(draws):
                    drawn_BS = _draw(logits_BSV, labels_BS, generator)
                    # The half is that of the second-order term, and the rest is the mean over the draws.
                    _backward(logits_BSV, drawn_BS, pieces, listeners, weight=1 / (2 * draws), keep=draw < draws - 1)
            # The only gradient that the backward passes accumulate.
            model.embedding.weight.grad = None
    first, second = {}, {}
    for listener in listeners:
        for cell, sums_2XC in listener.by_cell():
            first[cell], second[cell] = sums_2XC
    return Estimate(first, second)


def _backward(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    pieces: _Pieces,
    listeners: Sequence[_Listener],
    *,
    weight: float | None,
    keep: bool,
) -> None:
    """Run one backward pass for these labels, which the site hooks listen to; ``keep`` the graph for the next pass."""
    for listener in listeners:
        listener.begin(pieces)
    # The sum and not the mean: the gradient of a row then does not depend on the other documents of the batch.
    torch.autograd.backward(token_losses(logits_BSV, labels_BS).sum(), retain_graph=keep)
    for listener in listeners:
        listener.end(weight=weight)


def _draw(logits_BSV: Tensor, labels_BS: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label from the prediction of the model at every position that has a label."""
    probabilities_TV = logits_BSV.detach().float().softmax(-1).flatten(0, 1)
    drawn_BS = torch.multinomial(probabilities_TV, 1, generator=generator).view_as(labels_BS)
    return torch.where(labels_BS == IGNORED_LABEL, labels_BS, drawn_BS)


class _Pieces(NamedTuple):
    """The pieces of a batch: the tokens of one document in one sequence."""

    of_token_T: Tensor
    document_P: Tensor

    @staticmethod
    def of(documents_BS: Tensor) -> _Pieces:
        sequence_BS = torch.arange(len(documents_BS), device=documents_BS.device)[:, None].expand_as(documents_BS)
        pairs_P2, of_token_T = (
            torch.stack([sequence_BS, documents_BS], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
        )
        return _Pieces(of_token_T, pairs_P2[:, 1])


@contextmanager
def _listening(
    model: Transformer, num_documents: int, values: Sequence[float], ste_share: float
) -> Iterator[list[_Listener]]:
    """Attach a listener to every site, and restore the model on exit.

    Only the embedding requires a gradient, so that the graph reaches every site and no weight gradient is computed.
    """
    listeners: dict[SparseSite, _Listener] = {}
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    sites = [site for block in model.blocks() for site in block.sites().values()]
    shares = [site.ste_share for site in sites]
    routers = model.routers()
    was_training = model.training
    try:
        # In evaluation the router has no noise and no capacity, so the same tokens always reach the same experts.
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.embedding.weight.requires_grad_(True)
        for block in model.blocks():
            tokens = _TokensOfRows()
            if block.moe is not None:
                block.moe.router.hook = tokens
            for site in block.sites().values():
                site.ste_share = ste_share
                listeners[site] = _Listener(block, site, tokens, num_documents, values)
        with site_hooks(listeners, ranks=True):
            yield list(listeners.values())
    finally:
        for site, share in zip(sites, shares, strict=True):
            site.ste_share = share
        for router in routers:
            router.hook = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
        model.train(was_training)


class _TokensOfRows:
    """A router hook that records the token of each routed row of a layer, which the hooks of sites are not given."""

    def __init__(self) -> None:
        self.token_N: Tensor | None = None

    def __call__(self, expert_ids_TA: Tensor) -> None:
        # Routed tokens are sorted by expert, those of one expert by token (moe/permutation.py); none is dropped here,
        # because a capacity applies in training only. The choices that their token does not use come first.
        unused = int((expert_ids_TA == UNUSED).sum())
        slot_N = expert_ids_TA.flatten().argsort(stable=True)[unused:]
        self.token_N = slot_N.div(expert_ids_TA.shape[1], rounding_mode="floor")


class _Listener:
    """A hook at one site that sums both terms of its cells during the backward passes."""

    def __init__(
        self, block: Block, site: SparseSite, tokens: _TokensOfRows, num_documents: int, values: Sequence[float]
    ) -> None:
        self._layer, self._site, self._tokens = block.layer, site, tokens
        # K and not S enters the estimate: several S may round to one K.
        self._counts = [site_num_selected(site.settings, value, site.num_features) for value in values]
        self._num_documents = num_documents
        # float64: the sums run over every token, and the second order squares them.
        self._sums_2ECX = torch.zeros(2, site.num_experts, num_documents, len(values), dtype=torch.float64)
        self._pieces: _Pieces | None = None
        self._sums_FX = torch.zeros(0)

    def begin(self, pieces: _Pieces) -> None:
        """Prepare for one backward pass over a batch."""
        self._pieces = pieces
        self._sums_FX = torch.zeros(
            self._site.num_experts * len(pieces.document_P), len(self._counts), dtype=torch.float64
        )

    def end(self, *, weight: float | None) -> None:
        """Add the sums of the pass to the first order, or their squares times ``weight`` to the second order."""
        assert self._pieces is not None
        sums_EPX = self._sums_FX.unflatten(0, (-1, len(self._pieces.document_P)))
        document_P = self._pieces.document_P.cpu()
        if weight is None:
            self._sums_2ECX[0].index_add_(1, document_P, sums_EPX)
        else:
            self._sums_2ECX[1].index_add_(1, document_P, sums_EPX.square(), alpha=weight)

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        # The pieces are read during the backward pass, because one forward pass serves several of them.
        token_N = None if expert_ids_N is None else self._tokens.token_N
        hook = partial(self._add, x.detach().flatten(0, -2), sparse.detach().flatten(0, -2), expert_ids_N, token_N)
        sparse.register_hook(hook)
        return sparse

    def _add(
        self, x_ND: Tensor, sparse_ND: Tensor, expert_ids_N: Tensor | None, token_N: Tensor | None, grad: Tensor
    ) -> None:
        assert self._pieces is not None
        index_N = self._pieces.of_token_T
        if expert_ids_N is not None:
            assert token_N is not None
            # Experts and pieces share one flat index, so that a single index_add_ serves both.
            index_N = expert_ids_N.long() * len(self._pieces.document_P) + index_N[token_N.long()]
        change_NX = row_changes(self._site, x_ND, sparse_ND, grad.flatten(0, -2), self._counts).double().cpu()
        self._sums_FX.index_add_(0, index_N.cpu(), change_NX)

    def by_cell(self) -> Iterator[tuple[Cell, Array]]:
        """Yield each cell with its sums, ``(2, X, C)``."""
        has_experts = self._site.site in EXPERT_SITES
        for expert in range(self._sums_2ECX.shape[1]):
            cell = Cell(self._layer, self._site.site, expert if has_experts else None)
            yield cell, np.ascontiguousarray(self._sums_2ECX[:, expert].transpose(-1, -2).numpy())


def row_changes(site: SparseSite, x_ND: Tensor, sparse_ND: Tensor, grad_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """Return ``g.(y(K) - y)`` of every row for each K of ``counts``, ``(N, X)``, in at least fp32.

    Args:
        site: the site whose selection, number format, and rescaling turn x into y.
        x_ND: the input of the site.
        sparse_ND: the current y.
        grad_ND: g, the gradient with respect to ``sparse_ND``.
        counts: values of K, as returned by ``site_num_selected``.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    # The selection ranks x itself, but the matrix reads x in the number format of the site.
    rounded_ND, grad_ND = as_format(x_ND, site.number_format).to(wide), grad_ND.to(wide)
    now_N1 = (grad_ND * sparse_ND.to(wide)).sum(-1, keepdim=True)
    group = site.ranking.group_size or site.num_features
    # Stable, so that ties go to the lower index as in the selection itself.
    order_NGF = x_ND.unflatten(-1, (-1, group)).abs().sort(dim=-1, descending=True, stable=True).indices
    along_NX = _read(grad_ND * rounded_ND, order_NGF, counts)
    # Without rescaling the change is linear in the sums, and no energies are needed.
    if site.settings.rescale == "none":
        return along_NX - now_N1
    energy_NX = _read(rounded_ND.square(), order_NGF, counts)
    # unit scales a row to norm 1, preserve to the norm of its input.
    target_N1 = x_ND.to(wide).square().sum(-1, keepdim=True) if site.settings.rescale == "preserve" else 1.0
    # SparseSite does not rescale a row of which it selects every feature, so S = 0 must not be rescaled here either.
    is_whole_X = torch.tensor([count == site.num_features for count in counts], device=x_ND.device)
    # A row of zeros has no energy to scale to: 0 / 0 becomes 0.
    scale_NX = (target_N1 / energy_NX).sqrt().nan_to_num(0.0, 0.0, 0.0)
    return torch.where(is_whole_X, along_NX, along_NX * scale_NX) - now_N1


def _read(terms_ND: Tensor, order_NGF: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sums of ``terms`` over the features that each K selects, ``(N, X)``, an equal part from each group."""
    num_groups, group = order_NGF.shape[-2:]
    running_NGF = terms_ND.unflatten(-1, (num_groups, group)).gather(-1, order_NGF).cumsum(-1)
    last_X = torch.tensor([count // num_groups - 1 for count in counts], device=terms_ND.device)
    return running_NGF.index_select(-1, last_X).sum(-2)
