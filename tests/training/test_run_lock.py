"""The lock of a run folder, which only one process at a time can hold."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.folder import newest_step, run_folder
from qsparse_moe.training import run_lock
from qsparse_moe.training.loop import train as train_here
from qsparse_moe.training.run_lock import RunFolderLock
from tests.cli.test_run import REPOSITORY, train, write_inputs


@contextlib.contextmanager
def locked_run_folder(folder):
    with RunFolderLock(folder) as lock:
        lock.acquire()
        yield lock


def record_of(folder):
    return folder.with_name(f".{folder.name}.holder.json")


def write_record(folder, *, host, beat=0):
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = {"host": host, "pid": 4711, "since": "2026-01-31 12:00:00 UTC", "beat": beat}
    record_of(folder).write_text(json.dumps(record))


def test_a_second_process_is_refused_with_the_holder_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with locked_run_folder(folder):
        with pytest.raises(CheckpointError) as caught, locked_run_folder(folder):
            pass
        message = str(caught.value)
        assert message.startswith(f"{folder}: is in use by process {os.getpid()} on {socket.gethostname()} since 20")
        assert " UTC; only one process at a time" in message
        assert "training.resume=true" in message and message.endswith("another training.name")
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
    assert run_lock._SETTLE_SECONDS > 2 * run_lock._BEAT_SECONDS
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 0.6)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.3)
    folder = tmp_path / "mine"
    write_record(folder, host="node-elsewhere")
    begin = time.monotonic()
    with locked_run_folder(folder):
        assert time.monotonic() - begin >= 0.9
        assert json.loads(record_of(folder).read_text())["pid"] == os.getpid()
    holder = "process 4711 on node-elsewhere since 2026-01-31 12:00:00 UTC"
    assert said == [f"{folder}: {holder} sent no heartbeat for 0.6 s; this run takes it over"]
    assert list(tmp_path.iterdir()) == []


class OtherMachine(RunFolderLock):
    """A process on another machine, with a file system that does not share ``flock``."""

    def acquire(self):
        self._record = run_lock._Record(self._folder)
        self._record._own = replace(self._record._own, host=f"node-{id(self)}", boot="")
        self._record._temporary = self._record._file.with_name(f"{self._record._file.name}.{id(self)}")
        self._held.enter_context(self._record)


@pytest.mark.parametrize("found", ["nothing", "a dead record", "a torn record"])
def test_of_machines_that_start_at_the_same_instant_exactly_one_gets_the_folder(tmp_path, monkeypatch, found):
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.6)
    folder = tmp_path / "mine"
    if found == "a dead record":
        write_record(folder, host="node-elsewhere")
    elif found == "a torn record":
        record_of(folder).write_text("")
    write, together = run_lock._Record._write, threading.Barrier(3, timeout=20)

    def write_together(record):
        # All have decided to replace the record before the first one does.
        if threading.current_thread().name.startswith("taker") and found != "nothing":
            together.wait()
        write(record)

    monkeypatch.setattr(run_lock._Record, "_write", write_together)
    locks, refused = [OtherMachine(folder) for _ in range(3)], []

    def take(lock):
        try:
            lock.acquire()
        except CheckpointError as error:
            refused.append(str(error))

    takers = [threading.Thread(target=take, args=(lock,), name=f"taker {n}") for n, lock in enumerate(locks)]
    for thread in takers:
        thread.start()
    for thread in takers:
        thread.join()
    holder = json.loads(record_of(folder).read_text())["host"]
    assert len(refused) == 2 and all(
        f"is in use by process {os.getpid()} on {holder} since" in text for text in refused
    )
    for lock in locks:
        lock.check() if f"node-{id(lock)}" == holder else None
        lock.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system_the_record_keeps_a_second_process_of_this_machine_out(tmp_path, monkeypatch):
    """A record of a process that has ended on this machine is replaced without waiting."""
    monkeypatch.setattr(run_lock, "acquire_lock", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.02)
    folder = tmp_path / "mine"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        record = {"host": socket.gethostname(), "pid": child.pid, "since": "now", "boot": run_lock._boot()}
        record_of(folder).write_text(json.dumps(record))
        threading.Timer(0.3, lambda: record_of(folder).write_text(json.dumps(record | {"beat": 1}))).start()
        with pytest.raises(CheckpointError, match=f"is in use by process {child.pid} on"), locked_run_folder(folder):
            pass
        child.communicate(b"\n")
    begin = time.monotonic()
    with locked_run_folder(folder):
        assert time.monotonic() - begin < 5


ENDED, OTHER_USER, ALIVE = 111, 222, 333


@pytest.mark.parametrize(
    ("changes", "is_dead"),
    [
        ({"pid": ENDED}, True),
        ({"pid": ENDED, "boot": ""}, True),  # an earlier version wrote none
        ({"pid": ENDED, "boot": "another"}, False),
        ({"pid": ENDED, "host": "node-elsewhere"}, False),
        ({"pid": OTHER_USER}, False),
        ({"pid": ALIVE}, False),
        ({}, True),  # the number of this process, which holds flock
    ],
)
def test_only_a_process_of_this_machine_that_has_ended_is_surely_dead(tmp_path, monkeypatch, changes, is_dead):
    def kill(pid, number):
        assert number == 0, "nobody is ended"
        if pid in (ENDED, OTHER_USER):
            raise ProcessLookupError if pid == ENDED else PermissionError

    record = run_lock._Record(tmp_path / "mine")
    record._own = replace(record._own, boot="this one")
    monkeypatch.setattr(run_lock.os, "kill", kill)
    assert record._is_surely_dead(replace(record._own, beat=7, **changes)) is is_dead
    assert record._is_surely_dead(None) is False


def test_a_record_is_ones_own_whatever_its_heartbeat_and_nobody_elses(tmp_path):
    record = run_lock._Record(tmp_path / "mine")
    assert record.other_holder() is None
    record._write()
    assert record.other_holder() is None
    written = json.loads(record_of(tmp_path / "mine").read_text())
    assert written == vars(record._own) and list(written) == ["host", "pid", "since", "beat", "boot"]
    for changes, is_own in (
        ({"beat": 9}, True),
        ({"pid": 1}, False),
        ({"since": "then"}, False),
        ({"boot": "b"}, False),
    ):
        record_of(tmp_path / "mine").write_text(json.dumps(written | changes))
        assert (record.other_holder() is None) is is_own
    for text in ("", "[1]", '{"host": "x"}', "{"):
        record_of(tmp_path / "mine").write_text(text)
        assert record.other_holder() is None, "a record that cannot be read names nobody"


def test_a_lock_that_was_never_acquired_has_nothing_to_check(tmp_path):
    write_record(tmp_path / "mine", host="node-elsewhere")
    with RunFolderLock(tmp_path / "mine") as lock:
        lock.check()
    assert record_of(tmp_path / "mine").exists()


def test_a_machine_of_the_same_name_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 0.4)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.0)
    folder = tmp_path / "mine"
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": "then", "boot": "another"}
    record_of(folder).write_text(json.dumps(record))
    begin = time.monotonic()
    with locked_run_folder(folder):
        assert time.monotonic() - begin >= 0.4


def test_a_holder_that_was_suspended_learns_who_has_the_folder_and_takes_nothing_back(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.05)
    folder = tmp_path / "mine"
    with locked_run_folder(folder) as lock:
        lock.check()
        write_record(folder, host="node-elsewhere")
        time.sleep(0.3)
        assert json.loads(record_of(folder).read_text())["host"] == "node-elsewhere"
        with pytest.raises(CheckpointError) as caught:
            lock.check()
    message = str(caught.value)
    assert message.startswith(
        f"{folder}: was taken over by process 4711 on node-elsewhere since 2026-01-31 12:00:00 UTC, "
    )
    assert "no heartbeat for 30 s" in message and "writes nothing more" in message
    assert [path.name for path in tmp_path.iterdir()] == [record_of(folder).name], "the other's"


@pytest.mark.parametrize("at", ["a report", "a save"])
def test_a_run_whose_folder_was_taken_over_ends_before_it_writes_anything(make_config, at):
    config = make_config(steps=6, checkpoint_interval=2)
    if at == "a save":
        config = config.model_copy(update={"metrics": config.metrics.model_copy(update={"interval": 6})})
    folder = run_folder(config)
    reported = []

    def listener(report):
        reported.append(report.step)
        if report.step == 3:
            write_record(folder, host="node-elsewhere")

    if at == "a save":
        listener.begin = lambda context: write_record(folder, host="node-elsewhere")
    with pytest.raises(CheckpointError, match="was taken over by process 4711 on node-elsewhere"):
        train_here(config, [listener])
    assert reported == ([1, 2, 3] if at == "a report" else [])
    assert newest_step(folder) == (2 if at == "a report" else None)
    assert record_of(folder).exists()


@pytest.mark.distributed
def test_a_second_process_is_refused_and_may_continue_after_the_first_has_died(tmp_path):
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
