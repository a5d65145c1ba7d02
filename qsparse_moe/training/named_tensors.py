"""The interface of readers of trained weights, and the reader of this package's checkpoints.

Training knows named tensors only. A reader of a folder format implements ``NamedTensors``, and ``train`` receives a
function that opens what ``training.init_from`` names; ``interop.initial_weights`` has the readers of other formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.find import ModelFolder, find_initial_weights, naming_init_from
from qsparse_moe.runs.folder import CONFIG_FILE, load_run_config, no_checkpoint
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints


class NamedTensors(Protocol):
    """A reader of a trained model: its weights and persistent buffers by their names in our state dict."""

    @property
    def kind(self) -> str:
        """Kind of the named folder, such as ``run`` or ``export``; the manifest records it."""

    @property
    def path(self) -> Path:
        """The folder that is read; opened again, it has the same weights, even if a run still adds checkpoints."""

    @property
    def step(self) -> int:
        """Number of steps that the weights were trained."""

    @property
    def model(self) -> ModelConfig:
        """The model that the weights belong to."""

    @property
    def model_file(self) -> Path:
        """The file that describes the model, for messages."""

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the weights, as ``data.tokenizer`` names it."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The global shape of every weight and buffer by name, without reading one; a tied weight occurs once."""

    def tensor(self, name: str) -> Tensor:
        """Read one global tensor, on the CPU and of any floating-point dtype."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read the elements from ``start`` to ``stop`` of a flattened global tensor, on the CPU."""

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """Read every ``parts``-th file, starting with file ``part``, and return its CRC-32 by name.

        Raises:
            CheckpointError: a file's content is damaged.
        """


def num_not_finite(value: Tensor) -> int:
    """Return the number of values that are NaN or infinite."""
    # A value that is not finite makes the sum not finite. The sum reads at 40 GB/s from the cache, where counting reads
    # at 0.3 (bf16), so the values are counted only where the sum says so; that of very large values may overflow too.
    # In bf16 it is accumulated in fp32 and has its range; asking for an fp32 result makes it six times as slow.
    if value.sum(dtype=torch.float32 if value.dtype == torch.float16 else None).isfinite():
        return 0
    return int((~value.isfinite()).sum())


OpenWeights = Callable[[str], NamedTensors]
"""Open the folder that ``training.init_from`` names. It raises CheckpointError if the folder cannot be read."""


class CheckpointWeights:
    """The weights of one checkpoint, written by any engine on any number of ranks; see ``NamedTensors``."""

    def __init__(self, path: Path, *, kind: str) -> None:
        self.path, self.kind = path, kind
        folder = ModelFolder(path, "checkpoint").config_folder
        self._checkpoint = Checkpoint(path)
        config = load_run_config(folder)
        self.model, self.tokenizer = config.model, config.data.tokenizer
        self.model_file = folder / CONFIG_FILE
        self.step = self._checkpoint.progress.step
        self.shapes: dict[str, list[int]] = self._checkpoint.shapes | self._checkpoint.buffer_shapes

    def tensor(self, name: str) -> Tensor:
        """See ``NamedTensors``."""
        if name in self._checkpoint.shapes:
            return self._checkpoint.tensor("weight", name)
        return self._checkpoint.buffer(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See ``NamedTensors``."""
        if name in self._checkpoint.shapes:
            return self._checkpoint.read("weight", name, start, stop)
        return self._checkpoint.buffer(name).flatten()[start:stop]

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """See ``NamedTensors``."""
        self._checkpoint.verify(part=part, parts=parts)
        names = sorted(self._checkpoint.checksums)[part::parts]
        return {name: self._checkpoint.checksums[name] for name in names}


def open_checkpoint(init_from: str) -> NamedTensors:
    """Open a run's newest checkpoint, or the named one.

    Raises:
        CheckpointError: the folder is neither, is damaged, or is of a format that this package's training cannot read.
    """
    found = find_initial_weights(init_from)
    if found.kind not in ("run", "checkpoint"):
        what = "an export" if found.kind == "export" else "a Hugging Face model"
        raise CheckpointError(
            f"training.init_from ({init_from}): is {what}, and training.loop.train alone reads runs and "
            "checkpoints; call qsparse_moe.train, or pass open_weights=interop.initial_weights.open_weights"
        )
    with naming_init_from(init_from):
        if found.kind == "checkpoint":
            return CheckpointWeights(found.path, kind=found.kind)
        paths = list_checkpoints(found.path)
        if not paths:
            raise no_checkpoint(found.path)
        return CheckpointWeights(paths[-1], kind=found.kind)
