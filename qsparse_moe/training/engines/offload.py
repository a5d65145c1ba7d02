"""What NVMe offload needs of a machine, and where a run's swap files go. Knows DeepSpeed's asynchronous I/O."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.runs.folder import run_folder


def swap_folder(config: RunConfig) -> Path | None:
    """Where the run's swap files go, a folder that no other run has; None without NVMe offload.

    DeepSpeed names them by rank and parameter only: two runs in one folder would read each other's weights.
    """
    chosen = config.training.deepspeed
    if "nvme" not in (chosen.offload_optimizer, chosen.offload_parameters):
        return None
    assert chosen.nvme_path is not None, "a rule sees to it"
    run = run_folder(config).resolve()
    return Path(chosen.nvme_path).expanduser() / f"{run.name}-{zlib.crc32(str(run).encode()):08x}"


def check_offload(config: RunConfig) -> None:
    """Raise unless this machine can do the run's NVMe offload; nothing to check without it.

    Raises:
        ConfigError: ``training.deepspeed.nvme_path`` is no folder that can be written.
        BackendUnavailable: DeepSpeed's asynchronous I/O cannot be compiled here.
    """
    folder = swap_folder(config)
    if folder is None:
        return
    path = config.training.deepspeed.nvme_path
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        raise ConfigError(
            f"training.deepspeed.nvme_path ({path}) must be a folder that exists and can be written on every machine "
            "of the run; make it, or name another"
        )
    if not _has_libaio():
        raise BackendUnavailable(
            "training.deepspeed offloads to nvme: DeepSpeed's asynchronous I/O is compiled against libaio, and the "
            "compiler does not find it on this machine; install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, "
            "RHEL), or offload to cpu"
        )


def check_alignment(places: Mapping[str, tuple[int, int]], *, alignment: int, smallest: int) -> None:
    """Raise where DeepSpeed (0.19.8) would read a gradient back to the wrong place, as it does without a word.

    It reads the gradient of each large parameter into the flat one of a rank, at an offset that must be aligned for
    direct I/O; the parts of the parameters before it decide whether it is.

    Args:
        places: offset and elements of a rank's part of each parameter, by name.
        alignment: elements.
        smallest: parts of fewer elements are never in a file.

    Raises:
        ConfigError: with the first parameter that is not aligned.
    """
    for name, (offset, size) in places.items():
        if size >= smallest and offset % alignment:
            raise ConfigError(
                f"training.deepspeed.offload_optimizer (nvme): a rank's part of {name} begins at element {offset} of "
                f"what it holds, which must be a multiple of {alignment} for direct I/O, or its gradient would be read "
                "back to the wrong place. Choose a model.vocab_size and other sizes whose matrices divide by "
                f"{alignment} times the ranks, another number of ranks, or offload to cpu"
            )


def remove_swap_files(config: RunConfig, rank: int) -> None:
    """Remove what ``rank`` has swapped out; the folder goes with its last file."""
    folder = swap_folder(config)
    if folder is None or not folder.is_dir():
        return
    for mine in [*folder.glob(f"**/rank{rank}")]:
        shutil.rmtree(mine, ignore_errors=True)
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:  # another rank's files are in it
            return


def _has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
