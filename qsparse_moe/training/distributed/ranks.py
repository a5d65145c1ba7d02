"""This process among the ranks of a run: its rank, its device, and the few collectives that training calls itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels.onednn import limit_compiled_products
from qsparse_moe.training.distributed.launcher_environment import launcher_ranks, num_local_ranks
from qsparse_moe.training.distributed.rendezvous import open_store

T = TypeVar("T")

_launcher_store: dist.Store | None = None


@dataclass(frozen=True)
class Distributed:
    """This process among the ranks of a run. All ranks must call each method, in the same order."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def all_reduce(
        self,
        tensor: Tensor,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Reduce ``tensor`` in place over all ranks, or over this rank's ``group``, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, which can be any object that pickles, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 only and return its result on every rank; an exception is raised on every rank."""
        return self._broadcast_outcome(self.attempt(work) if self.rank == 0 else None)

    def on_every_rank(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank and return the results by rank; an exception is raised on every rank."""
        outcomes = self.all_gather(self.attempt(work))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def _broadcast_outcome(self, outcome: tuple[T, Exception | None] | None) -> T:
        """Return the value of rank 0's ``outcome``, or raise its exception, on every rank."""
        box: list[Any] = [outcome]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        value, error = box[0]
        if error is not None:
            raise error
        return value

    @staticmethod
    def attempt(work: Callable[[], T]) -> tuple[T, Exception | None]:
        """Return the value of ``work()`` and its exception, one of which is None; the caller raises on all ranks."""
        try:
            return work(), None
        except Exception as error:  # Of any type: the other ranks wait in a collective for this outcome.
            return None, error  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


ONE_RANK = Distributed(0, 1, 0, torch.device("cpu"))
"""A process by itself, on a CPU, without a process group."""


@contextlib.contextmanager
def open_distributed(device: str = "auto", *, timeout: float = 600.0) -> Iterator[Distributed]:
    """Initialize the process group with the launcher's other ranks, or with one rank if there is no launcher.

    On exit, all ranks wait for each other and destroy the group; after an error they destroy it without waiting.

    Args:
        device: ``training.device``.
        timeout: ``training.collective_timeout``, in seconds; it also limits the wait for the other ranks to connect.

    Raises:
        BackendUnavailable: ``cuda`` was requested and is not available.
        ConfigError: the launcher's environment is incomplete or wrong, or another process listens on its port.
        RankLost: another rank did not connect within ``timeout``.
    """
    rank, world_size, local_rank = launcher_ranks()
    chosen = choose_device(device, local_rank)
    # DeepSpeed selects an accelerator when it is imported; without this it takes CUDA in a run on the CPU.
    os.environ["DS_ACCELERATOR"] = chosen.type
    if chosen.type == "cuda":
        # NCCL and DeepSpeed allocate on the current device, not on the one of their tensors.
        torch.cuda.set_device(chosen)
    else:
        limit_compiled_products()
    _share_cores()
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with contextlib.ExitStack() as stack:
        if world_size == 1:
            stack.enter_context(environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(local_rank)))
        excepthook = sys.excepthook
        dist.init_process_group(
            backend,
            store=_session_store(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=chosen if world_size > 1 and chosen.type == "cuda" else None,
        )
        if world_size == 1:
            # init_process_group installs a hook that prefixes tracebacks with the rank, once more in every session.
            sys.excepthook = excepthook
        try:
            yield Distributed(rank, world_size, local_rank, chosen)
            # Without this barrier, about one launch in seven ended with a rank that had lost its peer.
            dist.barrier()
        finally:
            _leave()


def choose_device(requested: str, local_rank: int) -> torch.device:
    """Return the device that ``training.device`` selects on this machine; ``auto`` selects CUDA if it is available.

    Raises:
        BackendUnavailable: CUDA was requested by name and is not available, or there are more ranks than devices.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise BackendUnavailable(
            f"training.device ({requested}): torch {torch.__version__} finds {found} CUDA devices on this machine, but "
            f"local rank {local_rank} needs a device of its own; start fewer ranks, or set training.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _share_cores() -> None:
    """Divide this machine's cores among its ranks; by default every rank starts one thread per core.

    An existing OMP_NUM_THREADS takes precedence; the launcher sets it only with --bind_cores_to_rank.
    """
    local_ranks = num_local_ranks()
    if "OMP_NUM_THREADS" not in os.environ and local_ranks > 1:
        torch.set_num_threads(max(1, num_cores() // local_ranks))


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_sessions = itertools.count()


def _session_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return the rendezvous store of a session; a single rank needs no port, which another run might use.

    The launcher's port is opened once per process, and every session has its own key prefix: DeepSpeed keeps the groups
    of an ended session alive, and the next session would find their keys in the store and hang.
    """
    global _launcher_store
    session = next(_sessions)
    if world_size == 1:
        return dist.HashStore()
    if _launcher_store is None:
        _launcher_store = open_store(rank, world_size, timeout=timeout)
    return dist.PrefixStore(f"session-{session}", _launcher_store)


def launcher_store() -> dist.Store:
    """Return the store that the ranks of a launcher share; rank 0's process hosts it."""
    assert _launcher_store is not None, "open_distributed must be entered first"
    return _launcher_store


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables inside the block and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave() -> None:
    """Destroy the process group, and DeepSpeed's groups if it was used, so that the next run creates new ones."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.comm.cdb is not None:
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()
