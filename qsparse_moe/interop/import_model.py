"""Import a Hugging Face folder: write its weights under our names, as an export that every command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from qsparse_moe.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.data.tokenizer import TextTokenizer, check_vocabulary, load_tokenizer
from qsparse_moe.errors import ArgumentError, CheckpointError, ConfigError, DataError, without_fields
from qsparse_moe.interop.auto_model.reader import started
from qsparse_moe.interop.companion_files import copy_generation_config
from qsparse_moe.interop.export_folder import PART_BYTES, Export, check_output, write_export
from qsparse_moe.interop.families.settings import CONFIG_JSON
from qsparse_moe.interop.hub import local_folder
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.upcycling import UpcycledWeights, upcycled
from qsparse_moe.interop.upcycling_rules import Upcycling
from qsparse_moe.interop.weight_files import export_metadata
from qsparse_moe.runs.folder import CONFIG_FILE, PLAN_FILE, TOKENIZER, write_config
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES

ImportDtype = Literal["auto", "fp32", "bf16"]

# data.sequence_length limits generation too, and evaluation holds the logits of a whole sequence.
_LONGEST = 2048
_PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def import_model(
    folder: Path | str,
    output: Path | str,
    *,
    tokenizer: str | None = None,
    dtype: ImportDtype = "auto",
    force: bool = False,
    upcycling: Upcycling | None = None,
    part_bytes: int = PART_BYTES,
) -> Export:
    """Write the model of a Hugging Face folder as an export, which ``load_export`` reads.

    At most its largest tensor is held in memory. The model is dense, with S = 0, unless it is a model of this package
    that transformers has saved, or was saved while ``sparsify`` had made it sparse. Its tokenizer is copied.

    Args:
        folder: the folder, with ``config.json`` and safetensors files, or the name of a model on the hub.
        output: folder to create; with ``force``, an earlier export is replaced.
        tokenizer: the tokenizer as in ``data.tokenizer``; None: that of the folder.
        dtype: type of the weights; ``auto``: as they are stored.
        force: see ``output``.
        upcycling: the experts to make of every dense layer; None: the model as it is.
        part_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        ConfigError: ``upcycling`` does not fit the model.
        CheckpointError: the folder cannot be read as a model, or ``output`` is in use or cannot be written.
        BackendUnavailable: safetensors is not installed.
    """
    output = Path(output)
    check_output(output, force)
    folder = local_folder(str(folder))
    _check_folder(folder)
    source = HuggingFaceWeights(folder)
    name, loaded = _tokenizer(source, tokenizer)
    sequence_length = min(source.max_length or _LONGEST, _LONGEST)
    # Named by its place in the finished export.
    plan_file = output.absolute() / PLAN_FILE
    model = source.model if source.plan is None else started(source.model, source.plan, str(plan_file))
    weights: HuggingFaceWeights | UpcycledWeights = source
    if upcycling is not None:
        model, weights = _upcycled(source, upcycling)
    stored = None if dtype == "auto" else COMPUTE_DTYPES[dtype]
    tensors = {name: weights.spec(name, stored) for name in weights.shapes}
    # That of the weights, because the bytes that a token reads are counted by it.
    precision = _PRECISIONS.get(tensors["embedding.weight"].dtype, "fp32")
    config = RunConfig(
        model=model,
        data=DataConfig(tokenizer=name, sequence_length=sequence_length),
        training=TrainingConfig(micro_batch_size=1, precision=precision),
    )

    def write_rest(partial: Path) -> None:
        write_config(partial, config)
        if config.model.sparsity.plan is not None:
            assert source.plan is not None
            source.plan.save(partial / PLAN_FILE)
        copy_generation_config(folder, partial)
        if loaded.files:
            loaded.save(partial / TOKENIZER)

    metadata = export_metadata(
        step=source.step, max_length=source.max_length or sequence_length, family=source.model_type
    )
    return write_export(output, tensors, metadata=metadata, write_rest=write_rest, part_bytes=part_bytes)


def _upcycled(source: HuggingFaceWeights, upcycling: Upcycling) -> tuple[ModelConfig, UpcycledWeights]:
    if moe_layers(source.model):
        raise ArgumentError(
            f"{{experts}} ({upcycling.experts}) makes experts of the layers of a dense model, and "
            f"{without_fields(source.path)} has {source.model.moe.num_experts} experts already; leave it out"
        )
    if source.plan is not None:
        raise ArgumentError(
            f"{{experts}} ({upcycling.experts}) makes experts of a model of another family, and "
            f"{without_fields(source.path)} has a sparsity plan for the sites of its dense layers; leave it out, and "
            "name the folder in training.init_from of a run with experts"
        )
    return upcycled(source, upcycling)


def _check_folder(folder: Path) -> None:
    if (folder / CONFIG_JSON).is_file():
        return
    if (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: contains {CONFIG_FILE} and no {CONFIG_JSON}, so it is a run or an export of this package and "
            "needs no import; use it as it is"
        )
    problem = f"contains no {CONFIG_JSON}" if folder.is_dir() else "is no folder"
    raise CheckpointError(
        f"{folder}: {problem}, and the folder of a Hugging Face model, or its name on the hub (OWNER/NAME), is "
        "needed; correct the name, or download the model again"
    )


def _tokenizer(weights: HuggingFaceWeights, name: str | None) -> tuple[str, TextTokenizer]:
    """Return the tokenizer and its name, checked against the vocabulary of the model.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has ids without a row in the embedding.
    """
    try:
        name = name or weights.tokenizer
        tokenizer = load_tokenizer(name)
        check_vocabulary(weights.model, tokenizer)
    except (DataError, ConfigError) as error:
        raise CheckpointError(
            f"{weights.path}: its tokenizer cannot be used: {error}. Name another one with --tokenizer (tokenizer=... "
            "in Python)"
        ) from error
    return name, tokenizer
