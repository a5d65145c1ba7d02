"""Causal grouped-query attention. B batch, S sequence, H heads, C channels per head, D width."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import head_size, num_kv_heads
from qsparse_moe.kernels.onednn import Linear, linear
from qsparse_moe.model.rope import Rotation, rotate
from qsparse_moe.nn.runtime import SiteRuntime
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.stats import Stats


class Projection(Linear):
    """A linear map that rounds its weight to a number format when it is used; the stored weight is not rounded.

    A bias is not rounded, and is added to the result in the dtype of the input.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, in_features: int, out_features: int, weight_format: Literal["none", "ternary"], *, has_bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features)
        self.weight_format = weight_format
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*, in)`` to ``(*, out)``; the product is in the dtype of the weight."""
        weight = as_format(self.weight, self.weight_format)
        rounded = x.to(weight.dtype)
        y = linear(rounded, weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of the queries or of the keys: over the channels of every head, or over those of all heads together."""

    def forward(self, x_BHSC: Tensor) -> Tensor:
        """Return the normed heads; their statistics and products are those of ``torch.nn.RMSNorm``."""
        return norm_heads(x_BHSC, self.weight, self.eps)


def norm_heads(x_BHSC: Tensor, weight: Tensor, epsilon: float | None) -> Tensor:
    """Norm every head by itself, or the heads of a token together where ``weight`` has H * C elements."""
    if weight.numel() == x_BHSC.shape[-1]:
        return F.rms_norm(x_BHSC, weight.shape, weight, epsilon)
    together_BSX = F.rms_norm(rearrange(x_BHSC, "b h s c -> b s (h c)"), weight.shape, weight, epsilon)
    return rearrange(together_BSX, "b s (h c) -> b h s c", c=x_BHSC.shape[-1])


def _head_norm(config: ModelConfig, num_heads: int) -> HeadNorm | None:
    """Return the norm of ``num_heads`` heads; None if the model has none."""
    if config.qk_norm == "none":
        return None
    together = num_heads if config.qk_norm == "all_heads" else 1
    return HeadNorm(together * head_size(config), eps=config.norm_epsilon)


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, for evaluation: what generation gives to the attention of one layer."""

    def update(self, key_BHSC: Tensor, value_BHSC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values of the new tokens, and return what their queries attend to.

        Returns:
            Keys and values of K tokens, and the mask: true where a query attends to a key, broadcast to
            ``(B, H, S, K)``; None if the K tokens are the S new ones, with the plain causal mask.
        """


class Attend(Protocol):
    """The product of queries with keys and values, in place of this module's own; it has its own mask and cache."""

    def __call__(self, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
        """Return ``(B, S, H * C)`` for the new tokens; keys and values have fewer heads with grouped queries."""


class Attention(nn.Module):
    """Attention with two sparse sites: one before the joint query, key, and value projection, one before the output."""

    def __init__(self, config: ModelConfig, runtime: SiteRuntime) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = num_kv_heads(config)
        self.head_size = head_size(config)
        self.scale = self.head_size**-0.5
        """Factor of the scores."""
        width = self.num_heads * self.head_size
        weight_format = config.sparsity.quantization.weights
        # One matrix for queries, keys, and values, so that one product and one sparse input serve all three.
        bias = config.attention_bias
        joint_width = width + 2 * self.num_kv_heads * self.head_size
        self.qkv = Projection(config.hidden_size, joint_width, weight_format, has_bias=bias != "none")
        self.output = Projection(width, config.hidden_size, weight_format, has_bias=bias == "all")
        self.query_norm = _head_norm(config, self.num_heads)
        self.key_norm = _head_norm(config, self.num_kv_heads)
        self.input_site = runtime.make_site("attention_input", config.hidden_size, config.sparsity)
        self.output_site = runtime.make_site("attention_output", width, config.sparsity)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        *,
        with_stats: bool,
        cache: AttentionCache | None = None,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Stats, Stats]:
        """Return the attention output ``(B, S, D)`` and the statistics of the input site and of the output site.

        The mask is the plain causal one, or with a ``cache`` the one that the cache returns. ``attend`` replaces mask,
        cache, and product.
        """
        x_BSD, input_stats = self.input_site(x_BSD, with_stats=with_stats)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = rearrange(self.qkv(x_BSD), "b s (h c) -> b h s c", c=self.head_size)
        query, key, value = qkv.split(heads, dim=1)
        # Normalized before the rotation, as in Qwen3 and OLMoE; a rotation does not change a norm, so only the learned
        # scale makes the order matter.
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed_BSD = self._attend(query, key, value, cache) if attend is None else attend(query, key, value)
        mixed_BSD, output_stats = self.output_site(mixed_BSD, with_stats=with_stats)
        return self.output(mixed_BSD), input_stats, output_stats

    def _attend(self, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, cache: AttentionCache | None) -> Tensor:
        """Return ``(B, S, H * C)``."""
        mask = None
        if cache is not None:
            assert not self.training, "a cache requires evaluation mode"
            # After the rotation: a cached key keeps its angle, so later steps need not rotate it again.
            key_BHSC, value_BHSC, mask = cache.update(key_BHSC, value_BHSC)
        # PyTorch's own kernels. Written out with batched products, attention was faster in bf16 at length 256 on a CPU,
        # as fast at 1024, and slower in fp32 (lab log of 23 November 2026).
        mixed = F.scaled_dot_product_attention(
            query_BHSC,
            key_BHSC,
            value_BHSC,
            attn_mask=mask,
            # SDPA accepts one of the two. Without a mask tensor it can choose its fused causal kernels.
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return rearrange(mixed, "b h s c -> b s (h c)")
