"""Writes checkpoints under a temporary name, renamed once all of the checkpoint is on the disk."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.locks import flush
from qsparse_moe.runs.folder import CHECKPOINTS
from qsparse_moe.training.checkpoint.state import collect, collect_buffers, owners, random_states, state_buffers
from qsparse_moe.training.checkpoint.store import (
    FORMAT,
    INDEX,
    LISTENERS,
    UNFINISHED,
    ReportState,
    RunProgress,
    list_checkpoints,
)
from qsparse_moe.training.engines.protocol import Engine

_NO_REPORTS = ReportState()


def save_checkpoint(
    run_dir: Path,
    engine: Engine,
    progress: RunProgress,
    data_state: dict[str, Any],
    *,
    keep_last: int,
    report_state: ReportState = _NO_REPORTS,
    step_filter: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of ``progress.step`` and remove all but the newest ``keep_last``. All ranks must call it.

    When the function returns, the folder is complete and on the disk. If the process is killed at any point, the
    earlier checkpoints are intact. An existing checkpoint of the same step is left unchanged.

    Args:
        run_dir: the run folder.
        engine: the engine, between two steps.
        progress: the progress of the run.
        data_state: the state of the data loader, combined over the ranks; JSON-able.
        keep_last: number of checkpoints to keep, including this one.
        report_state: the state of listeners and monitors on this rank.
        step_filter: the state of the step filter, the same on every rank; None without one.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    distributed = engine.distributed
    root = run_dir / CHECKPOINTS
    final = root / f"step-{progress.step:08d}"
    # One rank decides for all: on a network file system the ranks may see the folder at different times.
    if distributed.on_rank_zero(final.exists):
        return final
    partial = root / f"{UNFINISHED[0]}{final.name}"
    try:
        distributed.on_rank_zero(lambda: _make_empty(partial))
        content = {
            "tensors": collect(engine),
            "buffers": collect_buffers(engine) if distributed.rank == 0 else {},
            "random": random_states(),
            "monitor": report_state.monitor,
        }
        name = f"rank-{distributed.rank:05d}-of-{distributed.world_size:05d}.pt"
        # Every rank learns of a full disk on any of them here, before the index declares the checkpoint complete.
        files = distributed.on_every_rank(lambda: _write_shard(partial / name, content))
        files.append(distributed.on_rank_zero(lambda: _write_json(partial / LISTENERS, report_state.listeners)))
        index = _index(engine, progress, data_state, files)
        index |= {"listeners": LISTENERS, "evaluation_pending": report_state.evaluation_pending}
        index["step_filter"] = step_filter
        # The index is written last and the rename follows it; no reader opens the folder before that.
        distributed.on_rank_zero(lambda: _finish(partial, final, index))
        distributed.on_rank_zero(lambda: _prune(root, keep_last))
    except OSError as error:
        _remove(partial, distributed.rank)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); it requires a folder that this user may write to "
            "and free disk space. Free some space, or move the run and set training.output_dir; earlier checkpoints "
            "are intact"
        ) from error
    return final


def _index(
    engine: Engine, progress: RunProgress, data_state: dict[str, Any], files: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the index: everything that a reader needs before it opens the files of tensors."""
    owner = owners(engine.shapes(), engine.distributed.world_size)
    parameters = {
        name: {"shape": list(shape), "file": files[owner[name]]["name"]} for name, shape in engine.shapes().items()
    }
    return {
        "format": FORMAT,
        "progress": {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds},
        "adam_step": engine.adam_step,
        "loss_scale": None if engine.loss_scaler is None else engine.loss_scaler.state_dict(),
        "world_size": engine.distributed.world_size,
        "data": data_state,
        "files": {file["name"]: {"bytes": file["bytes"], "crc32": file["crc32"]} for file in files},
        "parameters": parameters,
        "buffers": {
            name: {"shape": list(value.shape), "file": files[0]["name"]}
            for name, value in state_buffers(engine.model).items()
        },
    }


class _Checksummed:
    """A writer that computes the CRC-32 of its content and remembers the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        # While writing, because reading a large file back would take as long again.
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_shard(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        writer = _Checksummed(file)
        try:
            torch.save(content, cast(BinaryIO, writer))
        except RuntimeError:
            # torch's writer reports only an unexpected position, not the full disk that caused it.
            if writer.error is not None:
                raise writer.error from None
            raise
        file.flush()
        # The rename in _finish must not reach the disk before the content.
        os.fsync(file.fileno())
        return {"name": path.name, "bytes": file.tell(), "crc32": writer.crc32}


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    # NaN is not JSON, and other readers would refuse the file.
    content = json.dumps(value, allow_nan=False).encode("utf-8")
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": len(content), "crc32": zlib.crc32(content)}


def _remove(partial: Path, rank: int) -> None:
    """Free the disk space of a checkpoint that could not be completed."""
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, index: dict[str, Any]) -> None:
    with (partial / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    # In this order: first the entries of the folder, then its final name, which declares it complete.
    flush(partial)
    partial.rename(final)
    flush(final.parent)


def _prune(root: Path, keep_last: int) -> None:
    for path in list_checkpoints(root.parent)[:-keep_last]:
        # Renamed first: a partly deleted folder must never have a final name.
        doomed = path.with_name(f"{UNFINISHED[1]}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
