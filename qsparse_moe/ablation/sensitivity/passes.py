"""One forward pass and ``1 + draws`` backward passes per batch, to which sites and MoE layers listen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.ablation.routing import Choice, choices_of, with_all_ranks
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, token_losses
from qsparse_moe.ablation.sensitivity.listeners import ChoiceLoad, RoutingListener, SiteListener
from qsparse_moe.ablation.sensitivity.routed_layer import routed_layers
from qsparse_moe.ablation.sensitivity.sums import Pieces, PieceSums
from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.model.sharded import is_sharded
from qsparse_moe.model.transformer import IGNORED_LABEL, Transformer
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.training.engines.protocol import run_model


@dataclass(frozen=True)
class Changes:
    """The changes whose terms are summed."""

    values: Sequence[float]
    """Values of S for every cell."""
    routing: Mapping[int, Sequence[Choice]]
    """Choices of ranks per MoE layer."""
    sites: Mapping[int, Sequence[Choice]]
    """Per MoE layer, the choices under which the sites of its experts are summed."""


@dataclass(frozen=True)
class PassSums:
    """The sums of all listeners."""

    sites: dict[tuple[int, Site], PieceSums]
    routing: dict[int, PieceSums]
    load: dict[int, dict[Choice, tuple[float, ...]]]
    """Share of tokens that use each expert, per MoE layer and choice in ``Changes.routing``."""


def run_passes(
    model: Transformer,
    sequences: DocumentSequences,
    changes: Changes,
    *,
    ste_share: float,
    draws: int,
    seed: int,
    keep: bool,
) -> PassSums:
    """Run the passes over all sequences and return the sums of every listener.

    The plan, the weights, and the ``requires_grad`` flags of the model are the same after the call.

    Args:
        model: a model that selects by rank, on any device.
        sequences: the sequences to measure on, with their documents.
        changes: the changes of the model to listen for.
        ste_share: as in ``estimate``.
        draws: number of labels drawn per position from the predictions of the model.
        seed: the seed of the draws.
        keep: as in ``PieceSums``.
    """
    device = model.embedding.weight.device
    with _listening(model, sequences, changes, ste_share, keep) as (found, loads):
        every = [*found.sites.values(), *found.routing.values()]
        for turn, batch, documents_BS in sequences.turns():
            pieces = Pieces.of(documents_BS.to(device))
            for load in loads:
                load.counts = not turn.is_spare
            # The caller may run under no_grad.
            with torch.enable_grad():
                logits_BSV = run_model(model, batch, device, with_stats=False, layer_hook=None).logits_BSV
                for load in loads:
                    load.counts = False
                labels_BS = batch.targets_BS.to(device)
                passes: _Passes = [(None, _backward(logits_BSV, labels_BS, pieces, every, keep_graph=draws > 0))]
                generator = _generator(seed, turn.index, device)
                for draw in range(draws):
                    drawn_BS = _draw(logits_BSV, labels_BS, generator)
                    # The half is that of the second-order term, and the rest is the mean over the draws.
                    sums = _backward(logits_BSV, drawn_BS, pieces, every, keep_graph=draw < draws - 1)
                    passes.append((1 / (2 * draws), sums))
            _add_turn(turn.gather((pieces.document_P.cpu(), passes)), every)
    return found


_Passes = list[tuple[float | None, list[Tensor]]]
"""The sums of every listener in each pass over one batch, and the weight of their squares."""


def _add_turn(batches: Sequence[tuple[Tensor, _Passes]], every: Sequence[PieceSums]) -> None:
    """Add the passes over the batches of all ranks in the order of the batches, so that the sums are those of one."""
    for document_P, passes in batches:
        for weight, found in passes:
            for sums, pass_RPX in zip(every, found, strict=True):
                sums.end(document_P, pass_RPX, weight=weight)


def _backward(
    logits_BSV: Tensor, labels_BS: Tensor, pieces: Pieces, every: Sequence[PieceSums], *, keep_graph: bool
) -> list[Tensor]:
    """Run one backward pass for these labels, and return what the hooks summed; ``keep_graph`` for the next pass."""
    for sums in every:
        sums.begin(pieces)
    # The sum and not the mean: the gradient of a row then does not depend on the other documents of the batch.
    torch.autograd.backward(token_losses(logits_BSV, labels_BS).sum(), retain_graph=keep_graph)
    return [sums.pass_RPX for sums in every]


def _generator(seed: int, batch: int, device: torch.device) -> torch.Generator:
    # One per batch, so that the draws do not depend on the number of ranks. Mixed by a hash: sums of seed and batch
    # would repeat among neighbouring seeds.
    mixed = int(np.random.SeedSequence((seed, batch)).generate_state(1)[0])
    return torch.Generator(device).manual_seed(mixed)


def _draw(logits_BSV: Tensor, labels_BS: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label from the prediction of the model at every position that has a label."""
    probabilities_TV = logits_BSV.detach().float().softmax(-1).flatten(0, 1)
    drawn_BS = torch.multinomial(probabilities_TV, 1, generator=generator).view_as(labels_BS)
    return torch.where(labels_BS == IGNORED_LABEL, labels_BS, drawn_BS)


