from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.training.distributed.ranks import choose_device, environment, num_cores, open_distributed


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


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    with environment(KEPT="during", NEW="during"):
        assert os.environ["KEPT"] == os.environ["NEW"] == "during"
    assert os.environ["KEPT"] == "before" and "NEW" not in os.environ
