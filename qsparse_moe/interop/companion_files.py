"""The files of an export beside its weights and its ``config.json``: tokenizer, generation config, and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qsparse_moe.data.tokenizer import TextTokenizer, load_tokenizer, meaningless_ids
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.byte_tokenizer import write_byte_tokenizer
from qsparse_moe.interop.export_source import GENERATION_CONFIG, ExportDtype, ExportSource
from qsparse_moe.interop.families.settings import CONFIG_JSON
from qsparse_moe.interop.model_card import MODEL_CARD, model_card

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_companions(
    folder: Path, source: ExportSource, dtype: ExportDtype, *, command: str | None, model_type: str = "qsparse_moe"
) -> None:
    """Write the files beside the weights into the folder of an export, where transformers looks for them.

    Args:
        folder: the folder.
        source: the exported model.
        dtype: the requested dtype.
        command: the command line of the export, for the card.
        model_type: family of the format, or ``qsparse_moe``.
    """
    tokenizer = load_tokenizer(source.config.data.tokenizer)
    _write_tokenizer(folder, tokenizer)
    write_json(folder / GENERATION_CONFIG, generation_settings(source, tokenizer))
    name = folder.name.removeprefix(".").removesuffix(".partial")
    card = model_card(source, dtype, model_type=model_type, name=name, command=command)
    (folder / MODEL_CARD).write_text(card, encoding="utf-8")


def generation_settings(source: ExportSource, tokenizer: TextTokenizer | None = None) -> dict[str, Any]:
    """Return the generation config that the model came with.

    If there is none, texts begin and end with the document token, and ids that decode to nothing are suppressed.
    """
    file = source.folder / GENERATION_CONFIG
    if file.is_file():
        return dict(_read_object(file))
    tokenizer = tokenizer or load_tokenizer(source.config.data.tokenizer)
    document, meaningless = tokenizer.document_token, meaningless_ids(source.config.model, tokenizer)
    # Our generator never chooses them either.
    suppressed = {"suppress_tokens": list(meaningless)} if meaningless else {}
    return {"bos_token_id": document, "eos_token_id": document} | suppressed


def token_ids(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens of a generation config, which older programs read in ``config.json``."""
    return {name: settings[name] for name in _TOKEN_IDS if settings.get(name) is not None}


def copy_generation_config(folder: Path, output: Path) -> None:
    """Copy the generation config of a Hugging Face folder, or make one from its ``config.json`` if there is none.

    Raises:
        CheckpointError: the file is not an object of JSON.
    """
    file = folder / GENERATION_CONFIG
    if file.is_file():
        _read_object(file)
        shutil.copyfile(file, output / GENERATION_CONFIG)
        return
    settings = _read_object(folder / CONFIG_JSON)
    ids = {name: settings[name] for name in _TOKEN_IDS if settings.get(name) is not None}
    if ids:
        write_json(output / GENERATION_CONFIG, ids)


def _write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    if not tokenizer.files:
        write_byte_tokenizer(folder)
        return
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)
    config = folder / _TOKENIZER_CONFIG
    settings = _read_object(config) if config.is_file() else {}
    if "tokenizer_class" not in settings:
        # Otherwise transformers takes the class of the model's family, which may split text in another way.
        write_json(config, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}), and must be JSON; correct or remove it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: is no object of JSON, and must be one; correct or remove it")
    return found


def write_json(file: Path, settings: dict[str, Any]) -> None:
    """Write a file of settings."""
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
