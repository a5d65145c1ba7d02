"""The decode engines, which compute one token per sequence and step from the weights and a key-value cache.

``ENGINES`` lists them in the order in which ``auto`` tries them; ``resolve_engine`` chooses one when a model is loaded,
and logs the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qsparse_moe.errors import ArgumentError, BackendUnavailable
from qsparse_moe.inference import gather_engine, native, triton_engine
from qsparse_moe.inference.cached_model import TorchDecode
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.weights import fold_rounding, use_bf16_products
from qsparse_moe.kernels.onednn import has_bf16_instructions
from qsparse_moe.kernels.row_product.stored import WeightFormat
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.runtime import choose

logger = logging.getLogger(__name__)


class DecodeEngine(Protocol):
    """Computes the next logits of a batch of sequences."""

    name: str
    """The value of the setting that requests it."""
    cache_dtype: torch.dtype | None
    """The dtype of the key-value cache that it needs; None: the model's dtype."""

    def decode(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits ``(B, V)`` after one more token of each sequence: fp32, ids that the model hides at -inf.

        Args:
            tokens_B: ``(B,)`` int64 on the CPU, the newest token of each sequence. Its keys and values are stored at
                ``cache.positions_B``, which then include it.
            cache: the cache of these sequences, in the same order.

        Raises:
            ConfigError: a sequence has no slot left, and the cache does not slide.
        """

    def figures(self) -> dict[str, Any]:
        """Return figures about the steps so far for ``generate --stats``; JSON-able, may be empty."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine other than its name."""

    weights: WeightFormat | None = None
    """Number format of the matrices behind sparse sites, to which the model has been rounded; None: their own."""
    head: WeightFormat | None = None
    """Number format of the output head, to which it has been rounded; None: see ``weights.head_format``."""
    rows: native.Rows = "auto"
    """The rows of a matrix that a step reads, for engines that can skip some; see ``NativeDecode``."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine that can be requested by name."""

    name: str
    why_not: Callable[[Transformer], str | None]
    """Returns the reason why it cannot run this model on its device, with the way out; None if it can."""
    build: Callable[[Transformer, EngineSettings], DecodeEngine]
    """Builds the engine for a model in evaluation mode, whose weights and plan must not change afterwards."""
    why_not_auto: Callable[[Transformer], str | None] = lambda model: None
    """Returns the reason why ``auto`` leaves out an engine that can run this model; None if it takes it."""
    has_own_matrices: bool = False
    """Whether it stores a copy of the matrices behind sparse sites, so that those of the model serve prefill alone."""


def _torch_engine(model: Transformer, settings: EngineSettings) -> DecodeEngine:
    if settings.rows == "selected":
        raise ArgumentError(
            "{rows} ('selected') must be all or auto with the engine torch, which reads every row of every matrix; "
            "leave it out, or use the engine native or gather"
        )
    return TorchDecode(model, settings.weights, settings.head)


# In the order of speed where each can run: gather has 1.4 to 5.6 times the tokens per second of torch from S 0.4 on
# (docs/inference.md).
ENGINES: tuple[EngineSpec, ...] = (
    EngineSpec(
        "native",
        native.why_not,
        lambda model, settings: native.NativeDecode(model, settings.weights, head=settings.head, rows=settings.rows),
        has_own_matrices=True,
    ),
    EngineSpec(
        "gather",
        gather_engine.why_not,
        lambda model, settings: gather_engine.GatherDecode(
            model, settings.weights, head=settings.head, rows=settings.rows
        ),
        why_not_auto=gather_engine.why_not_auto,
    ),
    EngineSpec("torch", lambda model: None, _torch_engine),
    # After torch, which runs everywhere, so that auto never chooses it: it has not been measured on a GPU.
    EngineSpec(
        "triton",
        triton_engine.why_not,
        lambda model, settings: triton_engine.TritonDecode(
            model, settings.weights, head=settings.head, rows=settings.rows
        ),
        has_own_matrices=True,
    ),
)


def resolve_engine(
    requested: str,
    model: Transformer,
    *,
    settings: EngineSettings = EngineSettings(),
    engines: Sequence[EngineSpec] = ENGINES,
) -> DecodeEngine:
    """Return the engine of that name for ``model``, or for ``auto`` the first that can run it, and log the choice.

    Args:
        requested: ``auto`` or the name of an engine.
        model: in evaluation mode.
        settings: the other settings of the engine.
        engines: the engines to choose from.

    Raises:
        BackendUnavailable: the name is unknown, or the engine cannot run this model here; with the reason. ``auto``
            raises it only if no engine can run the model.
    """
    names = [spec.name for spec in engines]
    if requested not in ("auto", *names):
        raise BackendUnavailable(f"engine ({requested!r}) must be one of auto, {', '.join(names)}; choose one of them")
    failed: dict[str, str] = {}

    def why_not(spec: EngineSpec) -> str | None:
        reason = failed.get(spec.name) or spec.why_not(model)
        return spec.why_not_auto(model) if reason is None and requested == "auto" else reason

    while True:
        spec = choose("engine", requested, engines, why_not)
        try:
            return spec.build(model, settings)
        except BackendUnavailable as error:
            if requested != "auto":
                raise
            # Known only now: a compiler that fails, or a folder for its results that cannot be written.
            failed[spec.name] = str(error)
            logger.warning("engine=auto: %s cannot be built (%s); trying the next engine", spec.name, error)


def prepare_prefill(model: Transformer, engine: DecodeEngine, weight_format: WeightFormat | None) -> None:
    """Change the weights of ``model`` in place to those that prefill is fastest with, once the engine has been built.

    Weights that training rounds in every forward are rounded once. int8 weights are kept in bf16, half of their size in
    fp32, where the engine has its own copy of them and the processor has instructions for bf16.

    Args:
        model: in evaluation mode; ``engine`` was built for it.
        engine: the engine that decodes.
        weight_format: of the matrices behind sparse sites, to which the model has been rounded.
    """
    fold_rounding(model)
    has_own = any(spec.has_own_matrices for spec in ENGINES if spec.name == engine.name)
    if weight_format == "int8" and has_own and has_bf16_instructions(model.head.weight.device):
        use_bf16_products(model)
