"""Claims: one builder at a time has one, and those of builders that are gone or silent are taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsparse_moe.data import claims
from qsparse_moe.data.claims import Claims


def write_claim(path: Path, **changes: object) -> None:
    holder = {"host": "node7", "process": 4711, "since": "2026-01-31 12:00:00 UTC", "builder": "4711-1", "beats": 1}
    path.write_text(json.dumps(holder | changes))


def test_one_builder_has_a_claim_and_its_end_frees_it(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take("shard-00001")
    assert claim is not None
    with claim:
        assert second.take("shard-00001") is None
        assert second.holder("shard-00001").startswith(f"process {os.getpid()} on {socket.gethostname()} since 2")
        other = second.take("shard-00002")
        assert other is not None
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00002.claim"]
    assert second.take("shard-00001") is not None


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_claim(tmp_path / "it.claim", host=socket.gethostname(), process=gone.pid)
    claim = Claims(tmp_path).take("it")
    assert claim is not None
    with claim:
        assert json.loads((tmp_path / "it.claim").read_text())["process"] == os.getpid()


def test_a_claim_of_another_machine_is_taken_over_once_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    write_claim(tmp_path / "it.claim")
    builder = Claims(tmp_path)
    assert builder.take("it") is None and builder.holder("it") == "process 4711 on node7 since 2026-01-31 12:00:00 UTC"
    now[0] += 59
    assert builder.take("it") is None
    write_claim(tmp_path / "it.claim", beats=2)
    now[0] += 59
    assert builder.take("it") is None
    now[0] += 59
    assert builder.take("it") is None
    now[0] += 2
    assert builder.take("it") is not None


def test_an_empty_claim_is_that_of_a_process_that_has_just_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    (tmp_path / "it.claim").touch()
    builder = Claims(tmp_path)
    assert builder.take("it") is None and builder.holder("it") == "another process"
    now[0] += 61
    assert builder.take("it") is not None


def test_a_claim_is_renewed_and_one_that_was_taken_over_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.01)
    claim = Claims(tmp_path).take("it")
    assert claim is not None
    file = tmp_path / "it.claim"
    with claim:
        began = time.monotonic()
        while json.loads(file.read_text())["beats"] < 3:
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        # The thread must not write after the other builder has.
        claim._ended.set()
        claim._thread.join()
        write_claim(file)
    assert json.loads(file.read_text())["host"] == "node7"
