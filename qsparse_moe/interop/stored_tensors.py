"""The safetensors files of a Hugging Face folder: the header of every tensor, and tensors read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.weight_files import FAMILY_FORMAT, INDEX, WEIGHTS, open_safetensors, unreadable
from qsparse_moe.training.checkpoint.store import file_checksum
from qsparse_moe.training.named_tensors import num_not_finite

# As safetensors names them. Everything else is quantized, or no weight.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NEEDED = "every file of the model is needed; download it again"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class StoredTensors:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists.

    Raises:
        CheckpointError: there is neither, a file is missing or damaged, a tensor occurs twice, or one is not of a
            floating-point dtype.
        BackendUnavailable: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _file_names(folder)
        self._where: dict[str, tuple[Path, Any]] = {}
        self._metadata: list[dict[str, str]] = []
        for name in self._files:
            self._add(folder / name)
        self.step = 0
        """Number of trained steps, which only ``qsparse-moe export`` writes into the files."""
        for metadata in self._metadata:
            if metadata.get("qsparse_moe") == FAMILY_FORMAT:
                self.step = int(metadata["step"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, (path, file) in self._where.items():
            header = file.get_slice(name)
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = _dtype(path, name, header.get_dtype())

    def _add(self, path: Path) -> None:
        file = open_safetensors(path, _NEEDED)
        names: list[str] = file.keys()
        self._metadata.append(file.metadata() or {})
        for name in names:
            if name in self._where:
                raise CheckpointError(
                    f"{path}: contains {name}, which is in {self._where[name][0].name} too, and a tensor must be in "
                    "one file; download the model again"
                )
            self._where[name] = (path, file)

    def file(self, name: str) -> Path:
        """Return the file that contains a tensor."""
        return self._where[name][0]

    def read(self, name: str, index: tuple[int, slice] | None = None) -> Tensor:
        """Return one tensor, or the rows of one matrix in it, backed by the file.

        Raises:
            CheckpointError: a value is not finite.
        """
        path, file = self._where[name]
        value: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        num_bad = num_not_finite(value)
        if num_bad:
            raise CheckpointError(
                f"{path}: {num_bad} of {value.numel()} values of {name} are not finite, and all must be; download the "
                "file again, or name another model"
            )
        return value

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """Read every ``parts``-th file, starting with file ``part``, and return its CRC-32 by name."""
        return {name: file_checksum(self._folder / name) for name in self._files[part::parts]}


def _file_names(folder: Path) -> list[str]:
    # A folder may have both; transformers reads the single file.
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(index, error, _NEEDED) from error
    for name in sorted(map(str, names)):
        # The index comes from elsewhere, and must not make this process read other folders.
        if name != Path(name).name or not (folder / name).is_file():
            raise CheckpointError(f"{index}: names the file {name}, which does not exist in the folder, and {_NEEDED}")
    return sorted(names)


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return CheckpointError(
            f"{folder}: contains neither {WEIGHTS} nor {INDEX}, and one of them is needed; download the model again"
        )
    return CheckpointError(
        f"{folder}: has its weights in {pickles[0]}, which is a pickle and can run any program when it is read; only "
        "safetensors files are read. Download the model's safetensors files, or, if you trust its author, convert it "
        "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def _dtype(path: Path, name: str, dtype: str) -> torch.dtype:
    found = _DTYPES.get(dtype)
    if found is None:
        raise CheckpointError(
            f"{path}: {name} has the dtype {dtype}, which must be one of {', '.join(_DTYPES)}; name weights that were "
            "not quantized"
        )
    return found
