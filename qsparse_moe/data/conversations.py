"""Conversations as records of a source: what a record must hold, and the conversation as the text of a document."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Message = dict[str, Any]
"""One turn of a conversation: ``role`` (``system``, ``user``, ``assistant``, or ``tool``), ``content``, and what else a
template reads."""

Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""Names of roles in the form of ShareGPT."""


class Rendering(NamedTuple):
    """A conversation as text."""

    text: str
    answers: tuple[Span, ...]
    """The parts that the assistant writes, each with the token that ends its turn."""


class Conversation(str):
    """A conversation as the text of a document: its messages as JSON, the same for every template.

    A string like other documents, so that its digest decides the side of the split and enters the fingerprint.
    """

    rendering: Rendering
    """The conversation as the chat template writes it."""
    counted: str
    """The text whose bytes count in bits per byte: that of the answers, or of all messages."""


def messages_json(value: object, column: str, place: str) -> tuple[str, str]:
    """Return the messages of a record as JSON, and its problem; one of the two is empty.

    A message has ``role`` and ``content``, as in OpenAI's files, or ``from`` and ``value``, as in those of ShareGPT.
    """
    if not isinstance(value, list) or not value:
        shown = type(value).__name__ if not isinstance(value, list) else "an empty list"
        return "", (
            f"{place}: column {column!r} holds {shown}, and a conversation must be a list of messages with role and "
            "content; correct the record, or name the column that holds the messages"
        )
    messages = []
    for index, item in enumerate(value):
        message, problem = _message(item)
        if problem:
            return "", f"{place}: message {index} of column {column!r} {problem}; correct the record"
        messages.append(message)
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "", f"{place}: column {column!r} holds half of a surrogate pair, and text must be Unicode; remove it"
    return text, ""


def _message(item: object) -> tuple[Message, str]:
    """Return one message in OpenAI's form, and its problem."""
    if not isinstance(item, dict):
        return {}, f"is {type(item).__name__}, and it must be an object with role and content"
    if "role" not in item and "from" in item:
        rest = {key: value for key, value in item.items() if key not in ("from", "value")}
        item = {"role": _ROLES.get(str(item["from"]), item["from"]), "content": item.get("value")} | rest
    # Parquet has every key in every message.
    message = {key: value for key, value in item.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        return {}, "has no role, and it must be a text such as user or assistant"
    content = _content(message.get("content"))
    if content is None:
        # A call of a tool stands in place of text.
        if role == "assistant" and message.get("tool_calls"):
            return message, ""
        return {}, f"(role {role}) has no text in content, and content must be text"
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        return {}, "(role assistant) is an empty answer, and an answer must have text"
    return message | {"content": content}, ""


def _content(content: Any) -> str | None:
    """Return the text of a message's content, which OpenAI also writes as a list of parts; None if it is no text."""
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return content if isinstance(content, str) else None
