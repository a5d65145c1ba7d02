"""Conversations as token ids, by the chat template that a Hugging Face tokenizer may have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import BackendUnavailable, DataError

_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


class ChatTemplate:
    """Writes a conversation as the token ids that a model was trained on, up to where the assistant answers."""

    def __init__(self, folder: Path) -> None:
        """``folder`` holds a ``tokenizer.json`` and a chat template."""
        self._folder = folder
        self._tokenizer: Any = _transformers().PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the messages and of the beginning of the assistant's answer.

        Raises:
            DataError: the template cannot write these messages; with its own reason.
        """
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    # Versions from 5 on return a dictionary with an attention mask by default.
                    list(messages),
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            )
        except Exception as error:  # jinja2's errors of many types, and those that the template raises itself
            raise DataError(
                f"{self._folder}: its chat template cannot write this conversation ({error}); the template must take "
                "messages with role and content. Correct it, or generate with --prompt"
            ) from error


def load_chat_template(tokenizer: TextTokenizer) -> ChatTemplate | None:
    """Return the chat template of a tokenizer; None if it has none, as for bytes.

    Raises:
        BackendUnavailable: there is a template, and transformers is not installed.
    """
    if not tokenizer.files:
        return None
    folder = tokenizer.files[0].parent
    settings = folder / _SETTINGS_FILE
    # Looked up without transformers, which only a tokenizer with a template needs.
    in_settings = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    # transformers reads a template from either file, and newer versions write the separate one.
    if not in_settings and not (folder / _TEMPLATE_FILE).is_file():
        return None
    return ChatTemplate(folder)


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise BackendUnavailable(
            "the tokenizer's chat template is applied by transformers, which is not installed; pip install "
            '"qsparse-moe[hf]", or generate with --prompt'
        ) from None
