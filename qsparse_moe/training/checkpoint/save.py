"""Writes checkpoints: under another name first, renamed when all of it is on the disk."""

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
) -> Path:
    """Write the checkpoint of ``progress.step`` and remove the oldest beyond ``keep_last``. All ranks call it.

    When it returns, the folder is complete and on the disk; whenever it is cut off, the checkpoints before it are
    untouched. One that is there already stays as it is.

    Args:
        run_dir: the run folder.
        engine: between two steps.
        progress: of the run.
        data_state: the loader's, combined over the ranks; JSON-able.
        keep_last: how many to keep, this one included.
        report_state: of this rank.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    distributed = engine.distributed
    root = run_dir / CHECKPOINTS
    final = root / f"step-{progress.step:08d}"
    if distributed.on_rank_zero(final.exists):
        return final
    partial = root / f"{UNFINISHED[0]}{final.name}"
    try:
        distributed.on_rank_zero(lambda: _make_empty(partial))
        share = collect(engine)
        content = {
            "tensors": share,
            "buffers": collect_buffers(engine) if distributed.rank == 0 else {},
            "random": random_states(),
            "monitor": report_state.monitor,
        }
        name = f"rank-{distributed.rank:05d}-of-{distributed.world_size:05d}.pt"
        files = distributed.on_every_rank(lambda: _write_shard(partial / name, content))
        files.append(distributed.on_rank_zero(lambda: _write_json(partial / LISTENERS, report_state.listeners)))
        index = _index(engine, progress, data_state, files)
        index |= {"listeners": LISTENERS, "evaluation_pending": report_state.evaluation_pending}
        distributed.on_rank_zero(lambda: _finish(partial, final, index))
        distributed.on_rank_zero(lambda: _prune(root, keep_last))
    except OSError as error:
        _remove(partial, distributed.rank)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); it needs a folder that this user may write and "
            "free space. Make room, or move the run and set training.output_dir; the checkpoints before it are intact"
        ) from error
    return final


def _index(
    engine: Engine, progress: RunProgress, data_state: dict[str, Any], files: list[dict[str, Any]]
) -> dict[str, Any]:
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
    """A file to write to that adds up what goes into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
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
            # torch's writer says only that it ended at an unexpected place.
            if writer.error is not None:
                raise writer.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
        return {"name": path.name, "bytes": file.tell(), "crc32": writer.crc32}


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    content = json.dumps(value, allow_nan=False).encode("utf-8")
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": len(content), "crc32": zlib.crc32(content)}


def _remove(partial: Path, rank: int) -> None:
    """Give the space of a checkpoint that could not be written back."""
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
    flush(partial)
    partial.rename(final)
    flush(final.parent)


def _prune(root: Path, keep_last: int) -> None:
    for path in list_checkpoints(root.parent)[:-keep_last]:
        # Renamed first: half of a folder must never have a final name.
        doomed = path.with_name(f"{UNFINISHED[1]}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
