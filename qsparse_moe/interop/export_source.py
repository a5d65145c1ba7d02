"""The model that is exported: of a run, of one checkpoint, or of an earlier export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.empty_model import empty_model
from qsparse_moe.interop.initial_weights import ExportWeights
from qsparse_moe.interop.safetensors_writer import Part, TensorSpec
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config, no_checkpoint
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint.state import check_shapes, state_buffers, stored_shapes
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES
from qsparse_moe.training.named_tensors import CheckpointWeights, NamedTensors

ExportDtype = Literal["auto", "fp32", "bf16"]

# 64 MiB in fp32: few enough bytes for several threads, and enough for the disk.
_PART_ELEMENTS = 2**24

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
            return self.weights.read(name, 0, 1).dtype
        return COMPUTE_DTYPES[requested]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Read a range of the first dimension of a tensor, such as one expert, and nothing else."""
        _, *rest = self.weights.shapes[name]
        size = math.prod(rest)
        return self.weights.read(name, first * size, last * size).view(last - first, *rest)

    def specs(self, dtype: ExportDtype) -> Mapping[str, TensorSpec]:
        """Return every tensor under our names, in parts that are read when they are written."""
        return {name: TensorSpec(self.dtype(name, dtype), *self._parts(name)) for name in self.weights.shapes}

    def _parts(self, name: str) -> tuple[tuple[int, ...], Sequence[Part]]:
        shape = tuple(self.weights.shapes[name])
        if not shape:
            return shape, (Part(shape, partial(self.weights.tensor, name)),)
        num_rows, *rest = shape
        step = max(1, _PART_ELEMENTS // max(1, math.prod(rest)))
        ranges = [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
        return shape, [Part((last - first, *rest), partial(self.rows, name, first, last)) for first, last in ranges]


def open_source(folder: Path, distributed: Distributed = ONE_RANK) -> ExportSource:
    """Open a run (its newest checkpoint), one checkpoint, or an export; a checkpoint's files are verified.

    The ranks of ``distributed`` must call it together, and divide the files among them to verify them.

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
        # Rank 0 chooses it for all: a run that is still training may save another one meanwhile.
        checkpoint = distributed.on_rank_zero(lambda: _checkpoint(found.path, found.kind))
        weights = stored = CheckpointWeights(checkpoint, kind=found.kind)
        # Every file is read and compared, because an export is all that may remain of a run.
        distributed.on_every_rank(lambda: stored.checksums(part=distributed.rank, parts=distributed.world_size))
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
