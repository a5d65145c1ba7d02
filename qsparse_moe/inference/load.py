"""Load a trained model for generation from the folder of a run, of one checkpoint, or of an export."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.tokenizer import TextTokenizer, load_tokenizer, meaningless_ids
from qsparse_moe.errors import ArgumentError
from qsparse_moe.inference.weights import LOADED_DTYPES, StoredFormats, check_head, check_weights, use_weights
from qsparse_moe.interop.trained_model import load_trained
from qsparse_moe.kernels.onednn import limit_compiled_products
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan


class LoadedModel(NamedTuple):
    """A model in evaluation mode, with everything that generation needs beside it."""

    config: RunConfig
    model: Transformer
    tokenizer: TextTokenizer
    step: int
    """Steps that the model was trained."""
    formats: StoredFormats
    """The requested number formats."""


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    weights: str = "auto",
    head: str = "auto",
    plan: SparsityPlan | Path | str | None = None,
) -> LoadedModel:
    """Load the newest checkpoint of a run, one checkpoint, or an export.

    Args:
        folder: the folder of a run, of a checkpoint in it, or of an export.
        device: the device of the model.
        weights: number format of the weights; see ``weights.use_weights``. ``auto``: the format of training, or that
            of the export.
        head: number format of the output head.
        plan: a sparsity plan that replaces the model's own, or a file with one.

    Raises:
        CheckpointError: the folder is none of the three, or is damaged.
        ConfigError: the plan was made for another model or would change nothing, or ``weights`` or ``head`` is unknown.
    """
    limit_compiled_products()
    found = find_model(Path(folder))
    config = load_run_config(found.config_folder)
    check_weights(weights, config.model.sparsity.quantization.weights)
    dtype = LOADED_DTYPES.get(weights)
    check_head(head, dtype)
    plan = _checked_plan(plan, config.model)  # before the weights are read
    tokenizer = load_tokenizer(config.data.tokenizer)
    config, model, step = load_trained(found.path, device, dtype=dtype)
    formats = use_weights(model, weights, head)
    # After the weights: loading sets the plan of the checkpoint's step.
    if plan is not None:
        model.set_sparsity(plan)
    model.hide_ids(meaningless_ids(config.model, tokenizer))
    return LoadedModel(config, model.requires_grad_(False), tokenizer, step, formats)


def _checked_plan(plan: SparsityPlan | Path | str | None, config: ModelConfig) -> SparsityPlan | None:
    if plan is None:
        return None
    if config.sparsity.selection == "relu":
        raise ArgumentError(
            "{plan}: a plan has no effect on this model, because its model.sparsity.selection is relu, which keeps "
            "every positive feature whatever S is; leave it out"
        )
    if isinstance(plan, SparsityPlan):
        plan.check_fits(config)
        return plan
    found = SparsityPlan.load(Path(plan))
    found.check_fits(config, file=plan)
    return found
