"""The ranks of a run: who this process is, its device, and the few collectives that training itself needs."""

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
from qsparse_moe.training.distributed.launcher_environment import launcher_ranks, num_local_ranks
from qsparse_moe.training.distributed.rendezvous import meet

T = TypeVar("T")

_launcher_store: dist.Store | None = None


@dataclass(frozen=True)
class Distributed:
    """This process among the ranks of a run. Every method is a collective: all ranks call it, in the same order."""

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
        """Reduce ``tensor`` over the ranks, or over those of this rank's ``group``, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (anything that pickles), by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """What ``work()`` returned on rank 0, which alone calls it; what it raised there is raised on every rank."""
        return self.share(self.attempt(work) if self.rank == 0 else None)

    def on_every_rank(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank; its results by rank. What one rank raised is raised on all of them."""
        outcomes = self.gather(self.attempt(work))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def share(self, outcome: tuple[T, Exception | None] | None) -> T:
        """Rank 0's outcome of ``attempt``, on every rank: its value, or its error raised."""
        box: list[Any] = [outcome]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        value, error = box[0]
        if error is not None:
            raise error
        return value

    @staticmethod
    def attempt(work: Callable[[], T]) -> tuple[T, Exception | None]:
        """The value of ``work()`` and None, or what it raised: to be raised where all ranks agree on it."""
        try:
            return work(), None
        except Exception as error:  # whatever it is, the other ranks wait for it
            return None, error  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_distributed(device: str = "auto", *, timeout: float = 600.0) -> Iterator[Distributed]:
    """Join the other ranks of the launcher, or be the only rank where no launcher started this process.

    On the way out all ranks wait for each other and leave; after an error they leave without waiting.

    Args:
        device: ``training.device``.
        timeout: ``training.collective_timeout``, seconds; for the other ranks to come as well.

    Raises:
        BackendUnavailable: ``cuda`` was asked for and is not there.
        ConfigError: the launcher's environment is incomplete or wrong, or another process listens at its port.
        RankLost: another rank did not come within ``timeout``.
    """
    rank, world_size, local_rank = launcher_ranks()
    chosen = choose_device(device, local_rank)
    # DeepSpeed looks for an accelerator by itself when it is imported; it has to find the one that is used.
    os.environ["DS_ACCELERATOR"] = chosen.type
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
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
            # It writes the rank before every line of a traceback, once more for every session of the process.
            sys.excepthook = excepthook
        try:
            yield Distributed(rank, world_size, local_rank, chosen)
            # Without it, about one launch in seven ended with a rank that had lost its peer.
            dist.barrier()
        finally:
            _leave()


def choose_device(requested: str, local_rank: int) -> torch.device:
    """``training.device`` as a device of this machine; ``auto`` takes CUDA where there is one.

    Raises:
        BackendUnavailable: CUDA was asked for by name and is not there, or there are more ranks than devices.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise BackendUnavailable(
            f"training.device ({requested}): this machine shows {found} CUDA devices to torch {torch.__version__}, and "
            f"local rank {local_rank} needs one of its own; start fewer ranks, or set training.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _share_cores() -> None:
    """Divide this machine's cores among its ranks; without it every rank starts a thread on every core.

    The launcher sets OMP_NUM_THREADS only with --bind_cores_to_rank; where it is set, it is kept.
    """
    local_ranks = num_local_ranks()
    if "OMP_NUM_THREADS" not in os.environ and local_ranks > 1:
        torch.set_num_threads(max(1, num_cores() // local_ranks))


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_sessions = itertools.count()


def _session_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Where the ranks find each other. One rank alone needs no port, so nothing that another run could hold.

    The launcher's port is opened once for the life of the process and every session has its own names in it: DeepSpeed
    keeps the groups of an ended session alive, and the next one would meet their entries in the store and hang.
    """
    global _launcher_store
    session = next(_sessions)
    if world_size == 1:
        return dist.HashStore()
    if _launcher_store is None:
        _launcher_store = meet(rank, world_size, timeout=timeout)
    return dist.PrefixStore(f"session-{session}", _launcher_store)


def launcher_store() -> dist.Store:
    """The store that the ranks of a launcher share; it lives in rank 0's process."""
    assert _launcher_store is not None, "open_distributed comes first"
    return _launcher_store


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables that are set for a while."""
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
    """Leave the group; DeepSpeed, where it was used, forgets its groups too, so that the next run makes its own."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.comm.cdb is not None:
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()
