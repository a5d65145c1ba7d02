from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data import table as table_module
from qsparse_moe.data.packing import Packer, is_validation, text_digest
from qsparse_moe.data.packing_settings import Packing
from qsparse_moe.data.prepare import LogProgress
from qsparse_moe.data.shard_writer import UpTo, token_type
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.stored import SourceTable
from qsparse_moe.data.table import TableJob, build_table
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.data.tokenizer import load_tokenizer
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_files, write_jsonl

MakeConfig = Callable[..., DataConfig]


def test_the_command_of_the_settings_page_clears_the_cache(jsonl_source: SourceConfig, data_config: MakeConfig) -> None:
    """The tables go, nothing else does, and the next run makes its table again."""
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(rm [^`]*)`", page)
    config = data_config(jsonl_source)
    rows = all_rows(load_data(config))
    other = Path(config.cache_dir) / "other.txt"
    other.write_text("kept")
    assert table_folders(config)
    subprocess.run(command.replace("~/.cache/qsparse_moe", config.cache_dir), shell=True, check=True)
    assert list(Path(config.cache_dir).iterdir()) == [other]
    assert all_rows(load_data(config)) == rows and len(table_folders(config)) == 1


def load_one(config: DataConfig) -> SourceTable:
    packing = Packing(load_tokenizer(config.tokenizer), config.sequence_length, config.validation_fraction)
    source = config.sources[0]
    job = TableJob(open_source(source, 0), packing, Path(config.cache_dir), config.shard_bytes, source.max_bytes)
    build_table(job, lambda number, done: None)
    return job.open()


def all_rows(data: TokenData) -> list[list[int]]:
    return [row.tolist() for table in (data.train, data.validation) for row in table.tokens(range(len(table)))]


def table_folders(config: DataConfig) -> list[Path]:
    return sorted(path for path in (Path(config.cache_dir) / "tables").iterdir() if path.is_dir())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_table_contains_the_packed_documents_of_each_split(
    data_config: MakeConfig, jsonl_source: SourceConfig, bpe_folder: Path, tokenizer: str
) -> None:
    config = data_config(jsonl_source, tokenizer="bytes" if tokenizer == "bytes" else str(bpe_folder))
    table = load_one(config)
    text_tokenizer = load_tokenizer(config.tokenizer)
    for held_out, side in ((False, table.train), (True, table.validation)):
        texts = [text for text in make_texts(400) if is_validation(text_digest(text.encode()), 0.2) == held_out]
        want = Packer(16).add(text_tokenizer.tokenize(texts))
        assert len(side) > 50
        assert [side.tokens(index).tolist() for index in range(len(side))] == want.tokens.tolist()
        if held_out:
            assert [side.num_bytes(index) for index in range(len(side))] == want.num_bytes.tolist()
        joined = "".join(texts).encode()
        assert side.byte_counts.tolist() == [joined.count(value) for value in range(256)]


def test_many_chunks_make_the_same_sequences_as_one(
    data_config: MakeConfig, jsonl_source: SourceConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = load_data(data_config(jsonl_source))
    monkeypatch.setattr("qsparse_moe.data.shard_writer._CHUNK_BYTES", 500)
    calls: list[tuple[str, int, int | None]] = []
    config = data_config(jsonl_source, cache_dir=str(tmp_path / "other"))
    parts = load_data(config, progress=lambda *call: calls.append(call))
    assert all_rows(parts) == all_rows(whole)
    assert parts.fingerprint == whole.fingerprint
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls) and len(calls) > 10
    size = Path(str(jsonl_source.path)).stat().st_size
    assert calls[-1] == ("data.sources.0 (jsonl)", size, size)


def test_token_ids_beyond_two_bytes_survive(data_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    vocabulary = {"<unk>": 0, "</s>": 1, "one": 2, "far": 70_000}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}})
    )
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    source = SourceConfig(
        kind="jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", [f"far one {i}" for i in range(99)]))
    )
    data = load_data(data_config(source, tokenizer=str(folder), sequence_length=4))
    assert data.tokenizer.vocab_size == 70_001
    assert data.train.tokens([0]).tolist() == [[1, 70_000, 2, 0, 1]]


