"""What a conversation gives to the model: the turns of a chat and a text in turns, each cut to the model's length."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from qsparse_moe.cli.conversation import _Chat, _Text, converse
from qsparse_moe.cli.generated_text import Settings
from qsparse_moe.inference.sampling import Sampling


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


class Answering:
    """A generator that answers every prompt with two pieces of text, and remembers what it was asked."""

    def __init__(self, *, fails=False):
        made = generator_of(99)
        self.max_length, self.tokenizer = made.max_length, made.tokenizer
        self.asked, self._fails = [], fails

    def stream(self, prompts, **settings):
        self.asked.append((prompts, settings))
        return self

    def __iter__(self):
        yield [SimpleNamespace(text="x")]
        if self._fails:
            raise KeyboardInterrupt
        yield [SimpleNamespace(text="y")]

    @property
    def results(self):
        return [answer("xy")]


def said(monkeypatch, generator, template, lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    converse(generator, template, Settings(Sampling(temperature=1.0), 7, ("z",), 5, False))


@pytest.mark.parametrize(("end", "stop_tokens"), [(None, ()), (0, (0,)), (42, (42,))])
def test_every_turn_has_a_seed_of_its_own_and_ends_as_the_template_does(monkeypatch, capsys, end, stop_tokens):
    generator, template = Answering(), Template()
    template.end_of_answer = lambda: end
    said(monkeypatch, generator, template, ["a", "b", "c"])
    assert [prompts for prompts, _ in generator.asked] == [
        [turns("u:a")],
        [turns("u:a m:xy u:b")],
        [turns("u:a m:xy u:b m:xy u:c")],
    ]
    settings = [settings for _, settings in generator.asked]
    assert [one["seed"] for one in settings] == [5, 6, 7]
    assert {one["stop_tokens"] for one in settings} == {stop_tokens}
    assert all((one["max_tokens"], one["stop"]) == (7, ("z",)) for one in settings)
    # One cache for the whole conversation.
    assert settings[0]["reuse"] is settings[1]["reuse"] is settings[2]["reuse"] is not None
    assert capsys.readouterr().out == "xy\nxy\nxy\n"


def test_an_empty_line_is_a_turn_too(monkeypatch, capsys):
    generator = Answering()
    said(monkeypatch, generator, None, ["", "b"])
    assert [prompts[0] for prompts, _ in generator.asked] == [[0], [0, *map(ord, "xyb")]]
    assert capsys.readouterr().out == "xy\nxy\n"


def test_an_answer_that_is_interrupted_ends_its_line(monkeypatch, capsys):
    generator = Answering(fails=True)
    with pytest.raises(KeyboardInterrupt):
        said(monkeypatch, generator, None, ["a", "b"])
    assert capsys.readouterr().out == "x\n" and len(generator.asked) == 1


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "> "), (False, "")])
def test_only_a_terminal_is_prompted_for_a_line(monkeypatch, capsys, is_terminal, shown):
    class Lines(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr(sys, "stdin", Lines("a\n"))
    converse(Answering(), None, Settings(Sampling(), 7, (), 0, False))
    assert capsys.readouterr().out == f"{shown}xy\n{shown}"
