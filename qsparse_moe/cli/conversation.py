"""``qsparse-moe generate --interactive``: a line of the user, an answer of the model, and so on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

import typer

from qsparse_moe.cli.generated_text import Settings, open_stream, report_speed

if TYPE_CHECKING:
    from qsparse_moe.data.chat_template import ChatTemplate
    from qsparse_moe.data.conversations import Message
    from qsparse_moe.inference.generator import Generator
    from qsparse_moe.inference.sequences import Generation


def converse(generator: Generator, template: ChatTemplate | None, settings: Settings) -> None:
    """Answer the lines of standard input until it ends. Each answer is printed as it comes and ends with a line.

    A turn computes only the tokens that follow those of the turns before, unless these were cut or changed.
    """
    from qsparse_moe.inference.prompt_cache import PromptCache

    conversation: _Conversation = _Chat(generator, template) if template is not None else _Text(generator)
    # The model has learned to end an answer as the template does, which need not be with the document token.
    end = None if template is None else template.end_of_answer()
    ends = () if end is None else (end,)
    kept = PromptCache()
    turn = 0
    while (line := _read_line()) is not None:
        stream = open_stream(generator, [conversation.prompt(line)], settings, turn, reuse=kept, stop_tokens=ends)
        try:
            for step in stream:
                typer.echo(step[0].text, nl=False)
        # Also after Ctrl-C, so that the shell's prompt begins on a line of its own.
        finally:
            typer.echo()
        conversation.take(stream.results[0])
        report_speed(stream, settings)
        turn += 1


class _Conversation(Protocol):
    def prompt(self, line: str) -> list[int]:
        """Return the token ids to answer after the user's ``line``."""

    def take(self, answer: Generation) -> None:
        """Add the model's answer to the conversation."""


class _Chat:
    """Turns written by the chat template; the oldest are left out once the conversation is too long."""

    def __init__(self, generator: Generator, template: ChatTemplate) -> None:
        self._generator, self._template = generator, template
        self._messages: list[Message] = []

    def prompt(self, line: str) -> list[int]:
        self._messages.append({"role": "user", "content": line})
        ids = self._template.encode(self._messages)
        # The newest question stays even if it is too long alone: what happens to it is up to --overlong.
        while len(ids) > self._generator.max_length and len(self._messages) > 2:
            # A question with its answer, because templates require that the roles alternate.
            del self._messages[:2]
            ids = self._template.encode(self._messages)
        return ids

    def take(self, answer: Generation) -> None:
        self._messages.append({"role": "assistant", "content": answer.text})


class _Text:
    """One text that the user and the model continue in turn, for a tokenizer without a chat template.

    Its last ``max_length`` tokens are used; a line of more tokens is treated as any prompt of that length.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        # The model has learned texts that begin with this token, and prompts of generate begin with it too.
        self._ids = [generator.tokenizer.document_token]

    def prompt(self, line: str) -> list[int]:
        new = self._generator.tokenizer.encode(line)
        self._ids = [*self._ids, *new][-max(self._generator.max_length, len(new)) :]
        return self._ids

    def take(self, answer: Generation) -> None:
        self._ids = [*self._ids, *answer.token_ids]
        # The model has ended its document, so the next line begins another.
        if answer.stop_reason == "stop_token":
            self._ids.append(self._generator.tokenizer.document_token)


def _read_line() -> str | None:
    """Return the user's next line; None at the end of standard input. Only on a terminal a prompt is printed."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
