"""Sources of text: the standard library, paths and globs, the identity of a source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data import sources
from qsparse_moe.data.open_source import content_digest
from qsparse_moe.data.sources import open_source
from qsparse_moe.errors import DataError
from tests.data.corpus import write_files, write_jsonl
from tests.data.read_source import read


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


def test_globs_and_paths_give_every_file_once_in_order(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "deep", ["one", "two"])
    (tmp_path / "z.txt").write_text("three")
    patterns = (str(tmp_path / "z.txt"), str(tmp_path / "**/*.txt"), str(folder / "0001.txt"))
    assert read(kind="text", path=patterns) == ["one", "two", "three"]


def test_a_file_name_may_contain_the_characters_of_a_glob(tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "a[1]*.jsonl", ["one"])
    assert read(kind="jsonl", path=str(odd)) == ["one"]


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read(kind="text", path="~/a.txt") == ["one"]


def test_reading_leaves_nothing_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert read(kind="jsonl", path=str(source)) == ["one"]
    assert not list(scratch.iterdir())


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


def test_importing_the_data_package_does_not_import_datasets() -> None:
    code = "import qsparse_moe.data.loader, sys; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_path_may_contain_the_characters_of_a_chained_url(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "simplecache::file:" / "x"
    folder.mkdir(parents=True)
    write = {"text": lambda f: f.write_text("one"), "jsonl": lambda f: write_jsonl(f, ["one"])}
    write["parquet"] = lambda f: pq.write_table(pa.table({"text": ["one"]}), f)
    write[kind](folder / "a::b")
    assert read(kind=kind, path=f"{folder}/*") == ["one"]


def test_a_content_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    big = bytes(range(256)) * 40_000
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"onf"), ("d", big), ("e", big), ("f", big[:-1] + b"x")):
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / "b", ns=(0, 1))
    digest = {name: content_digest([str(tmp_path / name)]) for name in "abcdef"}
    assert digest["a"] == digest["b"] != digest["c"] and digest["d"] == digest["e"] != digest["f"]
    files = [str(tmp_path / name) for name in "ac"]
    assert content_digest(files) != content_digest(files[::-1])
