"""How alike the features of an expert's tokens are: the measurement behind ``model.sparsity.selection: shared``.

Three kinds of groups of equally many tokens are compared at both sites of every layer:

- ``routed``: tokens that were routed to expert e, at e's own hidden features;
- ``others``: tokens of the same layer that were not routed to e, pushed through the same weights of e;
- ``random``: any tokens of a dense layer.

T tokens, D features, N rows of a group, K selected features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.model.block import Block
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.sparsity.plan import num_selected
from qsparse_moe.sparsity.topk import topk_mask
from qsparse_moe.training.engines.protocol import run_model


@dataclass(frozen=True)
class Likeness:
    """How alike the K largest magnitudes of N rows are, and the energy that one set for all of them keeps."""

    union: float
    """Share of the D features that are selected in at least one row."""
    overlap: float
    """Mean over all pairs of rows of the number of features that both select, divided by K."""
    kept_per_token: float
    """Energy of each row's own K largest features, as a share of the energy of the rows."""
    kept_shared: float
    """Energy of the K features with the largest energy over these rows: the best single set."""
    kept_average: float
    """Energy of the K features with the largest energy over other tokens of the same kind."""

    @property
    def relative(self) -> float:
        """``kept_shared`` divided by ``kept_per_token``."""
        return self.kept_shared / self.kept_per_token

    @property
    def relative_average(self) -> float:
        """``kept_average`` divided by ``kept_per_token``."""
        return self.kept_average / self.kept_per_token


def likeness(rows_ND: Tensor, count: int, earlier_D: Tensor) -> Likeness:
    """Compare rows by their ``count`` largest magnitudes.

    Args:
        rows_ND: at least two rows.
        count: K.
        earlier_D: energy of every feature over other tokens.
    """
    num_rows, num_features = rows_ND.shape
    mask_ND = topk_mask(rows_ND, count)
    uses_D = mask_ND.sum(0).double()
    squares_ND = rows_ND.double().square()
    energy_D, total = squares_ND.sum(0), squares_ND.sum()
    return Likeness(
        union=float((uses_D > 0).sum()) / num_features,
        overlap=float((uses_D * (uses_D - 1)).sum()) / (num_rows * (num_rows - 1) * count),
        kept_per_token=float((squares_ND * mask_ND).sum() / total),
        kept_shared=float(energy_D.topk(count).values.sum() / total),
        kept_average=float(energy_D[earlier_D.topk(count).indices].sum() / total),
    )


@torch.no_grad()
def measure_sharing(
    model: Transformer, sequences: DocumentSequences, *, fractions: Sequence[float], group: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return one entry per layer, site, kind of group, and K / D, each a mean over the experts.

    The first half of the tokens gives the averages, and the groups come from the second half.

    Args:
        model: in evaluation mode, without sparsity.
        sequences: the text.
        fractions: the values of K / D.
        group: N, the number of tokens of a group. An expert with fewer in the second half is left out.
        seed: of the choice among more.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for layer, (x_TD, ids_TA) in enumerate(_inputs(model, sequences)):
        block = cast(Block, model.layers[layer])
        for kind, site, rows_by_group in _groups(block, x_TD, ids_TA, group, generator):
            if not rows_by_group:
                continue
            for fraction in fractions:
                values = [
                    likeness(rows_ND, num_selected(1 - fraction, rows_ND.shape[1]), earlier_D)
                    for rows_ND, earlier_D in rows_by_group
                ]
                place = {"layer": layer, "site": site, "kind": kind, "fraction": fraction, "groups": len(values)}
                found.append(place | _means(values))
    return found


def _means(values: Sequence[Likeness]) -> dict[str, float]:
    each = [asdict(v) | {"relative": v.relative, "relative_average": v.relative_average} for v in values]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _inputs(model: Transformer, sequences: DocumentSequences) -> list[tuple[Tensor, Tensor | None]]:
    """Return the inputs ``(T, D)`` of every feed-forward layer, and the experts ``(T, A)`` of each if it has some."""
    inputs: list[list[Tensor]] = [[] for _ in model.layers]
    chosen: list[list[Tensor]] = [[] for _ in model.layers]
    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks()):
            part = cast(nn.Module, block.dense if block.moe is None else block.moe)
            keep = inputs[layer]
            handle = part.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].flatten(0, 1)))
            hooks.callback(handle.remove)
            if block.moe is not None:
                block.moe.router.hook = chosen[layer].append
                hooks.callback(setattr, block.moe.router, "hook", None)
        for batch, _ in sequences:
            run_model(model, batch, model.embedding.weight.device, with_stats=False, layer_hook=None)
    return [(torch.cat(x), torch.cat(ids) if ids else None) for x, ids in zip(inputs, chosen, strict=True)]


Groups = list[tuple[Tensor, Tensor]]
"""Rows of a group, and the energy of every feature over other tokens of its kind."""


def _groups(
    block: Block, x_TD: Tensor, ids_TA: Tensor | None, size: int, generator: torch.Generator
) -> Iterator[tuple[str, str, Groups]]:
    """Yield the kind, the site, and the groups of one layer."""
    middle = len(x_TD) // 2
    if ids_TA is None:
        dense = cast(FeedForward, block.dense)
        order = torch.randperm(len(x_TD) - middle, generator=generator) + middle
        parts = [order[begin : begin + size] for begin in range(0, len(order) - size + 1, size)]
        hidden_TF = _hidden(dense, x_TD)
        for site, rows_TX in (("input", x_TD), ("hidden", hidden_TF)):
            earlier_X = rows_TX[:middle].double().square().sum(0)
            yield "random", site, [(rows_TX[part], earlier_X) for part in parts]
        return
    experts = cast(MoELayer, block.moe).experts
    groups: dict[tuple[str, str], Groups] = {}
    for expert in range(len(experts.w_up)):
        is_routed_T = (ids_TA == expert).any(-1)
        for kind, belongs_T in (("routed", is_routed_T), ("others", ~is_routed_T)):
            earlier = belongs_T[:middle].nonzero().squeeze(1)
            later = belongs_T[middle:].nonzero().squeeze(1) + middle
            if len(later) < size or not len(earlier):
                continue
            part = later[torch.randperm(len(later), generator=generator)[:size]]
            for site in ("input", "hidden"):
                rows, before = (
                    x_TD[index] if site == "input" else _hidden(experts, x_TD[index], expert)
                    for index in (part, earlier)
                )
                groups.setdefault((kind, site), []).append((rows, before.double().square().sum(0)))
    for (kind, site), rows_by_group in groups.items():
        yield kind, site, rows_by_group


def _hidden(part: Any, x_TD: Tensor, expert: int | None = None) -> Tensor:
    """Return the hidden features ``(T, F)`` before the site, of one expert or of a dense network."""
    gate, up = (None if w is None else x_TD @ (w if expert is None else w[expert]) for w in (part.w_gate, part.w_up))
    return part.activation.dense(gate, up)
