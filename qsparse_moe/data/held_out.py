"""The documents of a stream that are held out for validation: a fraction by a hash of the text, or the first ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qsparse_moe.data.open_source import OpenSource
from qsparse_moe.data.packing import Array, PackedSequences, Packer, is_validation, text_digest
from qsparse_moe.data.packing_settings import Packing
from qsparse_moe.data.shard_writer import count_bytes
from qsparse_moe.data.stored import SequenceArray

logger = logging.getLogger(__name__)

HeldOut = Callable[[str], bool]
"""Returns whether a document belongs to the validation side."""

# A start that reads more than this for its validation sequences says so: it takes about a minute.
_MUCH_TEXT = 100 << 20


def by_fraction(fraction: float) -> HeldOut:
    """Return the rule that holds out a fraction of the documents, by a hash of their text."""
    return lambda text: is_validation(text_digest(text.encode("utf-8")), fraction)


def one_of(digests: frozenset[bytes]) -> HeldOut:
    """Return the rule that holds out the texts with these digests, also where they occur again."""
    return lambda text: text_digest(text.encode("utf-8")) in digests


class Head(NamedTuple):
    """The first documents of a source, which are held out."""

    digests: frozenset[bytes]
    """Digests of their texts."""
    sequences: SequenceArray
    """The sequences that they fill."""
    train_byte_counts: Array
    """``(256,)`` how often each byte value occurs in as many bytes of the text that follows."""


def read_head(source: OpenSource, packing: Packing, num_tokens: int) -> Head:
    """Read the first documents of a source that have ``num_tokens``, and as many bytes of the text after them."""
    packer, encode = Packer(packing.sequence_length), source.encoder(packing.tokenizer)
    found: list[PackedSequences] = [packer.add([])]
    digests: set[bytes] = set()
    read = 0
    counts = {False: np.zeros(256, np.int64), True: np.zeros(256, np.int64)}
    for text in source.texts():
        held_out = read < num_tokens
        counts[held_out] += count_bytes([text])
        if held_out:
            documents = encode([text])
            found.append(packer.add(documents))
            read += sum(len(document.tokens) for document in documents)
            digests.add(text_digest(text.encode("utf-8")))
        elif counts[False].sum() >= counts[True].sum():
            break
    found.append(packer.finish())
    tokens, num_bytes = (np.concatenate(part) for part in zip(*found, strict=True))
    return Head(frozenset(digests), SequenceArray(tokens, num_bytes, counts[True]), counts[False])


def gather(source: OpenSource, packing: Packing, num_sequences: int) -> tuple[SequenceArray, Array]:
    """Read a source from its beginning until its held-out documents fill ``num_sequences``, or to its end."""
    packer = Packer(packing.sequence_length)
    # An empty part first, so that the arrays below have their shapes even if nothing is held out.
    found: list[PackedSequences] = [packer.add([])]
    num_found = 0
    counts = {False: np.zeros(256, np.int64), True: np.zeros(256, np.int64)}
    encode = source.encoder(packing.tokenizer)
    for text in source.texts():
        held_out = is_validation(text_digest(text.encode("utf-8")), packing.validation_fraction)
        counts[held_out] += count_bytes([text])
        if held_out:
            found.append(packer.add(encode([text])))
            num_found += len(found[-1].tokens)
            if num_found >= num_sequences:
                break
    else:
        found.append(packer.finish())
    num_read = int(sum(count.sum() for count in counts.values()))
    if num_read > _MUCH_TEXT:
        logger.warning(
            "%s: %.0f MB of text were read to hold out %d sequences by data.validation_fraction (%g); "
            "data.validation_tokens=%d holds out the first documents instead, and nothing else is read for it",
            source.setting,
            num_read / 1e6,
            num_sequences,
            packing.validation_fraction,
            num_sequences * packing.sequence_length,
        )
    tokens = np.concatenate([packed.tokens for packed in found])[:num_sequences]
    num_bytes = np.concatenate([packed.num_bytes for packed in found])[:num_sequences]
    return SequenceArray(tokens, num_bytes, counts[True]), counts[False]
