"""What a conversation gives to the model: the turns of a chat and a text in turns, each cut to the model's length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qsparse_moe.cli.conversation import _Chat, _Text


class Template:
    """One token per character of a turn, and one for its role: 1 for the user, 2 for the model."""

    def __init__(self):
        self.roles = []

    def encode(self, messages):
        self.roles.append([message["role"] for message in messages])
        return [
            token
            for message in messages
            for token in (1 if message["role"] == "user" else 2, *map(ord, message["content"]))
        ]


def generator_of(max_length):
    tokenizer = SimpleNamespace(document_token=0, encode=lambda text: list(map(ord, text)))
    return SimpleNamespace(max_length=max_length, tokenizer=tokenizer)


def answer(text, stop_reason="max_tokens"):
    return SimpleNamespace(text=text, token_ids=tuple(map(ord, text)), stop_reason=stop_reason)


def turns(text):
    """Return the token ids of ``u:ab m:c``, a turn of the user and one of the model."""
    words = [word.split(":") for word in text.split()]
    return [token for role, said in words for token in (1 if role == "u" else 2, *map(ord, said))]


@pytest.mark.parametrize(
    ("max_length", "prompts"),
    [
        (99, ["u:aa", "u:aa m:b u:c", "u:aa m:b u:c m:dd u:e"]),
        # The third prompt has 12 tokens: up to its own length nothing is left out.
        (12, ["u:aa", "u:aa m:b u:c", "u:aa m:b u:c m:dd u:e"]),
        (11, ["u:aa", "u:aa m:b u:c", "u:c m:dd u:e"]),
        (7, ["u:aa", "u:aa m:b u:c", "u:c m:dd u:e"]),
        (6, ["u:aa", "u:c", "u:e"]),
        # A line by itself is never cut: the generator refuses, truncates or slides it.
        (1, ["u:aa", "u:c", "u:e"]),
    ],
)
def test_a_chat_leaves_out_its_oldest_pairs_of_turns_and_always_begins_with_the_user(max_length, prompts):
    template = Template()
    chat = _Chat(generator_of(max_length), template)
    for line, said, want in zip(("aa", "c", "e"), ("b", "dd", "f"), prompts, strict=True):
        assert chat.prompt(line) == turns(want)
        chat.take(answer(said))
    for roles in template.roles:
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_a_text_continues_with_every_line_and_answer_and_keeps_its_last_tokens():
    text = _Text(generator_of(5))
    assert text.prompt("ab") == [0, *map(ord, "ab")]
    text.take(answer("c"))
    assert text.prompt("d") == [0, *map(ord, "abcd")]
    text.take(answer("e"))
    assert text.prompt("f") == [*map(ord, "bcdef")]
    # A document that has ended begins a new one; a line longer than the model's length is left to the generator.
    text.take(answer("g", "stop_token"))
    assert text.prompt("h") == [*map(ord, "efg"), 0, ord("h")]
    assert text.prompt("ijklmn") == [*map(ord, "ijklmn")]
