"""Packed sequences by index: the tables of all sources as one, mixed by weight, and the sequences of each step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qsparse_moe.data.batch import Batch, make_batch
from qsparse_moe.data.packing import Array
from qsparse_moe.data.table import SideTable


class RowTable:
    """The rows of one side of all sources, source after source, each repeated according to its weight.

    Args:
        tables: one per source; at least one of them has rows.
        weights: one per source, see ``mixture_counts``.
        document_token: begins every document.
        attend_across_documents: as in the config.
    """

    def __init__(
        self,
        tables: Sequence[SideTable],
        weights: Sequence[float],
        *,
        document_token: int,
        attend_across_documents: bool,
    ) -> None:
        self.document_token = document_token
        self.attend_across_documents = attend_across_documents
        sizes = [len(table) for table in tables]
        counts = mixture_counts(sizes, weights)
        # Rows of this table: where each source begins and ends. Stored rows: where each source and chunk begins.
        self._begins, self._ends = _begins(counts), np.cumsum(counts)
        self._sizes, self._offsets = np.array(sizes), _begins(sizes)
        self._chunks = [chunk for table in tables for chunk in table.chunks]
        self._chunk_offsets = _begins([len(chunk) for chunk in self._chunks])
        self._num_bytes = np.concatenate([table.num_bytes for table in tables])
        repeats = [count / max(1, size) for count, size in zip(counts, sizes, strict=True)]
        self.byte_counts: Array = np.sum([r * t.byte_counts for r, t in zip(repeats, tables, strict=True)], axis=0)
        """``(256,)`` float, how often each byte value occurs in the text, repeated as its rows are."""

    def epochs(self, num_rows: int) -> list[float]:
        """Return how often each source has been read after ``num_rows`` rows; 0 for a source without rows."""
        shares = (self._ends - self._begins) / len(self)
        return [float(num_rows * share / max(1, size)) for share, size in zip(shares, self._sizes, strict=True)]

    @property
    def sequence_length(self) -> int:
        """S, the number of tokens per row."""
        return int(self._chunks[0].shape[1]) - 1

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: Sequence[int] | Array) -> Batch:
        """Return these rows as a batch."""
        return self.batch(self.tokens(indices))

    def batch(self, rows: Array) -> Batch:
        """Return ``(B, S + 1)`` token ids as a batch with this table's document settings."""
        return make_batch(
            rows, document_token=self.document_token, attend_across_documents=self.attend_across_documents
        )

    def tokens(self, indices: Sequence[int] | Array) -> Array:
        """Return the ``(len(indices), S + 1)`` token ids of these rows, in the table's own integer type."""
        stored = self._stored(indices)
        chunk_ids = np.searchsorted(self._chunk_offsets, stored, side="right") - 1
        within = stored - self._chunk_offsets[chunk_ids]
        return np.stack([self._chunks[chunk][row] for chunk, row in zip(chunk_ids, within, strict=True)])

    def num_bytes(self, indices: Sequence[int] | Array) -> int:
        """Return the bytes of text that the labels of these rows encode."""
        return int(self._num_bytes[self._stored(indices)].sum())

    def _stored(self, indices: Sequence[int] | Array) -> Array:
        """Return the indices of these rows among the stored rows."""
        wanted = np.asarray(indices, np.int64)
        assert len(wanted) and wanted.min() >= 0 and wanted.max() < len(self), "row indices outside the table"
        source = np.searchsorted(self._ends, wanted, side="right")
        return self._offsets[source] + (wanted - self._begins[source]) % self._sizes[source]


def _begins(lengths: Sequence[int]) -> Array:
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def mixture_counts(num_rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the number of rows of each source in one epoch.

    All rows have S tokens, so shares of rows are shares of tokens. When all weights are 1, every row counts once.
    Otherwise the weights are shares, and the epoch is the shortest one in which every source gets its share and every
    row occurs: the source that is largest for its weight is read once, the others are repeated. A source without rows
    gets none.
    """
    # Weights of 1 are the default and mean "as they are": sources of different sizes must not be repeated unasked.
    if all(weight == 1 for weight in weights):
        return list(num_rows)
    scale = max(rows / weight for rows, weight in zip(num_rows, weights, strict=True))
    return [round(scale * weight) if rows else 0 for rows, weight in zip(num_rows, weights, strict=True)]


def train_rows(step: int, *, num_rows: int, global_batch_size: int, seed: int, shuffle: bool) -> Array:
    """Return the row indices of the global batch of ``step``, counted from 0: a pure function.

    The run reads row after row of one endless sequence: epoch after epoch, each in its own random order when
    ``shuffle``. A batch may begin in one epoch and end in the next.

    Returns:
        ``(global_batch_size,)`` int64 row indices.
    """
    places = step * global_batch_size + np.arange(global_batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, num_rows)
    if not shuffle:
        return within
    rows = np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _epoch_order(num_rows, seed, int(epoch))[within[chosen]]
    return rows


# Two, because a batch may contain the end of one epoch and the beginning of the next. Each takes 8 bytes per row.
@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Array:
    # Seeded by the pair: with seed + epoch, epoch 1 of one seed would repeat epoch 0 of the next.
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def evenly_spaced_rows(num_rows: int, available: int) -> Array:
    """Return ``num_rows`` of ``available`` row indices at even distances, or all of them where there are fewer."""
    count = min(num_rows, available)
    return np.arange(count, dtype=np.int64) * available // max(1, count)
