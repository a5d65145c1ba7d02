"""The tokenizer ``bytes`` in the files of a Hugging Face tokenizer, which give other programs the ids of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsparse_moe.data.chat_template import has_chat_template
from qsparse_moe.data.tokenizer import ByteTokenizer

DOCUMENT_SPELLING = "<|endoftext|>"


def write_byte_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``: ids are byte values, and 256 begins a document."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": DOCUMENT_SPELLING,
        "eos_token": DOCUMENT_SPELLING,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", _tokenizer_json()), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def is_byte_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the ``tokenizer.json`` of ``write_byte_tokenizer`` and no chat template."""
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The tokenizer ``bytes`` has no files, so a template would be lost.
    return bool(found == _tokenizer_json()) and not has_chat_template(folder)


def _tokenizer_json() -> dict[str, Any]:
    document = ByteTokenizer.document_token
    first, text = ({"SpecialToken": {"id": DOCUMENT_SPELLING, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {"id": DOCUMENT_SPELLING, "ids": [document], "tokens": [DOCUMENT_SPELLING]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": document, "content": DOCUMENT_SPELLING} | flags],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {DOCUMENT_SPELLING: special},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_characters(), "merges": []},
    }


def _byte_characters() -> dict[str, int]:
    """Return the visible character by which byte-level BPE writes each byte (Radford et al. 2019), with its value."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}
