"""One decode step in which every projection behind a sparse site reads only the rows of nonzero features.

Norms, rotation, router, sites and activations are those of the training model; lists and products are those of an
engine (``ListedWeights``). All shapes here follow from the batch and the capacity of the cache, and the host reads no
value, so that the step can be captured as a CUDA graph. Activations are fp32.

B sequences (one token each), D width, H heads, C channels per head, P slots of the cache, A choices, F hidden width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.inference.listed_latent_attention import Fp32Norm, ListedLatentAttention, Product
from qsparse_moe.kernels.row_product.lists import FeatureLists
from qsparse_moe.model.attention import Attention, norm_heads
from qsparse_moe.model.block import Block
from qsparse_moe.model.latent_attention import LatentAttention
from qsparse_moe.model.rope import Rotation, rotate, rotation_at
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.sparse_site import SparseSite


class ListedModel:
    """The layers of a model with their matrices stored input-major on the device of the model."""

    def __init__(self, model: Transformer, weights: ListedWeights, *, reads_all_rows: bool) -> None:
        self._model = model
        lister = _Lister(weights, reads_all_rows)
        blocks = enumerate(model.blocks())
        self._layers = [_Layer(f"layers.{number}.", block, weights, lister) for number, block in blocks]
        self._final_norm = Fp32Norm(model.final_norm)
        self._weights = weights
        hidden_ids = model.hidden_ids
        self._hidden_ids = None if hidden_ids is None else hidden_ids.to(model.head.weight.device)

    def step(self, tokens_B: Tensor, positions_B: Tensor, key_LBHPC: Tensor, value_LBHPC: Tensor) -> Tensor:
        """Return the logits ``(B, V)`` fp32 after one more token of each sequence, and store its keys and values.

        Args:
            tokens_B: int64 on the device of the model.
            positions_B: int64 on the device of the model: the number of tokens of each sequence before.
            key_LBHPC: fp32 keys; the token at position p lies in slot ``p % P``.
            value_LBHPC: fp32 values.
        """
        config, capacity = self._model.config, key_LBHPC.shape[3]
        hidden_BD = self._model.embedding(tokens_B).float()
        rotation = rotation_at(positions_B[:, None], config, torch.float32)
        slots_B = positions_B % capacity
        # From position P on every slot holds a token. Empty slots hold zeros, so 0 * NaN cannot occur.
        is_visible_BP = torch.arange(capacity, device=positions_B.device) <= positions_B[:, None]
        for layer, key_BHPC, value_BHPC in zip(self._layers, key_LBHPC, value_LBHPC, strict=True):
            hidden_BD = hidden_BD + layer.attend(hidden_BD, rotation, slots_B, is_visible_BP, key_BHPC, value_BHPC)
            hidden_BD = hidden_BD + layer.feed_forward(hidden_BD)
        return self._logits(self._final_norm(hidden_BD))

    def _logits(self, normed_BD: Tensor) -> Tensor:
        logits_BV = self._weights.logits(normed_BD)
        return logits_BV if self._hidden_ids is None else logits_BV.index_fill(-1, self._hidden_ids, -torch.inf)


class ListedWeights(Protocol):
    """The matrices of a model as an engine stores them, and its products of listed features with their rows."""

    def of(self, *names: str) -> Any:
        """Return the matrices of these names as one stack, in the order of the names."""

    def num_matrices(self, stack: Any) -> int:
        """Return the number of matrices of a stack."""

    def list_features(self, rows_ND: Tensor, capacity: int, *, with_zeros: bool) -> FeatureLists:
        """Return the nonzero features of every row, at most ``capacity``; all features with ``with_zeros``."""

    def product(self, stack: Any, lists: FeatureLists, **settings: Any) -> Tensor:
        """Return sums of products of lists with matrices, fp32; see ``row_product.triton.listed_product_triton``."""

    def logits(self, normed_BD: Tensor) -> Tensor:
        """Return the logits ``(B, V)`` fp32."""


class _Lister:
    """Turns the sparse rows of a site into lists of their features."""

    def __init__(self, weights: ListedWeights, reads_all_rows: bool) -> None:
        self._weights = weights
        self._with_zeros = reads_all_rows

    def selected(self, site: SparseSite, rows_ND: Tensor, expert_N: Tensor | None = None) -> FeatureLists:
        """Return the features that the site selects in the rows."""
        return self.listed(site, site.select(rows_ND, expert_N).sparse)

    def listed(self, site: SparseSite, sparse_ND: Tensor) -> FeatureLists:
        """Return the nonzero features of rows to which the site's selection has been applied."""
        capacity = site.num_features if self._with_zeros else most_selected(site)
        return self._weights.list_features(sparse_ND, capacity, with_zeros=self._with_zeros)


