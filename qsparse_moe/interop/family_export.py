"""Write a model in its family's own Hugging Face format, by the recipes that read that format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.companion_files import generation_settings, token_ids, write_companions
from qsparse_moe.interop.export_folder import PART_BYTES, Export, write_export
from qsparse_moe.interop.export_source import ExportDtype, ExportSource
from qsparse_moe.interop.families.expressible import (
    family_settings,
    find_expressing,
    nearest_family,
    with_plan_as_setting,
)
from qsparse_moe.interop.families.recipe import Piece, Place, Recipe
from qsparse_moe.interop.families.registry import FAMILIES
from qsparse_moe.interop.families.settings import CONFIG_JSON
from qsparse_moe.interop.safetensors_writer import TensorSpec
from qsparse_moe.interop.weight_files import family_metadata
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed


def family_of(source: ExportSource) -> str | None:
    """Return the ``model_type`` of the family that can express the model; None if there is none."""
    return find_expressing(source.config.model, source.plan, first=source.family)


def no_family(source: ExportSource) -> CheckpointError:
    """Return the error of a model that no family can express, with every setting that prevents it."""
    nearest, reasons = nearest_family(source.config.model, source.plan)
    return CheckpointError(
        f"{source.folder}: cannot be written in the format of a Hugging Face family ({', '.join(FAMILIES)}), which "
        f"must compute what the model computes. The nearest is {nearest}, and it does not have "
        f"{'; '.join(reasons)}. Export it with --format native, or train a model with the settings of the family"
    )


def export_family(
    source: ExportSource,
    output: Path,
    model_type: str,
    *,
    dtype: ExportDtype,
    part_bytes: int = PART_BYTES,
    command: str | None = None,
    distributed: Distributed = ONE_RANK,
) -> Export:
    """Write the folder that transformers and other programs open; see ``export_model.export_model``.

    Args:
        source: a model that the family can express.
        output: see ``write_export``.
        model_type: the family.
        dtype: type of the weights.
        part_bytes: see ``write_export``.
        command: the command line of the export, for the card.
        distributed: see ``write_export``.
    """

    def write_rest(folder: Path) -> None:
        _write_config(folder, source, model_type, dtype)
        write_companions(folder, source, dtype, command=command, model_type=model_type)

    return write_export(
        output,
        family_tensors(source, model_type, dtype),
        metadata=family_metadata(step=source.step),
        write_rest=write_rest,
        part_bytes=part_bytes,
        model_type=model_type,
        distributed=distributed,
    )


def family_tensors(source: ExportSource, model_type: str, dtype: ExportDtype) -> Mapping[str, TensorSpec]:
    """Return the tensors under their published names, one per expert and matrix."""
    # Without stored names the recipes are those of the published layout, in which experts are not fused.
    recipes = FAMILIES[model_type].recipes(source.config.model, ())
    assert recipes.keys() == source.weights.shapes.keys(), recipes.keys() ^ source.weights.shapes.keys()
    return {
        piece.name: TensorSpec.whole(
            source.dtype(name, dtype), piece.shape, _reader(source, name, recipe, place, piece)
        )
        for name, recipe in recipes.items()
        for place, piece in recipe.places()
    }


def _reader(source: ExportSource, name: str, recipe: Recipe, place: Place, piece: Piece) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Only this piece: the ranks of a run have written ranges of a tensor, and all of it may be many gigabytes.
        if isinstance(place, int):
            return recipe.stored(source.rows(name, place, place + 1)[0], piece)
        return recipe.stored(source.rows(name, place.start, place.stop), piece)

    return read


def _write_config(folder: Path, source: ExportSource, model_type: str, dtype: ExportDtype) -> None:
    model, _ = with_plan_as_setting(source.config.model, source.plan)
    settings = family_settings(model_type, model) | {
        "max_position_embeddings": source.max_length,
        # The name that every version of transformers reads.
        "torch_dtype": str(source.dtype("embedding.weight", dtype)).removeprefix("torch."),
        "use_cache": True,
    }
    settings |= token_ids(generation_settings(source))
    (folder / CONFIG_JSON).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
