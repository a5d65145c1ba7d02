"""List the matrices that decoding may store in a number format of its own, and round a model to that format.

Rounding changes the model itself, so that prefill, every decode engine and an evaluation compute with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from qsparse_moe.errors import ArgumentError, without_fields
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, WeightFormat, load_dense, store
from qsparse_moe.model.attention import Projection
from qsparse_moe.model.block import Block
from qsparse_moe.model.latent_attention import LatentAttention
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.experts import Experts
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import as_format

WEIGHT_CHOICES = ("auto", *WEIGHT_FORMATS)
# ternary is missing, because training never rounds the head.
HEAD_CHOICES = ("auto", "fp32", "bf16", "int8")
# ternary is missing: such a model keeps the dtype in which it was trained.
LOADED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""The dtype of the model itself; codes times their scale are fp32, which bf16 would round a second time."""


class ModelMatrix(NamedTuple):
    """A matrix behind a sparse site or inside of latent attention, or a stack of them with one per expert."""

    name: str
    """Name of the parameter in the model's state dict."""
    parameter: Tensor
    is_output_major: bool
    """Whether a row belongs to an output, as in ``torch.nn.Linear``, or else to an input feature."""
    trained_format: str
    """The format to which the training model rounds it in every forward pass: ``none`` or ``ternary``."""
    has_site: bool = True
    """False for the inner matrices of latent attention, which every engine reads whole, from the model itself."""

    def input_major(self, weight_format: WeightFormat) -> Tensor:
        """Return the values to store in ``weight_format``, with one row per input feature.

        They are the values that the training model multiplies with, unless storing itself rounds to that format.
        Rounding to ternary twice differs from rounding once: the scale is a mean, which the zeros of the first rounding
        lower.
        """
        values = self.parameter if weight_format == self.trained_format else _as_trained(self)
        return values.T if self.is_output_major else values


def site_matrices(model: Transformer) -> Iterator[ModelMatrix]:
    """Yield every matrix behind a sparse site, and the inner ones of latent attention, in the order of the layers."""
    for path, module in model.named_modules():
        if isinstance(module, Projection):
            has_site = path.rsplit(".", 1)[-1] not in LatentAttention.INNER
            yield ModelMatrix(f"{path}.weight", module.weight, True, module.weight_format, has_site)
        if isinstance(module, (Experts, FeedForward)):
            for name in ("w_gate", "w_up", "w_down"):
                parameter = getattr(module, name)
                if parameter is not None:
                    yield ModelMatrix(f"{path}.{name}", parameter, False, module.weight_format)


def parts_of(block: Block) -> Iterator[tuple[str, Experts | FeedForward, SparseSite]]:
    """Yield the name in the layer, the module, and the input site of its routed, shared, and dense networks."""
    if block.moe is not None:
        yield "moe.experts", block.moe.experts, block.moe.input_site
    name, part = ("dense", block.dense) if block.moe is None else ("moe.shared", block.moe.shared)
    if part is not None:
        yield name, part, part.input_site


def why_not_stored(model: Transformer) -> str | None:
    """Return the reason why no engine with matrices of its own can hold the weights of ``model``; None if it can."""
    dtype = model.head.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its weights come from fp32 or bf16, and the model is in {dtype}; use the engine torch"
    return None


def own_format(model: Transformer) -> WeightFormat:
    """Return the number format that holds the weights of ``model`` as they are: ternary, bf16 or fp32."""
    if model.config.sparsity.quantization.weights == "ternary":
        return "ternary"
    return "bf16" if model.head.weight.dtype == torch.bfloat16 else "fp32"


def head_format(model: Transformer, weight_format: WeightFormat, head: WeightFormat | None = None) -> WeightFormat:
    """Return the number format of the output head.

    Args:
        model: its head has the dtype that ``auto`` keeps.
        weight_format: of the matrices behind sparse sites.
        head: the requested format; None: int8 if the matrices are int8, else the dtype that the head has.
    """
    if head is not None:
        return head
    if weight_format == "int8":
        return "int8"
    return "bf16" if model.head.weight.dtype == torch.bfloat16 else "fp32"


def check_weights(weights: str, trained_format: str) -> None:
    """Raise ConfigError unless a model that was trained with ``trained_format`` can be stored in ``weights``."""
    if weights not in WEIGHT_CHOICES:
        raise ArgumentError(
            f"{{weights}} ({without_fields(repr(weights))}) must be one of {', '.join(WEIGHT_CHOICES)}; choose one of "
            "them"
        )
    if weights == "ternary" and trained_format != "ternary":
        raise ArgumentError(
            "{weights} (ternary) must be those of a model that was trained with model.sparsity.quantization.weights="
            f"ternary, and this one was trained with {trained_format}: rounding would leave little of it. Use int8"
        )
    if weights == "int8" and trained_format == "ternary":
        raise ArgumentError(
            "{weights} (int8) must be those of a model that was not trained in ternary numbers, and this one was: its "
            "matrices have three values each. Use ternary, which holds them exactly in a quarter of the bytes"
        )


