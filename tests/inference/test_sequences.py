"""One sequence during its generation: what each token adds, and what the end of the sequence brings out."""

from __future__ import annotations

import pytest

from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.inference.sequences import Generation, GrowingSequence, NewToken

STOP = 9
DOCUMENT = 256
HALF = 0xE2
"""The first byte of a character of three."""
REPLACED = "\ufffd"


def grown(ids, *, max_tokens=20, stop=(), prompt=(DOCUMENT,)):
    """Return the sequence after ``ids``, whose log-probabilities are -1, -2, ..., and what each of them added."""
    sequence = GrowingSequence(
        4, prompt, ByteTokenizer(), max_tokens=max_tokens, stop_tokens={DOCUMENT, STOP}, stop_strings=stop
    )
    return sequence, [sequence.append(token, -1.0 - place) for place, token in enumerate(ids)]


def test_every_token_adds_its_text_and_its_log_probability():
    sequence, added = grown(b"ab", prompt=(DOCUMENT, 65))
    assert added == [NewToken(4, 97, -1.0, "a", None), NewToken(4, 98, -2.0, "b", None)]
    assert (sequence.index, sequence.prompt) == (4, (DOCUMENT, 65))
    assert sequence.generation() == Generation("ab", (97, 98), (-1.0, -2.0), None)


@pytest.mark.parametrize("end", [STOP, DOCUMENT])
def test_a_stop_token_is_no_part_of_the_sequence_and_brings_out_the_text_that_was_held_back(end):
    sequence, added = grown([*b"aEN", end], stop=["END"])
    assert [one.text for one in added] == ["a", "", "", "EN"]
    assert added[-1] == NewToken(4, None, None, "EN", "stop_token")
    assert sequence.generation() == Generation("aEN", tuple(b"aEN"), (-1.0, -2.0, -3.0), "stop_token")


@pytest.mark.parametrize(
    ("ids", "max_tokens", "texts", "reason"),
    [
        ([*b"a", HALF], 2, ["a", REPLACED], "max_tokens"),
        ([*b"a", HALF, STOP], 20, ["a", "", REPLACED], "stop_token"),
        ([*b"a", HALF], 20, ["a", ""], None),
    ],
)
def test_an_incomplete_character_is_shown_at_the_end_only(ids, max_tokens, texts, reason):
    sequence, added = grown(ids, max_tokens=max_tokens)
    assert [one.text for one in added] == texts
    assert (sequence.generation().text, sequence.stop_reason) == ("".join(texts), reason)


@pytest.mark.parametrize(("ids", "max_tokens"), [([*b"ab", HALF], 3), ([*b"ab", HALF, STOP], 20)])
@pytest.mark.parametrize(("stop", "text"), [(REPLACED, "ab"), (f"b{REPLACED}", "a")])
def test_the_text_of_an_incomplete_character_may_complete_a_stop_string(ids, max_tokens, stop, text):
    sequence, added = grown(ids, max_tokens=max_tokens, stop=[stop])
    assert (added[-1].text, added[-1].stop_reason) == ("", "stop_string")
    assert sequence.generation() == Generation(text, (*b"ab", HALF), (-1.0, -2.0, -3.0), "stop_string")


def test_a_stop_string_that_ends_with_the_last_token_is_the_reason():
    sequence, added = grown(b"aEND", max_tokens=4, stop=["END"])
    assert added[-1] == NewToken(4, ord("D"), -4.0, "", "stop_string")
    assert sequence.generation() == Generation("a", tuple(b"aEND"), (-1.0, -2.0, -3.0, -4.0), "stop_string")


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_the_last_token_is_that_of_the_requested_number(max_tokens):
    _, added = grown(b"abc"[:max_tokens], max_tokens=max_tokens)
    assert [one.stop_reason for one in added] == [None] * (max_tokens - 1) + ["max_tokens"]
