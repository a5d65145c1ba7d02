"""Find the modules of a model of transformers that get sparse sites: attention, experts, shared experts, dense layers.

All families of the list name these modules alike, so one description serves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import Site
from qsparse_moe.errors import BackendUnavailable, ConfigError

FAMILIES = ("llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""The ``model_type`` of every family into which the sites can be put."""
LayerSite = tuple[int, Site]


class Place(NamedTuple):
    """The size of a sparse site."""

    num_features: int
    """D, the number of features per row."""
    num_experts: int
    """E; 1 at a site without experts."""


@dataclass(frozen=True)
class Host:
    """A module with one site before its input matrices and one before its output matrix."""

    layer: int
    module: nn.Module
    input_site: Site
    hidden_site: Site
    input_place: Place
    hidden_place: Place
    projection: str | None
    """The name of the output matrix in ``module``; None for experts, which hold their matrices stacked."""

    @property
    def places(self) -> dict[LayerSite, Place]:
        """The two sites."""
        return {(self.layer, self.input_site): self.input_place, (self.layer, self.hidden_site): self.hidden_place}


def find_hosts(model: nn.Module) -> list[Host]:
    """Return the hosts of all sites of ``model``, in the order of the forward pass.

    Args:
        model: a model of transformers with or without a head, or one that peft has wrapped.

    Raises:
        ConfigError: it is not a model of one of ``FAMILIES``, or it holds its matrices in a form that is not supported.
        BackendUnavailable: transformers is not installed.
    """
    decoder = find_decoder(model)
    layers: Any = decoder.layers
    return [host for index, layer in enumerate(layers) for host in _layer_hosts(index, layer)]


def places_of(hosts: list[Host]) -> dict[LayerSite, Place]:
    """Return the size of every site of the hosts."""
    return {place: size for host in hosts for place, size in host.places.items()}


def find_decoder(model: nn.Module) -> Any:
    """Return the module that holds the decoder layers; the errors are those of ``find_hosts``."""
    kind = _pretrained_model()
    found: list[Any] = [part for part in model.modules() if isinstance(part, kind) and hasattr(part, "layers")]
    if len(found) != 1:
        raise ConfigError(
            f"sparsify: {type(model).__name__} contains {len(found)} decoders of transformers, and exactly one is "
            "needed; pass a model of transformers with one stack of decoder layers, or the part of yours that is one"
        )
    (decoder,) = found
    if decoder.config.model_type not in FAMILIES:
        raise ConfigError(
            f"sparsify: model_type ({show(decoder.config.model_type)}) is not a family into which Q-Sparse can be put; "
            f"choose a model of one of these: {', '.join(FAMILIES)}"
        )
    # Each rank would hold a shard of the features of a row, and would select among that shard only.
    if getattr(decoder, "_tp_size", None) not in (None, 1):
        raise ConfigError(
            f"sparsify: the model is split by tensor parallelism (tp_size is {decoder._tp_size}), and a site needs "
            "whole rows; load it without tp_plan"
        )
    return decoder


def innermost(module: Any) -> Any:
    """Return the module inside the wrappers that peft puts around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _layer_hosts(index: int, layer: Any) -> Iterator[Host]:
    attention, block = layer.self_attn, layer.mlp
    queries, output = attention.q_proj, attention.o_proj
    yield Host(
        index,
        attention,
        "attention_input",
        "attention_output",
        Place(queries.in_features, 1),
        Place(output.in_features, 1),
        "o_proj",
    )
    if not hasattr(block, "experts"):
        yield _feed_forward(index, block, "dense_input", "dense_hidden")
        return
    yield _experts(index, innermost(block.experts))
    if hasattr(block, "shared_expert"):
        yield _feed_forward(index, block.shared_expert, "shared_input", "shared_hidden")


def _feed_forward(index: int, module: Any, input_site: Site, hidden_site: Site) -> Host:
    widths = Place(module.up_proj.in_features, 1), Place(module.down_proj.in_features, 1)
    return Host(index, module, input_site, hidden_site, *widths, "down_proj")


# How transformers' decorator of experts describes their matrices, and the form that ours multiplies with.
_FORM: Mapping[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


def _experts(index: int, module: Any) -> Host:
    where = f"sparsify: layer {index}, {type(module).__name__}"
    fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    # Without the decorator, and so without this attribute, transformers never asks which implementation shall run.
    if not hasattr(type(module).forward, "__wrapped__") or not hasattr(module, "has_gate"):
        raise ConfigError(
            f"{where} does not go through transformers' experts interface, so a selection between its matrices would "
            "have no effect; load the model without quantization and without kernels that replace its layers"
        )
    for name, needed in _FORM.items():
        if getattr(module, name, False) != needed:
            raise ConfigError(
                f"{where} has {name.lstrip('_')} = {not needed}, which the sparse experts do not support; load the "
                "model on one device or with FSDP or DeepSpeed, in the layout of its family"
            )
    if module.config._experts_implementation == "deepgemm_megamoe" or not _is_plain(fused) or not _is_plain(down):
        raise ConfigError(
            f"{where} holds its matrices in a form of its own (experts_implementation is "
            f"{show(module.config._experts_implementation)}, gate_up_proj {getattr(fused, 'dtype', 'absent')}); load "
            "the model in fp32, fp16, or bf16 with experts_implementation grouped_mm, batched_mm, or eager"
        )
    num_experts, width, hidden = _expert_sizes(module)
    return Host(
        index, module, "expert_input", "expert_hidden", Place(width, num_experts), Place(hidden, num_experts), None
    )


def _is_plain(weight: Any) -> bool:
    return weight is not None and weight.is_floating_point() and weight.element_size() >= 2


def _expert_sizes(module: Any) -> tuple[int, int, int]:
    """Return E, D, and F. The settings are read, because ZeRO-3 leaves parameters without a shape."""
    return module.num_experts, module.hidden_dim, module.intermediate_dim


def _pretrained_model() -> type:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise BackendUnavailable(
            "sparsify needs transformers, which is not installed; pip install 'qsparse-moe[hf]'"
        ) from None
    return PreTrainedModel