def test_max_bytes_stops_between_two_characters(data_config: MakeConfig, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "déé", "never"])
    progress: list[tuple[str, int, int | None]] = []
    for max_bytes, want in ((6, "abcdé"), (7, "abcdé"), (8, "abcdéé"), (3, "abc"), (4, "abcd")):
        source = SourceConfig(kind="jsonl", path=str(path), max_bytes=max_bytes)
        table = load_one(data_config(source, sequence_length=2))
        counts = table.train.byte_counts + table.validation.byte_counts
        assert counts.tolist() == [want.encode().count(value) for value in range(256)], max_bytes
    folder = write_files(tmp_path / "files", make_texts(200))
    source = SourceConfig(kind="text", path=f"{folder}/*.txt", max_bytes=9000)
    load_data(data_config(source), progress=lambda *call: progress.append(call))
    assert progress[-1] == ("data.sources.0 (text)", 9000, 9000)


def test_a_second_load_builds_nothing(data_config: MakeConfig, jsonl_source: SourceConfig) -> None:
    config = data_config(jsonl_source)
    first = load_data(config)
    calls: list[object] = []
    second = load_data(config, progress=lambda *call: calls.append(call))
    assert not calls and len(table_folders(config)) == 1
    assert all_rows(first) == all_rows(second) and first.fingerprint == second.fingerprint


def test_changed_text_is_noticed_and_touched_files_are_the_same_data(data_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files", make_texts(100))
    config = data_config(SourceConfig(kind="text", path=f"{folder}/*.txt"))
    before = load_data(config)
    changed = folder / "0050.txt"
    text = changed.read_text("utf-8")
    changed.write_text(text.swapcase(), "utf-8")
    os.utime(changed, ns=(1, 1))
    after = load_data(config)
    assert after.fingerprint != before.fingerprint and after.parts != before.parts
    assert all_rows(after) != all_rows(before)
    changed.write_text(text, "utf-8")
    os.utime(changed, ns=(2, 2))
    assert load_data(config).fingerprint == before.fingerprint
    folder.rename(tmp_path / "moved")
    moved = data_config(SourceConfig(kind="text", path=f"{tmp_path / 'moved'}/*.txt"))
    assert load_data(moved).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"sequence_length": 17}, {"validation_fraction": 0.3}, {"tokenizer": "bpe"}, {"sources": 7_000}],
    ids=lambda change: next(iter(change)),
)
def test_every_change_of_a_setting_of_the_data_gives_another_table(
    data_config: MakeConfig, jsonl_source: SourceConfig, bpe_folder: Path, change: dict[str, object]
) -> None:
    before = load_data(data_config(jsonl_source))
    if "sources" in change:
        other = data_config(jsonl_source.model_copy(update={"max_bytes": change["sources"]}))
    else:
        settings = change | ({"tokenizer": str(bpe_folder)} if "tokenizer" in change else {})
        other = data_config(jsonl_source, **settings)
    after = load_data(other)
    # Sequences of text are cut when they are read.
    assert len(table_folders(other)) == (1 if "sequence_length" in change else 2)
    assert after.fingerprint != before.fingerprint
    changed = {name for name in after.parts if after.parts[name] != before.parts[name]}
    assert changed == {"data.sources.0" if "sources" in change else f"data.{next(iter(change))}"}


BUILDER = textwrap.dedent(
    """
    import logging, os, sys, time
    from qsparse_moe.config.schema import DataConfig, SourceConfig
    from qsparse_moe.data import shard_writer
    from qsparse_moe.data.token_data import load_data

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    shard_writer._CHUNK_BYTES = 2000
    path, cache_dir, go = sys.argv[1:]

    def progress(*call):
        print("building", flush=True)
        while not os.path.exists(go):
            time.sleep(0.01)

    source = SourceConfig(kind="jsonl", path=path)
    config = DataConfig(sources=(source,), cache_dir=cache_dir, sequence_length=16, validation_fraction=0.2)
    data = load_data(config, progress=progress)
    print("fingerprint", data.fingerprint, flush=True)
    """
)


