"""The random numbers that a resumed run draws, with the number of ranks that wrote its checkpoint and with another."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qsparse_moe.training.checkpoint.state import random_states, seed_random_states
from qsparse_moe.training.checkpoint.store import RunProgress
from qsparse_moe.training.prepare import _start_random_states


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def draws():
    return [*torch.rand(2).tolist(), *torch.randn(1).tolist(), *np.random.normal(size=3).tolist(), random.gauss(0, 1)]


def start(checkpoint, *, rank=1, world_size=2, step=7):
    distributed = SimpleNamespace(rank=rank, world_size=world_size)
    _start_random_states(5, distributed, RunProgress(step=step, tokens=0, seconds=0.0), checkpoint)
    return draws()


def saved_by_ranks():
    """Return a checkpoint of two ranks, and what each of them draws next."""
    states, following = [], []
    for rank in range(2):
        seed_random_states(100, 0, rank)
        draws()  # an odd number of normal values: numpy and random hold one back
        states.append(random_states())
        following.append(draws())
    return SimpleNamespace(world_size=2, random_states=lambda rank: states[rank]), following


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_continues_with_its_own_numbers(rank):
    checkpoint, following = saved_by_ranks()
    assert start(checkpoint, rank=rank) == following[rank] != following[1 - rank]


def test_on_another_number_of_ranks_every_rank_and_step_has_numbers_of_its_own():
    checkpoint, following = saved_by_ranks()
    found = [
        start(checkpoint, rank=rank, world_size=4, step=step) for rank, step in ((0, 7), (1, 7), (3, 7), (0, 8), (1, 8))
    ]
    for one in range(len(found)):
        assert found[one] not in following
        for other in range(one):
            assert not set(found[one]) & set(found[other])
    assert start(checkpoint, rank=3, world_size=4) == found[2] == start(None, rank=3, world_size=4)
