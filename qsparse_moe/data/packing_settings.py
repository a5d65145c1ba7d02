"""Everything other than the text on which the sequences depend, and the errors for too little text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsparse_moe.data.open_source import OpenSource
from qsparse_moe.data.packing import PACKING_VERSION
from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import DataError


@dataclass(frozen=True)
class Packing:
    """Everything other than the text on which the sequences depend."""

    tokenizer: TextTokenizer
    sequence_length: int
    """S, the number of tokens per sequence."""
    validation_fraction: float
    """Fraction of the documents held out."""

    def describe(self, source: OpenSource) -> dict[str, Any]:
        """Return a JSON-able description that is equal exactly where the same text gives the same stored tokens."""
        described: dict[str, Any] = {
            "version": PACKING_VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "validation_fraction": self.validation_fraction,
        }
        # The sequences of text are cut when they are read.
        return described if source.chat is None else described | {"sequence_length": self.sequence_length}


def too_little_train(source: OpenSource, packing: Packing) -> DataError:
    """Return the error for a source whose training documents do not fill one sequence."""
    return DataError(
        f"{source.setting} has too little text for one training sequence: the documents that are not held out have "
        f"fewer than data.sequence_length + 1 = {packing.sequence_length + 1} tokens, and every source must have "
        "them; add documents, raise max_bytes where it is set, or shorten data.sequence_length"
    )


def too_little_validation(sources: Sequence[OpenSource], packing: Packing) -> DataError:
    """Return the error for sources whose held-out documents together do not fill one sequence."""
    return DataError(
        f"{', '.join(source.setting for source in sources)}: too little text for one validation sequence: the "
        f"documents held out with data.validation_fraction {packing.validation_fraction} have fewer than "
        f"data.sequence_length + 1 = {packing.sequence_length + 1} tokens. A document (a text file, or a row of the "
        "others) is never split between the sides; add documents, name the separator of the documents in a file, "
        "raise data.validation_fraction, or shorten data.sequence_length"
    )
