"""Sequences with the document of every label, and losses summed per document.

The bootstrap resamples documents and not tokens, because the tokens of one document are not independent.

R sequences, S tokens per sequence, C documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.data.loader import sample_train_sequences
from qsparse_moe.data.marks import begins_document
from qsparse_moe.data.packing import Array
from qsparse_moe.data.sequences import SequenceTable
from qsparse_moe.data.token_data import TokenData
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed
from qsparse_moe.training.distributed.turns import Turn, gather_in_order, turns
from qsparse_moe.training.evaluate import Forward, model_forward

T = TypeVar("T")

# Bounds the memory of counting documents through a table that may be larger than memory.
_SEQUENCES_PER_READ = 1024


@dataclass(frozen=True)
class DocumentSequences:
    """Sequences in batches, with the document that each label belongs to."""

    batches: tuple[Batch, ...]
    documents: tuple[Tensor, ...]
    """``(B, S)`` int64 per batch: the document of every label, numbered from 0 without gaps."""
    num_documents: int
    distributed: Distributed = ONE_RANK
    """The ranks that take the batches in turn. Each has all batches in memory, and runs its own."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences, R."""
        return sum(len(batch.tokens_BS) for batch in self.batches)

    @property
    def labels_C(self) -> Array:
        """Number of labels per document, ``(C,)``."""
        every = torch.cat([ids[batch.targets_BS != IGNORED_LABEL] for batch, ids in self])
        return torch.bincount(every, minlength=self.num_documents).double().numpy()

    def first(self, num_sequences: int) -> DocumentSequences:
        """Return the first batches, with at least ``num_sequences`` sequences if there are as many."""
        count, taken = 0, 0
        while taken < num_sequences and count < len(self.batches):
            taken += len(self.batches[count].tokens_BS)
            count += 1
        return self._batches(slice(count))

    def halves(self) -> tuple[DocumentSequences, DocumentSequences]:
        """Return every second batch, and the others; a single batch is both halves."""
        if len(self.batches) == 1:
            return self, self
        return self._batches(slice(0, None, 2)), self._batches(slice(1, None, 2))

    def _batches(self, chosen: slice) -> DocumentSequences:
        return replace(self, batches=self.batches[chosen], documents=self.documents[chosen])

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        return iter(zip(self.batches, self.documents, strict=True))

    def turns(self) -> Iterator[tuple[Turn, Batch, Tensor]]:
        """Yield this rank's turns, each with its batch and the documents of the batch."""
        for turn in turns(len(self.batches), self.distributed):
            yield turn, self.batches[turn.index], self.documents[turn.index]

    def in_order(self, values: Sequence[T]) -> list[T]:
        """Return the values of all batches in order, on every rank, from those of this rank's turns."""
        return gather_in_order(values, len(self.batches), self.distributed)


def validation_documents(
    data: TokenData, *, num_sequences: int, batch_size: int, distributed: Distributed = ONE_RANK
) -> DocumentSequences:
    """Return ``num_sequences`` validation sequences spread evenly over the validation text, or all if it has fewer."""
    table, indices = data.evaluation_sequences(num_sequences)
    # Documents between the chosen sequences leave gaps in the numbering.
    _, dense = np.unique(_documents(table, indices), return_inverse=True)
    return _batched(table.tokens(indices), dense.reshape(len(indices), -1), data, batch_size, distributed)


def training_documents(
    config: RunConfig, data: TokenData, *, num_sequences: int, batch_size: int, distributed: Distributed = ONE_RANK
) -> DocumentSequences:
    """Return training sequences spread evenly over the training text, which has many more documents than validation.

    The part of a document inside one sequence counts as a document of its own: finding the sequences that share a
    document would mean reading the whole training text.
    """
    tokens_RS = sample_train_sequences(config, data, num_sequences)
    starts_RS = begins_document(tokens_RS[:, :-1], data.validation.document_token)
    starts_RS[:, 0] = True  # a sequence may begin in the middle of a document
    documents_RS = starts_RS.reshape(-1).cumsum().reshape(starts_RS.shape) - 1
    return _batched(tokens_RS, documents_RS, data, batch_size, distributed)


