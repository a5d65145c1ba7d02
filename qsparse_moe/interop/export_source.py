"""The model that is exported: of a run, of one checkpoint, or of an earlier export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.empty_model import empty_model
from qsparse_moe.interop.initial_weights import ExportWeights
from qsparse_moe.interop.safetensors_writer import TensorSpec
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config, no_checkpoint
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint.state import check_shapes, state_buffers, stored_shapes
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES
from qsparse_moe.training.named_tensors import CheckpointWeights, NamedTensors

ExportDtype = Literal["auto", "fp32", "bf16"]

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ExportSource:
    """A trained model with what belongs to it."""

    folder: Path
    """The folder of its config.yaml: an export, or the run."""
    config: RunConfig
    plan: SparsityPlan
    """The plan in use after its last step, perhaps in the middle of a ramp."""
    weights: NamedTensors
    buffers: frozenset[str]
    """Names of the tensors that are no parameters."""
    max_length: int
    """Number of positions that the model was made for."""
    family: str | None = None
    """The ``model_type`` of the folder that was imported, if it was."""

    @property
    def step(self) -> int:
        """Number of steps that the weights were trained."""
        return self.weights.step

    def dtype(self, name: str, requested: ExportDtype) -> torch.dtype:
        """Return the dtype of a tensor in the export; buffers keep their own."""
        if requested == "auto" or name in self.buffers:
            return self.weights.tensor(name).dtype
        return COMPUTE_DTYPES[requested]

    def specs(self, dtype: ExportDtype) -> Mapping[str, TensorSpec]:
        """Return every tensor under our names; it is read when it is written."""
        return {
            name: TensorSpec.whole(self.dtype(name, dtype), shape, partial(self.weights.tensor, name))
            for name, shape in self.weights.shapes.items()
        }


def open_source(folder: Path) -> ExportSource:
    """Open a run (its newest checkpoint), one checkpoint, or an export; a checkpoint's files are verified.

    Raises:
        CheckpointError: it is none of them, or a file is missing, damaged, or of another model.
        BackendUnavailable: safetensors is needed and not installed.
        ConfigError: its config.yaml cannot be read.
    """
    found = find_model(folder)
    weights: NamedTensors
    max_length: int | None = None
    family: str | None = None
    if found.kind == "export":
        config = load_run_config(found.path)
        weights = ExportWeights(found.path)
        max_length, family = weights.max_length, weights.family
    else:
        config = load_run_config(found.config_folder)
        weights = CheckpointWeights(_checkpoint(found.path, found.kind), kind=found.kind)
        # Every file is read and compared, because an export is all that may remain of a run.
        weights.checksums(part=0, parts=1)
    model = empty_model(config.model)
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    check_shapes(stored_shapes(model), shapes, str(found.path))
    return ExportSource(
        found.config_folder,
        config,
        plan_in_use(config, weights.step),
        weights,
        frozenset(state_buffers(model)),
        max_length or config.data.sequence_length,
        family,
    )


def plan_in_use(config: RunConfig, step: int) -> SparsityPlan:
    """Return the plan of the last of ``step`` steps: a run may end during the ramp of its sparsity schedule."""
    scale = scheduled_scale(config.model.sparsity.schedule, max(0, step - 1))
    return SparsityPlan.from_config(config.model).scaled(scale, config.model.moe.experts_per_token)


def _checkpoint(folder: Path, kind: str) -> Path:
    if kind == "checkpoint":
        return folder
    paths = list_checkpoints(folder)
    if not paths:
        raise no_checkpoint(folder)
    return paths[-1]
