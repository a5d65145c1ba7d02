"""Where the documents of packed sequences end, and the blocks of whole documents whose attention is computed together.

A document is a run of equal ids. B sequences, S tokens per sequence, L tokens per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Neighbouring sequences that are divided into the same blocks."""

    num_sequences: int
    lengths: list[int]
    """Number of tokens of each block."""
    masks: list[Tensor | None]
    """Mask of each block, ``(1, 1, L, L)`` or one per sequence: 0 where a query attends to a key, -inf elsewhere. None:
    the block is one document, with the plain causal mask."""


class BlockSizes(NamedTuple):
    """The limits that decide how sequences are divided."""

    whole: int
    """A sequence of at most this many tokens is one block."""
    block: int
    """Neighbouring documents of a longer sequence share a block as long as it has at most this many tokens."""


def last_of_documents(documents_BS: Tensor) -> Tensor:
    """Return ``(B, S)`` bool: true for the last token of every document."""
    is_last_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_last_BS[:, :-1] = documents_BS[:, :-1] != documents_BS[:, 1:]
    return is_last_BS


def document_offsets(documents_BS: Tensor) -> Tensor:
    """Return the first token of every document of the flattened sequences, and B * S at the end, as int32."""
    ends = last_of_documents(documents_BS).flatten().nonzero().flatten() + 1
    return torch.cat((ends.new_zeros(1), ends)).int()


def document_mask(documents_BS: Tensor) -> Tensor:
    """Return ``(B, 1, S, S)`` bool: true for the keys of a query's own document that do not come after it."""
    length = documents_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril()
    is_last_BS = last_of_documents(documents_BS)
    # Numbered anew, because an id may come back later in the sequence: then it is another document.
    number_BS = is_last_BS.cumsum(1) - is_last_BS.long()
    same_BSS = number_BS[:, :, None] == number_BS[:, None, :]
    return (same_BSS & causal_SS)[:, None]


def bands(documents_BS: Tensor, sizes: BlockSizes, dtype: torch.dtype) -> list[Band]:
    """Divide sequences into blocks whose masks have at most ``max(sizes)`` elements per token, in ``dtype``."""
    num_sequences, length = documents_BS.shape
    if not last_of_documents(documents_BS)[:, :-1].any():
        return [Band(num_sequences, [length], [None])]
    if length <= sizes.whole:
        return [Band(num_sequences, [length], [_added_to_scores(document_mask(documents_BS), dtype)])]
    found = []
    for lengths, equal in groupby(_lengths(documents_BS)):
        blocks = list(_blocks(lengths, sizes.block))
        masks = [_mask_of(block, dtype) if len(block) > 1 else None for block in blocks]
        found.append(Band(len(list(equal)), [sum(block) for block in blocks], masks))
    return found


def _lengths(documents_BS: Tensor) -> Iterator[list[int]]:
    """Iterate over the sequences: the lengths of the documents of each."""
    for is_last_S in last_of_documents(documents_BS):
        ends = is_last_S.nonzero().flatten()
        yield ends.diff(prepend=ends.new_full((1,), -1)).tolist()


def _blocks(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Group the lengths of neighbouring documents; a document of more than ``size`` tokens stays alone."""
    block: list[int] = []
    for length in lengths:
        if block and sum(block) + length > size:
            yield block
            block = []
        block.append(length)
    yield block


def _mask_of(lengths: list[int], dtype: torch.dtype) -> Tensor:
    ids_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return _added_to_scores(document_mask(ids_L[None]), dtype)


def _added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # Converted once, because attention converts a bool mask in every layer. The scores get the same bits.
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
