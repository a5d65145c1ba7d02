"""Decisions of the loop between two steps: which are logged, evaluated, and saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.training import loop
from qsparse_moe.training.loop import _Loop
from qsparse_moe.training.monitor import memory
from qsparse_moe.training.monitor.memory import memory_in_use


def a_loop(**attributes):
    made = _Loop.__new__(_Loop)
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("minutes", "seconds", "rank", "overdue"),
    [(2.0, 119.0, 0, False), (2.0, 120.0, 0, True), (0.5, 30.0, 0, True), (0.5, 29.0, 0, False), (0.0, 1e9, 0, False)]
    + [(2.0, 1e9, 1, False)],
)
def test_a_checkpoint_is_overdue_after_its_minutes_by_the_clock_of_rank_0(monkeypatch, minutes, seconds, rank, overdue):
    monkeypatch.setattr(loop.time, "monotonic", lambda: 1000.0 + seconds)
    made = a_loop(
        _training=SimpleNamespace(checkpoint_minutes=minutes),
        _run=SimpleNamespace(distributed=SimpleNamespace(rank=rank)),
        _saved_at=1000.0,
    )
    assert made._is_checkpoint_overdue() is overdue


def test_the_minutes_begin_again_with_every_checkpoint(monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "combine_states", lambda states: states)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 500.0)
    distributed = SimpleNamespace(all_gather=lambda state: [state], rank=0)
    state = SimpleNamespace(state_dict=dict)
    made = a_loop(
        _training=SimpleNamespace(checkpoint_minutes=1.0),
        _run=SimpleNamespace(distributed=distributed, loader=state),
        _writer=SimpleNamespace(save=lambda progress, data, reports, step_filter: saved.append(reports)),
        _stall=None,
        _progress=None,
        _reporter=state,
        _choices=state,
        _dead_experts=state,
        _step_filter=None,
        _saved_at=0.0,
    )
    assert made._is_checkpoint_overdue()
    made._save(evaluation_pending=True)
    assert not made._is_checkpoint_overdue() and made._saved_at == 500.0
    (reports,) = saved
    assert reports.evaluation_pending


@pytest.mark.parametrize(
    ("interval", "done", "due"),
    [(4, 4, True), (4, 5, False), (4, 8, True), (0, 4, False), (0, 10, True), (4, 10, True)],
)
def test_multiples_of_an_interval_and_the_last_step_are_due(interval, done, due):
    assert a_loop(_training=SimpleNamespace(steps=10))._is_due(interval, done) is due


def test_a_step_is_logged_at_the_interval_of_metrics_and_with_every_evaluation():
    config = SimpleNamespace(metrics=SimpleNamespace(interval=4))
    made = a_loop(_training=SimpleNamespace(steps=13, evaluation_interval=6), _run=SimpleNamespace(config=config))
    assert [done for done in range(1, 14) if made._is_reported(done)] == [4, 6, 8, 12, 13]


def test_memory_is_reported_in_bytes(monkeypatch):
    found = memory_in_use(torch.device("cpu"))
    with open("/proc/self/status", encoding="ascii") as lines:
        (resident,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")]
    assert found["resident"] == pytest.approx(resident, rel=0.02)
    usage = SimpleNamespace(ru_maxrss=10**9)
    monkeypatch.setattr(memory, "resource", SimpleNamespace(**vars(memory.resource) | {"getrusage": lambda who: usage}))
    assert memory_in_use(torch.device("cpu"))["peak_resident"] == 1024e9
    usage.ru_maxrss = 1
    lagging = memory_in_use(torch.device("cpu"))
    assert lagging["peak_resident"] == lagging["resident"], "the peak is never below the current value"
