"""The messages of a record: every form that is read, what is filled in, and what is no conversation."""

from __future__ import annotations

import json
import logging

import pytest

from qsparse_moe.data.chat import ChatCounts, ChatSource
from qsparse_moe.data.conversations import messages_json

CALL = [{"function": {"name": "f"}}]


def read(*messages):
    text, problem = messages_json(list(messages), "talk", "here")
    assert not problem
    return json.loads(text)


@pytest.mark.parametrize(
    ("sender", "role"),
    [("human", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("system", "system"), ("tool", "tool")],
)
def test_senders_of_sharegpt_are_roles(sender, role):
    assert read({"from": sender, "value": "a", "note": 1}) == [{"role": role, "content": "a", "note": 1}]


def test_a_message_with_a_role_is_in_openais_form_whatever_else_it_has():
    message = {"role": "user", "content": "a", "from": "gpt", "value": "b"}
    assert read(message) == [message]


@pytest.mark.parametrize("content", [None, "", "  "])
def test_a_call_of_a_tool_stands_in_place_of_an_answer(content):
    message = {"role": "assistant", "content": content, "tool_calls": CALL}
    assert read(message) == [{name: value for name, value in message.items() if value is not None}]


def test_what_only_an_answer_must_have_other_roles_may_lack():
    assert read({"role": "user", "content": ""}, {"role": "system", "content": " "}) == [
        {"role": "user", "content": ""},
        {"role": "system", "content": " "},
    ]
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert read({"role": "assistant", "content": parts}) == [{"role": "assistant", "content": "a b"}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": " "}, r"(role assistant) is an empty answer, and an answer must have text"),
        ({"role": "assistant", "content": "", "tool_calls": []}, r"(role assistant) is an empty answer"),
        ({"role": "user", "tool_calls": CALL}, "(role user) has no text in content"),
        ({"role": "user", "content": []}, "(role user) has no text in content"),
        ({"role": "user", "content": 7}, "(role user) has no text in content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
            "(role user) has no text in content",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]},
            "(role user) has no text in content",
        ),
        ({"role": "user", "content": [{"type": "image", "text": "a"}]}, "(role user) has no text in content"),
        ({"role": "", "content": "a"}, "has no role, and it must be a text"),
        ({"role": 1, "content": "a"}, "has no role, and it must be a text"),
        (7, "is int, and it must be an object with role and content"),
    ],
)
def test_a_message_that_cannot_be_read_is_named_by_its_place(message, problem):
    text, found = messages_json([{"role": "user", "content": "a"}, message], "talk", "here")
    assert text == "" and found.startswith(f"here: message 1 of column 'talk' {problem}")
    assert found.endswith("correct the record")


def test_numbers_of_conversations_are_reported_only_where_some_were_too_long_and_begin_again(caplog):
    counts = ChatCounts(conversations=9)
    source = ChatSource(type("Chat", (), {"sequence_length": 15})(), counts)
    with caplog.at_level(logging.WARNING):
        source.log_pass("data.sources.0")
        assert not caplog.records and counts == ChatCounts(0, 0, 0)
        for cut, dropped in ((1, 0), (0, 2)):
            counts.conversations, counts.cut, counts.dropped = 9, cut, dropped
            assert counts.as_dict() == {"conversations": 9, "cut": cut, "dropped": dropped}
            source.log_pass("data.sources.0")
            assert counts == ChatCounts(0, 0, 0)
    longer = (
        "data.sources.0: of 9 conversations, {} are longer than data.sequence_length + 1 = 16 tokens and were cut, "
    )
    assert caplog.messages == [
        longer.format(1) + "and 0 were left out (data.chat.too_long)",
        longer.format(0) + "and 2 were left out (data.chat.too_long)",
    ]
