"""Keep the keys and values of a conversation, so that each of its turns computes only the tokens that are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qsparse_moe.inference.kv_cache import KeyValueCache


class PromptCache:
    """The keys and values of one sequence, reused by the next prompt as far as it begins with the same tokens.

    They are computed again where they cannot be reused: after an earlier token has changed, from that token on; once
    older tokens have made way for newer ones, all of them.
    """

    def __init__(self) -> None:
        self._cache: KeyValueCache | None = None
        self._tokens: list[int] = []

    @property
    def is_allocated(self) -> bool:
        """True once its memory has been taken."""
        return self._cache is not None

    def begin(self, prompt: Sequence[int], allocate: Callable[[], KeyValueCache]) -> tuple[KeyValueCache, int]:
        """Return the cache, rewound to the tokens of ``prompt`` that it holds, and their number.

        At least the last token is left to compute, because its logits are needed.

        Args:
            prompt: at least one token.
            allocate: returns an empty cache for one sequence; called once.
        """
        if self._cache is None:
            self._cache = allocate()
        cache = self._cache
        # Slot p holds position p only until the first token has been replaced.
        has_slid = len(self._tokens) > cache.capacity
        reused = 0 if has_slid or len(prompt) > cache.capacity else _common_prefix(self._tokens, prompt[:-1])
        # The slots behind this position keep their old values, which the mask hides until they are overwritten.
        cache.positions_B.fill_(reused)
        self._tokens = list(prompt[:reused])
        return cache, reused

    def extend(self, tokens: Sequence[int]) -> None:
        """Record that the keys and values of these tokens follow those held so far."""
        self._tokens.extend(tokens)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
