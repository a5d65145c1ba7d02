"""The training model's own parts with a key-value cache: prefill, and the decode engine that is the definition.

B sequences, S tokens of a sequence (padded to the longest), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.config.shapes import head_size
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.model.rope import rotation_at
from qsparse_moe.model.transformer import Transformer


@torch.inference_mode()
def prefill(model: Transformer, tokens: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
    """Compute all tokens of each sequence at once, store their keys and values, return the logits after the last.

    A cache that holds tokens already goes on from them.

    Args:
        model: in evaluation mode, on the device of the cache.
        tokens: of each sequence, at least one; the sequences may differ in length.
        cache: of these sequences.

    Returns:
        ``(B, V)`` fp32 on the model's device; ids that the model hides at -inf.

    Raises:
        ConfigError: a sequence has no slot left, and the cache does not slide.
    """
    assert len(tokens) == cache.batch and all(tokens), "every sequence of the cache needs a token"
    lengths_B = torch.tensor([len(sequence) for sequence in tokens])
    tokens_BS = torch.zeros(len(tokens), int(lengths_B.max()), dtype=torch.int64)
    for row_S, sequence in zip(tokens_BS, tokens, strict=True):
        row_S[: len(sequence)] = torch.as_tensor(sequence)
    return _forward(model, tokens_BS, lengths_B, cache)


class TorchDecode:
    """Decodes with the training model's own parts: on any device, in any dtype, for any model."""

    name = "torch"
    cache_dtype: torch.dtype | None = None

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """See ``DecodeEngine.decode``."""
        return _forward(self.model, tokens_B[:, None], torch.ones_like(tokens_B), cache)

    def figures(self) -> dict[str, Any]:
        """There are none: every weight of an expert in use is read."""
        return {}


def _forward(model: Transformer, tokens_BS: Tensor, lengths_B: Tensor, cache: KeyValueCache) -> Tensor:
    """``(B, V)``: the logits after the last token of each sequence. Padding behind it changes nothing before it."""
    assert not model.training, "a cache goes with evaluation mode"
    step, device = cache.step(lengths_B), model.embedding.weight.device
    hidden_BSD = model.embedding(tokens_BS.to(device))
    rotation = rotation_at(step.positions_BS, head_size(model.config), model.config.rope_theta, hidden_BSD.dtype)
    for block, layer_cache in zip(model.blocks(), step.layers(), strict=True):
        hidden_BSD = block(hidden_BSD, rotation, None, False, cache=layer_cache).hidden_BSD
    cache.advance(lengths_B)
    last_BD = hidden_BSD[torch.arange(len(lengths_B)), lengths_B - 1]
    return model.logits(last_BD).float()
