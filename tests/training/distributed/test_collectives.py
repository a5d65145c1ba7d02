"""The time in collectives includes every call and every wait, and no function stays patched afterwards."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from qsparse_moe.training.distributed.collectives import CALLS, timed_collectives
from qsparse_moe.training.monitor.phases import PhaseClock


class Work:
    def wait(self):
        time.sleep(0.02)
        return True

    def is_completed(self):
        return False


def slow_call(tensor, async_op=False):
    time.sleep(0.01)
    return Work() if async_op else None


def test_calls_and_waits_through_aliases_are_counted(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", slow_call)
    elsewhere = SimpleNamespace(gather=slow_call, nothing=None)
    seconds = []
    with timed_collectives(seconds.append, [(elsewhere, "gather"), (elsewhere, "nothing")]):
        assert dist.all_reduce(torch.zeros(1)) is None
        work = elsewhere.gather(torch.zeros(1), async_op=True)
        assert not work.is_completed() and len(seconds) == 2
        assert work.wait() is True
    assert len(seconds) == 3 and seconds[0] >= 0.01 and seconds[1] >= 0.01 and seconds[2] >= 0.02
    assert dist.all_reduce is slow_call and elsewhere.gather is slow_call


def test_functions_are_restored_after_an_error_too():
    before = {name: getattr(dist, name) for name in CALLS if hasattr(dist, name)}
    with pytest.raises(RuntimeError), timed_collectives(lambda seconds: None):
        assert dist.all_reduce is not before["all_reduce"]
        raise RuntimeError
    assert {name: getattr(dist, name) for name in before} == before


def test_clock_adds_them_in_steps_that_are_reported_and_not_on_cuda(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", slow_call)
    clock = PhaseClock(torch.device("cpu"))
    for measures, expected in ((True, True), (False, False)):
        clock.begin(measures=measures)
        with clock.collectives(), clock.part("update"):
            dist.all_reduce(torch.zeros(1))
        assert ("communication" in clock.seconds) == expected
        if expected:
            assert 0.01 <= clock.seconds["communication"] <= clock.seconds["update"]
    clock.begin(measures=True)
    with clock.collectives():
        pass
    assert clock.seconds == {"communication": 0.0}, "a value in every logged step"
    on_cuda = PhaseClock(torch.device("cuda"))
    on_cuda.begin(measures=True)
    with on_cuda.collectives():
        assert dist.all_reduce is slow_call


def test_a_step_that_is_profiled_names_its_phases(monkeypatch):
    names = []

    def record(name):
        names.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr("qsparse_moe.training.monitor.phases.record_function", record)
    clock = PhaseClock(torch.device("cpu"))
    for traces, measures in ((False, True), (True, False), (False, False)):
        clock.begin(measures=measures, traces=traces)
        with clock.part(f"forward {traces} {measures}"):
            pass
    assert names == ["forward True False"] and clock.seconds == {}


def test_a_reported_step_on_cuda_waits_for_its_kernels_before_and_after_every_phase(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(str(device)))
    clock = PhaseClock(torch.device("cuda", 1))
    for measures in (False, True):
        clock.begin(measures=measures)
        with clock.part("forward"):
            pass
    assert waits == ["cuda:1"] * 2


def test_a_part_that_comes_several_times_in_a_step_has_the_sum_of_its_seconds_and_the_next_step_begins_at_0(
    monkeypatch,
):
    ticks = iter([0.0, 1.0, 10.0, 14.0, 20.0, 20.5, 100.0, 108.0])
    monkeypatch.setattr("qsparse_moe.training.monitor.phases.time", SimpleNamespace(perf_counter=ticks.__next__))
    clock = PhaseClock(torch.device("cpu"))
    clock.begin(measures=True)
    for name in ("forward", "backward", "forward"):  # as with two micro-batches
        with clock.part(name):
            pass
    assert clock.seconds == {"forward": 1.5, "backward": 4.0}
    clock.begin(measures=True)
    with clock.part("forward"):
        pass
    assert clock.seconds == {"forward": 8.0}
