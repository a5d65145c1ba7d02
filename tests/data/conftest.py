"""Small corpora and configs that keep their cache inside the test's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from tests.data.corpus import make_texts, write_jsonl


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A ``DataConfig`` of the given sources with a cache of its own and short sequences."""

    def make(*sources: SourceConfig, **settings: Any) -> DataConfig:
        defaults = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 16, "validation_fraction": 0.2}
        return DataConfig(sources=sources, **(defaults | settings))

    return make


@pytest.fixture
def jsonl_source(tmp_path: Path) -> SourceConfig:
    """400 documents in one file."""
    return SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "docs.jsonl", make_texts(400))))


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with an end-of-sequence token, as ``save_pretrained`` lays it out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200), trainer)
    # What a real one may bring along and a document must not be subject to.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
