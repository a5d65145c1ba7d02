"""Locks that end with the process that holds them, and name it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from qsparse_moe import locks
from qsparse_moe.locks import LockHeld, acquire_lock, build_once, holder_of

HOLD = """
import os, sys, time
from pathlib import Path
from qsparse_moe.locks import acquire_lock
lock = acquire_lock(Path(sys.argv[1]))
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    print(child, flush=True)
print("held", flush=True)
time.sleep(600)
"""


def start_holder(path, *options):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *options], stdout=subprocess.PIPE, text=True)
    lines = []
    while not lines or lines[-1] != "held":
        lines.append(holder.stdout.readline().strip())
        assert lines[-1], "the holder ended before it had the lock"
    return holder, lines[:-1]


def kill(holder):
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_lock_keeps_others_out_names_its_holder_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with acquire_lock(path) as lock:
        with pytest.raises(LockHeld) as refused:
            acquire_lock(path)
        host = re.escape(socket.gethostname())
        assert re.fullmatch(
            rf"process {os.getpid()} on {host} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC", refused.value.holder
        )
        assert str(refused.value) == f"{path} is held by {refused.value.holder}"
    assert not path.exists()
    lock.release()
    acquire_lock(path).release()


def test_lock_of_a_killed_process_is_free_though_its_file_lies_there(tmp_path):
    path = tmp_path / "lock"
    holder, _ = start_holder(path)
    try:
        with pytest.raises(LockHeld, match=f"process {holder.pid} on "):
            acquire_lock(path)
    finally:
        kill(holder)
    assert path.exists()
    with acquire_lock(path):
        assert f"process {os.getpid()} on " in holder_of(path)
    assert list(tmp_path.iterdir()) == []


def test_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path):
    path = tmp_path / "lock"
    holder, (child,) = start_holder(path, "fork")
    try:
        with pytest.raises(LockHeld):  # the child has closed its copy, which does not release the parent's lock
            acquire_lock(path, timeout=0.3)
        kill(holder)
        acquire_lock(path).release()
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_waiting_names_the_holder_and_ends_with_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_FIRST_NOTICE_SECONDS", 0.1)
    path = tmp_path / "lock"
    holder, _ = start_holder(path)
    killer = threading.Timer(0.6, kill, [holder])
    killer.start()
    with caplog.at_level(logging.INFO, "qsparse_moe.locks"):
        acquire_lock(path, timeout=60, purpose="the corpus").release()
    killer.join()
    (notice,) = [record.message for record in caplog.records]
    assert notice.startswith(f"waiting for the corpus, held by process {holder.pid} on ")
    assert notice.endswith(" UTC (at most 0:01:00 more)")


def test_waiting_has_a_time_limit(tmp_path):
    path = tmp_path / "lock"
    with acquire_lock(path):
        start = time.monotonic()
        with pytest.raises(LockHeld):
            acquire_lock(path, timeout=0.5)
        assert 0.5 <= time.monotonic() - start < 5


def test_the_clock_of_a_wait_decides_when_it_ends_and_when_it_is_logged(tmp_path, monkeypatch, caplog):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 0.5))
    monkeypatch.setattr(locks, "time", clock)
    with (
        acquire_lock(tmp_path / "lock"),
        caplog.at_level(logging.INFO, "qsparse_moe.locks"),
        pytest.raises(LockHeld),
    ):
        acquire_lock(tmp_path / "lock", timeout=130.0)
    assert now == [130.0]
    # After two seconds, and a minute and two minutes later.
    left = [record.message.partition("at most ")[2] for record in caplog.records]
    assert left == ["0:02:08 more)", "0:01:08 more)", "0:00:08 more)"]
    with acquire_lock(tmp_path / "lock"), pytest.raises(LockHeld):
        acquire_lock(tmp_path / "lock")
    assert now == [130.0], "without a timeout nothing waits"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_process_ends_on_a_signal(tmp_path, number):
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from qsparse_moe.locks import acquire_lock\n"
    code += "print('waits', flush=True); acquire_lock(Path(sys.argv[1]), timeout=600)"
    with acquire_lock(path):
        command = [sys.executable, "-c", code, str(path)]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert waiting.stdout.readline() == b"waits\n"
        time.sleep(0.3)
        assert waiting.poll() is None
        waiting.send_signal(number)
        assert waiting.wait(10) == -number
        waiting.stdout.close()


def test_lock_file_removed_between_open_and_flock_is_not_taken(tmp_path, monkeypatch):
    """A holder removes the file as it releases; one that opened it before would hold a lock unknown to others."""
    path = tmp_path / "lock"
    flock, calls = fcntl.flock, []

    def remove_first(descriptor, operation):
        if not calls:
            path.unlink()
        calls.append(operation)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with acquire_lock(path):
        assert len(calls) == 2 and path.exists()
        with pytest.raises(LockHeld):
            acquire_lock(path)


def test_many_processes_hold_it_one_at_a_time(tmp_path):
    """Each adds 1 to a number with a pause between reading and writing; with two at once a count is lost."""
    (tmp_path / "count").write_text("0")
    code = """
