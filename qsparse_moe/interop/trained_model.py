"""Load the model of a folder that a command names: a run, one of its checkpoints, or an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.find import find_model
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.evaluate import load_run


def load_trained(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
    distributed: Distributed | None = None,
    shard: bool | None = None,
) -> tuple[RunConfig, Transformer, int]:
    """Return the config, the model, and its number of training steps, as ``load_run`` does for a run.

    Args:
        folder: the folder of a run (its newest checkpoint is loaded), of one checkpoint, or of an export, which may be
            an imported model.
        device: the device of the model.
        dtype: the dtype of the model; None is the one that training computed in, or that of the export.
        overrides: settings that do not affect the weights.
        distributed: the ranks, which must call it together; None is this process alone.
        shard: whether they divide the weights among them; None: as they did in training.

    Raises:
        CheckpointError: the folder is none of the three, or is damaged.
        ConfigError: its config.yaml cannot be read, or an override is wrong.
        BackendUnavailable: it is an export, and safetensors is not installed.
    """
    found = find_model(folder)
    if found.kind == "export":
        return load_export(found.path, device, dtype=dtype, overrides=overrides, distributed=distributed, shard=shard)
    return load_run(
        found.config_folder,
        device,
        dtype=dtype,
        overrides=overrides,
        checkpoint_folder=found.path if found.kind == "checkpoint" else None,
        distributed=distributed,
        shard=shard,
    )
