"""Writes checkpoints: every rank the state that it holds, in a background thread while training goes on.

At a step boundary all ranks copy their state (``snapshot``). A thread on every rank then writes the copy and reports to
the thread of rank 0, which writes the index and renames the folder once all files are on the disk. No thread calls a
collective, and no rank receives a tensor of another one.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.locks import flush
from qsparse_moe.runs.folder import CHECKPOINTS, UNFINISHED
from qsparse_moe.training.checkpoint.contents import FORMAT, rank_file
from qsparse_moe.training.checkpoint.rank_reports import RankReports
from qsparse_moe.training.checkpoint.rank_state import pack_state
from qsparse_moe.training.checkpoint.snapshot import Snapshot
from qsparse_moe.training.checkpoint.state import (
    collect_buffers,
    owned_ranges,
    owned_tensors,
    random_states,
    state_buffers,
)
from qsparse_moe.training.checkpoint.store import (
    INDEX,
    LISTENERS,
    ReportState,
    RunProgress,
    list_checkpoints,
)
from qsparse_moe.training.checkpoint.tensor_file import TensorSource, write_blocks, write_tensors
from qsparse_moe.training.engines.protocol import STATE_KINDS, Engine
from qsparse_moe.training.flat_range import FlatRange

logger = logging.getLogger(__name__)

_NO_REPORTS = ReportState()
# After an error: the launcher kills a rank 30 s after another one has failed, and this one still has to report why.
_CLOSE_SECONDS = 15.0
# The ranks write files of about the same size at the same time; one that is later by so much is lost.
_LATE_SECONDS = 5.0


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written, on this rank."""

    final: Path
    partial: Path
    """Its folder until it is complete, under a name that no other save has."""
    tensors: dict[str, TensorSource]
    """The tensors of this rank's file by their names in it."""
    state: str
    """Random states and monitors of this rank, which ``pack_state`` packed."""
    index: str
    """The index in JSON, without files and ranges."""
    listeners: bytes
    """The states of the listeners in JSON."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    If a process is killed at any point, the earlier checkpoints are intact.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        *,
        keep_last: int,
        is_async: bool,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to write; all ranks must call it together.

        Args:
            run_dir: the run folder.
            engine: the engine whose state is saved.
            keep_last: number of checkpoints to keep, including the newest.
            is_async: write in the background; otherwise ``save`` returns when the checkpoint is complete.
            check_folder: raises CheckpointError if another run has taken the folder over; called on rank 0.

        Raises:
            CheckpointError: there is not enough memory for the copy that is written in the background.
        """
        self._root, self._engine, self._keep_last = run_dir / CHECKPOINTS, engine, keep_last
        self._distributed = engine.distributed
        self._check_folder = check_folder
        self._ranges = owned_ranges(engine)
        # They are constant over the run, so rank 0 learns them once.
        of_all = self._distributed.all_gather(self._ranges)
        self._parameters = _describe_parameters(engine.shapes(), of_all) if self._distributed.rank == 0 else {}
        self._snapshot: Snapshot | None = None
        if is_async:
            self._distributed.on_every_rank(self._allocate)
        self._reports = RankReports(self._distributed)
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._listeners = b""
        self._closed_at = math.inf

    def _allocate(self) -> None:
        num_elements = len(STATE_KINDS) * sum(map(len, self._ranges.values()))
        self._snapshot = Snapshot(num_elements, self._distributed.device)

    def save(
        self,
        progress: RunProgress,
        data_state: dict[str, Any],
        report_state: ReportState = _NO_REPORTS,
        step_filter: dict[str, Any] | None = None,
    ) -> Path:
        """Begin the checkpoint of ``progress.step``, between two steps; return its folder, which appears later.

        All ranks must call it together. It waits until the checkpoint before is complete; if that has failed, this one
        is tried nevertheless, and ``take_failure`` and ``finish`` report the failure. An existing checkpoint of the
        same step is left unchanged.

        Args:
            progress: the progress of the run.
            data_state: the state of the data loader, combined over the ranks; JSON-able.
            report_state: the state of listeners and monitors on this rank.
            step_filter: the state of the step filter, the same on every rank; None without one.

        Raises:
            CheckpointError: the folder cannot be made, or was taken over; or, without a background, the checkpoint
                cannot be written.
        """
        self._join()
        final = self._root / f"step-{progress.step:08d}"
        # One rank decides for all: on a network file system the ranks may see the folder at different times.
        partial = self._distributed.on_rank_zero(lambda: self._begin(final, report_state))
        if partial is None:
            return final
        index = json.dumps(self._index(progress, data_state, report_state) | {"step_filter": step_filter})
        save = self._collect(final, partial, index, report_state)
        if self._snapshot is None:
            self._write(save)
            self._distributed.on_rank_zero(self._raise_failure)
        else:
            self._thread = threading.Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()
        return final

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete. All ranks must call it together.

        Raises:
            CheckpointError: it, or an earlier one whose failure was not taken, could not be written.
        """
        self._join()
        self._distributed.on_rank_zero(self._raise_failure)

    def take_failure(self) -> CheckpointError | None:
        """Return the first error since the last call, once, on rank 0, without waiting for a checkpoint in progress."""
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        """Finish the checkpoint that is being written, if any, after an error, perhaps without the other ranks."""
        if self._thread is None:
            return
        self._closed_at = time.monotonic()
        self._thread.join(_CLOSE_SECONDS)
        if self._distributed.rank == 0:
            if (failure := self.take_failure()) is not None:
                logger.error("%s", failure)
            saved = list_checkpoints(self._root.parent)
            logger.warning("the newest complete checkpoint is %s", saved[-1] if saved else "none")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        if (failure := self.take_failure()) is not None:
            raise failure

    def _begin(self, final: Path, report_state: ReportState) -> Path | None:
        """Make the folder to write into; None if there is a checkpoint of this step already."""
        # NaN is not JSON, and other readers would refuse the file.
        self._listeners = json.dumps(report_state.listeners, allow_nan=False).encode()
        # A process that was suspended may have lost the folder to another run.
        self._check_folder()
        if final.exists():
            return None
        partial = final.with_name(f"{UNFINISHED[0]}{final.name}-{uuid.uuid4().hex[:8]}")
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(final, error.strerror or str(error)) from error
        return partial

    def _collect(self, final: Path, partial: Path, index: str, report_state: ReportState) -> _Save:
        """Copy all that the next step changes; without a snapshot, the tensors are read as they are written."""
        tensors = owned_tensors(self._engine, self._ranges)
        if self._snapshot is not None:
            tensors = self._snapshot.copy(tensors)
        state, others = pack_state({"random": random_states(), "monitor": report_state.monitor})
        if self._distributed.rank == 0:
            others |= {f"buffer/{name}": value for name, value in collect_buffers(self._engine).items()}
        tensors |= {name: TensorSource.of(value) for name, value in others.items()}
        return _Save(final, partial, tensors, state, index, self._listeners)

    def _index(self, progress: RunProgress, data_state: dict[str, Any], report_state: ReportState) -> dict[str, Any]:
        engine = self._engine
        return {
            "format": FORMAT,
            "progress": asdict(progress),
            "adam_step": engine.adam_step,
            "loss_scale": None if engine.loss_scaler is None else engine.loss_scaler.state_dict(),
            "world_size": self._distributed.world_size,
            "data": data_state,
            "buffers": {name: {"shape": list(value.shape)} for name, value in state_buffers(engine.model).items()},
            "listeners": LISTENERS,
            "evaluation_pending": report_state.evaluation_pending,
        }

    def _write(self, save: _Save) -> None:
        """Write this rank's file, and on rank 0 complete the checkpoint; errors are stored and not raised."""
        begin = time.monotonic()
        report = self._write_file(save)
        if self._distributed.rank:
            self._reports.send(save.partial.name, report)
            return
        written_at = time.monotonic()
        reports = self._reports.collect(
            save.partial.name,
            report,
            gives_up=lambda: time.monotonic() > max(written_at, self._closed_at) + _LATE_SECONDS,
        )
        # None: a rank is lost. The run ends, and its next part removes the folder.
        if reports is not None:
            failure = self._complete(save, reports)
            if failure is not None:
                self._failure = self._failure or failure
            else:
                size = sum(report["bytes"] for report in reports)
                logger.info("saved %s (%.3g GB in %.1f s)", save.final, size / 1e9, time.monotonic() - begin)

    def _write_file(self, save: _Save) -> dict[str, Any]:
        """Write this rank's file and return its size and checksum, or an error."""
        path = save.partial / rank_file(self._distributed.rank, self._distributed.world_size)
        try:
            return asdict(write_tensors(path, save.tensors, {"state": save.state}))
        except OSError as error:
            return {"error": error.strerror or str(error)}
        except Exception as error:  # Of any type: rank 0 waits for this report.
            logger.exception("%s", path)
            return {"error": repr(error)}

    def _complete(self, save: _Save, reports: Sequence[dict[str, Any]]) -> CheckpointError | None:
        """Write the index and rename the folder; return the error if that, or a rank's file, has failed."""
        try:
            # First, because a run that has taken the folder over has removed the files.
            self._check_folder()
            if errors := [report["error"] for report in reports if "error" in report]:
                raise _cannot_write(save.final, errors[0])
            self._publish(save, reports)
            _prune(self._root, self._keep_last)
            return None
        except CheckpointError as error:
            failure = error
        except OSError as error:
            failure = _cannot_write(save.final, error.strerror or str(error))
        except Exception as error:
            logger.exception("%s", save.final)
            failure = _cannot_write(save.final, repr(error))
        # Every rank has reported, so none writes into it any more.
        shutil.rmtree(save.partial, ignore_errors=True)
        return failure

    def _publish(self, save: _Save, reports: Sequence[dict[str, Any]]) -> None:
        files = {rank_file(rank, len(reports)): report for rank, report in enumerate(reports)}
        files[LISTENERS] = asdict(write_blocks(save.partial / LISTENERS, iter([save.listeners])))
        index = json.loads(save.index) | {"files": files, "parameters": self._parameters}
        # The index is written last and the rename follows it; no reader opens the folder before that.
        write_blocks(save.partial / INDEX, iter([json.dumps(index).encode()]))
        # In this order: first the entries of the folder, then its final name, which declares it complete.
        flush(save.partial)
        save.partial.rename(save.final)
        flush(save.final.parent)


def _describe_parameters(
    shapes: Mapping[str, torch.Size], ranges: Sequence[Mapping[str, FlatRange]]
) -> dict[str, dict[str, Any]]:
    """Return the index's entry for every parameter: its shape, and its ranges with the rank that saves each."""
    found = {}
    for name, shape in shapes.items():
        parts = [(own[name].start, own[name].stop, rank) for rank, own in enumerate(ranges) if name in own]
        parts.sort()
        ends = [0, *(stop for _, stop, _ in parts)]
        assert [start for start, _, _ in parts] == ends[:-1] and ends[-1] == shape.numel(), f"{name}: {parts}"
        found[name] = {"shape": list(shape), "ranges": parts}
    return found


def _cannot_write(final: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{final}: cannot be written ({reason}); it requires a folder that this user may write to and free disk space. "
        "Free some space, or move the run and set training.output_dir; earlier checkpoints are intact"
    )


def _prune(root: Path, keep_last: int) -> None:
    for path in list_checkpoints(root.parent)[:-keep_last]:
        # Renamed first: a partly deleted folder must never have a final name.
        doomed = path.with_name(f"{UNFINISHED[1]}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