def _batched(
    tokens_RS: Array, documents_RS: Array, data: TokenData, batch_size: int, distributed: Distributed
) -> DocumentSequences:
    begins = range(0, len(tokens_RS), batch_size)
    ids_RS = torch.from_numpy(documents_RS.astype(np.int64))
    return DocumentSequences(
        tuple(data.batch(tokens_RS[begin : begin + batch_size]) for begin in begins),
        tuple(ids_RS[begin : begin + batch_size] for begin in begins),
        int(ids_RS.max()) + 1,
        distributed,
    )


def _documents(table: SequenceTable, indices: Array) -> Array:
    """Return the documents of these sequences, ``(R, S)``, counted from the start of the table.

    Counting starts there because a document may continue over several sequences.
    """
    found, begun, wanted = [], 0, set(indices.tolist())
    for begin in range(0, int(indices.max()) + 1, _SEQUENCES_PER_READ):
        rows = range(begin, min(begin + _SEQUENCES_PER_READ, len(table)))
        # A label belongs to the document of its input, so the token that begins the next document is a label of this
        # one.
        starts = begins_document(table.tokens(rows)[:, :-1], table.document_token)
        counted = begun + np.cumsum(starts.reshape(-1)).reshape(starts.shape)
        begun = int(counted[-1, -1])
        found.append(counted[[row - begin for row in rows if row in wanted]])
    return np.concatenate(found)


@torch.no_grad()
def loss_by_document(model: Transformer, sequences: DocumentSequences, forward: Forward | None = None) -> Array:
    """Return the loss summed over the labels of each document, ``(C,)`` float64, in nats.

    ``forward`` computes the logits in place of the model's own call. All ranks return the same bits.
    """
    forward = forward or model_forward(model)
    found: list[tuple[Tensor, Tensor]] = []
    for _, batch, documents_BS in sequences.turns():
        logits_BSV = forward(batch).logits_BSV
        losses_T = token_losses(logits_BSV, batch.targets_BS.to(logits_BSV.device))
        documents_P, index_BS = documents_BS.unique(return_inverse=True)
        # float64 on the CPU: the change of one cell is a small difference of large sums.
        sums_P = torch.zeros(len(documents_P), dtype=torch.float64)
        found.append((documents_P, sums_P.index_add_(0, index_BS.flatten(), losses_T.double().cpu())))
    sums_C = torch.zeros(sequences.num_documents, dtype=torch.float64)
    # Batch by batch in their order, so that the sums do not depend on the number of ranks.
    for documents_P, sums_P in sequences.in_order(found):
        sums_C.index_add_(0, documents_P, sums_P)
    return sums_C.numpy()


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the loss per token in nats, ``(B * S,)``, in at least fp32."""
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    # Summed by the callers: the mean would weight documents by the batch that they are in.
    return F.cross_entropy(logits_BSV.flatten(0, 1).to(wide), labels_BS.flatten(), reduction="none")


def bootstrap_intervals(
    sums_XC: Array, labels_C: Array, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Array, Array]:
    """Return the bootstrap percentile interval of ``sum / labels`` for each quantity, as two arrays ``(X,)``.

    Documents are drawn with replacement (Efron 1979).

    Args:
        sums_XC: the contribution of each document to each of X sums.
        labels_C: number of labels per document, the denominator.
        draws: number of resamples, each of C documents.
        level: the confidence level.
        seed: the seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    count = len(labels_C)
    # Multinomial counts are the resamples in one matrix product, without a loop over draws.
    weights_BC = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    drawn_BX = (weights_BC @ sums_XC.T) / (weights_BC @ labels_C)[:, None]
    low, high = np.quantile(drawn_BX, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def mean_loss(model: Transformer, sequences: DocumentSequences, plan: SparsityPlan) -> float:
    """Return the loss under ``plan`` in nats per token. The plan of the model is the same after the call."""
    before = model.sparsity_plan
    try:
        model.set_sparsity(plan)
        return float(loss_by_document(model, sequences).sum() / sequences.labels_C.sum())
    finally:
        model.set_sparsity(before)
