"""From conversations to documents of tokens with marks: which tokens are targets, and what is too long."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsparse_moe.config.schema import DataConfig
from qsparse_moe.data.chat_template import (
    ChatTemplate,
    TemplateTokens,
    UnknownAnswers,
    load_chat_template,
)
from qsparse_moe.data.conversations import Conversation, Message, Rendering
from qsparse_moe.data.local_files import short
from qsparse_moe.data.marks import mark
from qsparse_moe.data.packing import Array, Document
from qsparse_moe.data.tokenizer import TextTokenizer, byte_offsets
from qsparse_moe.errors import DataError

logger = logging.getLogger(__name__)

_VERSION = 1
"""Part of every cache key; increased when conversations are tokenised differently."""


@dataclass
class ChatCounts:
    """Numbers of conversations that were tokenised."""

    conversations: int = 0
    cut: int = 0
    """Longer than a sequence, with their first part kept."""
    dropped: int = 0
    """Longer than a sequence and left out, because of data.chat.too_long or without an answer in the first part."""

    def as_dict(self) -> dict[str, int]:
        """Return the numbers by name."""
        return {"conversations": self.conversations, "cut": self.cut, "dropped": self.dropped}

    def reset(self) -> None:
        """Start to count again."""
        self.conversations = self.cut = self.dropped = 0

    def log(self, setting: str, sequence_length: int) -> None:
        """Log how many were too long, if any."""
        if self.cut or self.dropped:
            logger.warning(
                "%s: of %d conversations, %d are longer than data.sequence_length + 1 = %d tokens and were cut, and %d "
                "were left out (data.chat.too_long)",
                setting,
                self.conversations,
                self.cut,
                sequence_length + 1,
                self.dropped,
            )


class Chat:
    """How the conversations of a run are written and which of their tokens are targets.

    Args:
        config: the ``data`` section.
        tokenizer: that of the run.

    Raises:
        DataError: there is no chat template, or it cannot be read.
        BackendUnavailable: transformers is not installed.
    """

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer) -> None:
        self._loss, self._too_long = config.chat.loss, config.chat.too_long
        self.sequence_length = config.sequence_length
        self._template = open_template(config, tokenizer)
        self._special_ids = np.array(sorted(self._template.special_ids))

    @property
    def template(self) -> str:
        """The chat template."""
        return self._template.source

    def describe(self) -> dict[str, Any]:
        """Return a JSON-able description that is equal exactly where the same messages give the same tokens."""
        template = hashlib.blake2b(self.template.encode("utf-8"), digest_size=16).hexdigest()
        return {"version": _VERSION, "template": template, "loss": self._loss, "too_long": self._too_long}

    def read(self, text: str, place: str) -> tuple[Conversation, str]:
        """Return the conversation whose messages ``text`` holds as JSON, and its problem.

        Raises:
            DataError: the template does not show where the answers are, whatever the conversation.
        """
        messages: list[Message] = json.loads(text)
        conversation = Conversation(text)
        answers = [message for message in messages if message["role"] == "assistant"]
        if self._loss == "answers" and not answers:
            return conversation, (
                f"{place}: no message has the role assistant, and the loss needs an answer (data.chat.loss is answers);"
                " correct the record"
            )
        try:
            conversation.rendering = self._rendering(messages)
        except UnknownAnswers as error:
            raise DataError(f"{place}: {error}") from None
        except DataError as error:
            return conversation, f"{place}: {error}; correct the record"
        if self._loss == "answers" and not conversation.rendering.answers:
            raise DataError(
                f"{place}: the chat template marks no answer of this conversation with its generation blocks, and the "
                "loss needs them; put the blocks around every answer, or set data.chat.loss=all"
            )
        counted = answers if self._loss == "answers" else messages
        conversation.counted = "".join(message.get("content") or "" for message in counted)
        return conversation, ""

    def documents(self, texts: Sequence[str], counts: ChatCounts) -> list[Document]:
        """Return the documents of conversations from ``read``, in order, without those that are dropped."""
        conversations = [text for text in texts if isinstance(text, Conversation)]
        assert len(conversations) == len(texts), "a source of conversations gives nothing else"
        if not conversations:
            return []
        renderings = [conversation.rendering for conversation in conversations]
        tokenized = self._template.tokenize([rendering.text for rendering in renderings])
        found = [self._document(*pair, counts) for pair in zip(renderings, tokenized, strict=True)]
        return [document for document in found if document is not None]

    def _rendering(self, messages: Sequence[Message]) -> Rendering:
        return self._template.render(messages, finds_answers=self._loss == "answers")

    def _document(self, rendering: Rendering, tokens: TemplateTokens, counts: ChatCounts) -> Document | None:
        counts.conversations += 1
        ids = np.array(tokens.ids, np.int64)
        offsets = np.array(tokens.offsets, np.int64).reshape(-1, 2)
        targets = _overlaps(offsets, rendering.answers) if self._loss == "answers" else np.ones(len(ids), bool)
        # Nothing precedes the first token from which it could be predicted.
        targets[:1] = False
        num_bytes = np.where(targets & ~np.isin(ids, self._special_ids), _new_bytes(rendering.text, offsets), 0)
        most = self.sequence_length + 1
        is_too_long = len(ids) > most
        if (is_too_long and self._too_long == "drop") or not num_bytes[:most].any():
            counts.dropped += 1
            return None
        counts.cut += is_too_long
        return Document(mark(ids, targets=targets)[:most], num_bytes[:most].astype(np.int32), is_whole=True)


@dataclass(frozen=True)
class ChatSource:
    """What reads the conversations of one source, and their counts."""

    chat: Chat
    counts: ChatCounts

    def documents(self, texts: Sequence[str]) -> list[Document]:
        """Return the documents of conversations, without those that are dropped."""
        return self.chat.documents(texts, self.counts)

    def log_pass(self, setting: str) -> None:
        """Log how many conversations were too long since the last call, if any."""
        self.counts.log(setting, self.chat.sequence_length)
        self.counts.reset()


Encode = Callable[[Sequence[str]], list[Document]]
"""Tokenises the texts of a source, in order; conversations that are too long may be left out."""


def open_chat(config: DataConfig, tokenizer: TextTokenizer) -> Chat | None:
    """Return the chat settings of a run; None if no source holds conversations."""
    return Chat(config, tokenizer) if any(source.format == "chat" for source in config.sources) else None


def open_template(config: DataConfig, tokenizer: TextTokenizer) -> ChatTemplate:
    """Return the chat template of a run: the file that its settings name, or that of its tokenizer.

    Raises:
        DataError: the file cannot be read, or there is no template.
        BackendUnavailable: transformers is not installed.
    """
    file = config.chat.template
    try:
        text = None if file is None else Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat.template ({file}) cannot be read ({short(error)}); it must be a Jinja file in UTF-8"
        ) from error
    template = load_chat_template(tokenizer, text)
    if template is None:
        raise DataError(
            f"data.tokenizer ({config.tokenizer}) has no chat template, and a source of format chat needs one; name a "
            "Jinja file in data.chat.template, or choose a tokenizer that has one"
        )
    return template


def _overlaps(offsets: Array, spans: Sequence[tuple[int, int]]) -> Array:
    """Return which tokens cover a character of a span."""
    inside = np.zeros(len(offsets), bool)
    for begin, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    return inside


def _new_bytes(text: str, offsets: Array) -> Array:
    """Return the bytes of text that each token newly covers."""
    if not len(offsets):
        return np.zeros(0, np.int64)
    return np.diff(byte_offsets(text)[np.maximum.accumulate(offsets[:, 1])], prepend=0)
