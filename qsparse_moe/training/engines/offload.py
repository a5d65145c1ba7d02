"""Requirements of NVMe offload on a machine, and the folder of a run's swap files."""

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
    """Return the folder of the run's swap files, which no other run uses; None without NVMe offload.

    DeepSpeed names swap files by rank and parameter only, so two runs in one folder would read each other's weights.
    """
    chosen = config.training.deepspeed
    if "nvme" not in (chosen.offload_optimizer, chosen.offload_parameters):
        return None
    assert chosen.nvme_path is not None, "a rule of the config requires it"
    run = run_folder(config).resolve()
    return Path(chosen.nvme_path).expanduser() / f"{run.name}-{zlib.crc32(str(run).encode()):08x}"


def check_offload(config: RunConfig) -> None:
    """Raise if the run uses NVMe offload and this machine does not support it.

    Raises:
        ConfigError: ``training.deepspeed.nvme_path`` is not a writable folder.
        BackendUnavailable: DeepSpeed's asynchronous I/O cannot be compiled here.
    """
    folder = swap_folder(config)
    if folder is None:
        return
    path = config.training.deepspeed.nvme_path
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        raise ConfigError(
            f"training.deepspeed.nvme_path ({path}) must be an existing, writable folder on every machine of the run; "
            "create it, or choose another folder"
        )
    if not _has_libaio():
        raise BackendUnavailable(
            "training.deepspeed offloads to nvme, for which DeepSpeed compiles its asynchronous I/O against libaio, "
            "but the compiler does not find libaio on this machine; install libaio-dev (Debian, Ubuntu) or "
            "libaio-devel (Fedora, RHEL), or offload to cpu"
        )


def check_alignment(partitions: Mapping[str, tuple[int, int]], *, alignment: int, smallest: int) -> None:
    """Raise if DeepSpeed (0.19.8) would silently read a gradient back to a wrong offset.

    DeepSpeed reads the gradient of each large parameter into the rank's flat gradient at an offset that must be aligned
    for direct I/O. The sizes of the partitions before it determine the offset.

    Args:
        partitions: offset and number of elements of the rank's partition of each parameter, by name.
        alignment: the required alignment in elements.
        smallest: partitions with fewer elements are never swapped to a file.

    Raises:
        ConfigError: a partition is not aligned; the message names the first parameter.
    """
    for name, (offset, size) in partitions.items():
        if size >= smallest and offset % alignment:
            raise ConfigError(
                f"training.deepspeed.offload_optimizer (nvme): the rank's partition of {name} begins at element "
                f"{offset} of its flat gradient, but direct I/O requires a multiple of {alignment}, and otherwise "
                "DeepSpeed reads the gradient back to a wrong offset. Choose model.vocab_size and other sizes so that "
                f"the number of elements of every matrix is divisible by {alignment} times the number of ranks, use "
                "another number of ranks, or offload to cpu"
            )


def remove_swap_files(config: RunConfig, rank: int) -> None:
    """Remove the swap files of ``rank``, and the folder once it contains no more files."""
    folder = swap_folder(config)
    if folder is None or not folder.is_dir():
        return
    for mine in [*folder.glob(f"**/rank{rank}")]:
        shutil.rmtree(mine, ignore_errors=True)
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:  # It still contains files of another rank.
            return


def _has_libaio() -> bool:
    # Imported here because only NVMe offload needs DeepSpeed before the engine is built.
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
