"""Backend ``megablocks``: the permutation of MegaBlocks around a grouped matrix product.

T tokens, A experts per token, N = T * A routed tokens, D width, E experts, X and Y widths of a matrix.

The kernels of MegaBlocks compute in fp32 and store in the dtype of the rows. So ``combine`` rounds each weighted row
before it sums over the experts of a token, and it rounds the gradient of the weights. ``permutation.py`` does neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shared_selection_rules import gathers
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import tiles
from qsparse_moe.moe.backends import grouped
from qsparse_moe.moe.backends.megablocks_package import has_extension, load, missing
from qsparse_moe.moe.permutation import Permutation, RoutedTokens, TokenCounts, count_tokens, positions_within_capacity

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels compute offsets of values in int32.
_MAX_VALUES = 2**31 - 1


class MegaBlocksTokens(NamedTuple):
    """All routed tokens as MegaBlocks describes them, in int32, sorted by expert and within an expert by token."""

    expert_N: Tensor
    """The expert of each row, ascending (its ``bin_ids``)."""
    slot_N: Tensor
    """The (token, choice) pair of each row, as ``token * A + choice`` (its ``indices``)."""
    ends_E: Tensor
    """Exclusive end of each expert's rows (its ``bins``)."""
    tokens_per_expert_E: Tensor
    """An expert without tokens has 0."""
    experts_per_token: int

    @property
    def token_N(self) -> Tensor:
        """The token of each row; computed on access, because the kernels of MegaBlocks do not need it."""
        return self.slot_N.div(self.experts_per_token, rounding_mode="floor")


class TokensWithinCapacity(NamedTuple):
    """The tokens that are within the capacity of their expert, and all, which MegaBlocks' kernels need."""

    token_N: Tensor
    """The token of each row."""
    expert_N: Tensor
    """The expert of each row, ascending."""
    tokens_per_expert_E: Tensor
    """int64; an expert without tokens has 0."""
    row_N: Tensor
    """The position of each among all routed tokens."""
    all_tokens: MegaBlocksTokens


def sort(expert_ids_TA: Tensor, num_experts: int, within_TA: Tensor | None = None) -> RoutedTokens:
    """Sort the (token, expert) pairs by expert, stably, and leave out those of which ``within_TA`` is false.

    Nothing is copied to the host except, with ``within_TA``, the number of remaining pairs.
    """
    routed = _sort_all(expert_ids_TA, num_experts)
    if within_TA is None:
        return routed
    row_N = positions_within_capacity(routed.slot_N, within_TA)
    expert_N = routed.expert_N[row_N]
    return TokensWithinCapacity(routed.token_N[row_N], expert_N, count_tokens(expert_N, num_experts), row_N, routed)


def _sort_all(expert_ids_TA: Tensor, num_experts: int) -> MegaBlocksTokens:
    ops = load().ops
    ids_N = expert_ids_TA.flatten().int()
    with tiles.on_device_of(ids_N):
        # The sort reads only the low bits that ids can have, and at least one.
        expert_N, slot_N = ops.sort(ids_N, max(1, (num_experts - 1).bit_length()))
        tokens_per_expert_E = ops.histogram(ids_N, num_experts)
        # For a single expert the result has no dim.
        ends_E = ops.inclusive_cumsum(tokens_per_expert_E, 0).view(num_experts)
    return MegaBlocksTokens(expert_N, slot_N, ends_E, tokens_per_expert_E, expert_ids_TA.shape[1])


def permute(x_TD: Tensor, routed: MegaBlocksTokens | TokensWithinCapacity) -> Tensor:
    """Compute ``permute_reference`` with MegaBlocks' ``gather``, whose backward is its ``scatter``.

    Raises:
        BackendUnavailable: its kernels do not support a tensor of this dtype or size.
    """
    if isinstance(routed, TokensWithinCapacity):
        return permute(x_TD, routed.all_tokens).index_select(0, routed.row_N)
    _check(x_TD, len(routed.slot_N))
    with tiles.on_device_of(x_TD):
        # The kernel ignores strides.
        return load().ops.gather(
            x_TD.contiguous(), routed.slot_N, routed.expert_N, routed.ends_E, routed.experts_per_token
        )


def combine(y_ND: Tensor, weights_TA: Tensor, routed: MegaBlocksTokens | TokensWithinCapacity) -> Tensor:
    """Compute ``combine_reference`` with MegaBlocks' ``scatter``.

    Its backward is MegaBlocks' ``gather`` and a kernel of dot products.

    Raises:
        BackendUnavailable: its kernels do not support a tensor of this dtype or size.
    """
    if isinstance(routed, TokensWithinCapacity):
        # A dropped row is zero here: it adds nothing to its token, and its router weight gets no gradient.
        all_ND = y_ND.new_zeros(weights_TA.numel(), y_ND.shape[1]).index_copy(0, routed.row_N, y_ND)
        return combine(all_ND, weights_TA, routed.all_tokens)
    _check(y_ND, len(routed.slot_N))
    weight_N = weights_TA.flatten().contiguous()
    with tiles.on_device_of(y_ND):
        return load().ops.scatter(
            y_ND.contiguous(), routed.slot_N, routed.expert_N, weight_N, routed.ends_E, routed.experts_per_token
        )


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix.

    The package grouped_gemm multiplies if it is installed, for bf16 on CUDA, the only case it supports. It needs the
    row counts on the host, so a layer waits for the device once. Otherwise PyTorch's grouped product multiplies.
    """
    if rows_NX.is_cuda and rows_NX.dtype == torch.bfloat16:
        grouped_gemm = load().grouped_gemm_util.ops
        if grouped_gemm is not None:
            return grouped_gemm.gmm(rows_NX, weights_EXY, counts.on_host)
    return grouped.matmul(rows_NX, weights_EXY, counts)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return the reason why this backend cannot run the experts on ``device``, with the way out, or None if it can."""
    reason = missing() or tiles.why_not(device)
    if reason is not None:
        return reason
    if device.type != "cuda" and has_extension():
        return f"its CUDA extension is installed, which does not support tensors on the device {device.type}; use cuda"
    if gathers(config):
        return (
            "its kernels have not been tested with matrices of the size of shared features; use grouped, or set "
            "model.sparsity.shared.products to masked"
        )
    return grouped.why_not(config, device)


def _check(x: Tensor, num_rows: int) -> None:
    if x.dtype not in _DTYPES:
        raise BackendUnavailable(
            f"model.moe.backend ('megablocks') computes in fp32 at most, not in {x.dtype}; use another backend"
        )
    width = x.shape[-1]
    if num_rows * width > _MAX_VALUES:
        raise BackendUnavailable(
            f"model.moe.backend ('megablocks'): {num_rows} routed tokens of model.hidden_size {width} are more than "
            f"the {_MAX_VALUES} values that its kernels can address; lower training.micro_batch_size, or use grouped"
        )


PERMUTATION = Permutation(sort, permute, combine)
"""The permutation by MegaBlocks' kernels. They process every routed token; those beyond the capacity of their expert
are left out after them."""
