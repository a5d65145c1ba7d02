"""A sequence during its generation, and the values returned for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.inference.stopping import StopReason, StopStrings, TextStream


@dataclass(frozen=True)
class NewToken:
    """The token and text that one step adds to one sequence."""

    index: int
    """Number of the prompt, from 0."""
    token_id: int | None
    """None if the sequence ended at a stop token, which is not part of it."""
    log_probability: float | None
    """Natural logarithm of the model's own probability, before penalty, temperature and cuts; None as above."""
    text: str
    """The text that is now final: it ends with a whole character and contains no part of a stop string."""
    stop_reason: StopReason | None
    """None while the sequence continues."""


@dataclass(frozen=True)
class Generation:
    """A generated sequence."""

    text: str
    """The text without the prompt, a stop token and a stop string."""
    token_ids: tuple[int, ...]
    """The generated ids, including those of a stop string."""
    log_probabilities: tuple[float, ...]
    """One per token; see ``NewToken``."""
    stop_reason: StopReason | None
    """None where generation was interrupted."""


class GrowingSequence:
    """The tokens and the text of one sequence so far."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        tokenizer: TextTokenizer,
        *,
        max_tokens: int,
        stop_tokens: Collection[int],
        stop_strings: Sequence[str],
    ) -> None:
        self.index = index
        self.prompt = tuple(prompt)
        self._max_tokens = max_tokens
        self._stop_tokens = stop_tokens
        self._text_stream = TextStream(tokenizer, prompt)
        self._stop_strings = StopStrings(stop_strings)
        self._token_ids: list[int] = []
        self._log_probabilities: list[float] = []
        self._pieces: list[str] = []
        self.stop_reason: StopReason | None = None

    def append(self, token: int, log_probability: float) -> NewToken:
        """Take the next token, unless it is a stop token, and return what it adds."""
        if token in self._stop_tokens:
            return self._added(None, None, self._rest("stop_token"))
        self._token_ids.append(token)
        self._log_probabilities.append(log_probability)
        piece = self._stop_strings.push(self._text_stream.push(token))
        if self._stop_strings.found:
            self.stop_reason = "stop_string"
        elif len(self._token_ids) == self._max_tokens:
            piece += self._rest("max_tokens")
        return self._added(token, log_probability, piece)

    def generation(self) -> Generation:
        """Return the sequence generated so far."""
        return Generation(
            "".join(self._pieces), tuple(self._token_ids), tuple(self._log_probabilities), self.stop_reason
        )

    def _rest(self, reason: StopReason) -> str:
        """End the sequence and return the text that was held back."""
        # The text of an incomplete character may complete a stop string, which then cuts it.
        rest = self._stop_strings.push(self._text_stream.flush())
        self.stop_reason = "stop_string" if self._stop_strings.found else reason
        return rest + self._stop_strings.flush()

    def _added(self, token: int | None, log_probability: float | None, piece: str) -> NewToken:
        self._pieces.append(piece)
        return NewToken(self.index, token, log_probability, piece, self.stop_reason)