def start_builder(source: SourceConfig, config: DataConfig, go: Path) -> subprocess.Popen[str]:
    """Start a process that begins to build the table and continues when the file ``go`` exists."""
    command = [sys.executable, "-c", BUILDER, str(source.path), config.cache_dir, str(go)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_of_two_processes_one_builds_and_the_other_waits(
    data_config: MakeConfig, jsonl_source: SourceConfig, tmp_path: Path
) -> None:
    config, go = data_config(jsonl_source), tmp_path / "go"
    processes = []
    for first_line in ("building", "waiting for the tokens in "):
        process = start_builder(jsonl_source, config, go)
        assert process.stdout is not None and first_line in process.stdout.readline()
        processes.append(process)
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ["building" in output for output in outputs] == [True, False]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert len(table_folders(config)) == 1


def test_a_builder_that_never_finishes_is_named(
    data_config: MakeConfig, jsonl_source: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_config(jsonl_source)
    monkeypatch.setattr(table_module, "_TIMEOUT_SECONDS", 0.1)
    process = start_builder(jsonl_source, config, tmp_path / "never")
    assert process.stdout is not None and "building" in process.stdout.readline()
    message = rf"is being built by process {process.pid} on .*; end that process if it hangs, or set data\.cache_dir"
    try:
        with pytest.raises(DataError, match=message):
            load_data(config)
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_killed_build_leaves_no_table_and_the_next_one_cleans_up(
    data_config: MakeConfig, jsonl_source: SourceConfig, tmp_path: Path
) -> None:
    config = data_config(jsonl_source)
    process = start_builder(jsonl_source, config, tmp_path / "never")
    assert process.stdout is not None and "building" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (folder,) = table_folders(config)
    claim, left = sorted(folder.iterdir())
    assert claim.name == "shard-00000.claim" and ".partial-" in left.name and list(left.iterdir())
    data = load_data(config)
    assert all_rows(data)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "shard-00000"]


def test_a_build_that_fails_leaves_no_table(data_config: MakeConfig, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*make_texts(300), None])
    config = data_config(SourceConfig(kind="jsonl", path=str(path)))
    with pytest.raises(DataError, match=r"a\.jsonl, row 300: column 'text' holds NoneType"):
        load_data(config)
    assert not table_folders(config)


def test_a_cache_that_cannot_be_written_is_refused(
    data_config: MakeConfig, jsonl_source: SourceConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"data\.cache_dir: .*file/tables/\w+ cannot be written \(.*; set data\.cache_dir"
    ):
        load_data(data_config(jsonl_source, cache_dir=str(tmp_path / "file")))


def test_building_the_standard_library_takes_seconds(data_config: MakeConfig) -> None:
    config = data_config(SourceConfig(kind="stdlib"), sequence_length=256, validation_fraction=0.05)
    began = time.monotonic()
    data = load_data(config)
    # 0.4 s here; ten times that is still no wait.
    assert time.monotonic() - began < 10
    assert len(data.train) > 20_000
    assert 4.2 < data.unigram_bits_per_byte() < 4.9


def test_a_long_build_logs_its_progress_and_a_short_one_does_not(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qsparse_moe.data.prepare.time.monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="qsparse_moe.data.prepare"):
        say = LogProgress()
        say("data.sources.0 (text)", 10_000_000, 40_000_000)
        assert not caplog.messages
        now[0] = 6.0
        say("data.sources.0 (text)", 20_000_000, 40_000_000)
        say("data.sources.0 (text)", 30_000_000, None)
    assert caplog.messages == ["data.sources.0 (text): 20 of 40 (50 %) million bytes tokenized"]


def test_text_ends_at_the_byte_limit_of_its_source() -> None:
    # An empty document has no bytes, but a token.
    assert list(UpTo(iter(["ab", "cd", "", "e"]), 4)) == ["ab", "cd"]
    assert list(UpTo(iter(["ab", "", "cd"]), 3)) == ["ab", "", "c"]
    assert list(UpTo(iter(["ab", "cé"]), 4)) == ["ab", "c"]
    assert list(UpTo(iter(["ab", "", "cd"]), None)) == ["ab", "", "cd"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_as_long_as_the_largest_fits(vocab_size: int, dtype: str) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.vocab_size = vocab_size
    found = token_type(open_source(SourceConfig(kind="stdlib"), 0), Packing(tokenizer, 4, 0.5))
    assert found == np.dtype(dtype).newbyteorder("<")
