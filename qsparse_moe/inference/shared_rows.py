"""The rows and columns that an engine stores if all tokens of an expert share their features.

The sets are known before a step, so that the others need no memory. E experts (1 at a site without experts), K selected
features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.inference.weights import parts_of
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.shared_selector import SharedSelector
from qsparse_moe.nn.sparse_site import SparseSite


@dataclass(frozen=True)
class SharedSet:
    """The features that the tokens of every expert share at one site."""

    features_EK: Tensor
    """int64: first those that the expert selects, in ascending order; K is the largest number of any expert."""
    num_selected: list[int]
    """How many of them each expert selects."""


@dataclass(frozen=True)
class Kept:
    """The rows and the columns of a stored stack of matrices that are kept; None: all of them."""

    rows_EK: Tensor | None = None
    columns_EK: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        """Return whether both keep the same rows and columns."""
        return isinstance(other, Kept) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in ((self.rows_EK, other.rows_EK), (self.columns_EK, other.columns_EK))
        )

    @property
    def transposed(self) -> Kept:
        """What is kept of the transposed matrices."""
        return Kept(self.columns_EK, self.rows_EK)


def shared_set(site: SparseSite) -> SharedSet | None:
    """Return the features that all tokens of an expert share at ``site``; None if tokens select their own, or all.

    Raises:
        ConfigError: the energies have never been measured.
    """
    selector = site.selector
    if not isinstance(selector, SharedSelector) or selector.selects_all:
        return None
    index_EK, used_EK = selector.sets(None, None, slice(0, site.num_experts))
    if used_EK is None:
        return SharedSet(index_EK, [index_EK.shape[1]] * len(index_EK))
    used_first_EK = (~used_EK).long().argsort(dim=1, stable=True)
    return SharedSet(index_EK.gather(1, used_first_EK), used_EK.sum(1).tolist())


def keeps_columns(site: SparseSite) -> bool:
    """Return whether hidden features outside of the sets of ``site`` need not be computed."""
    # The scale of a number format is that of the whole row, and so is the norm that preserve restores.
    return site.number_format == "none" and site.settings.rescale != "preserve"


def kept_features(model: Transformer) -> dict[str, Kept]:
    """Return what is kept of every input-major matrix of ``model`` that is not kept whole, by the name of the matrix.

    Args:
        model: in evaluation mode.
    """
    found: dict[str, Kept] = {}
    for number, block in enumerate(model.blocks()):
        attention = f"layers.{number}.attention."
        qkv = "down.weight" if hasattr(block.attention, "down") else "qkv.weight"
        found[attention + qkv] = Kept(_features(block.attention.input_site))
        found[f"{attention}output.weight"] = Kept(_features(block.attention.output_site))
        for name, part, input_site in parts_of(block):
            hidden_EK = _features(part.hidden_site)
            columns_EK = hidden_EK if keeps_columns(part.hidden_site) else None
            prefix = f"layers.{number}.{name}."
            found |= {f"{prefix}{matrix}": Kept(_features(input_site), columns_EK) for matrix in ("w_gate", "w_up")}
            found[f"{prefix}w_down"] = Kept(hidden_EK)
    return {name: kept for name, kept in found.items() if kept != Kept()}


def _features(site: SparseSite) -> Tensor | None:
    shared = shared_set(site)
    return None if shared is None else shared.features_EK
