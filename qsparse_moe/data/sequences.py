"""Packed sequences by index: the tables of all sources as one, mixed by weight, and the sequences of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from qsparse_moe.data.batch import Batch, make_batch
from qsparse_moe.data.packing import Array
from qsparse_moe.data.permutation import permuted
from qsparse_moe.data.stored import SideTable

KEYED_ORDER = "keyed"
"""The random order of new runs, computed per index by ``data.permutation``."""
EARLIER_ORDER = "permutation"
"""The random order of runs that earlier versions began: an array of the size of the epoch."""


class SequenceTable:
    """The sequences of one side of all sources, source after source, each repeated according to its weight.

    Args:
        tables: one per source; at least one of them has sequences.
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
        # Where each source begins and ends among the sequences of this table.
        self._begins, self._ends = _begins(counts), np.cumsum(counts)
        self._sizes, self._tables = np.array(sizes), tables
        repeats = [count / max(1, size) for count, size in zip(counts, sizes, strict=True)]
        self.byte_counts: Array = np.sum([r * t.byte_counts for r, t in zip(repeats, tables, strict=True)], axis=0)
        """``(256,)`` float, how often each byte value occurs in the text, repeated as its sequences are."""

    def epochs(self, num_sequences: int) -> list[float]:
        """Return how often each source has been read after ``num_sequences``; 0 for a source that is empty."""
        shares = (self._ends - self._begins) / len(self)
        return [float(num_sequences * share / max(1, size)) for share, size in zip(shares, self._sizes, strict=True)]

    @property
    def sequence_length(self) -> int:
        """S, the number of tokens per sequence."""
        return self._tables[0].sequence_length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sequences(self, indices: Sequence[int] | Array) -> Batch:
        """Return these sequences as a batch."""
        return self.batch(self.tokens(indices))

    def batch(self, tokens: Array) -> Batch:
        """Return ``(B, S + 1)`` token ids as a batch with this table's document settings."""
        return make_batch(
            tokens, document_token=self.document_token, attend_across_documents=self.attend_across_documents
        )

    def tokens(self, indices: Sequence[int] | Array) -> Array:
        """Return the ``(len(indices), S + 1)`` token ids of these sequences, in the table's own integer type."""
        return np.stack([table.tokens(index) for table, index in self._stored(indices)])

    def num_bytes(self, indices: Sequence[int] | Array) -> int:
        """Return the bytes of text that the labels of these sequences encode; validation only."""
        return sum(table.num_bytes(index) for table, index in self._stored(indices))

    def _stored(self, indices: Sequence[int] | Array) -> list[tuple[SideTable, int]]:
        """Return the table of each sequence and its index there."""
        wanted = np.asarray(indices, np.int64)
        assert len(wanted) and wanted.min() >= 0 and wanted.max() < len(self), "sequence indices outside the table"
        sources = np.searchsorted(self._ends, wanted, side="right")
        # A source whose share is larger than itself is read again from its beginning.
        within = (wanted - self._begins[sources]) % self._sizes[sources]
        return [(self._tables[source], index) for source, index in zip(sources, within.tolist(), strict=True)]


def _begins(lengths: Sequence[int]) -> Array:
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def mixture_counts(num_sequences: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the number of sequences of each source in one epoch.

    All sequences have S tokens, so shares of sequences are shares of tokens. When all weights are 1, every sequence
    counts once. Otherwise the weights are shares, and the epoch is the shortest one in which every source gets its
    share and every sequence occurs: the source that is largest for its weight is read once, the others are repeated. A
    source without sequences gets none.
    """
    # Weights of 1 are the default and mean "as they are": sources of different sizes must not be repeated unasked.
    if all(weight == 1 for weight in weights):
        return list(num_sequences)
    scale = max(size / weight for size, weight in zip(num_sequences, weights, strict=True))
    return [round(scale * weight) if size else 0 for size, weight in zip(num_sequences, weights, strict=True)]


def train_indices(
    step: int, *, num_sequences: int, global_batch_size: int, seed: int, shuffle: bool, order: str = KEYED_ORDER
) -> Array:
    """Return the indices of the sequences of the global batch of ``step``, counted from 0: a pure function.

    The run reads epoch after epoch without end, each in its own random order when ``shuffle``. A batch may begin in one
    epoch and end in the next.

    Args:
        step: number of the step.
        num_sequences: number of sequences per epoch.
        global_batch_size: number of sequences per step.
        seed: selects the order of every epoch.
        shuffle: False: every epoch is read in the order of the table.
        order: how the random order is made, one of ``ORDERS``.

    Returns:
        ``(global_batch_size,)`` int64.
    """
    parts = []
    begin, end = step * global_batch_size, (step + 1) * global_batch_size
    while begin < end:
        epoch, place = divmod(begin, num_sequences)
        stop = min(place + end - begin, num_sequences)
        parts.append(_SHUFFLES[order](place, stop, num_sequences, seed, epoch) if shuffle else np.arange(place, stop))
        begin += stop - place
    return np.concatenate(parts)


def _keyed(place: int, stop: int, num_sequences: int, seed: int, epoch: int) -> Array:
    blocks = range(place // _BLOCK, (stop - 1) // _BLOCK + 1)
    whole = [_keyed_block(num_sequences, seed, epoch, block) for block in blocks]
    first = blocks.start * _BLOCK
    indices = whole[0] if len(whole) == 1 else np.concatenate(whole)
    return indices[place - first : stop - first]


# A call of numpy takes a microsecond for any small number of indices, and the permutation makes over a hundred: a block
# of indices costs hardly more than one index, and the following batches find theirs in it.
_BLOCK = 1024


@lru_cache(maxsize=4)
def _keyed_block(num_sequences: int, seed: int, epoch: int, block: int) -> Array:
    places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, num_sequences))
    # Keyed by the pair: with seed + epoch, epoch 1 of one seed would repeat epoch 0 of the next.
    return permuted(places, size=num_sequences, key=(seed, epoch))


def _whole_epoch(place: int, stop: int, num_sequences: int, seed: int, epoch: int) -> Array:
    return _epoch_order(num_sequences, seed, epoch)[place:stop]


# Two, because a batch may contain the end of one epoch and the beginning of the next. Each takes 8 bytes per sequence.
@lru_cache(maxsize=2)
def _epoch_order(num_sequences: int, seed: int, epoch: int) -> Array:
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)


_SHUFFLES: dict[str, Callable[[int, int, int, int, int], Array]] = {KEYED_ORDER: _keyed, EARLIER_ORDER: _whole_epoch}
ORDERS = tuple(_SHUFFLES)
"""Names of all random orders."""


def evenly_spaced_indices(num_sequences: int, available: int) -> Array:
    """Return ``num_sequences`` of ``available`` indices at even distances, or all of them where there are fewer."""
    count = min(num_sequences, available)
    return np.arange(count, dtype=np.int64) * available // max(1, count)