class _HeadNorm(Fp32Norm):
    """The norm of queries or keys, of every head or of all heads together."""

    def __call__(self, x_BHSC: Tensor) -> Tensor:
        return norm_heads(x_BHSC, self._weight, self._epsilon)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.detach().float()


class _Layer:
    def __init__(self, prefix: str, block: Block, weights: ListedWeights, lister: _Lister) -> None:
        self._attention_norm, self._feed_forward_norm = (
            Fp32Norm(block.attention_norm),
            Fp32Norm(block.feed_forward_norm),
        )
        self._attention = _attention(f"{prefix}attention.", block.attention, weights, lister)
        self.feed_forward_part: _MoE | _FeedForward
        if block.moe is not None:
            self.feed_forward_part = _MoE(f"{prefix}moe.", block.moe, weights, lister)
        else:
            assert block.dense is not None
            self.feed_forward_part = _FeedForward(f"{prefix}dense.", block.dense, weights, lister)

    def attend(self, hidden_BD: Tensor, *step: Tensor | Rotation) -> Tensor:
        return self._attention(self._attention_norm(hidden_BD), *step)  # type: ignore[arg-type]

    def feed_forward(self, hidden_BD: Tensor) -> Tensor:
        return self.feed_forward_part(self._feed_forward_norm(hidden_BD))


class _Attention:
    def __init__(self, prefix: str, attention: Attention, weights: ListedWeights, lister: _Lister) -> None:
        self._part, self._lister, self._weights = attention, lister, weights
        self._qkv, self._output = weights.of(f"{prefix}qkv.weight"), weights.of(f"{prefix}output.weight")
        self._qkv_bias, self._output_bias = attention.qkv.bias, attention.output.bias
        self._query_norm = None if attention.query_norm is None else _HeadNorm(attention.query_norm)
        self._key_norm = None if attention.key_norm is None else _HeadNorm(attention.key_norm)

    def __call__(
        self,
        x_BD: Tensor,
        rotation: Rotation,
        slots_B: Tensor,
        is_visible_BP: Tensor,
        key_BHPC: Tensor,
        value_BHPC: Tensor,
    ) -> Tensor:
        part = self._part
        qkv = self._weights.product(self._qkv, self._lister.selected(part.input_site, x_BD))
        qkv = _with_bias(qkv, self._qkv_bias)
        # One token per sequence: the dim of the tokens, S in training, is 1.
        heads = qkv.view(len(x_BD), -1, 1, part.head_size)
        query, key, value = heads.split([part.num_heads, part.num_kv_heads, part.num_kv_heads], dim=1)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        sequences_B = torch.arange(len(x_BD), device=x_BD.device)
        key_BHPC[sequences_B, :, slots_B] = key[:, :, 0]
        value_BHPC[sequences_B, :, slots_B] = value[:, :, 0]
        mixed = F.scaled_dot_product_attention(
            query,
            key_BHPC,
            value_BHPC,
            attn_mask=is_visible_BP[:, None, None],
            enable_gqa=part.num_kv_heads != part.num_heads,
        )
        y_BD = self._weights.product(self._output, self._lister.selected(part.output_site, mixed.flatten(1)))
        return _with_bias(y_BD, self._output_bias)


def _attention(
    prefix: str, attention: Attention | LatentAttention, weights: ListedWeights, lister: _Lister
) -> _Attention | ListedLatentAttention:
    if isinstance(attention, Attention):
        return _Attention(prefix, attention, weights, lister)

    def behind(site: SparseSite, name: str) -> Product:
        stack = weights.of(f"{prefix}{name}.weight")
        return lambda rows_ND: weights.product(stack, lister.selected(site, rows_ND))

    down, output = behind(attention.input_site, "down"), behind(attention.output_site, "output")
    return ListedLatentAttention(attention, down=down, output=output)


