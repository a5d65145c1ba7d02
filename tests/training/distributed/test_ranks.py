from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.training.distributed import ranks as ranks_module
from qsparse_moe.training.distributed.ranks import (
    Distributed,
    choose_device,
    environment,
    num_cores,
    open_distributed,
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank_and_nothing_stays_behind():
    excepthook = sys.excepthook
    for _ in range(2):
        with open_distributed("cpu") as distributed:
            assert (distributed.rank, distributed.world_size, distributed.device.type) == (0, 1, "cpu")
            assert dist.is_initialized() and os.environ["WORLD_SIZE"] == "1"
            assert distributed.all_gather("value") == ["value"]
            assert distributed.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
        assert not dist.is_initialized() and "RANK" not in os.environ
        assert sys.excepthook is excepthook


def test_an_error_inside_destroys_the_process_group_too():
    with pytest.raises(ZeroDivisionError), open_distributed("cpu") as distributed:
        distributed.on_rank_zero(lambda: 1 / 0)
    assert not dist.is_initialized()
    with pytest.raises(KeyError), open_distributed("cpu") as distributed:
        distributed.on_every_rank(lambda: {}["missing"])
    assert not dist.is_initialized()


def test_half_of_a_launchers_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught, open_distributed("cpu"):
        pass
    message = str(caught.value)
    assert message.startswith("environment variables LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set but RANK or")
    assert "Start ranks with the deepspeed launcher, or unset them all" in message


def test_a_device_requested_by_name_never_becomes_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(BackendUnavailable, match=r"training.device \(cuda\): .*0 CUDA devices .*training.device=cpu"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 5) == torch.device("cpu")
    with pytest.raises(BackendUnavailable, match=r"2 CUDA devices .*local rank 2.*start fewer ranks"):
        choose_device("auto", 2)


def test_local_ranks_divide_the_cores_unless_omp_num_threads_is_set(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("LOCAL_SIZE", str(max(2, num_cores())))
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
        torch.set_num_threads(3)
        with open_distributed("cpu"):
            assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        with open_distributed("cpu"):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("local_ranks", "threads"), [("1", []), ("4", [3]), ("5", [2]), ("12", [1]), ("40", [1])])
def test_every_local_rank_has_its_part_of_the_cores_and_at_least_one_thread(local_ranks, threads, monkeypatch):
    given = []
    monkeypatch.setattr(ranks_module, "num_cores", lambda: 12)
    monkeypatch.setattr(ranks_module.torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", local_ranks)
    ranks_module._share_cores()
    assert given == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ranks_module._share_cores()
    assert given == threads


class Gathered(Distributed):
    """Rank 1 of three, whose collectives return what the test says."""

    values = ()

    def all_gather(self, value):
        return [self.values[0], value, self.values[1]]


def test_the_first_error_of_any_rank_is_raised_on_every_rank(monkeypatch):
    one = Gathered(1, 3, 1, torch.device("cpu"))
    monkeypatch.setattr(Gathered, "values", (("a", None), ("c", None)))
    assert one.on_every_rank(lambda: "b") == ["a", "b", "c"]
    early, late = ValueError("early"), KeyError("late")
    monkeypatch.setattr(Gathered, "values", ((None, early), (None, late)))
    with pytest.raises(ValueError, match="early"):
        one.on_every_rank(lambda: "b")
    monkeypatch.setattr(Gathered, "values", (("a", None), (None, late)))
    with pytest.raises(ZeroDivisionError):
        one.on_every_rank(lambda: 1 / 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_work_of_rank_zero_is_done_there_alone_and_its_outcome_is_sent_to_all(rank, monkeypatch):
    sent, done = [], []

    def broadcast(box, src, device):
        sent.append((list(box), src, str(device)))
        box[0] = ("from rank 0", None)

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    one = Distributed(rank, 2, rank, torch.device("cpu"))
    assert one.on_rank_zero(lambda: done.append(1) or "mine") == "from rank 0"
    assert done == ([1] if rank == 0 else [])
    assert sent == [([("mine", None) if rank == 0 else None], 0, "cpu")]


def test_collectives_of_several_ranks_take_the_operation_and_the_group(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **named: calls.append(named) or tensor.add_(1))
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value: values.__setitem__(slice(None), [value, "b"]))
    two, alone = (Distributed(0, size, 0, torch.device("cpu")) for size in (2, 1))
    tensor = torch.zeros(2)
    assert two.all_reduce(tensor, dist.ReduceOp.MAX, group="group") is tensor and tensor.tolist() == [1.0, 1.0]
    two.all_reduce(tensor)
    two.barrier()
    assert calls == [{"op": dist.ReduceOp.MAX, "group": "group"}, {"op": dist.ReduceOp.SUM, "group": None}, "barrier"]
    assert two.all_gather("a") == ["a", "b"] and alone.all_gather("a") == ["a"]
    alone.all_reduce(tensor)
    alone.barrier()
    assert len(calls) == 3


def test_the_environment_is_restored_after_an_error(monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    with pytest.raises(KeyError), environment(KEPT="during", NEW="during"):
        raise KeyError
    assert os.environ["KEPT"] == "before" and "NEW" not in os.environ


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    with environment(KEPT="during", NEW="during"):
        assert os.environ["KEPT"] == os.environ["NEW"] == "during"
    assert os.environ["KEPT"] == "before" and "NEW" not in os.environ
