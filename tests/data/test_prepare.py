"""Building in several processes: the same tables, resumed after a kill, and errors in the words of one process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.packing_settings import Packing
from qsparse_moe.data.prepare import build_here, build_in_processes
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.table import TableJob
from qsparse_moe.data.token_data import load_data, prepare_data
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import DataError
from tests.data.corpus import make_texts, write_jsonl

MakeConfig = Callable[..., DataConfig]


def make_job(source: SourceConfig, cache_dir: Path, **changes: Any) -> TableJob:
    job = TableJob(open_source(source, 0), Packing(ByteTokenizer(), 16, 0.2), cache_dir, 10_000)
    return replace(job, **changes)


def test_processes_build_the_same_table_as_one(
    data_config: MakeConfig,
    jsonl_source: SourceConfig,
    bpe_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = data_config(jsonl_source, tokenizer=str(bpe_folder), shard_bytes=10_000)
    calls: list[tuple[str, int, int | None]] = []
    data, (source,) = prepare_data(config, processes=2, verify=False, progress=lambda *call: calls.append(call))
    size = Path(str(jsonl_source.path)).stat().st_size
    assert source.num_shards == source.num_built == -(-size // 10_000)
    assert calls[-1] == (source.setting, size, size) and [done for _, done, _ in calls] == sorted(c[1] for c in calls)
    single = load_data(config.model_copy(update={"cache_dir": str(tmp_path / "single")}))
    assert data.fingerprint == single.fingerprint
    assert data.train.tokens(range(len(data.train))).tolist() == single.train.tokens(range(len(single.train))).tolist()
    # A run opens it without tokenizing.
    monkeypatch.setattr("qsparse_moe.data.token_data.build_here", lambda *_: pytest.fail("tokenized again"))
    assert load_data(config).fingerprint == data.fingerprint


class KilledTokenizer(ByteTokenizer):
    """Kills the process that receives it."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGKILL,)


class LostTokenizer(ByteTokenizer):
    """Becomes an object that cannot tokenize."""

    def __reduce__(self) -> Any:
        return object, ()


def test_a_process_that_is_killed_ends_the_others_with_its_exit_code(
    jsonl_source: SourceConfig, tmp_path: Path
) -> None:
    job = make_job(jsonl_source, tmp_path, packing=Packing(KilledTokenizer(), 16, 0.2))
    with pytest.raises(DataError, match=r"has ended with exit code -9, .* fewer --processes take less\. Start again"):
        build_in_processes(job, 2, lambda *_: None)


def test_an_unexpected_error_comes_with_the_traceback_of_its_process(
    jsonl_source: SourceConfig, tmp_path: Path
) -> None:
    job = make_job(jsonl_source, tmp_path, packing=Packing(LostTokenizer(), 16, 0.2))
    with pytest.raises(RuntimeError, match=r"(?s)has failed:\nTraceback .*object has no attribute"):
        build_in_processes(job, 2, lambda *_: None)


def test_an_error_of_the_data_is_the_same_as_in_one_process(jsonl_source: SourceConfig, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [*make_texts(300), None])
    messages = []
    for build in (build_here, lambda job: build_in_processes(job, 2, lambda *_: None)):
        with pytest.raises(DataError, match="column 'text' holds NoneType") as caught:
            build(make_job(SourceConfig(kind="jsonl", path=str(path)), tmp_path / str(len(messages))))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_large_source_that_is_not_prepared_is_said_to_take_one_process(
    data_config: MakeConfig,
    jsonl_source: SourceConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, size = data_config(jsonl_source), Path(str(jsonl_source.path)).stat().st_size
    said = r"one process tokenizes this source now; `qsparse-moe prepare` with the same config"
    for limit, expected in ((size + 1, 0), (size, 1)):
        monkeypatch.setattr("qsparse_moe.data.prepare._LARGE_BYTES", limit)
        caplog.clear()
        with caplog.at_level("INFO"):
            load_data(config.model_copy(update={"cache_dir": f"{config.cache_dir}{limit}"}))
        assert sum(said in message for message in caplog.messages) == expected


def processes_of(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[2]) == group and stat[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_killed_prepare_leaves_its_finished_shards_and_no_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(2000))
    (tmp_path / "c.yaml").write_text(
        f"data:\n  sources: [{{kind: jsonl, path: {path}}}]\n  shard_bytes: 4000\n  cache_dir: {tmp_path}/cache\n"
    )
    command = [sys.executable, "-m", "qsparse_moe", "prepare", str(tmp_path / "c.yaml"), "--processes", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    began = time.monotonic()
    while len(done := list(tmp_path.glob("cache/tables/*/shard-*/shard.json"))) < 3 or any(
        ".partial" in str(file) for file in done
    ):
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.01)
    process.kill()
    process.wait()
    while processes_of(process.pid):
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    config = DataConfig(
        sources=(SourceConfig(kind="jsonl", path=str(path)),), shard_bytes=4000, cache_dir=str(tmp_path / "cache")
    )
    _, (source,) = prepare_data(config, processes=1, verify=True, progress=lambda *_: None)
    assert 0 < source.num_built <= source.num_shards - 3 and not source.repaired
    assert not list(tmp_path.glob("cache/tables/*/*.claim")) and not list(tmp_path.glob("cache/tables/*/*partial*"))
    whole = load_data(config.model_copy(update={"cache_dir": str(tmp_path / "whole"), "shard_bytes": 10**9}))
    assert load_data(config).fingerprint == whole.fingerprint
