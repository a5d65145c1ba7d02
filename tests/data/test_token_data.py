from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.packing import is_validation, text_digest
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import ConfigError, DataError
from tests.data.corpus import make_texts, write_files, write_jsonl

MakeConfig = Callable[..., DataConfig]


def split(texts: list[str], fraction: float = 0.2) -> tuple[list[str], list[str]]:
    held_out = [text for text in texts if is_validation(text_digest(text.encode()), fraction)]
    return [text for text in texts if text not in held_out], held_out


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_unigram_bits_per_byte_is_the_definition(
    data_config: MakeConfig, jsonl_source: SourceConfig, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsparse_moe.data.token_data._FIRST_STREAM_SEQUENCES", 10_000)  # to the end of the stream
    data = load_data(data_config(jsonl_source, mode=mode))
    train, held_out = ("".join(texts).encode() for texts in split(make_texts(400)))
    counts, total = Counter(train), len(train) + 256
    bits = -sum(math.log2((counts[byte] + 1) / total) for byte in held_out)
    assert data.unigram_bits_per_byte() == pytest.approx(bits / len(held_out))


def test_sources_are_joined_and_weighted(data_config: MakeConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    write_files(tmp_path / "files", make_texts(100, seed=1))
    sources = (
        SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl")),
        SourceConfig(kind="text", path=str(tmp_path / "files" / "*.txt")),
    )
    once = load_data(data_config(*sources))
    alone = [len(load_data(data_config(source)).train) for source in sources]
    assert len(once.train) == sum(alone)
    weighted = load_data(data_config(sources[0], sources[1].model_copy(update={"weight": 3.0})))
    assert len(weighted.train) == 4 * alone[0]
    assert len(list((tmp_path / "cache" / "tables").iterdir())) == 2, "a source has one table in every mixture"
    changed = {name for name in once.parts if once.parts[name] != weighted.parts[name]}
    assert changed == {"data.sources.1.weight"} and once.fingerprint != weighted.fingerprint


def test_every_document_is_in_one_split_only(data_config: MakeConfig, tmp_path: Path) -> None:
    texts = make_texts(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", texts[::-1])  # the same documents again, in another source
    sources = [SourceConfig(kind="jsonl", path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    data = load_data(data_config(*sources, sequence_length=8))
    sides = [
        data.tokenizer.decode([token for row in table.tokens(range(len(table))) for token in row[1:].tolist()])
        for table in (data.train, data.validation)
    ]
    for documents, this, other in zip(split(texts), sides, sides[::-1], strict=True):
        marks = [text.split()[-1] + "\n" for text in documents][1:-1]  # a row may cut the first and the last
        assert all(this.count(mark) == 2 and mark not in other for mark in marks)


def test_attention_across_documents_leaves_them_unmarked(data_config: MakeConfig, jsonl_source: SourceConfig) -> None:
    batch = load_data(data_config(jsonl_source, attend_across_documents=True)).train.sequences([0, 1])
    assert batch.documents_BS is None and batch.positions_BS[1].tolist() == list(range(16))
    marked = load_data(data_config(jsonl_source, sequence_length=200)).train.sequences([0])
    assert marked.documents_BS is not None and marked.documents_BS.max() > 0


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_too_little_text_for_validation_is_refused(data_config: MakeConfig, tmp_path: Path, mode: str) -> None:
    write_files(tmp_path / "files", split(make_texts(60))[0])
    config = data_config(SourceConfig(kind="text", path=f"{tmp_path}/files/*.txt"), mode=mode)
    message = r"data\.sources\.0 \(text\): too little text for one validation sequence: .*fraction 0\.2.* = 17 tok.*add"
    with pytest.raises(DataError, match=message):
        load_data(config)


def test_too_little_text_for_train_is_refused_with_its_source(data_config: MakeConfig, tmp_path: Path) -> None:
    good = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", make_texts(300))))
    short = SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "b.jsonl", ["short"])))
    with pytest.raises(
        DataError, match=r"data\.sources\.1 \(jsonl\) has too little text for one training sequence.* 17 "
    ):
        load_data(data_config(good, short))


def test_max_bytes_of_a_stream_is_refused_with_the_reason(data_config: MakeConfig, jsonl_source: SourceConfig) -> None:
    source = jsonl_source.model_copy(update={"max_bytes": 100})
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.max_bytes \(100\) must be null.*streaming.*mode=table"):
        load_data(data_config(source, mode="streaming"))


def test_the_training_sequences_of_a_stream_are_in_no_table(
    data_config: MakeConfig, jsonl_source: SourceConfig
) -> None:
    with pytest.raises(AssertionError, match="TrainLoader"):
        _ = load_data(data_config(jsonl_source, mode="streaming")).train
