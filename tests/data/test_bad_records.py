"""Files, rows and documents that cannot be used: they are refused by name, or skipped and counted up to the limit."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data.open_source import Limits
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.table import _check_bad_records
from qsparse_moe.errors import DataError
from tests.data.corpus import write_files, write_jsonl
from tests.data.read_source import read

BAD_FILES = {
    "latin.txt": ("ab\xe9".encode("latin-1"), "text", r"latin\.txt is not UTF-8 \(byte 0xe9 at offset 2\).*iconv"),
    "latin.jsonl": (
        b'{"text": "ok"}\n{"text": "\xff"}\n',
        "jsonl",
        r"latin\.jsonl, row 1 cannot be read as .*: Unicode",
    ),
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": oops}\n',
        "jsonl",
        r"broken\.jsonl, row 1 cannot be read as jsonl: JSOND",
    ),
    "list.jsonl": (
        b'[\n{"text": "a"}]\n',
        "jsonl",
        r"list\.jsonl, row 0 cannot be read as jsonl: .*every line must be",
    ),
    "array.jsonl": (
        b'["a"]\n',
        "jsonl",
        r"array\.jsonl, row 0 cannot be read as jsonl: it is not a JSON object; .*Correct",
    ),
    "half.jsonl": (
        b'{"text": "\\ud83d"}\n',
        "jsonl",
        r"half\.jsonl, row 0: column 'text' holds half of a surrogate pair",
    ),
    "cut.jsonl": (
        gzip.compress(b'{"text": "a"}\n')[:-9],
        "jsonl",
        r"cut\.jsonl cannot be read as jsonl: EOFError: .*Repair",
    ),
    "other.jsonl": (b'{"body": "ok"}\n', "jsonl", r"other\.jsonl, row 0 has no column 'text'; its columns are body\."),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n', "jsonl", r"null\.jsonl, row 1: column 'text' holds NoneType.*"),
    "number.jsonl": (b'{"text": 7}\n', "jsonl", r"row 0: column 'text' holds int \(7\), and every row must hold text;"),
    "not.parquet": (b"not parquet", "parquet", r"not\.parquet cannot be read as parquet: .*set the kind"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_among_good_ones_is_named(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    good = tmp_path / f"0.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["fine"]}), good)
    else:
        good.write_text('{"text": "fine"}\n')
    with pytest.raises(DataError, match=rf"data\.sources\.0 \({kind}\): .*{message}"):
        read(kind=kind, path=(str(good), str(tmp_path / name)))


def test_a_parquet_file_without_rows_or_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"every file of path is empty, and one must hold text; name files that do"):
        read(kind="parquet", path=str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet, row 0 has no column 'text'; its columns are body, n\..*name"):
        read(kind="parquet", path=str(tmp_path / "other.parquet"))


@pytest.mark.parametrize("character", "xé漢😀")
def test_the_limit_of_a_document_is_in_bytes_whatever_its_characters(tmp_path: Path, character: str) -> None:
    (tmp_path / "a.txt").write_text(f"{character * 10}--end", "utf-8")
    config = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), separator="--")
    size = 10 * len(character.encode())
    assert list(open_source(config, 0, Limits(0, size)).texts()) == [character * 10, "end"]
    assert list(open_source(config, 0, Limits(1, size - 1)).texts()) == ["end"]
    with pytest.raises(DataError, match=r"a\.txt: a document that ends before byte"):
        list(open_source(config, 0, Limits(0, size - 1)).texts())


def test_empty_files_among_others_are_passed_over_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "t", ["one", "", "two", ""])
    with caplog.at_level(logging.WARNING):
        assert read(kind="text", path=f"{folder}/*") == ["one", "two"]
    assert "2 of 4 files are empty and skipped; the first: " in caplog.text and "0001.txt" in caplog.text
    (folder / "0000.txt").write_text("")
    (folder / "0002.txt").write_text("")
    with pytest.raises(DataError, match=r"0000\.txt is empty, and so are all others, and a file must hold text; name"):
        read(kind="text", path=f"{folder}/*")


def test_files_without_a_row_are_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"every file of path is empty"):
        read(kind="jsonl", path=str(tmp_path / "*"))
    write_jsonl(tmp_path / "b.jsonl", ["one"])
    with caplog.at_level(logging.WARNING):
        assert read(kind="jsonl", path=str(tmp_path / "*")) == ["one"]
    assert "a.jsonl is empty and is skipped" in caplog.text


MIXED = '{"text": "a"}\n{"text": oops}\n{"text": "b"}\n{"text": 7.5}\n{"n": 1}\n{"text": "c"}\n'


def test_bad_records_up_to_the_limit_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(MIXED)
    config = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    with caplog.at_level(logging.WARNING):
        assert list(open_source(config, 0, Limits(max_bad_records=3)).texts()) == ["a", "b", "c"]
    assert "skipped a bad record (data.max_bad_records is 3): data.sources.0 (jsonl): " in caplog.text
    assert (
        "a.jsonl, row 1 cannot be read as jsonl" in caplog.text and "3 bad records skipped in this pass" in caplog.text
    )
    message = (
        r"a\.jsonl, row 4 has no column 'text'; its columns are n\. .*or let data\.max_bad_records \(2\) skip such"
    )
    with pytest.raises(DataError, match=message + r" records \(3 bad records in this pass\)"):
        list(open_source(config, 0, Limits(max_bad_records=2)).texts())


def test_bad_rows_of_parquet_text_and_a_hub_data_set_are_skipped_too(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", None, "two"]})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    for kind, path in (("parquet", "set/train.parquet"), ("hub", "set")):
        config = SourceConfig(kind=kind, path=str(tmp_path / path))  # type: ignore[arg-type]
        assert list(open_source(config, 0, Limits(max_bad_records=1)).texts()) == ["one", "two"], kind
        with pytest.raises(DataError, match=r"row 1.* column 'text' holds NoneType \(None\)"):
            list(open_source(config, 0).texts())
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"three")
    config = SourceConfig(kind="text", path=str(tmp_path / "*.txt"))
    assert list(open_source(config, 0, Limits(max_bad_records=1)).texts()) == ["three"]


@pytest.mark.parametrize("compress", [False, True])
def test_a_document_beyond_the_limit_is_a_bad_record_and_not_read_whole(tmp_path: Path, compress: bool) -> None:
    line = json.dumps({"text": "x" * 100_000})
    content = f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n{line}'.encode()
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(content) if compress else content)
    config = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(
        DataError, match=r"row 1, has more than data\.max_document_bytes \(50\) bytes.* raise the setting"
    ):
        list(open_source(config, 0, Limits(max_document_bytes=50)).texts())
    assert list(open_source(config, 0, Limits(2, 50)).texts()) == ["a", "b"]
    assert len(list(open_source(config, 0, Limits(0, len(line))).texts())) == 4
    (tmp_path / "a.txt").write_bytes(b"short--" + b"y" * 3_000_000 + b"--end")
    config = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), separator="--")
    assert list(open_source(config, 0, Limits(1, 50)).texts()) == ["short", "end"]
    with pytest.raises(
        DataError, match=r"a document that ends after byte 1048576 has more than .*name their separator"
    ):
        list(open_source(config, 0, Limits(0, 50)).texts())
    whole = SourceConfig(kind="text", path=str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"a\.txt has more than data\.max_document_bytes \(50\)"):
        list(open_source(whole, 0, Limits(0, 50)).texts())
    pq.write_table(pa.table({"text": ["é" * 30, "fits"]}), tmp_path / "a.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet"))
    assert list(open_source(config, 0, Limits(1, 50)).texts()) == ["fits"]


def test_a_cached_table_is_used_up_to_as_many_bad_records_as_are_allowed_now() -> None:
    source = SimpleNamespace(setting="data.sources.0 (jsonl)", limits=Limits(max_bad_records=3))
    _check_bad_records(source, 3)
    with pytest.raises(DataError, match=r"sources\.0 \(jsonl\): 4 bad records .*max_bad_records is 3; .*=4 or more"):
        _check_bad_records(source, 4)
