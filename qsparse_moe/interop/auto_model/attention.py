"""The product of queries with keys and values through transformers' attention interface.

B batch, H heads, G key and value heads, S new tokens, K tokens that are attended to, C channels per head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsparse_moe.interop.auto_model.library import ALL_ATTENTION_FUNCTIONS
from qsparse_moe.model.attention import Attend


@dataclass(frozen=True)
class AttentionCall:
    """Arguments that the attention of all layers shares in one forward pass."""

    mask: Any
    """The mask in the form of the implementation; None: plain causal attention."""
    cache: Any
    """A ``Cache`` of transformers; None: no earlier tokens, and nothing is stored."""
    options: dict[str, Any]
    """Arguments of the implementation, which a server may have passed to the model."""
    weights: list[Tensor | None] = field(default_factory=list)
    """The attention weights of every layer; None from an implementation that does not form them."""


class InterfaceAttention(nn.Module):
    """One layer's call of the implementation that ``config._attn_implementation`` names. It has no parameters.

    Implementations receive this module and read its attributes, as they read those of transformers' own models.
    """

    def __init__(self, config: Any, layer: int, scale: float) -> None:
        """``scale`` is the factor of the scores."""
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = scale
        self.is_causal = True

    def forward(
        self, query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(B, S, H * C)``, and the weights ``(B, H, S, K)`` if the implementation forms them."""
        if call.cache is not None:
            key_BGSC, value_BGSC = call.cache.update(key_BGSC, value_BGSC, self.layer_idx)
        # Looked up in every call: a server may register its implementation, and set it, after the model was loaded.
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed_BSHC, weights = attention(
            self, query_BHSC, key_BGSC, value_BGSC, call.mask, dropout=0.0, scaling=self.scaling, **call.options
        )
        return mixed_BSHC.flatten(2), weights


def attends(layers: Iterable[nn.Module], call: AttentionCall) -> list[Attend]:
    """Return one function per layer, which ``Transformer.run_layers`` calls for the attention of that layer."""

    def of(layer: nn.Module) -> Attend:
        def attend(query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
            mixed_BSX: Tensor
            mixed_BSX, weights = layer(query_BHSC, key_BHSC, value_BHSC, call)
            call.weights.append(weights)
            return mixed_BSX

        return attend

    return [of(layer) for layer in layers]


def eager_attention(
    module: Any,
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    mask_B1SK: Tensor | None,
    *,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention written out, ``(B, S, H, C)``, and its weights: the implementation ``eager``.

    ``mask_B1SK`` is added to the scores. transformers always forms it for this implementation, so None means that every
    query attends to every key, as a single new token does.
    """
    key_BHKC, value_BHKC = (
        part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key_BGKC, value_BGKC)
    )
    scores_BHSK = query_BHSC @ key_BHKC.transpose(2, 3) * scaling
    if mask_B1SK is not None:
        scores_BHSK = scores_BHSK + mask_B1SK
    wide = torch.promote_types(query_BHSC.dtype, torch.float32)
    weights_BHSK = scores_BHSK.softmax(-1, dtype=wide).to(query_BHSC.dtype)
    return (weights_BHSK @ value_BHKC).transpose(1, 2), weights_BHSK
