"""The keys and values of earlier tokens, stored so that each token is computed only once.

L layers, B sequences, H key and value heads, S new tokens of a sequence (padded to the longest), P slots per sequence,
C channels per head. The token at position p lies in slot p % P: the cache holds the last P tokens of each sequence.

With latent attention there is one head, whose key is the vector from which the keys and values of all heads are
computed, followed by the rotated key that they share. Its values have no channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import cached_values, head_size, latent_sizes, num_kv_heads
from qsparse_moe.errors import ConfigError


class KeyValueCache:
    """Keys and values of every layer for a batch of sequences, allocated once.

    A token attends to the last P tokens of its sequence, itself included. A cache that slides drops older tokens; one
    that does not slide refuses a token that has no slot left.
    """

    def __init__(self, key_LBHPC: Tensor, value_LBHPC: Tensor, *, slides: bool) -> None:
        assert key_LBHPC.shape[:-1] == value_LBHPC.shape[:-1], (key_LBHPC.shape, value_LBHPC.shape)
        self.key_LBHPC = key_LBHPC
        """Keys after the rotation. The slice of a layer is contiguous."""
        self.value_LBHPC = value_LBHPC
        self.positions_B = torch.zeros(key_LBHPC.shape[1], dtype=torch.int64)
        """Number of tokens of each sequence so far, which is the position of its next token; on the CPU."""
        self.slides = slides
        """Whether a new token replaces the oldest one when all slots are taken."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        slides: bool = False,
    ) -> KeyValueCache:
        """Return an empty cache for ``batch`` sequences of at most ``capacity`` tokens."""
        latent = latent_sizes(config)
        heads = 1 if latent else num_kv_heads(config)
        channels = (latent.cached_size, 0) if latent else (head_size(config), head_size(config))
        shape = (config.num_layers, batch, heads, capacity)
        # Zeros, not torch.empty: a masked slot still enters the product of attention, and 0 * NaN is NaN.
        key, value = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in channels)
        return cls(key, value, slides=slides)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.key_LBHPC.shape[1]

    @property
    def capacity(self) -> int:
        """P, the number of slots per sequence."""
        return self.key_LBHPC.shape[3]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.key_LBHPC.nbytes + self.value_LBHPC.nbytes

    def check_space(self, new_B: Tensor) -> None:
        """Raise ConfigError unless ``new_B`` more tokens of each sequence have slots, or the cache slides."""
        needed = int((self.positions_B + new_B).max())
        if not self.slides and needed > self.capacity:
            raise ConfigError(
                f"the key-value cache holds {self.capacity} tokens per sequence, and a sequence has {needed}; make the "
                "cache larger with max_length, or let it slide"
            )

    def step(self, lengths_B: Tensor) -> CacheStep:
        """Return the step that stores the next ``lengths_B`` tokens of each sequence (at least 1 each) in every layer.

        Raises:
            ConfigError: a sequence has no slot left, and the cache does not slide.
        """
        self.check_space(lengths_B)
        return CacheStep.of(self, lengths_B)

    def advance(self, lengths_B: Tensor | int = 1) -> None:
        """Count the tokens that every layer has stored; called once after the last layer."""
        self.positions_B += lengths_B

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but these, given by their place in the batch in ascending order."""
        assert list(sequences) == sorted(set(sequences)), sequences
        # In ascending order a sequence moves only to a place that has already been read.
        for place, source in enumerate(sequences):
            if place != source:
                self.key_LBHPC[:, place] = self.key_LBHPC[:, source]
                self.value_LBHPC[:, place] = self.value_LBHPC[:, source]
        self.positions_B = self.positions_B[list(sequences)]
        self.key_LBHPC = self.key_LBHPC[:, : len(sequences)]
        self.value_LBHPC = self.value_LBHPC[:, : len(sequences)]


def cache_bytes(config: ModelConfig, *, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """Return the number of bytes that ``KeyValueCache.allocate`` allocates."""
    return config.num_layers * batch * capacity * cached_values(config) * dtype.itemsize


@dataclass(frozen=True)
class CacheStep:
    """The new tokens of one forward pass, with the slots that store them and the tokens that each attends to."""

    cache: KeyValueCache
    positions_BS: Tensor
    """Positions of the new tokens, on the device; they continue over the padding."""
    num_read: int
    """Number of slots that hold a token of some sequence before (prefill) or after (decode) this step."""
    mask_B1SK: Tensor | None
    """True where a query attends to a key; None: to the new tokens only, causally."""
    source_BP: Tensor | None
    """The new token that each slot receives, -1 for an unchanged slot; None if each sequence has one new token."""

    @classmethod
    def of(cls, cache: KeyValueCache, lengths_B: Tensor) -> CacheStep:
        """See ``KeyValueCache.step``."""
        device, longest = cache.key_LBHPC.device, int(lengths_B.max())
        before_B1 = cache.positions_B[:, None]
        positions_BS = before_B1 + torch.arange(longest)
        # Only slots that hold a token are read. The positions lie on the CPU, so no device is waited for.
        filled = min(int(cache.positions_B.max()), cache.capacity)
        # Decode is the frequent case: one slot per sequence is written in place, and no key is copied.
        if longest == 1:
            filled = min(int(cache.positions_B.max()) + 1, cache.capacity)
            mask = (torch.arange(filled) <= before_B1)[:, None, None]
            return cls(cache, positions_BS.to(device), filled, mask.to(device), None)
        # A prompt may be longer than the cache: each slot takes the last of the new tokens that map to it.
        after_BP = _positions_in_slots(before_B1 + lengths_B[:, None], cache.capacity)
        source_BP = torch.where(after_BP >= before_B1, after_BP - before_B1, -1)
        if filled or longest > cache.capacity:
            held_BK = _positions_in_slots(before_B1, cache.capacity)[:, :filled]
            mask_B1SK = _visible(positions_BS, torch.cat((held_BK, positions_BS), dim=1), cache.capacity).to(device)
        else:
            mask_B1SK = None
        return cls(cache, positions_BS.to(device), filled, mask_B1SK, source_BP.to(device))

    def layers(self) -> list[LayerCache]:
        """Return the view of this step for every layer, in order."""
        return [LayerCache(self, layer) for layer in range(len(self.cache.key_LBHPC))]


@dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer in one step; see ``model.attention.AttentionCache``."""

    step: CacheStep
    layer: int

    def update(self, key_BHSC: Tensor, value_BHSC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values of the new tokens; return those that the queries attend to, and the mask."""
        cache, step = self.step.cache, self.step
        stored = (cache.key_LBHPC[self.layer], cache.value_LBHPC[self.layer])
        new = (key_BHSC, value_BHSC)
        if step.source_BP is None:
            slots_B = step.positions_BS[:, 0] % cache.capacity
            sequences_B = torch.arange(cache.batch, device=slots_B.device)
            for held, part in zip(stored, new, strict=True):
                held[sequences_B, :, slots_B] = part[:, :, 0].to(held.dtype)
            # The cache has the dtype of its engine, often fp32, and the model may compute in bf16.
            key, value = (held[:, :, : step.num_read].to(key_BHSC.dtype) for held in stored)
            return key, value, step.mask_B1SK
        attended = new
        if step.num_read:
            # Older tokens are copied, because the first new ones attend to tokens that the last new ones overwrite.
            key, value = (
                torch.cat((held[:, :, : step.num_read].to(part.dtype), part), dim=2)
                for held, part in zip(stored, new, strict=True)
            )
            attended = (key, value)
        # After the concatenation above, which has to read the tokens that these overwrite.
        for held, part in zip(stored, new, strict=True):
            _put(held, part, step.source_BP)
        return *attended, step.mask_B1SK


def _positions_in_slots(num_tokens_B1: Tensor, capacity: int) -> Tensor:
    """Return ``(B, P)``: the position of each slot's token after ``num_tokens`` tokens; negative for an empty slot."""
    last_B1 = num_tokens_B1 - 1
    # The remainder of torch is never negative here, so a slot behind the last token gets the position of the round
    # before.
    return last_B1 - (last_B1 - torch.arange(capacity)) % capacity


def _visible(queries_BS: Tensor, keys_BK: Tensor, capacity: int) -> Tensor:
    """Return ``(B, 1, S, K)`` bool: a query attends to itself and the ``capacity - 1`` tokens before it."""
    keys_B1K = keys_BK[:, None]
    distance_BSK = queries_BS[:, :, None] - keys_B1K
    return ((keys_B1K >= 0) & (distance_BSK >= 0) & (distance_BSK < capacity))[:, None]


def _put(held_BHPC: Tensor, new_BHSC: Tensor, source_BP: Tensor) -> None:
    index_BHPC = source_BP.clamp(min=0)[:, None, :, None].expand(held_BHPC.shape)
    taken = new_BHSC.to(held_BHPC.dtype).gather(2, index_BHPC)
    # Written in place, because the layers share one allocation. Clamped indices above only keep gather within range.
    torch.where((source_BP >= 0)[:, None, :, None], taken, held_BHPC, out=held_BHPC)
