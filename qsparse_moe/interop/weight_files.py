"""The safetensors files of an export, and how to read them one tensor at a time."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from qsparse_moe.errors import BackendUnavailable, CheckpointError
from qsparse_moe.training.checkpoint.store import file_checksum

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMAT, FAMILY_FORMAT = "qsparse_moe.state-dict/1", "qsparse_moe.family/1"
_NEEDED = "every file of an export is needed. Export the run again, or restore the file from a copy"


def export_metadata(*, step: int, max_length: int, family: str | None = None) -> dict[str, str]:
    """Return the metadata of the files of an export with the names of our state dict.

    ``family`` is the ``model_type`` of the folder that was imported.
    """
    origin = {"family": family} if family else {}
    return {"qsparse_moe": FORMAT, "step": str(step), "max_length": str(max_length)} | origin


def family_metadata(*, step: int) -> dict[str, str]:
    """Return the metadata of the files of an export in the format of a family."""
    return {"qsparse_moe": FAMILY_FORMAT, "step": str(step)}


class WeightFiles:
    """The state dict of an export; files are mapped, and tensors are read on access.

    Raises:
        CheckpointError: a file is missing or damaged, or was not written by ``qsparse-moe export``.
        BackendUnavailable: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, Any] = {}
        self._metadata: dict[str, str] = {}
        for name in self._names(folder):
            file = open_safetensors(folder / name, _NEEDED)
            self._metadata = file.metadata() or {}
            self._where |= dict.fromkeys(file.keys(), file)
        if self._metadata.get("qsparse_moe") != FORMAT:
            raise CheckpointError(
                f"{folder}: was not written by qsparse-moe export of this version (format "
                f"{self._metadata.get('qsparse_moe')!r}, not {FORMAT!r}); export the run again"
            )

    @staticmethod
    def _names(folder: Path) -> list[str]:
        index = folder / INDEX
        if not index.is_file():
            return [WEIGHTS]
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(index, error, _NEEDED) from error

    @property
    def step(self) -> int:
        """Number of steps that the weights were trained."""
        return int(self._metadata["step"])

    @property
    def max_length(self) -> int | None:
        """Number of positions that the model was made for; None in exports of earlier versions."""
        length = self._metadata.get("max_length")
        return None if length is None else int(length)

    @property
    def family(self) -> str | None:
        """The ``model_type`` of the folder that was imported; None in exports of runs."""
        return self._metadata.get("family")

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor by name."""
        return {name: file.get_slice(name).get_shape() for name, file in self._where.items()}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        return self._where[name].get_tensor(name)

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """Read every ``parts``-th file, starting with file ``part``, and return its CRC-32 by name."""
        return {name: file_checksum(self._folder / name) for name in self._names(self._folder)[part::parts]}


def open_safetensors(file: Path, needed: str) -> Any:
    """Open one file, whose content is read on access.

    Args:
        file: a safetensors file.
        needed: the rule and the way out, for the message.

    Raises:
        CheckpointError: it is missing, truncated, or damaged.
        BackendUnavailable: safetensors is not installed.
    """
    safetensors_torch()
    library = import_module("safetensors")
    try:
        return library.safe_open(file, framework="pt")
    except (OSError, library.SafetensorError) as error:
        raise unreadable(file, error, needed) from error


def unreadable(file: Path, error: Exception, needed: str) -> CheckpointError:
    """Return the error of a file that cannot be read, with the rule and the way out in ``needed``."""
    return CheckpointError(f"{file}: cannot be read ({error}), and {needed}")


def safetensors_torch() -> Any:
    """Return the module ``safetensors.torch``.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise BackendUnavailable(
            'exports and Hugging Face models need safetensors, which is not installed; pip install "qsparse-moe[hf]"'
        ) from None
