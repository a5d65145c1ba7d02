"""Run the modules of the training model with a key-value cache: prefill, and the reference decode engine.

B sequences, S tokens of a sequence (padded to the longest), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.weights import head_format, own_format
from qsparse_moe.kernels.row_product.stored import WeightFormat
from qsparse_moe.model.rope import rotation_at
from qsparse_moe.model.transformer import Transformer


@torch.inference_mode()
def prefill(model: Transformer, tokens: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
    """Compute all tokens of each sequence at once, store their keys and values, and return the logits after the last.

    If the cache already holds tokens, the new ones continue from them.

    Args:
        model: in evaluation mode, on the device of the cache.
        tokens: at least one token per sequence; the sequences may differ in length.
        cache: the cache of these sequences.

    Returns:
        ``(B, V)`` fp32 on the model's device; ids that the model hides at -inf.

    Raises:
        ConfigError: a sequence has no slot left, and the cache does not slide.
    """
    assert len(tokens) == cache.batch and all(tokens), "every sequence of the cache needs a token"
    lengths_B = torch.tensor([len(sequence) for sequence in tokens])
    # Any id will do as padding: it comes after the tokens of its sequence, which attend backwards only, and the cache
    # does not store its keys and values.
    tokens_BS = torch.zeros(len(tokens), int(lengths_B.max()), dtype=torch.int64)
    for row_S, sequence in zip(tokens_BS, tokens, strict=True):
        row_S[: len(sequence)] = torch.as_tensor(sequence)
    return _forward(model, tokens_BS, lengths_B, cache)


class TorchDecode:
    """Decodes with the modules of the training model, on any device, in any dtype, for any model."""

    name = "torch"
    cache_dtype: torch.dtype | None = None

    def __init__(
        self, model: Transformer, weight_format: WeightFormat | None = None, head: WeightFormat | None = None
    ) -> None:
        """``model`` has been rounded to ``weight_format`` and its head to ``head``; None: its own formats."""
        self.model = model
        self._formats = (
            weight_format or own_format(model),
            head_format(model, weight_format or own_format(model), head),
        )

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """See ``DecodeEngine.decode``."""
        return _forward(self.model, tokens_B[:, None], torch.ones_like(tokens_B), cache)

    def figures(self) -> dict[str, Any]:
        """Return the number formats to which the weights have been rounded; all those of experts in use are read."""
        weights, head = self._formats
        return {"weights": weights, "head": head}


def _forward(model: Transformer, tokens_BS: Tensor, lengths_B: Tensor, cache: KeyValueCache) -> Tensor:
    """Return ``(B, V)``: the logits after the last token of each sequence, which padding does not affect."""
    assert not model.training, "a cache requires evaluation mode"
    step, device = cache.step(lengths_B), model.embedding.weight.device
    hidden_BSD = model.embedding(tokens_BS.to(device))
    rotation = rotation_at(step.positions_BS, model.config, hidden_BSD.dtype)
    for block, layer_cache in zip(model.blocks(), step.layers(), strict=True):
        hidden_BSD = block(hidden_BSD, rotation, False, cache=layer_cache).hidden_BSD
    # Only after the last layer: every layer computes its slots from the same number of earlier tokens.
    cache.advance(lengths_B)
    # The head reads the last tokens alone: logits of a whole prompt would take V values per token.
    last_BD = hidden_BSD[torch.arange(len(lengths_B)), lengths_B - 1]
    return model.logits(last_BD).float()
