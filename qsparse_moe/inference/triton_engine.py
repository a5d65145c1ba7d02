"""The decode engine for NVIDIA GPUs: Triton kernels that read only the rows behind nonzero features.

It holds a copy of the weights in a number format of its own; activations, keys and values are fp32. Its reference is
``cached_model.TorchDecode`` with the same weights. B sequences, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.listed_model import ListedModel
from qsparse_moe.inference.native import Rows
from qsparse_moe.inference.weights import ModelMatrix, head_format, own_format, site_matrices, why_not_stored
from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.row_product.lists import FeatureLists
from qsparse_moe.kernels.row_product.op import list_features, listed_product
from qsparse_moe.kernels.row_product.stored import StoredWeights, WeightFormat, store, with_scales_per_output
from qsparse_moe.model.transformer import Transformer


def why_not(model: Transformer) -> str | None:
    """Return the reason why the engine cannot run ``model`` where it is, with the way out; None if it can."""
    reason = tiles.why_not(model.head.weight.device)
    if reason is not None:
        return f"{reason}; the engine torch runs on every device"
    if (reason := why_not_stored(model)) is not None:
        return reason
    widest = max(site.num_features for block in model.blocks() for site in block.sites().values())
    if widest > tiles.MAX_FEATURES:
        return f"its rows hold at most {tiles.MAX_FEATURES} features, and a site has {widest}; use the engine torch"
    return None


class TritonDecode:
    """A model's weights as the kernels read them, and one CUDA graph per batch size where there is a CUDA device."""

    name = "triton"
    cache_dtype: torch.dtype | None = torch.float32

    def __init__(
        self,
        model: Transformer,
        weight_format: WeightFormat | None = None,
        *,
        head: WeightFormat | None = None,
        rows: Rows = "auto",
        capture_graphs: bool = True,
    ) -> None:
        """Store the weights of ``model``.

        Args:
            model: in evaluation mode; its weights and its plan must not change afterwards.
            weight_format: number format of all matrices behind sparse sites; None: ``weights.own_format``.
            head: number format of the output head; None: see ``weights.head_format``.
            rows: ``all`` reads every row of a matrix, zeros included; ``selected`` and ``auto`` read the rows behind
                nonzero features.
            capture_graphs: whether a step is captured as a CUDA graph and replayed. It is not captured without a CUDA
                device, with hooks, or with ``model.sparsity.debug``, whose checks read values on the host.
        """
        self.weight_format = weight_format or own_format(model)
        self.rows: Rows = "all" if rows == "all" else "selected"
        self._weights = TritonWeights(model, self.weight_format, head_format(model, self.weight_format, head))
        self._model = ListedModel(model, self._weights, reads_all_rows=rows == "all")
        self._device = model.head.weight.device
        self.captures_graphs = capture_graphs and self._device.type == "cuda" and _can_capture(model)
        self._graphs: dict[int, _CapturedStep] = {}

    def with_plan_of(self, model: Transformer) -> TritonDecode:
        """Return an engine for ``model`` over the same stored weights.

        Args:
            model: a model with the same parameters, such as a copy that shares them. It needs modules of its own,
                because an engine computes with the sites of its model.
        """
        # A shallow copy shares the stored weights, which are most of the memory.
        other = copy.copy(self)
        other._model = ListedModel(model, self._weights, reads_all_rows=self.rows == "all")
        # A captured step reads K and thresholds from the buffers of the other model.
        other._graphs = {}
        return other

    @torch.inference_mode()
    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """See ``engine.DecodeEngine``; the logits are on the model's device."""
        cache.check_space(torch.ones_like(cache.positions_B))
        if self.captures_graphs:
            logits_BV = self._replayed(tokens_B, cache)
        else:
            logits_BV = self._step(tokens_B.to(self._device), cache.positions_B.to(self._device), cache)
        cache.advance()
        return logits_BV

    def figures(self) -> dict[str, Any]:
        """Return the bytes of the stored weights, which rows are read, and the number of CUDA graphs.

        The bytes that a step reads are known on the device only, and copying them to the host would stall it.
        """
        return {
            "weights": self.weight_format,
            "head": self._weights.head_format,
            "weight_bytes": self._weights.num_bytes,
            "rows": self.rows,
            "cuda_graphs": len(self._graphs),
        }

    def _step(self, tokens_B: Tensor, positions_B: Tensor, cache: KeyValueCache) -> Tensor:
        return self._model.step(tokens_B, positions_B, cache.key_LBHPC, cache.value_LBHPC)

    def _replayed(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        # A graph per batch size: its addresses and shapes are fixed, and a batch shrinks as its sequences end.
        captured, memory = self._graphs.get(cache.batch), _memory_of(cache)
        if captured is None or captured.memory != memory:
            captured = self._graphs[cache.batch] = self._capture(tokens_B, cache)
        captured.tokens_B.copy_(tokens_B)
        captured.positions_B.copy_(cache.positions_B)
        captured.graph.replay()
        # The next replay writes to the same memory.
        return captured.logits_BV.clone()

    def _capture(self, tokens_B: Tensor, cache: KeyValueCache) -> _CapturedStep:
        with torch.cuda.device(self._device):
            tokens_B, positions_B = tokens_B.to(self._device), cache.positions_B.to(self._device)
            # A step outside of a graph first: it compiles the kernels, and it writes only what the replay writes again.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(tokens_B, positions_B, cache)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_BV = self._step(tokens_B, positions_B, cache)
        return _CapturedStep(graph, _memory_of(cache), tokens_B, positions_B, logits_BV)


class TritonWeights:
    """The matrices of a model as the kernels read them, in the memory of its device; each is stored once."""

    def __init__(self, model: Transformer, weight_format: WeightFormat, head: WeightFormat) -> None:
        self._matrices: dict[str, ModelMatrix] = {matrix.name: matrix for matrix in site_matrices(model)}
        self._head_weight = model.head.weight
        self._format = weight_format
        self.head_format = head
        """Number format of the output head."""
        self._head = None if head == "fp32" else self._stored_head()
        self._stored: dict[tuple[str, ...], StoredWeights] = {}

    def of(self, *names: str) -> StoredWeights:
        """Return the matrices of these names as one stack, in the order of the names."""
        if names not in self._stored:
            parts = [self._matrices[name].input_major(self._format) for name in names]
            stack = torch.cat([part if part.dim() == 3 else part[None] for part in parts])
            self._stored[names] = self._store(stack, self._format)
        return self._stored[names]

    def num_matrices(self, stack: StoredWeights) -> int:
        """Return the number of matrices of a stack."""
        return stack.num_matrices

    def list_features(self, rows_ND: Tensor, capacity: int, *, with_zeros: bool) -> FeatureLists:
        """Return the nonzero features of every row."""
        return list_features(rows_ND, capacity, with_zeros=with_zeros)

    def product(self, stack: StoredWeights, lists: FeatureLists, **settings: Any) -> Tensor:
        """Return sums of products of lists with matrices."""
        return listed_product(stack, lists, **settings)

    def logits(self, normed_BD: Tensor) -> Tensor:
        """Return the logits ``(B, V)``."""
        if self._head is None:
            # By cuBLAS, which would round the fp32 rows to bf16 for a head in bf16.
            return F.linear(normed_BD, self._head_weight)
        logits_BV = listed_product(self._head.codes, list_features(normed_BD, normed_BD.shape[1]))
        return logits_BV if self._head.scales_V is None else logits_BV * self._head.scales_V

    def _stored_head(self) -> StoredHead:
        if self.head_format == "bf16":
            return StoredHead(self._store(self._head_weight.T, "bf16"), None)
        # int8 with one scale per id, as all engines have it, though the rows here are those of the input features.
        codes, scales_V = with_scales_per_output(self._head_weight.detach().cpu())
        return StoredHead(codes.to(self._head_weight.device), scales_V.to(self._head_weight.device))

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices behind sparse sites and of the head."""
        head = self._head_weight.nbytes if self._head is None else self._head.num_bytes
        return head + sum(stored.num_bytes for stored in self._stored.values())

    def _store(self, weights: Tensor, weight_format: WeightFormat) -> StoredWeights:
        # Rounded and packed on the CPU, whose memory ``store`` writes to, and then copied once.
        return store(weights.detach().cpu(), weight_format).to(self._head_weight.device)


class StoredHead(NamedTuple):
    """The output head with one row per input feature."""

    codes: StoredWeights
    scales_V: Tensor | None
    """One per id, for int8: the format of its rows has one per input feature, which here are all 1."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows and scales."""
        return self.codes.num_bytes + (0 if self.scales_V is None else self.scales_V.nbytes)


class _CapturedStep(NamedTuple):
    """A step of one batch size over one cache, with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    memory: tuple[Any, ...]
    tokens_B: Tensor
    positions_B: Tensor
    logits_BV: Tensor


def _memory_of(cache: KeyValueCache) -> tuple[Any, ...]:
    """Return the addresses and shapes that a graph fixes: another cache or another capacity needs its own graph."""
    return tuple((part.data_ptr(), part.shape, part.stride()) for part in (cache.key_LBHPC, cache.value_LBHPC))


def _can_capture(model: Transformer) -> bool:
    """Return whether a step runs no hook, which a replay would skip, and no check that reads values on the host."""
    sites = [site for block in model.blocks() for site in block.sites().values()]
    hooks = [site.hook for site in sites] + [router.hook for router in model.routers()]
    return not model.config.sparsity.debug and all(hook is None for hook in hooks)
