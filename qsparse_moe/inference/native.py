"""The native decode engine: one C++ call per step, which reads only the weights behind nonzero features.

It holds a copy of the weights in a number format of its own; activations are fp32. Its reference is
``cached_model.TorchDecode`` with the same weights.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from qsparse_moe.config.shapes import latent_sizes, num_kv_heads, rotary_size
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.row_costs import NEVER, TOKENS, shares_to_read_all
from qsparse_moe.inference.shared_rows import Kept, keeps_columns, kept_features, shared_set
from qsparse_moe.inference.weights import (
    ModelMatrix,
    head_format,
    own_format,
    parts_of,
    site_matrices,
    why_not_stored,
)
from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.op import native_matrix
from qsparse_moe.kernels.row_product.stored import StoredWeights, WeightFormat, store
from qsparse_moe.model.attention import Attention, Projection
from qsparse_moe.model.block import Block
from qsparse_moe.model.latent_attention import LatentAttention
from qsparse_moe.model.rope import rotary_frequencies, rotation_factor
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.router import Router
from qsparse_moe.nn.selectors import ThresholdSelector
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import as_format

Rows = Literal["auto", "selected", "all"]

# The numbers of the C++ enumerations in kernels/decode_model/site.h and vector_math.h.
_SELECTIONS = {"topk": 0, "block": 1, "threshold": 2, "statistical": 3, "relu": 4, "shared": 5}
_ROW_FORMATS = {"none": 0, "int8": 1, "int4": 2}
_RESCALES = {"none": 0, "unit": 1, "preserve": 2}
_ACTIVATIONS = {"swiglu": 0, "relu2glu": 1, "reglu": 2, "drelu": 3, "relu2": 4}
_FEWER_WEIGHTS = {"router": 0, "kept": 1, "renormalized": 2}
_GATED_BY_RELU = {"relu2glu", "reglu", "drelu"}
# About half of the gates are positive at the start of training and fewer after it (0.33 in the tiny recipe), so that a
# site which leaves more than half of its features skips less of up than the gate does.
_GATE_FIRST_ABOVE = 0.5
_NONE = torch.empty(0)


def why_not(model: Transformer) -> str | None:
    """Return the reason why the engine cannot run ``model`` where it is, with the way out; None if it can."""
    device = model.head.weight.device
    reason = native.why_not(device)
    if reason is not None:
        return f"{reason}; the engine torch needs no compiler and runs on every device"
    if (reason := why_not_stored(model)) is not None:
        return reason
    if model.config.moe.force_uniform_routing:
        return "model.moe.force_uniform_routing is a setting for measurements of whole batches; use the engine torch"
    return None


class NativeDecode:
    """A model's weights in the layout of the C++ engine, and the engine."""

    name = "native"
    cache_dtype: torch.dtype | None = torch.float32

    def __init__(
        self,
        model: Transformer,
        weight_format: WeightFormat | None = None,
        *,
        head: WeightFormat | None = None,
        rows: Rows = "selected",
        by_integers: bool = True,
        gate_first: bool | None = None,
    ) -> None:
        """Store the weights of ``model``.

        Args:
            model: in evaluation mode; later changes of its weights or plan have no effect.
            weight_format: number format of all matrices behind sparse sites; None: ``weights.own_format``. Weights
                that it cannot represent are rounded; see ``weights.round_weights``.
            head: number format of the output head; None: see ``weights.head_format``.
            rows: the rows of a matrix that a pass reads: those ``selected`` by at least one token of the pass, ``all``,
                or ``auto``: all of them where so many are selected that reading the whole matrix is faster on this
                machine (``row_costs``).
            by_integers: whether codes of int8 and ternary weights are multiplied as integers where the processor can;
                features are then rounded to 15 bits. False multiplies in fp32, which is slower.
            gate_first: whether gate is computed before up, and up only for the hidden features whose gate is positive;
                possible for activations with a ReLU on the gate, in fp32 and bf16. None: where S at the input of gate
                and up is below 0.5, because up cannot skip the rows of dropped input features then.

        Raises:
            BackendUnavailable: the C++ library cannot be compiled.
        """
        native.load(native.DECODE)
        self.weight_format = weight_format or own_format(model)
        self._gate_first = _names_of_gate_first(model, self.weight_format, gate_first)
        self._kept = self._kept_rows(model)
        self._stored = {matrix.name: self._store(matrix) for matrix in site_matrices(model) if matrix.has_site}
        # Output-major, one row per id: there is no site before the head, so every weight of it is read.
        self._stored["head.weight"] = store(model.head.weight, head_format(model, self.weight_format, head))
        # Those of latent attention, which are read whole, in fp32 whatever the format of the others is.
        self._inner_bytes = sum(4 * matrix.parameter.numel() for matrix in site_matrices(model) if not matrix.has_site)
        self._hidden_ids = model.hidden_ids
        self._rows = rows
        self._by_integers = by_integers
        self._read_all_from = {"selected": [NEVER] * len(TOKENS), "all": [0.0] * len(TOKENS)}.get(rows)
        if self._read_all_from is None:
            self._read_all_from = shares_to_read_all(self.weight_format)
        self._engine = self._build(model)

    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """See ``engine.DecodeEngine``."""
        cache.check_space(torch.ones_like(cache.positions_B))
        logits_BV = self._engine.step(tokens_B, cache.positions_B, cache.key_LBHPC, cache.value_LBHPC)
        cache.advance()
        if self._hidden_ids is not None:
            logits_BV.index_fill_(-1, self._hidden_ids, -torch.inf)
        return logits_BV

    def with_plan_of(self, model: Transformer) -> NativeDecode:
        """Return an engine with the plan that ``model`` has now, over the same stored weights.

        Raises:
            ValueError: this engine has left out features that the plan needs, which a shared selection does.
        """
        # A shallow copy shares the stored weights, which are most of the memory.
        other = copy.copy(self)
        other._kept = self._kept_rows(model)
        other._stored = {name: self._kept_under(other._kept, name) for name in self._stored}
        other._engine = other._build(model)
        return other

    @property
    def bytes_read(self) -> int:
        """Bytes of stored weights that the last step read."""
        return int(self._engine.last_step()[0])

    def figures(self) -> dict[str, Any]:
        """Return the bytes of weights that the last step read, and its passes over a matrix, partial and whole."""
        read, dense, passes, whole = self._engine.last_step()
        return {
            "weights": self.weight_format,
            "head": self._stored["head.weight"].weight_format,
            "weight_bytes": self._inner_bytes + sum(stored.num_bytes for stored in self._stored.values()),
            "bytes_read": read,
            "bytes_read_without_zeros": dense,
            "rows": self._rows,
            "passes": passes,
            "passes_over_all_rows": whole,
        }

    def _kept_rows(self, model: Transformer) -> dict[str, Kept]:
        """Return what is kept of the matrices, as this engine stores them."""
        kept = kept_features(model)
        return kept | {name: kept[name].transposed for name in self._gate_first if name in kept}

    def _store(self, matrix: ModelMatrix) -> StoredWeights:
        values = matrix.input_major(self.weight_format)
        stored = store(values.transpose(-1, -2) if matrix.name in self._gate_first else values, self.weight_format)
        kept = self._kept.get(matrix.name)
        return stored if kept is None else stored.keep(kept.rows_EK, kept.columns_EK)

    def _kept_under(self, kept_by_name: dict[str, Kept], name: str) -> StoredWeights:
        stored, before, kept = self._stored[name], self._kept.get(name), kept_by_name.get(name)
        if kept == before:
            return stored
        if before is not None:
            raise ValueError(f"{name} has the features of another plan only; build an engine with S = 0 first")
        assert kept is not None, "it differs from what was kept before"
        return stored.keep(kept.rows_EK, kept.columns_EK)

    def _build(self, model: Transformer) -> Any:
        config, classes = model.config, torch.classes.qsparse_moe
        engine = classes.DecodeModel(
            config.num_heads,
            1 if latent_sizes(config) else num_kv_heads(config),
            rotary_size(config),
            config.norm_epsilon,
            _ACTIVATIONS[config.moe.activation],
            rotary_frequencies(config),
            rotation_factor(config),
            _fp32(model.final_norm.weight),
            model.embedding.weight.detach(),
            self._matrix("head.weight"),
        )
        for number, block in enumerate(model.blocks()):
            if number == 0 and isinstance(block.attention, LatentAttention):
                engine.use_latent_attention(*_latent_sizes(block.attention))
            engine.add_layer(*self._layer(f"layers.{number}.", block))
            if isinstance(block.attention, LatentAttention):
                engine.add_latent_maps(*_latent_maps(block.attention))
        engine.read_all_rows_from(self._read_all_from)
        engine.multiply_by_integers(self._by_integers)
        return engine

    def _layer(self, prefix: str, block: Block) -> tuple[Any, ...]:
        attention, moe = block.attention, block.moe
        # A layer whose plan leaves its tokens no expert has no routed part.
        routed = None if moe is None or moe.router.fewer.number == 0 else moe
        part = block.dense if moe is None else moe.shared
        part_name = "dense" if moe is None else "moe.shared"
        token_gate = getattr(part, "token_gate", None)
        return (
            _fp32(block.attention_norm.weight),
            _fp32(block.feed_forward_norm.weight),
            *self._projections(f"{prefix}attention.", attention),
            _site(attention.input_site),
            _site(attention.output_site),
            None if routed is None else _router(routed.router, reads_sparse=routed.router_sees_sparse),
            None if routed is None else self._feed_forward(f"{prefix}moe.experts.", routed.experts, routed.input_site),
            None if part is None else self._feed_forward(f"{prefix}{part_name}.", part, part.input_site),
            _optional(token_gate).flatten(),
        )

    def _projections(self, prefix: str, attention: Attention | LatentAttention) -> tuple[Any, ...]:
        """Return the norms of queries and keys, the matrices behind both sites, and the biases."""
        if isinstance(attention, LatentAttention):
            return (
                _NONE,
                _NONE,
                self._matrix(f"{prefix}down.weight"),
                self._matrix(f"{prefix}output.weight"),
                _NONE,
                _NONE,
            )
        return (
            _optional(None if attention.query_norm is None else attention.query_norm.weight),
            _optional(None if attention.key_norm is None else attention.key_norm.weight),
            self._matrix(f"{prefix}qkv.weight"),
            self._matrix(f"{prefix}output.weight"),
            _optional(attention.qkv.bias),
            _optional(attention.output.bias),
        )

    def _feed_forward(self, prefix: str, part: Any, input_site: SparseSite) -> Any:
        gate = None if part.w_gate is None else self._matrix(f"{prefix}w_gate")
        up, down = self._matrix(f"{prefix}w_up"), self._matrix(f"{prefix}w_down")
        return torch.classes.qsparse_moe.FeedForward(
            gate, up, down, _site(input_site), _hidden_site(part.hidden_site), f"{prefix}w_up" in self._gate_first
        )

    def _matrix(self, name: str) -> Any:
        return native_matrix(self._stored[name])


