"""The slots of a cache, written out: which token lies where, which are read, and what stays when sequences end."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.kv_cache import KeyValueCache, _positions_in_slots, _visible
from tests.inference.models import config

LAYERS, CAPACITY = 2, 4


def filled(*positions, slides=True):
    """A cache whose keys and values are all different, after so many tokens of each sequence."""
    cache = KeyValueCache.allocate(
        config(), batch=len(positions), capacity=CAPACITY, dtype=torch.float32, slides=slides
    )
    for number, held in enumerate((cache.key_LBHPC, cache.value_LBHPC)):
        held.copy_(torch.arange(held.numel()).view(held.shape) + number * 10**6)
    cache.positions_B.copy_(torch.tensor(positions))
    return cache


@pytest.mark.parametrize(
    ("num_tokens", "positions"),
    [
        (0, [-4, -3, -2, -1]),
        (1, [0, -3, -2, -1]),
        (3, [0, 1, 2, -1]),
        (4, [0, 1, 2, 3]),
        (5, [4, 1, 2, 3]),
        (8, [4, 5, 6, 7]),
    ],
)
def test_a_slot_holds_the_newest_token_of_its_remainder_and_is_negative_while_it_is_empty(num_tokens, positions):
    assert _positions_in_slots(torch.tensor([[num_tokens]]), CAPACITY).tolist() == [positions]


def test_a_query_attends_to_itself_and_as_many_tokens_as_fit_beside_it():
    found = _visible(torch.tensor([[3, 4]]), torch.tensor([[-1, 0, 1, 2, 3, 4]]), 3)
    assert found.tolist() == [[[[False, False, True, True, True, False], [False, False, False, True, True, True]]]]


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2], [1, 2], [2], [0], []])
def test_sequences_that_stay_keep_their_keys_values_and_positions_in_order(kept):
    cache = filled(1, 2, 3)
    key, value = cache.key_LBHPC.clone(), cache.value_LBHPC.clone()
    cache.keep(kept)
    assert torch.equal(cache.key_LBHPC, key[:, kept]) and torch.equal(cache.value_LBHPC, value[:, kept])
    assert cache.positions_B.tolist() == [(1, 2, 3)[place] for place in kept] and cache.batch == len(kept)
    assert (cache.capacity, cache.num_bytes) == (CAPACITY, LAYERS * len(kept) * CAPACITY * 2 * 64 * 4)


@pytest.mark.parametrize("kept", [[1, 0], [0, 0], [2, 1]])
def test_sequences_are_kept_once_and_in_ascending_order(kept):
    with pytest.raises(AssertionError):
        filled(1, 2, 3).keep(kept)


@pytest.mark.parametrize(
    ("positions", "num_read", "mask"),
    [
        ((0, 0), 1, [[True], [True]]),
        ((0, 2), 3, [[True, False, False], [True, True, True]]),
        ((1, 3), 4, [[True, True, False, False], [True] * 4]),
        # Full and beyond: every slot is read.
        ((4, 9), 4, [[True] * 4, [True] * 4]),
    ],
)
def test_one_new_token_reads_the_slots_up_to_its_own(positions, num_read, mask):
    step = filled(*positions).step(torch.tensor([1, 1]))
    assert (step.num_read, step.source_BP) == (num_read, None)
    assert step.mask_B1SK.tolist() == [[[row]] for row in mask]
    assert step.positions_BS.tolist() == [[place] for place in positions]
    assert [layer.layer for layer in step.layers()] == [0, 1]


def test_several_new_tokens_go_to_the_slots_behind_the_old_ones_and_the_last_replace_the_first():
    step = filled(0, 3).step(torch.tensor([2, 3]))
    # Tokens 0 and 1; tokens 3, 4 and 5, of which the last two go around.
    assert step.source_BP.tolist() == [[0, 1, -1, -1], [1, 2, -1, 0]]
    assert (step.num_read, step.positions_BS.tolist()) == (3, [[0, 1, 2], [3, 4, 5]])
    assert filled(0, 0).step(torch.tensor([2, 4])).mask_B1SK is None
    longer = filled(0, 0).step(torch.tensor([2, 5]))
    assert longer.source_BP.tolist() == [[0, 1, -1, -1], [4, 1, 2, 3]]
    assert longer.mask_B1SK[1, 0, 4].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("positions", "fits", "too_many"), [((0, 3), (4, 1), (5, 1)), ((0, 3), (4, 1), (4, 2)), ((4, 0), (0, 4), (1, 4))]
)
def test_a_cache_that_does_not_slide_has_a_slot_for_every_token_up_to_its_capacity(positions, fits, too_many):
    cache = filled(*positions, slides=False)
    cache.check_space(torch.tensor(fits))
    with pytest.raises(ConfigError, match="holds 4 tokens per sequence, and a sequence has 5"):
        cache.check_space(torch.tensor(too_many))
    filled(*positions).check_space(torch.tensor([99, 99]))


def test_tokens_are_counted_once_per_sequence():
    cache = filled(1, 2, 3)
    cache.advance()
    cache.advance(torch.tensor([0, 1, 5]))
    assert cache.positions_B.tolist() == [2, 4, 9]
    fresh = KeyValueCache.allocate(config(), batch=1, capacity=2, dtype=torch.float32)
    assert not fresh.slides and fresh.positions_B.tolist() == [0] and not fresh.key_LBHPC.any()
