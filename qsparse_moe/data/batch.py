"""The batch of the model, made from packed sequences.

Letters: B sequences, S tokens per sequence. A packed sequence has S + 1 tokens: the inputs are all but
the last of them, and the labels all but the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qsparse_moe.data.marks import begins_document, has_marks, is_target, token_ids

if TYPE_CHECKING:
    from torch import Tensor

# This is the value that PyTorch's cross-entropy ignores by default.
IGNORED_LABEL = -100
"""The label that every loss ignores."""


class Batch(NamedTuple):
    """Sequences of tokens with their targets: int64 on the CPU."""

    tokens_BS: Tensor
    """Inputs."""
    targets_BS: Tensor
    """The token that follows each input; -100 is ignored."""
    positions_BS: Tensor
    """Positions, from 0 in every sequence and every document; from 0 in every sequence only if attention crosses
    documents."""
    documents_BS: Tensor | None
    """Running index of the document inside the sequence, from 0; None: attention may cross documents."""
    loss_weight: Tensor | None = None
    """``()`` float32, factor of the mean loss over the targets; None is 1. It makes up for different numbers of targets
    in the micro-batches of a step."""

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from which it is copied to a CUDA device while that computes."""
        return Batch._make(None if part is None else part.pin_memory() for part in self)


def make_batch(sequences: np.ndarray[Any, Any], *, document_token: int, attend_across_documents: bool) -> Batch:
    """Split packed sequences into inputs and labels and find the documents in them.

    Tokens with marks (``data.marks``) lose them: the label of one that is no target is -100. A sequence that begins in
    the middle of a document counts its positions from 0 there.

    Args:
        sequences: ``(B, S + 1)`` token ids of any integer type.
        document_token: the token that begins every document.
        attend_across_documents: leave the documents unmarked.
    """
    ids = token_ids(sequences)
    tokens = ids[:, :-1]
    labels = ids[:, 1:]
    if has_marks(sequences):
        labels = np.where(is_target(sequences[:, 1:]), labels, IGNORED_LABEL)
    columns = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if attend_across_documents:
        return Batch(_tensor(tokens), _tensor(labels), _tensor(columns), None)
    begins = begins_document(sequences[:, :-1], document_token)
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    # The index is 0 for the first document, whether the sequence begins with its document token or inside of it.
    documents = np.cumsum(begins, axis=1) - begins[:, :1]
    return Batch(_tensor(tokens), _tensor(labels), _tensor(positions), _tensor(documents))


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    # Imported here: processes that only read and tokenise would need seconds and 200 MB for it.
    import torch

    # A copy where the array is a read-only or strided view: torch must not share memory with a mapped file.
    return torch.from_numpy(np.require(array, np.int64, ["C", "W", "O"]))
