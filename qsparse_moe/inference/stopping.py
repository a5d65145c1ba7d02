"""Detect the end of a sequence, and turn its tokens into pieces of text that can be printed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import ArgumentError, without_fields

StopReason = Literal["stop_token", "stop_string", "max_tokens"]
"""The reason why a sequence ended: a stop token, which is not part of it; a stop string, which is not part of its text;
or the requested number of tokens."""

# Decoding returns this character for bytes that do not yet form a whole character.
_INCOMPLETE = "\ufffd"
# Tokens of the prompt that are decoded together with the first new ones, because some tokenizers decode a word
# differently at the beginning of a text.
_CONTEXT_TOKENS = 8
# A character of UTF-8 has at most four bytes, so at most three tokens wait for its last one.
_MOST_INCOMPLETE = 3


class TextStream:
    """Turns the tokens of one sequence into pieces of text that end with whole characters.

    Only the tokens since the last whole character are decoded again, so the cost of a token does not grow with the
    text.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._shown = self._num_whole()
        """Tokens whose text has been returned, or belongs to the prompt."""

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A text that really has U+FFFD at its end is held back as well, until the next token or the end.
        return "" if text.endswith(_INCOMPLETE) else self._take(text)

    def flush(self) -> str:
        """Return the text of the tokens that are left, with U+FFFD for incomplete characters."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        # The difference of two decoded texts: decoded alone, a token may lose the space before it.
        piece = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        del self._ids[:-_CONTEXT_TOKENS]
        self._shown = len(self._ids)
        return piece

    def _num_whole(self) -> int:
        """Return the number of prompt tokens up to its last whole character; all if its end is not valid text."""
        for missing in range(min(_MOST_INCOMPLETE, len(self._ids)) + 1):
            num = len(self._ids) - missing
            if not self._tokenizer.decode(self._ids[:num]).endswith(_INCOMPLETE):
                return num
        return len(self._ids)


class StopStrings:
    """Cuts a stream of text where the first of some strings begins, even if the string is split over several pieces.

    Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Search for ``strings``, which ``check_stop_strings`` has accepted."""
        self._strings = tuple(strings)
        self._held = ""
        self.found = False
        """Whether a stop string has come; nothing is returned after it."""

    def push(self, piece: str) -> str:
        """Return the text that certainly comes before any stop string."""
        text = self._held + piece
        places = [place for place in (text.find(string) for string in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        # The longest possible beginning of any stop string is held back until the next piece decides.
        sure = len(text) - max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[sure:]
        return text[:sure]

    def flush(self) -> str:
        """Return the text that was held back: the sequence has ended and no stop string can come."""
        text, self._held = self._held, ""
        return text


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raise ConfigError if a stop string is empty: it would end every text before its first character."""
    if any(not string for string in strings):
        raise ArgumentError(
            f"{{stop}} ({without_fields(list(strings))}) must hold strings of at least one character, "
            "because an empty one ends every text at once; remove it"
        )


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``string``."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