def _names_of_gate_first(model: Transformer, weight_format: WeightFormat, requested: bool | None) -> set[str]:
    """Return the names of the up matrices that are computed after their gate, and stored output-major for it."""
    # The codes of int8 have a scale per stored row and would be rounded otherwise than those of the other layout;
    # ternary has no product with chosen outputs.
    possible = model.config.moe.activation in _GATED_BY_RELU and weight_format in ("fp32", "bf16")
    if requested and not possible:
        raise ValueError(
            f"gate_first needs an activation of {', '.join(sorted(_GATED_BY_RELU))} and weights in fp32 or bf16, and "
            f"the model has {model.config.moe.activation} and {weight_format}"
        )
    if not possible or requested is False:
        return set()
    names = set()
    for number, block in enumerate(model.blocks()):
        for name, _, site in parts_of(block):
            needed = (
                1.0 if site.selector.selects_all else site.ranking.num_selected_E.float().mean() / site.num_features
            )
            if requested or needed > _GATE_FIRST_ABOVE:
                names.add(f"layers.{number}.{name}.w_up")
    return names


def _latent_sizes(attention: LatentAttention) -> tuple[float, ...]:
    sizes, epsilon = attention.sizes, attention.latent_norm.eps
    assert epsilon is not None, "latent attention sets it"
    ranks = sizes.query_rank or 0, sizes.key_value_rank
    return *ranks, sizes.nope_head_size, sizes.value_head_size, attention.scale, epsilon


