"""Random initial values: any range, any number of threads, their distribution, and their independence."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from qsparse_moe.model import random_values
from qsparse_moe.model.random_values import fill_normal

SIZE = 300_007
WANT = [0.2756904363632202, -0.7912739515304565, -0.2725645899772644, 0.25365138053894043]


def draw(start=0, stop=SIZE, *, seed=1, name="layers.0.w", std=1.0, dtype=torch.float32):
    out = torch.full((stop - start,), torch.nan, dtype=dtype)
    fill_normal(seed, name, start, out, std=std)
    return out


@pytest.fixture(scope="module")
def whole():
    return draw()


@pytest.mark.parametrize(
    ("start", "stop"),
    # The counter of the generator serves eight values, and 2**14 are computed at once.
    [(0, 1), (7, 8), (5, 9), (16, 24), (16_383, 16_385), (12_345, 200_001), (SIZE - 3, SIZE), (40, 40)],
)
def test_a_range_is_that_part_of_the_whole(whole, start, stop):
    assert torch.equal(draw(start, stop), whole[start:stop])


def test_threads_draw_what_one_draws(whole, monkeypatch):
    monkeypatch.setattr(random_values, "_TASK", 1 << 15)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(3), whole[3:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_keeps_the_rounded_value(whole, dtype):
    assert torch.equal(draw(std=0.02, dtype=dtype), draw(std=0.02).to(dtype))


def test_the_values_are_quantiles_of_philoxs_numbers_and_stay_the_same():
    """The bits are the same in every version of numpy and on every processor, so that they can be compared exactly."""
    key = int.from_bytes(hashlib.blake2b(b"0 embedding.weight", digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(6).view("<u4")[8:12]
    normal = NormalDist()
    low = normal.cdf(-3)
    have = draw(8, 12, seed=0, name="embedding.weight").tolist()
    assert have == pytest.approx([normal.inv_cdf(low + (1 - 2 * low) * int(bit) / 2**32) for bit in bits], abs=2e-6)
    assert have == WANT


def test_the_distribution_is_a_normal_one_cut_at_three_deviations(whole):
    values = draw(0, 4_000_000).double()
    # Moments of the standard normal distribution cut at 3: its density there is 0.004432, and 0.9973 lies inside.
    variance = 1 - 2 * 3 * 0.00443185 / 0.99730020
    assert values.mean().abs() < 4 / math.sqrt(len(values))
    assert values.var().item() == pytest.approx(variance, abs=4 * math.sqrt(2 / len(values)))
    assert values.pow(3).mean().abs() < 4 * math.sqrt(15 / len(values))
    assert 2.999 < values.abs().max() <= 3
    # Kolmogorov's statistic, which exceeds 1.95 with a probability of one in a thousand.
    inside = (torch.special.ndtr(values.sort().values) - 0.0013498980) / 0.9973002
    empirical = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    assert (inside - empirical).abs().max() * math.sqrt(len(values)) < 1.95


def test_neighbours_names_and_seeds_are_independent(whole):
    half = SIZE // 2
    others = {
        "neighbour": (whole[:-1], whole[1:]),
        "eighth": (whole[:-8], whole[8:]),
        "half": (whole[:half], whole[half : 2 * half]),
        "name": (whole, draw(name="layers.1.w")),
        "seed": (whole, draw(seed=2)),
        "digits": (draw(seed=11, name="1.w"), draw(seed=1, name="11.w")),
    }
    for pair, (one, other) in others.items():
        correlation = np.corrcoef(one.numpy(), other.numpy())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(len(one)), pair
        # Of magnitudes too: a permuted or negated copy has no linear correlation.
        assert abs(np.corrcoef(one.abs().numpy(), other.abs().numpy())[0, 1]) < 4.5 / math.sqrt(len(one)), pair


def test_what_a_thread_raises_ends_the_draw(monkeypatch):
    def fail(*arguments, **settings):
        raise MemoryError("no memory")

    monkeypatch.setattr(random_values, "_draw", fail)
    monkeypatch.setattr(random_values, "_TASK", 1 << 15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MemoryError, match="no memory"):
        draw()