class _GatedProducts:
    """Gate and up as one stack, and down, of experts or of a dense network, with the activation between them."""

    def __init__(self, prefix: str, part: Experts | FeedForward, weights: ListedWeights, lister: _Lister) -> None:
        self._part, self._lister, self._weights = part, lister, weights
        inner = ("w_up",) if part.w_gate is None else ("w_gate", "w_up")
        self._inner = weights.of(*(f"{prefix}{name}" for name in inner))
        self._down = weights.of(f"{prefix}w_down")

    def hidden_lists(
        self, lists: FeatureLists, matrix_N: Tensor, expert_N: Tensor | None, *, products_per_list: int = 1
    ) -> FeatureLists:
        """Return the selected hidden features of N rows, each with its matrix of the stack ``down``."""
        inner_N = matrix_N
        if self._part.w_gate is not None:
            # Gate and up are one stack, so that one launch serves both. It has the matrices of up after those of gate,
            # which are as many as those of down.
            inner_N = torch.cat((matrix_N, matrix_N + self._weights.num_matrices(self._down)))
        products = self._weights.product(self._inner, lists, matrix_P=inner_N, products_per_list=products_per_list)
        gate_NF = None if self._part.w_gate is None else products[: len(matrix_N)]
        # From the end, where they are with and without a gate.
        up_NF = products[-len(matrix_N) :]
        hidden_NF, _ = self._part.activation(gate_NF, up_NF, expert_N, with_stats=False)
        return self._lister.listed(self._part.hidden_site, hidden_NF)

    def down(self, lists: FeatureLists, **settings: Any) -> Tensor:
        """Return the products of hidden features with the matrices ``down``."""
        return self._weights.product(self._down, lists, **settings)


class _FeedForward:
    """A dense layer's network, or the shared experts of a MoE layer with their gate per token."""

    def __init__(self, prefix: str, part: FeedForward, weights: ListedWeights, lister: _Lister) -> None:
        self._part, self._lister = part, lister
        self._products = _GatedProducts(prefix, part, weights, lister)

    def __call__(self, x_BD: Tensor) -> Tensor:
        matrix_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
        hidden = self._products.hidden_lists(self._lister.selected(self._part.input_site, x_BD), matrix_B, None)
        y_BD = self._products.down(hidden)
        # Only shared experts have this parameter; a dense network is of the class that they extend.
        token_gate: Tensor | None = getattr(self._part, "token_gate", None)
        return y_BD if token_gate is None else y_BD * (x_BD @ token_gate.float().T).sigmoid()


class _MoE:
    """The routed experts: one product per stack of matrices for all tokens and all of their experts."""

    def __init__(self, prefix: str, layer: MoELayer, weights: ListedWeights, lister: _Lister) -> None:
        self._layer, self._lister = layer, lister
        self._products = _GatedProducts(f"{prefix}experts.", layer.experts, weights, lister)
        self._shared = None if layer.shared is None else _FeedForward(f"{prefix}shared.", layer.shared, weights, lister)

    def __call__(self, x_BD: Tensor) -> Tensor:
        layer = self._layer
        site = layer.input_site
        selected = site.select(x_BD).sparse if site.is_uniform else None
        routing = layer.router(selected if layer.router_sees_sparse and selected is not None else x_BD)
        choices, expert_N = routing.expert_ids_TA.shape[1], routing.expert_ids_TA.flatten()
        if choices == 0:
            # A kernel cannot be launched for no rows at all.
            return torch.zeros_like(x_BD) if self._shared is None else self._shared(x_BD)
        if routing.used_TA is not None:
            # A choice that its token does not use has rows of zeros, whose lists are empty: nothing is read for it.
            rows_ND = (x_BD if selected is None else selected).repeat_interleave(choices, 0)
            sparse_ND = site.select(rows_ND, expert_N).sparse if selected is None else rows_ND
            lists, per_list = self._lister.listed(site, sparse_ND * routing.used_TA.flatten()[:, None]), 1
        elif selected is not None:
            lists, per_list = self._lister.listed(site, selected), choices
        else:
            # With an S per expert a token has one selection for each of them. The number of repeats is an int: a tensor
            # would have to be read on the host.
            lists, per_list = self._lister.selected(site, x_BD.repeat_interleave(choices, 0), expert_N), 1
        hidden = self._products.hidden_lists(lists, expert_N, expert_N, products_per_list=per_list)
        # Routing weights and the sum over the experts of a token are part of the product: no result per expert is read
        # again.
        y_BD = self._products.down(
            hidden,
            matrix_P=expert_N,
            factors_P=routing.weights_TA.flatten(),
            products_per_sum=choices,
        )
        return y_BD if self._shared is None else y_BD + self._shared(x_BD)


def most_selected(site: SparseSite) -> int:
    """Return the largest number of features that the site selects in a row: K for a selection by rank, else all."""
    # A hook may replace the selected rows by others.
    if site.hook is not None or site.comparison is not None:
        return site.num_features
    return site.ranking.largest_num_selected
