"""The portable decode engine: stock PyTorch that reads only the weights behind nonzero features.

Its products are gathers by ``torch.nn.functional.embedding_bag``; activations, keys and values are fp32. Its reference
is ``cached_model.TorchDecode`` with the same weights. B sequences, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.listed_model import ListedModel
from qsparse_moe.inference.native import Rows
from qsparse_moe.inference.weights import head_format, own_format, site_matrices, why_not_stored
from qsparse_moe.kernels.onednn import linear
from qsparse_moe.kernels.row_product.gather import GatheredMatrices, list_features_gather, listed_product_gather
from qsparse_moe.kernels.row_product.lists import FeatureLists
from qsparse_moe.kernels.row_product.stored import WeightFormat
from qsparse_moe.model.transformer import Transformer

_LEAST_SPARSITY = 0.2


def why_not(model: Transformer) -> str | None:
    """Return the reason why the engine cannot run ``model`` where it is, with the way out; None if it can."""
    device = model.head.weight.device
    if device.type != "cpu":
        return f"it reads the lengths of its lists on the host, and the device is {device.type}; use the engine torch"
    if (reason := why_not_stored(model)) is not None:
        return reason
    if model.config.moe.force_uniform_routing:
        return "model.moe.force_uniform_routing is a setting for measurements of whole batches; use the engine torch"
    return None


def why_not_auto(model: Transformer) -> str | None:
    """Return the reason why the engine torch is faster for ``model``; None if this one is."""
    # Measured with D 1024, F 2048, 32 experts, A 2 on two cores of an AMD EPYC (family 25), batch 1 to 16: 0.93 to 1.29
    # times the tokens per second of the engine torch at S 0, 1.38 to 1.63 times at S 0.4.
    mean = model.sparsity_plan.mean
    # S does not say how many zeros a ReLU leaves.
    if mean < _LEAST_SPARSITY and model.config.sparsity.selection != "relu":
        return (
            f"it is faster than the engine torch from a mean S of {_LEAST_SPARSITY:g} on, and this model has {mean:.2f}"
        )
    return None


class GatherDecode:
    """The layers of a model with their matrices input-major, shared with the model where it keeps them so itself."""

    name = "gather"
    cache_dtype: torch.dtype | None = torch.float32

    def __init__(
        self,
        model: Transformer,
        weight_format: WeightFormat | None = None,
        *,
        head: WeightFormat | None = None,
        rows: Rows = "auto",
    ) -> None:
        """Arrange the weights of ``model``, which must not change afterwards; neither must its plan.

        Args:
            model: in evaluation mode.
            weight_format: number format to which its matrices have been rounded; None: ``weights.own_format``.
            head: number format to which its head has been rounded; None: see ``weights.head_format``.
            rows: ``all`` reads every row of a matrix, zeros included; ``selected`` and ``auto`` read the rows behind
                nonzero features.
        """
        self.rows: Rows = "all" if rows == "all" else "selected"
        self.weight_format = weight_format or own_format(model)
        self.head_format = head_format(model, self.weight_format, head)
        self._weights = GatheredWeights(model)
        self._model = ListedModel(model, self._weights, reads_all_rows=rows == "all")

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """See ``engine.DecodeEngine``."""
        cache.check_space(torch.ones_like(cache.positions_B))
        # Empty slots at the end need not be read. As long as there are some, no position has wrapped round.
        filled = min(int(cache.positions_B.max()) + 1, cache.capacity)
        key_LBHPC, value_LBHPC = cache.key_LBHPC[:, :, :, :filled], cache.value_LBHPC[:, :, :, :filled]
        logits_BV = self._model.step(tokens_B, cache.positions_B, key_LBHPC, value_LBHPC)
        cache.advance()
        return logits_BV

    def figures(self) -> dict[str, Any]:
        """Return the number formats to which the weights have been rounded, their bytes, and which rows are read."""
        return {
            "weights": self.weight_format,
            "head": self.head_format,
            "weight_bytes": self._weights.num_bytes,
            "rows": self.rows,
        }


class GatheredWeights:
    """The matrices of a model as ``embedding_bag`` reads them, in the dtype of the model, int8 as its values."""

    def __init__(self, model: Transformer) -> None:
        dtype = model.head.weight.dtype
        in_memory: WeightFormat = "bf16" if dtype == torch.bfloat16 else "fp32"
        self._head_weight = model.head.weight.detach()
        # Those that training rounds in every forward are rounded once; attention's are copied to be input-major. All
        # others are the model's own memory.
        self._stacks = {
            matrix.name: _stack(matrix.input_major(in_memory)).contiguous()
            for matrix in site_matrices(model)
            if matrix.has_site
        }

    def of(self, *names: str) -> GatheredMatrices:
        """Return the matrices of these names as stacks, in the order of the names."""
        return GatheredMatrices(tuple(self._stacks[name] for name in names))

    def num_matrices(self, stack: GatheredMatrices) -> int:
        """Return the number of matrices of all stacks."""
        return stack.num_matrices

    def list_features(self, rows_ND: Tensor, capacity: int, *, with_zeros: bool) -> FeatureLists:
        """Return the nonzero features of every row."""
        return list_features_gather(rows_ND, capacity, with_zeros=with_zeros)

    def product(self, stack: GatheredMatrices, lists: FeatureLists, **settings: Any) -> Tensor:
        """Return sums of products of lists with matrices."""
        return listed_product_gather(stack, lists, **settings)

    def logits(self, normed_BD: Tensor) -> Tensor:
        """Return the logits ``(B, V)``, with products in the dtype of the head."""
        rounded_BD = normed_BD.to(self._head_weight.dtype)
        return linear(rounded_BD, self._head_weight).float()

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices behind sparse sites and of the head."""
        return self._head_weight.nbytes + sum(stack.nbytes for stack in self._stacks.values())


def _stack(values: Tensor) -> Tensor:
    values = values.detach()
    return values if values.dim() == 3 else values[None]
