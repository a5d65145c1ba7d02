"""Readers of the weights that a run can start from; see ``training.named_tensors``.

A reader of another format is a class with the interface of ``NamedTensors`` and a branch in ``open_weights``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qsparse_moe.interop.hub import local_folder
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.weight_files import WeightFiles
from qsparse_moe.runs.find import find_initial_weights, naming_init_from
from qsparse_moe.runs.folder import CONFIG_FILE, load_run_config
from qsparse_moe.training.named_tensors import NamedTensors, open_checkpoint


class ExportWeights:
    """The weights of an export in one or several files; see ``NamedTensors``."""

    kind = "export"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = WeightFiles(path)
        config = load_run_config(path)
        self.model, self.tokenizer = config.model, config.data.tokenizer
        self.model_file = path / CONFIG_FILE
        self.step, self.max_length, self.family = self._files.step, self._files.max_length, self._files.family
        self.shapes = self._files.shapes

    def tensor(self, name: str) -> Tensor:
        """See ``NamedTensors``."""
        return self._files.tensor(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See ``NamedTensors``."""
        return self.tensor(name).flatten()[start:stop]

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """See ``NamedTensors``. An export has no stored checksums, so only the manifest of the run records these."""
        return self._files.checksums(part=part, parts=parts)


def open_weights(init_from: str) -> NamedTensors:
    """Open the folder that ``training.init_from`` names: a run, one checkpoint, an export, or a Hugging Face model.

    Raises:
        CheckpointError: it is none of them, a file of it is missing or damaged, or the model is not supported.
        BackendUnavailable: safetensors is needed and not installed.
    """
    found = find_initial_weights(init_from)
    if found.kind in ("run", "checkpoint"):
        return open_checkpoint(init_from)
    with naming_init_from(init_from):
        return ExportWeights(found.path) if found.kind == "export" else HuggingFaceWeights(local_folder(init_from))
