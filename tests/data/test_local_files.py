"""Files of text, JSONL and Parquet: documents, separators, columns, compression, byte order marks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data.open_source import Limits
from qsparse_moe.data.sources import open_source
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts
from tests.data.read_source import read


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\n\n漢\n".encode())
    assert read(kind="text", path=str(tmp_path / "a.txt")) == ["é\r\n\n漢\n"]


def test_jsonl_files_may_differ_in_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "n": 1}\n{"body": "", "n": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"extra": {"x": [1]}, "body": "two"}\n')
    assert read(kind="jsonl", path=str(tmp_path / "*.jsonl"), column="body") == ["one", "two"]


def test_parquet_files_are_read_over_their_row_groups(tmp_path: Path) -> None:
    texts = make_texts(50)
    pq.write_table(pa.table({"n": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    assert read(kind="parquet", path=str(tmp_path / "a.parquet")) == texts


def test_a_separator_makes_many_documents_of_one_text_file(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\n\ntwo\n\n\n\nthree", "utf-8")
    source = open_source(SourceConfig(kind="text", path=str(file), separator="\n\n"), 0)
    assert list(source.texts()) == ["one", "two", "three"]
    assert source.identity != open_source(SourceConfig(kind="text", path=str(file)), 0).identity


def test_only_the_needed_column_of_jsonl_is_read(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "n": 1, "m": {"x": 1}} for i in range(2000)]
    rows += [{"text": "late", "n": "three", "m": [1, {"y": 2}]}, {"m": None, "text": "last"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"n": ' + "9" * 5000 + ', "text": "huge"}')
    assert read(kind="jsonl", path=str(file)) == [*(f"t{i}" for i in range(2000)), "late", "last", "huge"]


def test_compressed_files_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("éins".encode()))
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": "four"}'))
    assert read(kind="text", path=(str(tmp_path / "*.txt*"))) == ["éins", "two"]
    assert read(kind="jsonl", path=str(tmp_path / "c.jsonl.gz")) == ["three", "four"]
    source = open_source(SourceConfig(kind="text", path=str(tmp_path / "*.txt*")), 0)
    assert source.num_bytes is None, "the sizes of compressed files say nothing about their text"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone--\xef\xbb\xbftwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n')
    assert read(kind="text", path=str(tmp_path / "a.txt")) == ["one--\ufefftwo"], "inside a text it is a character"
    assert read(kind="text", path=str(tmp_path / "a.txt"), separator="--") == ["one", "\ufefftwo"]
    assert read(kind="jsonl", path=str(tmp_path / "b.jsonl")) == ["three"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_a_separator_is_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("qsparse_moe.data.local_files._BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_text("é一--two---- x-y--漢", "utf-8")
    assert read(kind="text", path=str(tmp_path / "a.txt"), separator="--") == ["é一", "two", " x-y", "漢"]
    (tmp_path / "b.txt").write_bytes("é--".encode() + b"ab\xff")
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte 0xff at offset 6\)"):
        read(kind="text", path=str(tmp_path / "b.txt"), separator="--")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_the_separator_behind_a_document_that_is_too_long_is_found_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("qsparse_moe.data.local_files._BLOCK_BYTES", block)
    # Seven lengths, so that the part of a skipped document in memory ends at every position of the separator.
    long = [f"{'x' * length}<->{length}<->" for length in range(6, 13)]
    (tmp_path / "a.txt").write_text("one<->much too long-><-<->two<->" + "".join(long) + "y" * 9, "utf-8")
    config = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), separator="<->")
    assert list(open_source(config, 0, Limits(9, 5)).texts()) == ["one", "two", *map(str, range(6, 13))]