import sys, time
from pathlib import Path
from qsparse_moe.locks import acquire_lock
folder = Path(sys.argv[1])
for _ in range(5):
    with acquire_lock(folder / "lock", timeout=60):
        count = int((folder / "count").read_text())
        time.sleep(0.002)
        (folder / "count").write_text(str(count + 1))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "20"
    assert not (tmp_path / "lock").exists()


def test_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "qsparse_moe.locks"):
        acquire_lock(tmp_path / "lock").release()
    assert "this file system has no locks" in caplog.text and str(tmp_path / "lock") in caplog.text
    assert not (tmp_path / "lock").exists()


def test_other_errors_of_the_file_are_raised(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        acquire_lock(tmp_path / "no-folder" / "lock")

    def fail(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"):
        acquire_lock(tmp_path / "lock")


def test_a_folder_built_once_is_complete_or_absent_and_leaves_no_other_files(tmp_path):
    place = tmp_path / "deep" / "thing"

    def fail(folder):
        (folder / "part").write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        build_once(place, fail, timeout=0, purpose="it")
    assert list(place.parent.iterdir()) == []

    def build(folder):
        assert not place.exists() and list(folder.iterdir()) == []
        (folder / "inner").mkdir()
        (folder / "inner" / "part").write_text("whole")
        return folder

    build_once(place, build, timeout=0, purpose="it")
    assert [path.name for path in place.parent.iterdir()] == ["thing"]
    assert (place / "inner" / "part").read_text() == "whole"
    build_once(place, fail, timeout=0, purpose="it")


def test_folders_of_dead_processes_are_removed_and_those_of_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, alive = socket.gethostname(), os.getppid()
    left = tmp_path / f"thing.partial-{dead.pid}-{host}-1"
    stays = [
        tmp_path / f"thing.partial-{alive}-{host}-1",
        tmp_path / f"thing.partial-{dead.pid}-{host}-elsewhere-1",
        tmp_path / f"other.partial-{dead.pid}-{host}-1",
    ]
    old = tmp_path / "thing.partial-1-elsewhere-1"
    for folder in (left, old, *stays):
        folder.mkdir()
        (folder / "part").write_text("half")
    os.utime(old, (0, 0))

    def build(folder):
        (folder / "file").write_text("whole")
        return folder / "file"

    build_once(tmp_path / "thing", build, timeout=0, purpose="it")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "thing", *stays])
    assert (tmp_path / "thing").read_text() == "whole"


def test_without_locks_the_faster_one_of_two_that_build_a_folder_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    place = tmp_path / "thing"

    def build(folder):
        (folder / "part").write_text("second")
        place.mkdir()
        (place / "part").write_text("first")
        return folder

    build_once(place, build, timeout=0, purpose="it")
    assert (place / "part").read_text() == "first"
    assert list(tmp_path.iterdir()) == [place]
