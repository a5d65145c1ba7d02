"""Conversations as text and token ids, by the chat template of a Hugging Face tokenizer.

Templates come from the hub and are run by transformers: in its sandbox, which is kept up against escapes, and with the
result that every other program gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from qsparse_moe.data.conversations import Message, Rendering, Span
from qsparse_moe.data.local_files import short
from qsparse_moe.data.tokenizer import TEMPLATE_FILE, TextTokenizer
from qsparse_moe.errors import BackendUnavailable, DataError

_SETTINGS_FILE = "tokenizer_config.json"


class TemplateTokens(NamedTuple):
    """The tokens of a rendered conversation."""

    ids: list[int]
    offsets: list[Span]
    """The part of the text that each token covers."""


class UnknownAnswers(DataError):
    """The template does not show where the answers of the assistant are."""


class ChatTemplate:
    """Writes a conversation as the token ids that a model was trained on, up to where the assistant answers."""

    def __init__(self, folder: Path, template: str | None = None) -> None:
        """``folder`` holds a ``tokenizer.json``; ``template`` replaces the chat template in it."""
        self._folder = folder
        library = _transformers()
        try:
            self._tokenizer: Any = library.PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # of many types
            raise DataError(
                f"{folder}: transformers cannot open this tokenizer ({short(error)}), and it applies the chat "
                "template; save the tokenizer again with save_pretrained"
            ) from error
        if template is not None:
            self._tokenizer.chat_template = template

    @cached_property
    def source(self) -> str:
        """The template itself."""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:  # several templates by name, none of which is the default
            raise DataError(
                f"{self._folder}: its chat template cannot be chosen ({error}); name a Jinja file in data.chat.template"
            ) from error

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

    def render(self, messages: Sequence[Message], *, finds_answers: bool = True) -> Rendering:
        """Return the conversation as text, with the answers in it, unless ``finds_answers`` is False.

        The answers are what the template's own ``{% generation %}`` blocks mark, or else what every message of the
        assistant adds to the text of the messages before it.

        Raises:
            UnknownAnswers: the template has no such blocks, and the text of the first messages is not how the whole
                text begins.
            DataError: the template cannot write these messages; with its own reason.
        """
        if finds_answers and self._marks_answers:
            text, spans = self._rendered(messages, tracks=True)
            return Rendering(text, tuple((begin, end) for begin, end in spans if begin < end))
        text, _ = self._rendered(messages)
        if not finds_answers:
            return Rendering(text, ())
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return Rendering(text, tuple(self._span(messages, index, text) for index in answers))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of the messages and of the beginning of the assistant's answer.

        Raises:
            DataError: the template cannot write these messages; with its own reason.
        """
        return self._rendered(messages, prompts=True)[0]

    def tokenize(self, texts: Sequence[str]) -> list[TemplateTokens]:
        """Return the tokens of rendered conversations; special tokens are found where the template spells them."""
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        return [TemplateTokens(*pair) for pair in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(
            index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(self._tokenizer.all_special_ids)

    def end_of_answer(self) -> int | None:
        """Return the special token with which the template ends an answer; None if it ends otherwise."""
        try:
            text, answers = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except DataError:
            return None
        (tokens,) = self.tokenize([text])
        inside = [i for i, (begin, end) in zip(*tokens, strict=True) if answers and begin < answers[-1][1] and end]
        return inside[-1] if inside and inside[-1] in self.special_ids else None

    @cached_property
    def _marks_answers(self) -> bool:
        # The tag may control the white space around it, and a space beside its name may be left out.
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return dict(self._tokenizer.special_tokens_map)

    @cached_property
    def _spellings(self) -> tuple[str, ...]:
        return tuple(self._tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))

    def _span(self, messages: Sequence[Message], index: int, text: str) -> Span:
        before, _ = self._rendered(messages[:index], prompts=True)
        # Rendering takes most of the time of reading conversations, and the last answer usually ends them.
        after = text if index == len(messages) - 1 else self._rendered(messages[: index + 1])[0]
        if not (text.startswith(after) and after.startswith(before) and len(before) < len(after)):
            raise UnknownAnswers(
                f"the chat template of {self._folder} does not show where answer {index} (a message of role assistant) "
                "is: it writes the first messages of a conversation otherwise when others follow, or begins an answer "
                "otherwise than it prompts for one, and the loss on answers must know them. Put {% generation %} and "
                "{% endgeneration %} around the answer in a copy of the template and name it in data.chat.template, or "
                "set data.chat.loss=all"
            )
        # White space after the token that ends the turn belongs to the template, not to the answer.
        shown = after.rstrip()
        return len(before), len(shown) if shown.endswith(self._spellings) else len(after)

    def _rendered(
        self, messages: Sequence[Message], *, prompts: bool = False, tracks: bool = False
    ) -> tuple[str, list[Span]]:
        render = import_module("transformers.utils.chat_template_utils").render_jinja_template
        # As apply_chat_template does: templates would write None where a key is there without a value.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            (text,), spans = render(
                conversations=[plain],
                chat_template=self.source,
                return_assistant_tokens_mask=tracks,
                add_generation_prompt=prompts,
                **self._special_tokens,
            )
        except Exception as error:  # jinja2's errors of many types, and those that the template raises itself
            raise DataError(f"the chat template of {self._folder} cannot write this conversation ({error})") from error
        return text, list(spans[0]) if tracks else []


def load_chat_template(tokenizer: TextTokenizer, template: str | None = None) -> ChatTemplate | None:
    """Return the chat template of a tokenizer; None if it has none, as for bytes.

    ``template`` replaces the tokenizer's own.

    Raises:
        BackendUnavailable: there is a template, and transformers is not installed.
    """
    if not tokenizer.files:
        return None
    folder = tokenizer.files[0].parent
    return ChatTemplate(folder, template) if template is not None or has_chat_template(folder) else None


def has_chat_template(folder: Path) -> bool:
    """Return whether the folder of a tokenizer has a chat template. Needs no transformers."""
    settings = folder / _SETTINGS_FILE
    in_settings = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    # transformers reads a template from either file, and newer versions write the separate one.
    return bool(in_settings) or (folder / TEMPLATE_FILE).is_file()


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise BackendUnavailable(
            "the tokenizer's chat template is applied by transformers, which is not installed; pip install "
            '"qsparse-moe[hf]" (generate needs none with --prompt)'
        ) from None
