"""The reader of Hugging Face folders, for the families in ``interop.families``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import CheckpointError, DataError
from qsparse_moe.interop.auto_model.reader import own_recipes, read_own
from qsparse_moe.interop.auto_model.settings import MODEL_TYPE
from qsparse_moe.interop.byte_tokenizer import is_byte_tokenizer
from qsparse_moe.interop.families.recipe import Piece, Place, Recipe, Recipes
from qsparse_moe.interop.families.registry import find_family, model_config
from qsparse_moe.interop.families.settings import CONFIG_JSON, FamilySettings
from qsparse_moe.interop.kept_plan import kept_plan, with_kept_plan
from qsparse_moe.interop.safetensors_writer import Part, TensorSpec
from qsparse_moe.interop.stored_tensors import StoredTensors
from qsparse_moe.sparsity.plan import SparsityPlan

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"


class HuggingFaceWeights:
    """The weights of a folder with ``config.json`` and safetensors files; see ``NamedTensors``.

    Raises:
        CheckpointError: the family or a setting is not supported, a file is missing or damaged, or a tensor is missing,
            unknown, of another shape, or not of a floating-point dtype.
        BackendUnavailable: safetensors is not installed.
    """

    kind = "hugging_face"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_file = path / CONFIG_JSON
        settings = FamilySettings.load(path)
        self.model_type, self.max_length = settings.model_type, settings.max_length
        family = None if settings.model_type == MODEL_TYPE else find_family(settings)
        self.model: ModelConfig
        self.plan: SparsityPlan | None = None
        """The plan in use, of a model of this package or of one that ``drop_in.sparsify`` made sparse; None: S is 0."""
        if family is None:
            self.model, self.plan = read_own(settings)
        else:
            entry = kept_plan(settings)
            self.model = model_config(family, settings)
            if entry is not None:
                self.model, self.plan = with_kept_plan(self.model, entry, settings)
        self._stored = StoredTensors(path)
        self.step = self._stored.step
        """Number of steps that the model was trained, if ``qsparse-moe export`` wrote the folder, and else 0."""
        names = self._stored.shapes.keys()
        self._recipes = family.recipes(self.model, names) if family else own_recipes(self.model, names)
        left_out = family.left_out(self.model, names) if family else {}
        _check_tensors(path, self._recipes, self._stored, left_out)
        _log_left_out(path, left_out)
        self.shapes: dict[str, tuple[int, ...]] = {name: recipe.shape for name, recipe in self._recipes.items()}

    @property
    def tokenizer(self) -> str:
        """The folder itself, or ``bytes`` for the files by which an export gives this tokenizer to other programs.

        Raises:
            DataError: it has no ``tokenizer.json``.
        """
        if not (self.path / TOKENIZER_JSON).is_file():
            raise DataError(
                f"{self.path} contains no {TOKENIZER_JSON}, and the tokenizer of the weights must be known; copy the "
                "file into it, make it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)), or "
                "import the folder with qsparse-moe import --tokenizer"
            )
        return "bytes" if is_byte_tokenizer(self.path) else str(self.path)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor: the widest of those that it is made of."""
        dtypes = {self._stored.dtypes[piece.name] for piece in self._recipes[name].pieces}
        return reduce(torch.promote_types, dtypes)

    def tensor(self, name: str) -> Tensor:
        """See ``NamedTensors``. In addition, raises CheckpointError if a value is not finite."""
        return self._recipes[name].build(self._read, self.dtype(name))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See ``NamedTensors``."""
        return self.tensor(name).flatten()[start:stop]

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """See ``NamedTensors``. The folder has no stored checksums, so only the manifest of the run records these."""
        return self._stored.checksums(part=part, parts=parts)

    def spec(self, name: str, dtype: torch.dtype | None = None) -> TensorSpec:
        """Return one tensor as the parts that its pieces are, of ``dtype``; None, and buffers: as it is stored."""
        recipe = self._recipes[name]
        if recipe.keeps_dtype:
            dtype = None
        parts = (Part(_part_shape(recipe, place), self._reader(recipe, piece)) for place, piece in recipe.places())
        return TensorSpec(dtype or self.dtype(name), recipe.shape, tuple(parts))

    def _reader(self, recipe: Recipe, piece: Piece) -> Callable[[], Tensor]:
        return lambda: recipe.part(self._read(piece))

    def _read(self, piece: Piece) -> Tensor:
        return piece.in_our_order(self._stored.read(piece.name, piece.index))


def _part_shape(recipe: Recipe, place: Place) -> tuple[int, ...]:
    rows = 1 if isinstance(place, int) else place.stop - place.start
    return rows, *recipe.shape[1:]


def _check_tensors(folder: Path, recipes: Recipes, stored: StoredTensors, left_out: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the folder has the tensors of the model, each with its shape, and no others."""
    want = {piece.name: piece.shape for recipe in recipes.values() for piece in recipe.pieces}
    missing, extra = sorted(want.keys() - stored.shapes), sorted(stored.shapes.keys() - want.keys() - left_out.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: lacks the tensor {_first_of(missing)}, which the model of its {CONFIG_JSON} has; download the "
            "model again"
        )
    if extra:
        raise CheckpointError(
            f"{stored.file(extra[0])}: contains the tensor {_first_of(extra)}, which the model of {CONFIG_JSON} does "
            "not have and which may change the result; name another model, or remove the tensor if it has no effect"
        )
    for name, shape in want.items():
        if stored.shapes[name] != shape:
            raise CheckpointError(
                f"{stored.file(name)}: {name} has the shape {stored.shapes[name]} in the file and {shape} by "
                f"{folder / CONFIG_JSON}; they must be equal. Download both again"
            )


def _log_left_out(folder: Path, left_out: Mapping[str, str]) -> None:
    for purpose in sorted(set(left_out.values())):
        names = sorted(name for name, of in left_out.items() if of == purpose)
        logger.warning(
            "%s: the tensor %s is left out, because it belongs to the %s, which this package does not have; the model "
            "without it is complete",
            folder,
            _first_of(names),
            purpose,
        )


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