@contextmanager
def _listening(
    model: Transformer, sequences: DocumentSequences, changes: Changes, ste_share: float, keep: bool
) -> Iterator[tuple[PassSums, list[ChoiceLoad]]]:
    """Attach all listeners, and restore the model on exit."""
    plan, num_documents = model.sparsity_plan, sequences.num_documents
    listeners: dict[SparseSite, SiteListener] = {}
    found = PassSums({}, {}, {})
    with _with_graph(model), _straight_through(model, ste_share):
        try:
            # Every rank is computed, and RoutedLayer uses those of the plan.
            model.set_sparsity(with_all_ranks(plan))
            with routed_layers(model, choices_of(plan, model.config)) as routed:
                routing = {
                    layer: RoutingListener(place, changes.routing[layer], num_documents, keep=keep)
                    for layer, place in routed.items()
                }
                found.routing.update({layer: listener.sums for layer, listener in routing.items()})
                loads = {layer: ChoiceLoad(place, changes.routing[layer]) for layer, place in routed.items()}
                for block in model.blocks():
                    for name, site in block.sites().items():
                        own = routed.get(block.layer) if name in EXPERT_SITES else None
                        choices = () if own is None else changes.sites[block.layer]
                        listener = SiteListener(site, changes.values, choices, own, num_documents, keep=keep)
                        listeners[site], found.sites[block.layer, name] = listener, listener.sums
                with site_hooks(listeners, ranks=True):
                    yield found, list(loads.values())
                found.load.update({layer: load.shares(sequences.distributed) for layer, load in loads.items()})
        finally:
            model.set_sparsity(plan)


@contextmanager
def _with_graph(model: Transformer) -> Iterator[None]:
    """Run in evaluation mode with a graph from the embedded tokens on, and without gradients of weights."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training, recomputed = model.training, model.activation_checkpointing
    embedded = model.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    try:
        # In evaluation the router has no noise and no capacity, so the same tokens always reach the same experts.
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if is_sharded(model):
            # The graph of a layer keeps its weights: all together they would be the whole model.
            model.activation_checkpointing = "full"
        yield
    finally:
        embedded.remove()
        model.activation_checkpointing = recomputed
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
        model.train(was_training)


@contextmanager
def _straight_through(model: Transformer, share: float) -> Iterator[None]:
    sites = [site for block in model.blocks() for site in block.sites().values()]
    before = [site.ste_share for site in sites]
    try:
        for site in sites:
            site.ste_share = share
        yield
    finally:
        for site, own in zip(sites, before, strict=True):
            site.ste_share = own
