from __future__ import annotations

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
    monkeypatch.setattr(sources.tempfile, "tempdir", str(scratch))
    assert read(kind="jsonl", path=str(source)) == ["one"]
    assert not list(scratch.iterdir())


BAD_FILES = {
    "latin.txt": ("ab\xe9".encode("latin-1"), "text", r"latin\.txt is not UTF-8 \(byte 0xe9 at offset 2\).*iconv"),
    "empty.txt": (b"", "text", r"empty\.txt is empty.*remove it"),
    "empty.jsonl": (b"", "jsonl", r"empty\.jsonl is empty.*remove it"),
    "blank.jsonl": (b"\n\n", "jsonl", r"blank\.jsonl is empty.*remove it"),
    "latin.jsonl": (b'{"text": "ok"}\n{"text": "\xff"}\n', "jsonl", r"latin\.jsonl cannot be read as jsonl: Unicode.*"),
    "broken.jsonl": (b'{"text": "ok"}\n{"text": oops}\n', "jsonl", r"broken\.jsonl cannot be read as jsonl: .*Mend it"),
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
    with pytest.raises(DataError, match=r"none\.parquet is empty, and every file must hold text; remove it"):
        read(kind="parquet", path=str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet, row 0 has no column 'text'; its columns are body, n\..*name"):
        read(kind="parquet", path=str(tmp_path / "other.parquet"))


def test_a_path_that_matches_nothing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(text\): path '.*/\*\.txt' matches no file \(looked in .*mend the path"):
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
    with pytest.raises(DataError, match=r"split nowhere\) cannot be opened: .*nowhere.*Mend the name"):
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
