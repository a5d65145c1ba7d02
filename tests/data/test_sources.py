from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data import sources
from qsparse_moe.data.open_source import Limits, content_digest
from qsparse_moe.data.sources import open_source
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_files, write_jsonl


def read(**settings: Any) -> list[str]:
    return list(open_source(SourceConfig(**settings), 0).texts())


def test_the_standard_library_is_read_in_order_and_without_tests() -> None:
    source = open_source(SourceConfig(kind="stdlib"), 0)
    files = [file for file, _, _ in source.identity["files"]]
    assert files == sorted(files) and Path(os.__file__).name in {Path(file).name for file in files}
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(Path(file).parts) for file in files)
    assert source.num_bytes is not None and source.num_bytes > 5_000_000
    texts = source.texts()
    assert [next(texts) for _ in range(5)] == [Path(file).read_bytes().decode() for file in files[:5]]


def test_a_python_without_a_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"data\.sources\.0 \(stdlib\): .* holds no \.py file.*use another Python"):
        open_source(SourceConfig(kind="stdlib"), 0)


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\n\n漢\n".encode())
    assert read(kind="text", path=str(tmp_path / "a.txt")) == ["é\r\n\n漢\n"]


def test_globs_and_paths_give_every_file_once_in_order(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "deep", ["one", "two"])
    (tmp_path / "z.txt").write_text("three")
    patterns = (str(tmp_path / "z.txt"), str(tmp_path / "**/*.txt"), str(folder / "0001.txt"))
    assert read(kind="text", path=patterns) == ["one", "two", "three"]


def test_a_file_name_may_hold_the_signs_of_a_glob(tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "a[1]*.jsonl", ["one"])
    assert read(kind="jsonl", path=str(odd)) == ["one"]


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read(kind="text", path="~/a.txt") == ["one"]


def test_jsonl_files_may_differ_in_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "n": 1}\n{"body": "", "n": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"extra": {"x": [1]}, "body": "two"}\n')
    assert read(kind="jsonl", path=str(tmp_path / "*.jsonl"), column="body") == ["one", "two"]


