"""Sums of g.d over the rows of one document in one sequence, which the listeners of a pass add up.

C documents, P pieces (one document in one sequence) of a batch, R changes of one kind (such as the experts of a site),
X values of S. G draws of labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """The pieces of a batch: the tokens of one document in one sequence."""

    of_token_T: Tensor
    document_P: Tensor

    @staticmethod
    def of(documents_BS: Tensor) -> Pieces:
        """Return the pieces of a batch with these documents per label."""
        sequence_BS = torch.arange(len(documents_BS), device=documents_BS.device)[:, None].expand_as(documents_BS)
        pairs_P2, of_token_T = (
            torch.stack([sequence_BS, documents_BS], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
        )
        return Pieces(of_token_T, pairs_P2[:, 1])


class PieceSums:
    """The sums of one listener over all batches.

    ``first_RCX`` and ``second_RCX`` are both terms by document. With ``keep`` they have a single document, and
    ``drawn`` holds the sums of every piece for the drawn labels, before they are squared.
    """

    def __init__(self, num_changes: int, num_values: int, num_documents: int, *, keep: bool) -> None:
        self._keep = keep
        shape = (num_changes, 1 if keep else num_documents, num_values)
        # float64: the sums run over every token, and the second order squares them.
        self.first_RCX = torch.zeros(shape, dtype=torch.float64)
        self.second_RCX = torch.zeros(shape, dtype=torch.float64)
        self.drawn: list[Tensor] = []
        self._pieces: Pieces | None = None
        self.pass_RPX = torch.zeros(0)
        """Sums of the current pass by piece."""

    @property
    def pieces(self) -> Pieces:
        """The pieces of the current batch."""
        assert self._pieces is not None, "begin has not been called"
        return self._pieces

    def begin(self, pieces: Pieces) -> None:
        """Prepare for one backward pass over a batch."""
        self._pieces = pieces
        num_changes, _, num_values = self.first_RCX.shape
        self.pass_RPX = torch.zeros(num_changes, len(pieces.document_P), num_values, dtype=torch.float64)

    def add(self, change_M: Tensor, piece_M: Tensor, terms_MX: Tensor) -> None:
        """Add the terms of M rows to their changes and pieces."""
        # Changes and pieces share one flat index, so that a single index_add_ serves both.
        index_M = change_M.long() * self.pass_RPX.shape[1] + piece_M.long()
        self.pass_RPX.flatten(0, 1).index_add_(0, index_M.cpu(), terms_MX.double().cpu())

    def end(self, document_P: Tensor, pass_RPX: Tensor, *, weight: float | None) -> None:
        """Add the sums of a pass to the first order, or their squares times ``weight`` to the second order.

        Args:
            document_P: the documents of the pieces, on the CPU.
            pass_RPX: the sums of the pass, which another rank may have run.
            weight: None for the labels themselves.
        """
        if self._keep:
            document_P = torch.zeros_like(document_P)
        if weight is None:
            self.first_RCX.index_add_(1, document_P, pass_RPX)
            return
        self.second_RCX.index_add_(1, document_P, pass_RPX.square(), alpha=weight)
        if self._keep:
            # In fp32, because the sums of all pieces are kept.
            self.drawn.append(pass_RPX.float())
