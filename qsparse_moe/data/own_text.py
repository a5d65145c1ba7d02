"""All text of the user's own files as packed sequences, to evaluate a trained model on other than its own data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qsparse_moe.config.file_sources import file_sources, has_only_conversations
from qsparse_moe.config.schema import DataConfig
from qsparse_moe.data.batch import IGNORED_LABEL, Batch, make_batch
from qsparse_moe.data.chat import open_chat
from qsparse_moe.data.open_source import Limits, OpenSource
from qsparse_moe.data.packing import Array, Packer
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import DataError


class OwnText:
    """The documents of some files, packed into sequences as those of a run are; nothing is held out or cached.

    Args:
        files: files or globs, read in order: JSON lines and Parquet by their suffix, the others as text. The records of
            JSON lines and Parquet are conversations if all sources of the run are.
        config: the ``data`` section of the run.
        tokenizer: the run's.

    Raises:
        DataError: a file cannot be read, or there is no text in them.
    """

    def __init__(self, files: Sequence[str], config: DataConfig, tokenizer: TextTokenizer) -> None:
        self._config, self._document_token = config, tokenizer.document_token
        packer, full = Packer(config.sequence_length), []
        self.num_bytes = 0
        """Bytes of text."""
        for source in _sources(files, config, tokenizer):
            encode = source.encoder(tokenizer)
            for text in source.texts():
                documents = encode([text])
                self.num_bytes += sum(int(document.num_bytes.sum()) for document in documents)
                full.append(packer.add(documents).tokens)
        full.append(packer.finish().tokens)
        # The end of the text is evaluated too: the last sequence is padded, and the labels of the padding are ignored.
        waiting = packer.state_dict()["tokens"]
        self._last_labels = max(0, len(waiting) - 1)
        if self._last_labels:
            last = np.full((1, config.sequence_length + 1), tokenizer.document_token, np.int32)
            last[0, : len(waiting)] = waiting
            full.append(last)
        self._tokens_RS: Array = np.concatenate(full)
        if not len(self._tokens_RS):
            raise DataError(f"{', '.join(files)}: no file holds text, and a loss needs some; name another file")

    def __len__(self) -> int:
        return len(self._tokens_RS)

    def batches(self, micro_batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """Return one rank's part of the sequences; labels after the end of the text are ignored by the loss.

        Every rank gets the same number of batches: a rank that has none left gets the first one, without labels.
        """
        # Equally many batches on every rank: a forward pass may contain collectives, in which the others would wait.
        begins = range(0, len(self), world_size * micro_batch_size)
        return [self._own_or_spare(begin + rank * micro_batch_size, micro_batch_size) for begin in begins]

    def _own_or_spare(self, begin: int, micro_batch_size: int) -> Batch:
        if begin < len(self):
            return self._batch(begin, begin + micro_batch_size)
        spare = self._batch(0, micro_batch_size)
        return spare._replace(targets_BS=spare.targets_BS.new_full(spare.targets_BS.shape, IGNORED_LABEL))

    def _batch(self, begin: int, end: int) -> Batch:
        batch = make_batch(
            self._tokens_RS[begin:end],
            document_token=self._document_token,
            attend_across_documents=self._config.attend_across_documents,
        )
        if end >= len(self) and self._last_labels:
            batch.targets_BS[-1, self._last_labels :] = IGNORED_LABEL
        return batch


def _sources(files: Sequence[str], config: DataConfig, tokenizer: TextTokenizer) -> Iterator[OpenSource]:
    limits = Limits(config.max_bad_records, config.max_document_bytes)
    chat = open_chat(config, tokenizer) if has_only_conversations(config) else None
    for index, source in enumerate(file_sources(files, config)):
        yield open_source(source, index, limits, chat=chat)
