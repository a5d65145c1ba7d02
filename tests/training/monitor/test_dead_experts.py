"""Warnings of experts without a token: once per window, by layer and expert, on rank 0."""

from __future__ import annotations

import logging

import pytest
import torch

from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.loop import train
from qsparse_moe.training.monitor.dead_experts import DeadExpertMonitor, in_ranges

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def rows(*layers):
    return torch.tensor(layers, dtype=torch.float64)


def warnings_of(caplog, watch, steps):
    """Return the warnings of each report; ``steps`` has one list per report with the counts of its steps."""
    found, step = [], 0
    for interval in steps:
        step += len(interval)
        for one in interval[:-1]:
            watch.add(one)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            watch.check(step, None if interval[-1] is None else sum(interval))
        found.append([record.getMessage() for record in caplog.records])
    return found


def test_an_expert_without_a_token_for_a_window_is_named_once_per_window(caplog):
    dead = rows([3, 0, 1, 0, 0], [2, 2, 0, 0, 0])
    late = rows([3, 0, 1, 0, 0], [2, 2, 0, 0, 1])
    watch = DeadExpertMonitor(4, [1, 3], ALONE)
    first, second, third, fourth, fifth = warnings_of(
        caplog, watch, [[dead, dead], [dead, late], [dead, dead], [dead], [dead] * 3]
    )
    assert first == [] and third == [] and len(second) == 2
    assert second[0].startswith("step 4: layer 1: experts 1, 3-4 received no token in the last 4 steps ")
    for part in (
        "metrics.dead_expert_window",
        "model.moe.load_balance_coefficient",
        "model.moe.bias_update_rate above 0",
    ):
        assert part in second[0]
    assert second[1].startswith("step 4: layer 3: experts 2-3 received no token")
    # Expert 4 of layer 3 received a token in step 4's interval and none in those after it.
    assert fourth == []
    fronts = [text.split(" received")[0] for text in fifth]
    assert fronts == ["step 10: layer 1: experts 1, 3-4", "step 10: layer 3: experts 2-4"]


def test_one_token_in_the_window_is_enough(caplog):
    dead, alive = rows([1, 0]), rows([1, 1])
    steps = [[dead, dead, dead], [alive, dead], [dead, dead], [dead]]
    assert warnings_of(caplog, DeadExpertMonitor(4, [0], ALONE), steps) == [[], [], [], []]


def test_a_window_of_zero_and_a_model_without_experts_give_no_warning(caplog):
    dead = rows([1, 0])
    assert warnings_of(caplog, DeadExpertMonitor(0, [0], ALONE), [[dead] * 9]) == [[]]
    assert warnings_of(caplog, DeadExpertMonitor(2, [], ALONE), [[None] * 9]) == [[]]


def test_only_rank_zero_warns(caplog):
    for rank, want in ((0, ["step 2: layer 0: experts 2"]), (1, [])):
        watch = DeadExpertMonitor(2, [0], Distributed(rank, 2, rank, torch.device("cpu")))
        found = warnings_of(caplog, watch, [[rows([1, 1, 0])] * 2])[0]
        assert [text.split(" received")[0] for text in found] == want


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([0, 1], "0-1"), ([1, 3, 4, 5, 9], "1, 3-5, 9")])
def test_numbers_are_shown_as_ranges(numbers, text):
    assert in_ranges(numbers) == text


def test_a_run_names_its_dead_experts(make_config, caplog, monkeypatch):
    from qsparse_moe.training import start

    build = start.build_empty

    def two_preferred(*arguments, **settings):
        model = build(*arguments, **settings)
        model.layers[1].moe.router.expert_bias.copy_(torch.tensor([9.0, 9, 0, 0]))
        return model

    monkeypatch.setattr(start, "build_empty", two_preferred)
    config = make_config(steps=4)
    moe = config.model.moe.model_copy(update={"bias_update_rate": 1.0, "bias_update_steps": 0})
    watch = config.metrics.model_copy(update={"interval": 2, "dead_expert_window": 3})
    model = config.model.model_copy(update={"moe": moe})
    with caplog.at_level(logging.WARNING):
        train(config.model_copy(update={"metrics": watch, "model": model}))
    messages = [record.getMessage() for record in caplog.records if "received no token" in record.getMessage()]
    assert [text.split(" received")[0] for text in messages] == ["step 4: layer 1: experts 2-3"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_warns_as_an_uninterrupted_one(caplog, stop):
    """Expert 1 receives no token; the state is saved after ``stop`` steps, with a report every two steps."""
    dead, watch = rows([3, 0]), DeadExpertMonitor(4, [0], ALONE)
    want = warnings_of(caplog, DeadExpertMonitor(4, [0], ALONE), [[dead, dead], [dead, dead], [dead, dead]])
    assert [len(texts) for texts in want] == [0, 1, 0]
    found = []
    for step in range(1, 7):
        if step % 2:
            watch.add(dead)
        else:
            caplog.clear()
            watch.check(step, watch.routed_LE + dead)
            found.append([record.getMessage() for record in caplog.records])
        if step == stop:
            resumed = DeadExpertMonitor(4, [0], ALONE)
            resumed.load_state_dict(watch.state_dict())
            watch = resumed
    assert found == want
