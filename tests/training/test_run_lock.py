"""One run folder belongs to one run at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.folder import newest_step
from qsparse_moe.training import run_lock
from qsparse_moe.training.run_lock import locked_run_folder
from tests.cli.test_run import REPOSITORY, train, write_inputs


def record_of(folder):
    return folder.with_name(f".{folder.name}.holder.json")


def write_record(folder, *, host, beat=0):
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = {"host": host, "pid": 4711, "since": "2026-01-31 12:00:00 UTC", "beat": beat}
    record_of(folder).write_text(json.dumps(record))


def test_the_second_is_refused_with_the_holder_and_nothing_stays(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with locked_run_folder(folder):
        with pytest.raises(CheckpointError) as caught, locked_run_folder(folder):
            pass
        message = str(caught.value)
        assert message.startswith(f"{folder}: is in use by process {os.getpid()} on {socket.gethostname()} since 20")
        assert message.endswith(
            " UTC; one run folder belongs to one run at a time. Wait until it has ended, or end it, and then continue "
            "with training.resume=true, or give this run another training.name"
        )
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_the_record_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    folder = tmp_path / "mine"
    with locked_run_folder(folder):
        end = time.monotonic() + 20
        while json.loads(record_of(folder).read_text())["beat"] < 2:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_live_run_of_another_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    folder = tmp_path / "mine"
    write_record(folder, host="node-elsewhere")
    threading.Timer(0.3, lambda: write_record(folder, host="node-elsewhere", beat=1)).start()
    named = "is in use by process 4711 on node-elsewhere since 2026-01-31 12:00:00 UTC; "
    with pytest.raises(CheckpointError, match=named), locked_run_folder(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [record_of(folder).name]


def test_a_dead_run_of_another_machine_is_taken_over_after_half_a_minute(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(run_lock.logger, "warning", lambda text, *values: said.append(text % values))
    assert run_lock._STALE_SECONDS == 30.0
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 0.6)
    folder = tmp_path / "mine"
    write_record(folder, host="node-elsewhere")
    begin = time.monotonic()
    with locked_run_folder(folder):
        assert time.monotonic() - begin >= 0.6
        assert json.loads(record_of(folder).read_text())["pid"] == os.getpid()
    holder = "process 4711 on node-elsewhere since 2026-01-31 12:00:00 UTC"
    assert said == [f"{folder}: {holder} gave no sign for 0.6 s; this run takes it over"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_second_process_is_refused_and_the_death_of_the_first_lets_it_go_on(tmp_path):
    config = write_inputs(tmp_path)
    folder = tmp_path / "runs" / "mine"
    with locked_run_folder(folder):
        fresh = train(config)
    assert fresh.returncode == 2
    assert f"{folder}: is in use by process {os.getpid()} on " in " ".join(fresh.stderr.split())
    assert list(folder.parent.iterdir()) == [], "nothing is written"
    long = ["training.steps=100000", "training.checkpoint_interval=1"]
    command = [sys.executable, "-m", "qsparse_moe", "train", str(config), *long]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while newest_step(folder) is None:
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        second = train(config, *long, "training.resume=true")
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on {socket.gethostname()} since" in " ".join(second.stderr.split())
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = newest_step(folder)
    third = train(config, f"training.steps={done + 1}", "training.resume=true")
    assert third.returncode == 0, third.stderr
    assert newest_step(folder) == done + 1
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