def _latent_maps(attention: LatentAttention) -> tuple[Tensor, ...]:
    """Return the inner norms and matrices in fp32: those of the model itself where it is in fp32."""

    def as_trained(projection: Projection | None) -> Tensor:
        return _NONE if projection is None else _fp32(as_format(projection.weight, projection.weight_format))

    norm = attention.query_latent_norm
    query_norm = _optional(None if norm is None else norm.weight)
    return (
        query_norm,
        as_trained(attention.query_up),
        _fp32(attention.latent_norm.weight),
        as_trained(attention.latent_up),
    )


def _fp32(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def _optional(parameter: Tensor | None) -> Tensor:
    return _NONE if parameter is None else _fp32(parameter)


def _site(site: SparseSite) -> Any:
    """Return the engine's form of a site with its current K and thresholds."""
    selector = site.selector
    num_selected = site.ranking.num_selected_E.tolist()
    thresholds = [0.0] * len(num_selected)
    if isinstance(selector, ThresholdSelector):
        thresholds = selector.threshold_bits_E.view(torch.float32).tolist()
    # One entry where all experts agree, so that the engine selects once per token and not once per expert.
    if selector.is_uniform or selector.selects_all:
        num_selected, thresholds = num_selected[:1], thresholds[:1]
    shared = shared_set(site)
    features = [] if shared is None else shared.features_EK.flatten().tolist()
    return torch.classes.qsparse_moe.Site(
        site.num_features,
        _SELECTIONS[site.settings.selection],
        _ROW_FORMATS[site.number_format],
        _RESCALES[site.settings.rescale],
        site.settings.group_size or 0,
        num_selected,
        thresholds,
        features,
        selector.selects_all,
    )


def _hidden_site(site: SparseSite) -> Any:
    """Return the engine's form of a site in front of down, where only the shared features are computed if possible."""
    shared = shared_set(site)
    if shared is None or not keeps_columns(site):
        return _site(site)
    count = shared.features_EK.shape[1]
    return torch.classes.qsparse_moe.Site(
        count,
        _SELECTIONS["shared"],
        _ROW_FORMATS[site.number_format],
        _RESCALES[site.settings.rescale],
        0,
        shared.num_selected,
        [0.0] * len(shared.num_selected),
        list(range(count)) * len(shared.num_selected),
        False,
    )


def _router(router: Router, *, reads_sparse: bool) -> Any:
    config, (number, top_p) = router.config, router.fewer
    # A router that chooses fewer needs no weights of the choices that it leaves out.
    weighed = number if config.fewer_experts_weights == "router" and top_p == 1.0 else config.experts_per_token
    return torch.classes.qsparse_moe.Router(
        _fp32(router.weight),
        _NONE if router.expert_bias is None else _fp32(router.expert_bias),
        number,
        weighed,
        top_p,
        _FEWER_WEIGHTS[config.fewer_experts_weights],
        config.router.startswith("sigmoid"),
        config.router == "topk_softmax",
        config.router.endswith("renormalized"),
        config.router_scaling_factor,
        config.num_expert_groups,
        config.groups_per_token,
        config.group_score == "top2_sum",
        reads_sparse,
    )
