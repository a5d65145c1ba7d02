"""Attention inside of documents, without a tensor of all pairs of tokens of a sequence.

B sequences, S tokens per sequence, H heads, C channels per head. Keys and values have fewer heads with grouped queries.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qsparse_moe.model.documents import Band, BlockSizes, bands, document_offsets
from qsparse_moe.nn.runtime import choose

SETTING = "model.attention_backend"

Product = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Maps queries, keys, values ``(B, H, S, C)`` and the factor of the scores to ``(B, S, H * C)``."""

# Forward and backward pass on one CPU core, against the mask of whole sequences (docs/results.md): blocks are never
# slower above these lengths. Products of bf16 need larger ones than those of fp32.
_SIZES = {torch.float32: BlockSizes(256, 128), torch.float64: BlockSizes(256, 128)}
_SIZES_OF_HALVES = BlockSizes(384, 256)


@dataclass(frozen=True)
class DocumentBackend:
    """An implementation of attention inside of documents."""

    name: str
    """The value of ``model.attention_backend``."""
    why_not: Callable[[torch.device, torch.dtype | None, int], str | None]
    """Returns why it cannot run for a device, a dtype (None: any), and a number of channels; None if it can."""
    prepare: Callable[[Tensor, Tensor], Product]
    """Maps the documents ``(B, S)`` in host memory and the queries to the product for this batch."""


class DocumentAttention:
    """The attention of all layers for one batch: what ``Transformer.run_layers`` calls in place of their own.

    Args:
        documents_BS: ``(B, S)`` ids; a document is a run of equal ids. With ids in host memory nothing waits for a GPU.
        scale: the factor of the scores.
        requested: ``model.attention_backend``.
    """

    def __init__(self, documents_BS: Tensor, scale: float, requested: str) -> None:
        self._documents_BS = documents_BS.cpu()
        self._scale = scale
        self._requested = requested
        # The first layer prepares it for all, because only the queries show the dtype of the products.
        self._product: Product | None = None

    def __call__(self, query_BHSC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor) -> Tensor:
        """Return ``(B, S, H * C)``."""
        if self._product is None:
            device, channels = query_BHSC.device, query_BHSC.shape[-1]
            backend = resolve_document_backend(self._requested, device, query_BHSC.dtype, channels)
            self._product = backend.prepare(self._documents_BS, query_BHSC)
        return self._product(query_BHSC, key_BHSC, value_BHSC, self._scale)


# Cached, so that the choice is logged once per kind of query and not in every forward pass.
@functools.cache
def resolve_document_backend(
    requested: str, device: torch.device, dtype: torch.dtype | None, channels: int
) -> DocumentBackend:
    """Choose the implementation of ``model.attention_backend``; ``dtype`` None stands for any.

    Raises:
        BackendUnavailable: the implementation was requested by name and cannot run here; with the reason.
    """
    return choose(SETTING, requested, DOCUMENT_BACKENDS, lambda spec: spec.why_not(device, dtype, channels))


def _why_not_varlen(device: torch.device, dtype: torch.dtype | None, channels: int) -> str | None:
    """Return a requirement of the flash attention kernels behind ``varlen_attn`` that is not met."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs a CUDA device"
    if find_varlen_attn() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn with a scale and a window"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs a GPU of compute capability 8.0 or more"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"flash attention computes in bf16 or fp16, and the queries are in {str(dtype).removeprefix('torch.')}"
    if channels % 8 or channels > 256:
        return f"the channels per head ({channels}) must be a multiple of 8 and at most 256"
    return None


def find_varlen_attn() -> Callable[..., Any] | None:
    """Return PyTorch's attention for sequences of different lengths; None if it lacks an argument that is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Its first version, of torch 2.10, had neither.
    has_arguments = {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if has_arguments else None


def _prepare_varlen(documents_BS: Tensor, query_BHSC: Tensor) -> Product:
    varlen_attn = find_varlen_attn()
    assert varlen_attn is not None
    offsets = document_offsets(documents_BS)
    # Read in host memory: on the device it would stop the launch of further kernels.
    longest = int(offsets.diff().max())
    # torch 2.11 has grouped queries in the kernel and no argument for them.
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    offsets = offsets.to(query_BHSC.device, non_blocking=True)

    def product(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
        if key.shape[1] != query.shape[1] and knows_groups:
            options["enable_gqa"] = True
        elif key.shape[1] != query.shape[1]:
            key, value = _for_every_query_head(query, key), _for_every_query_head(query, value)
        tokens = (rearrange(part, "b h s c -> (b s) h c") for part in (query, key, value))
        mixed: Tensor = varlen_attn(*tokens, offsets, offsets, longest, longest, **options)
        return rearrange(mixed, "(b s) h c -> b s (h c)", b=len(query))

    return product


def _prepare_blocks(documents_BS: Tensor, query_BHSC: Tensor) -> Product:
    sizes = _SIZES.get(query_BHSC.dtype, _SIZES_OF_HALVES)
    prepared = [
        band._replace(masks=[None if mask is None else mask.to(query_BHSC.device) for mask in band.masks])
        for band in bands(documents_BS, sizes, query_BHSC.dtype)
    ]
    return functools.partial(_in_blocks, prepared)


def _in_blocks(prepared: Sequence[Band], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if key.shape[1] != query.shape[1] and query.device.type != "cpu":
        # Without flash attention, the kernels of other devices that form no S x S scores know no grouped queries.
        key, value = _for_every_query_head(query, key), _for_every_query_head(query, value)
    num_sequences = [band.num_sequences for band in prepared]
    queries, keys, values = (_split(part, num_sequences, dim=0) for part in (query, key, value))
    parts = zip(queries, keys, values, prepared, strict=True)
    return _joined([_in_band(q, k, v, band, scale) for q, k, v, band in parts], dim=0)


def _in_band(query: Tensor, key: Tensor, value: Tensor, band: Band, scale: float) -> Tensor:
    queries, keys, values = (_split(part, band.lengths, dim=2) for part in (query, key, value))
    blocks = zip(queries, keys, values, band.masks, strict=True)
    return _joined([_in_block(q, k, v, mask, scale) for q, k, v, mask in blocks], dim=1).flatten(2)


def _in_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return ``(B, L, H, C)`` for a block of L tokens."""
    grouped = key.shape[1] != query.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    # Joined in this order, in which the output projection reads them.
    return mixed.transpose(1, 2)


def _for_every_query_head(query_BHSC: Tensor, x_BGSC: Tensor) -> Tensor:
    return x_BGSC.repeat_interleave(query_BHSC.shape[1] // x_BGSC.shape[1], dim=1)


# One part is returned as it is: split and cat would copy it, or its gradient.
def _split(x: Tensor, sizes: list[int], *, dim: int) -> Sequence[Tensor]:
    return (x,) if len(sizes) == 1 else x.split(sizes, dim=dim)


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


DOCUMENT_BACKENDS = (
    DocumentBackend("varlen", _why_not_varlen, _prepare_varlen),
    DocumentBackend("blocks", lambda device, dtype, channels: None, _prepare_blocks),
)
"""The implementations, the fastest first."""
