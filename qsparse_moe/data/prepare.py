"""Build the tables of all sources of a run: in this process, or in several with ``qsparse-moe prepare``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from qsparse_moe.data.table import TableJob, build_shards, build_table
from qsparse_moe.errors import DataError, QSparseMoEError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called while a table is built with the source, the bytes of its files that are done, and all their bytes if known."""

# From this size on, tokenising takes minutes in one process.
_LARGE_BYTES = 1 << 30
_REPORT_SECONDS = 0.2


def build_here(job: TableJob, progress: Progress | None = None) -> None:
    """Build the table of a source in this process.

    Raises:
        DataError: as ``build_table`` does.
    """
    sizes = [part.size for part in job.parts]
    if sum(size or 0 for size in sizes) >= _LARGE_BYTES:
        logger.info(
            "%s: one process tokenizes this source now; `qsparse-moe prepare` with the same config does it in several "
            "processes before a run",
            job.source.setting,
        )
    progress = progress or LogProgress()
    if build_table(job, _Done(job, progress)):
        _Done(job, progress).tell()


def build_in_processes(job: TableJob, processes: int, progress: Progress) -> None:
    """Build the table of a source in ``processes`` processes, but at most one per missing shard.

    A table with a limit in bytes is built in this process, because a shard must be finished before it is known how much
    text the next one may have.

    Raises:
        DataError: as ``build_table`` does, or a process was killed.
    """
    missing = sum(not job.shard(number).exists() for number in range(len(job.parts)))
    count = min(processes, missing)
    if count > 1 and job.max_bytes is None:
        job.folder.mkdir(parents=True, exist_ok=True)
        _Pool(job, count, max(1, processes // count)).run(_Done(job, progress))
    # All shards are there, and this writes the manifest.
    build_table(job, _Done(job, progress))
    _Done(job, progress).tell()


class LogProgress:
    """Logs a line every few seconds; a short build logs its end only."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._logged_at = time.monotonic()

    def __call__(self, setting: str, done: int, total: int | None) -> None:
        """Log what is done, if the last line is some seconds old."""
        if time.monotonic() - self._logged_at < self._every:
            return
        self._logged_at = time.monotonic()
        of_all = f" of {total / 1e6:,.0f} ({100 * done / total:.0f} %)" if total else ""
        logger.info("%s: %.0f%s million bytes tokenized", setting, done / 1e6, of_all)


class _Done:
    """Adds up what is done of all shards of a source."""

    def __init__(self, job: TableJob, progress: Progress) -> None:
        self._progress, self._setting, self._max_bytes = progress, job.source.setting, job.max_bytes
        self._sizes = [part.size for part in job.parts]
        # The shards that are there already.
        self._done = {number: size or 0 for number, size in enumerate(self._sizes) if job.shard(number).exists()}

    def __call__(self, number: int, done: int) -> None:
        """Report the bytes of text that are done of one shard."""
        size = self._sizes[number]
        # Text may be longer than the file that it is read from, which may be compressed.
        self._done[number] = done if size is None else min(done, size)
        self.tell()

    def tell(self) -> None:
        """Report what is done of all shards."""
        known = [size for size in self._sizes if size is not None]
        total = sum(known) if len(known) == len(self._sizes) else None
        if total is not None and self._max_bytes is not None:
            total = min(total, self._max_bytes)
        done = sum(self._done.values())
        self._progress(self._setting, done if total is None else min(done, total), total)


class _Pool:
    """Processes that build the shards of one table.

    Args:
        job: the table.
        count: number of processes.
        threads: number of threads of the tokenizer in each.
    """

    def __init__(self, job: TableJob, count: int, threads: int) -> None:
        # Spawned, because a fork of a process with threads may stand still.
        context = multiprocessing.get_context("spawn")
        job = replace(job, source=job.source.for_other_process())
        self._processes: dict[Connection, Any] = {}
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_build, args=(job, threads, theirs, os.getpid()), daemon=True)
            process.start()
            # The end of the pipe is noticed only if no one else can write into it.
            theirs.close()
            self._processes[ours] = process

    def run(self, report: _Done) -> None:
        """Wait until all processes have ended; the first error ends the others."""
        try:
            while self._processes:
                for connection in wait(list(self._processes)):
                    assert isinstance(connection, Connection)
                    self._receive(connection, report)
        finally:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                process.join()

    def _receive(self, connection: Connection, report: _Done) -> None:
        try:
            message = connection.recv()
        except EOFError:
            process = self._processes.pop(connection)
            process.join()
            if process.exitcode:
                raise DataError(
                    f"a process that tokenizes has ended with exit code {process.exitcode}, a negative number being "
                    "that of a signal, and all must finish: 9 is often a lack of memory, and fewer --processes take "
                    "less. Start again: finished shards are kept"
                ) from None
            return
        if isinstance(message, tuple):
            report(*message)
        elif isinstance(message, QSparseMoEError):
            raise message
        else:
            raise RuntimeError(f"a process that tokenizes has failed:\n{message}")


def _build(job: TableJob, threads: int, connection: Connection, parent: int) -> None:
    """Build shards until none is missing; send progress and errors to the process that has started this one."""
    # Ctrl-C reaches the whole group of processes; the first of them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Read by the tokenizer when it first encodes.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    reported = 0.0

    def report(number: int, done: int) -> None:
        nonlocal reported
        if os.getppid() != parent:
            os._exit(1)  # the process that has started this one was killed
        if time.monotonic() - reported >= _REPORT_SECONDS:
            connection.send((number, done))
            reported = time.monotonic()

    try:
        build_shards(job, report)
    except QSparseMoEError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc())
    finally:
        connection.close()