def test_parquet_files_are_read_over_their_row_groups(tmp_path: Path) -> None:
    texts = make_texts(50)
    pq.write_table(pa.table({"n": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    assert read(kind="parquet", path=str(tmp_path / "a.parquet")) == texts


def test_reading_leaves_nothing_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert read(kind="jsonl", path=str(source)) == ["one"]
    assert not list(scratch.iterdir())


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


def test_a_path_that_matches_nothing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(text\): path '.*/\*\.txt' matches no file \(looked in .*correct the path"):
        read(kind="text", path=str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"path '.*' is a folder.*write '.*/\*' for the files in it"):
        read(kind="text", path=str(tmp_path))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.txt"
    path.write_text("here for a moment")
    source = open_source(SourceConfig(kind="text", path=str(path)), 3)
    path.unlink()
    with pytest.raises(DataError, match=r"data\.sources\.3 \(text\): .*gone\.txt cannot be read as text: FileNotFound"):
        list(source.texts())


def test_a_library_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("in the way")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "a.txt" / "cache")
    with pytest.raises(DataError, match=r"\(text\): the cache folder .*a\.txt/cache\) cannot be written.* HF_HOME"):
        read(kind="text", path=str(tmp_path / "a.txt"))


def test_a_changed_file_changes_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    config = SourceConfig(kind="text", path=str(path))
    before = open_source(config, 0).identity
    assert open_source(config, 0).identity == before
    os.utime(path, ns=(0, 1))
    assert open_source(config, 0).identity != before


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A data set as it lies on the hub: a folder of files that ``datasets`` recognises."""
    folder = tmp_path / "data_set"
    folder.mkdir()
    for part in range(2):
        texts = make_texts(5, seed=part)
        pq.write_table(pa.table({"body": texts, "n": range(5)}), folder / f"train-{part}.parquet")
    pq.write_table(pa.table({"body": ["held out"], "n": [0]}), folder / "test-0.parquet")
    return folder


def test_a_hub_data_set_is_streamed_by_split(data_folder: Path) -> None:
    assert read(kind="hub", path=str(data_folder), column="body") == make_texts(5) + make_texts(5, seed=1)
    assert read(kind="hub", path=str(data_folder), column="body", split="test") == ["held out"]


def test_the_identity_of_a_hub_data_set_follows_its_revision(data_folder: Path) -> None:
    config = SourceConfig(kind="hub", path=str(data_folder), column="body")
    before = open_source(config, 0).identity
    assert open_source(config, 0).identity == before
    os.utime(data_folder / "train-1.parquet", ns=(0, 1))
    assert open_source(config, 0).identity != before


def test_a_hub_name_is_passed_on_with_its_subset(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real, asked = datasets.load_dataset_builder, []

    def load(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        return real(str(data_folder))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert len(read(kind="hub", path="owner/name", subset="small", column="body")) == 10
    assert asked == [("owner/name", "small")]


def test_a_hub_data_set_that_cannot_be_opened_is_refused(data_folder: Path) -> None:
    with pytest.raises(DataError, match=r"\(hub\): 'owner/none' \(subset None, split train\) cannot be opened: .*copy"):
        read(kind="hub", path="owner/none")
    with pytest.raises(DataError, match=r"split nowhere\) cannot be opened: .*nowhere.*Correct the name"):
        read(kind="hub", path=str(data_folder), split="nowhere")
    with pytest.raises(DataError, match=r"\(hub\): '.*' has no column 'text'; its columns are body, n\..*column"):
        read(kind="hub", path=str(data_folder))


def test_a_hub_stream_that_breaks_is_a_data_error() -> None:
    from datasets import IterableDataset

    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("the line went dead")

    source = sources.OpenSource("data.sources.0 (hub)", IterableDataset.from_generator(broken), "text", {}, None)
    with pytest.raises(DataError, match=r"sources\.0 \(hub\) could not be read.*ConnectionError: the line.*Try again"):
        list(source.texts())


def test_importing_the_room_does_not_import_datasets() -> None:
    code = "import qsparse_moe.data.loader, sys; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_path_may_hold_the_signs_of_a_chained_url(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "simplecache::file:" / "x"
    folder.mkdir(parents=True)
    write = {"text": lambda f: f.write_text("one"), "jsonl": lambda f: write_jsonl(f, ["one"])}
    write["parquet"] = lambda f: pq.write_table(pa.table({"text": ["one"]}), f)
    write[kind](folder / "a::b")
    assert read(kind=kind, path=f"{folder}/*") == ["one"]


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
    # Of seven lengths, so that what is kept of a skipped document ends at every place of the separator.
    long = [f"{'x' * length}<->{length}<->" for length in range(6, 13)]
    (tmp_path / "a.txt").write_text("one<->much too long-><-<->two<->" + "".join(long) + "y" * 9, "utf-8")
    config = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), separator="<->")
    assert list(open_source(config, 0, Limits(9, 5)).texts()) == ["one", "two", *map(str, range(6, 13))]


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


def test_a_saved_data_set_is_read_by_its_own_kind(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = make_texts(70)
    train = Dataset.from_dict({"body": texts, "n": list(range(70))})
    train.save_to_disk(tmp_path / "plain")
    DatasetDict(train=train, test=train.select([3])).save_to_disk(tmp_path / "splits")
    assert read(kind="saved", path=str(tmp_path / "plain"), column="body") == texts
    assert read(kind="saved", path=str(tmp_path / "splits"), column="body", split="test") == [texts[3]]
    with pytest.raises(DataError, match=r"\(saved\): .*splits has no split 'dev'; its splits are train, test\."):
        read(kind="saved", path=str(tmp_path / "splits"), column="body", split="dev")
    with pytest.raises(DataError, match=r"\(saved\): .* has no column 'text'; its columns are body, n\."):
        read(kind="saved", path=str(tmp_path / "plain"))
    with pytest.raises(
        DataError, match=r"\(saved\): path '.*' is not a folder that save_to_disk wrote .*correct the path"
    ):
        read(kind="saved", path=str(tmp_path))
    with pytest.raises(
        DataError, match=r"\(text\): path '.*plain' is a data set that save_to_disk wrote.* kind to saved"
    ):
        read(kind="text", path=str(tmp_path / "plain"))
    (tmp_path / "plain" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"plain cannot be read as a saved data set: .*Save it again"):
        read(kind="saved", path=str(tmp_path / "plain"), column="body")


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: pytest.fail("asked"))
    for path in (str(tmp_path / "no"), "./no", "a/b/c"):
        with pytest.raises(DataError, match=r"\(hub\): path '.*' looks like a folder, and there is none .*owner/name"):
            read(kind="hub", path=path)


def test_a_content_digest_is_of_content_alone(tmp_path: Path) -> None:
    big = bytes(range(256)) * 40_000
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"onf"), ("d", big), ("e", big), ("f", big[:-1] + b"x")):
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / "b", ns=(0, 1))
    digest = {name: content_digest([str(tmp_path / name)]) for name in "abcdef"}
    assert digest["a"] == digest["b"] != digest["c"] and digest["d"] == digest["e"] != digest["f"]
    files = [str(tmp_path / name) for name in "ac"]
    assert content_digest(files) != content_digest(files[::-1])
