"""Arguments of transformers that a model of type ``qsparse_moe`` refuses, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qsparse_moe.errors import ArgumentError, BackendUnavailable

# transformers' losses of other models read them; ours would ignore them.
_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels")
_PARALLEL = ("tp_plan", "tp_size", "distributed_config")


def no_transformers() -> BackendUnavailable:
    """Return the error of an installation without a fitting version of transformers."""
    return BackendUnavailable(
        "model type qsparse_moe is one of transformers, which is not installed in version 5 or later; pip install "
        '"qsparse-moe[hf]"'
    )


def check_loading(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError if ``from_pretrained`` was asked for tensor parallelism."""
    for name in _PARALLEL:
        if options.get(name) is not None:
            raise ArgumentError(
                f"{{{name}}}: must be left out for model type qsparse_moe, because a sparse site selects among all "
                "features of a token, and every rank would select among its shard only, which is another model; use "
                "device_map to place layers on several devices"
            )


def check_options(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    options: Mapping[str, Any],
) -> None:
    """Raise ArgumentError for arguments of ``forward`` that contradict each other or are not supported."""
    if (input_ids is None) == (inputs_embeds is None):
        count = "neither" if input_ids is None else "both"
        raise ArgumentError(
            f"{{input_ids}} and {{inputs_embeds}}: {count} is given, and exactly one of them must be; leave one out"
        )
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ArgumentError(
            "{logits_to_keep}: must be 0 with {labels}, because the loss reads all logits; leave it out"
        )
    for name in _LOSS_OPTIONS:
        if options.get(name) is not None:
            raise ArgumentError(
                f"{{{name}}}: must be left out, because the loss is the mean over the labels of this batch plus the "
                "losses of the routers; compute another loss from the logits"
            )


def check_checkpointing(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless ``gradient_checkpointing_enable`` asks for what the layers do.

    Whole layers are recomputed, by the non-reentrant kind.
    """
    function = options.get("gradient_checkpointing_func")
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ArgumentError(
            "{use_reentrant} (True): must be False, because the reentrant kind drops the gradients of the router "
            "losses; pass gradient_checkpointing_kwargs={{'use_reentrant': False}}"
        )
    if options.get("every_n_layers", 1) != 1:
        raise ArgumentError(
            f"{{every_n_layers}} ({options['every_n_layers']}): must be 1, because every layer is recomputed; leave it "
            "out"
        )