class StoredFormats(NamedTuple):
    """The number formats in which decode engines store a model."""

    weights: WeightFormat | None = None
    """Of the matrices behind sparse sites; None: ``own_format``."""
    head: WeightFormat | None = None
    """Of the output head; None: see ``head_format``."""


def check_head(head: str, dtype: torch.dtype | None = None) -> None:
    """Raise ConfigError unless ``head`` is a number format that the output head of a model in ``dtype`` can have."""
    if head not in HEAD_CHOICES:
        raise ArgumentError(
            f"{{head}} ({without_fields(repr(head))}) must be one of {', '.join(HEAD_CHOICES)}; choose one of them"
        )
    if head == "fp32" and dtype == torch.bfloat16:
        raise ArgumentError(
            "{head} (fp32) must be auto, bf16, or int8 where the model itself is in bf16, because fp32 would hold the "
            "same values in twice the bytes; leave it out, or add {weights} fp32"
        )


def use_weights(model: Transformer, weights: str, head: str = "auto") -> StoredFormats:
    """Convert ``model`` in place to the number formats ``weights`` and ``head``, and return them; None for ``auto``.

    Raises:
        ConfigError: a format is unknown, or does not fit the format in which the model was trained.
    """
    check_weights(weights, model.config.sparsity.quantization.weights)
    check_head(head)
    if weights in LOADED_DTYPES:
        model.to(LOADED_DTYPES[weights])
    # A second time, because only now the dtype of an ``auto`` is known.
    check_head(head, model.head.weight.dtype)
    formats = StoredFormats(
        None if weights == "auto" else cast(WeightFormat, weights), None if head == "auto" else cast(WeightFormat, head)
    )
    round_weights(model, formats.weights or own_format(model), formats.head)
    return formats


@torch.no_grad()
def round_weights(model: Transformer, weight_format: WeightFormat, head: WeightFormat | None = None) -> None:
    """Round the matrices of ``model`` in place to the values that their number formats can represent.

    The dtype of the model represents the formats other than int8 already, except bf16 for the head of a model in fp32.
    Embedding, norms and routers are not rounded, except an embedding that is also the head.

    Args:
        model: the model to round.
        weight_format: of the matrices behind sparse sites.
        head: of the output head; None: see ``head_format``.
    """
    if weight_format == "int8":
        for matrix in site_matrices(model):
            _round_rows(matrix.parameter, matrix.is_output_major)
    head = head_format(model, weight_format, head)
    if head == "int8":
        # False although its rows are outputs: the head has one scale per id in every engine, because no site before it
        # drops inputs.
        _round_rows(model.head.weight, False)
    elif head == "bf16":
        model.head.weight.copy_(model.head.weight.bfloat16())


@torch.no_grad()
def fold_rounding(model: Transformer) -> None:
    """Replace weights that the training model rounds in every forward by their rounded values, in place.

    Prefill then rounds nothing: on a model of 1.6 billion ternary weights, rounding took ten times as long as the
    products of 512 tokens. To be called once the engine has stored the weights, because rounding twice is not rounding
    once.
    """
    for matrix in site_matrices(model):
        matrix.parameter.copy_(_as_trained(matrix))
    for module in model.modules():
        if isinstance(module, (Projection, Experts, FeedForward)):
            module.weight_format = "none"


def use_bf16_products(model: Transformer) -> None:
    """Keep the matrices behind sparse sites in bf16, in which prefill then multiplies; all else stays in fp32.

    For int8 weights, whose copy in fp32 takes twice the memory and whose products take longer. Rounding a code times
    its scale to bf16 moves it by at most 1/512 of itself, rounding the weight to int8 by up to 1/254 of the largest
    weight of its row. To be called once the engine has stored the codes.
    """
    for matrix in site_matrices(model):
        # The inner matrices of latent attention decode too.
        if matrix.has_site:
            matrix.parameter.data = matrix.parameter.data.bfloat16()


def products_dtype(model: Transformer) -> torch.dtype:
    """Return the dtype in which prefill multiplies with the matrices behind sparse sites."""
    return next(site_matrices(model)).parameter.dtype


def _round_rows(parameter: Tensor, is_output_major: bool) -> None:
    # Matrix by matrix, because an fp32 copy of a whole stack of experts may not fit into memory.
    for weights in parameter if parameter.dim() == 3 else [parameter]:
        dense = load_dense(store(weights.T if is_output_major else weights, "int8"))
        weights.copy_(dense.T if is_output_major else dense)


def _as_trained(matrix: ModelMatrix) -> Tensor:
    assert matrix.trained_format in ("none", "ternary"), matrix.trained_format
    return as_format(matrix.parameter, "ternary") if matrix.trained_format == "ternary" else matrix.parameter
