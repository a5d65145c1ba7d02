"""Every way to choose a token: by hand, and against the slow and obvious version."""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.errors import ConfigError, TrainingDiverged
from qsparse_moe.inference.sampling import (
    Sampler,
    Sampling,
    cut_min_p,
    cut_top_k,
    cut_top_p,
    draw,
    penalise_repetition,
    probabilities,
)

INF = float("inf")


def random_logits(rows=6, width=40, seed=0):
    """With ties and with ids that have no probability."""
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 2
    logits[:, 3::7] = -INF
    return logits


def test_greedy_takes_the_largest_logit_and_reports_its_log_probability():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0 - 50]])
    tokens, log_probs = Sampler(Sampling(), [0, 0], [[], []])(logits)
    assert tokens.tolist() == [1, 0]
    assert log_probs.tolist() == pytest.approx([math.log(0.75), 0.0], abs=1e-6)


def test_top_k_leaves_the_k_largest_and_the_lower_id_of_equal_ones():
    assert cut_top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 2).tolist() == [[-INF, 3.0, 3.0, -INF, -INF]]
    logits = random_logits()
    for k in (1, 3, 39, 40, 100):
        for row, found in zip(logits.tolist(), cut_top_k(logits, k).tolist(), strict=True):
            kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
            assert found == [x if i in kept else -INF for i, x in enumerate(row)]
    assert cut_top_k(logits, 0) is logits


def test_top_p_leaves_the_smallest_set_that_reaches_p():
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert cut_top_p(probs, 0.5).tolist() == [[1.0, 0.0, 0.0]]
    assert cut_top_p(probs, 0.6)[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert cut_top_p(probs, 0.81)[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert cut_top_p(probs, 1e-9).tolist() == [[1.0, 0.0, 0.0]], "one token always stays"
    assert cut_top_p(probs, 1.0) is probs
    probs = random_logits().double().softmax(-1)
    for p in (0.1, 0.5, 0.9, 0.99):
        for row, found in zip(probs.tolist(), cut_top_p(probs, p).tolist(), strict=True):
            kept, mass = [], 0.0
            for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
                if mass >= p:
                    break
                kept, mass = [*kept, i], mass + row[i]
            assert found == pytest.approx([x / mass if i in kept else 0.0 for i, x in enumerate(row)])


def test_min_p_leaves_tokens_with_a_fraction_of_the_largest_probability():
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
    assert cut_min_p(probs, 0.5)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert cut_min_p(probs, 1.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert cut_min_p(probs, 0.0) is probs
    probs = random_logits().double().softmax(-1)
    for row, found in zip(probs.tolist(), cut_min_p(probs, 0.3).tolist(), strict=True):
        kept = [x if x >= 0.3 * max(row) else 0.0 for x in row]
        assert found == pytest.approx([x / sum(kept) for x in kept])


def test_repeated_ids_lose_whatever_the_sign_of_their_logit():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, -INF]])
    found = penalise_repetition(logits, [[0, 1, 1], [2]], 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, -INF]]
    assert logits[0, 0] == 2.0, "the logits themselves stay"
    logits = random_logits(rows=2)
    tokens = [[5, 6, 5, 3], [0]]
    for row, sequence, found in zip(
        logits.tolist(), tokens, penalise_repetition(logits, tokens, 1.3).tolist(), strict=True
    ):
        want = [(x / 1.3 if x > 0 else x * 1.3) if i in sequence else x for i, x in enumerate(row)]
        assert found == pytest.approx(want)


def test_the_penalty_counts_the_prompt_and_the_new_tokens():
    sampler = Sampler(Sampling(repetition_penalty=10.0), [0], [[0]])
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    assert [sampler(logits)[0].item() for _ in range(4)] == [1, 2, 0, 0]


def test_the_log_probability_is_the_model_s_own():
    sampler = Sampler(Sampling(temperature=0.1, top_k=1, repetition_penalty=3.0), [0], [[0]])
    tokens, log_probs = sampler(torch.tensor([[1.0, 0.9]]))
    assert tokens.tolist() == [1]
    assert log_probs.item() == pytest.approx(0.9 - math.log(math.exp(1.0) + math.exp(0.9)))


def test_the_cuts_come_in_the_documented_order():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64))
    assert probabilities(logits, Sampling(temperature=1.0))[0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    squares = [0.16, 0.09, 0.04, 0.01]
    assert probabilities(logits, Sampling(temperature=0.5))[0].tolist() == pytest.approx([x / 0.3 for x in squares])
    # Of the first three 4/9, 3/9, 2/9: two reach 0.7, and the second has 3/4 of the first.
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.7, min_p=0.74)
    assert probabilities(logits, sampling)[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(logits, Sampling(temperature=1.0, top_k=3, top_p=0.7, min_p=0.76)).tolist() == [[1, 0, 0, 0]]
    # Three reach 0.75 and have 0.3 of the first; of 0.4, 0.3 and 0.2 alone, as min-p before top-p would leave, two do.
    found = probabilities(logits, Sampling(temperature=1.0, top_p=0.75, min_p=0.3))[0]
    assert found.tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])


def test_probabilities_of_logits_in_fp32_have_the_digits_of_float64():
    found = probabilities(torch.tensor([[0.0, 1.0]]), Sampling(temperature=0.5))
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(2)), math.exp(2) / (1 + math.exp(2))], rel=1e-14)


def test_a_draw_is_where_the_sum_of_probabilities_passes_the_number():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for uniform, token in [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-53, 3)]:
        assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).item() == token
    first = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    assert draw(first, torch.zeros(1, dtype=torch.float64)).item() == 2, "an id of probability 0 at the front"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=2.0, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.0, repetition_penalty=2.0),
    ],
)
def test_draws_follow_the_probabilities_and_never_take_a_hidden_id(sampling):
    logits = random_logits(rows=1, width=12)
    many = 6000
    wanted = logits
    if sampling.repetition_penalty != 1.0:
        wanted = penalise_repetition(logits, [[1, 2]], sampling.repetition_penalty)
    probs = probabilities(wanted, sampling)[0]
    # Many sequences with one draw each: the same as one sequence would draw, were its logits the same.
    tokens, _ = Sampler(sampling, range(many), [[1, 2]] * many)(logits.expand(many, -1))
    found = tokens.bincount(minlength=12) / many
    assert found.double() == pytest.approx(probs, abs=0.025)
    assert found[logits[0] == -INF].sum() == 0 and found[probs == 0].sum() == 0


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_a_sequence_draws_the_same_alone_and_in_any_batch(penalty):
    logits = [random_logits(rows=3, seed=step) for step in range(8)]
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=penalty)
    alone = []
    for row, seed in enumerate((7, 8, 9)):
        sampler = Sampler(sampling, [seed], [[]])
        alone.append([sampler(step[row : row + 1])[0].item() for step in logits])
    sampler, together = Sampler(sampling, [7, 8, 9], [[]] * 3), [[], [], []]
    running = [0, 1, 2]
    for number, step in enumerate(logits):
        if number == 4:  # the second has ended
            running = [0, 2]
            sampler.keep(running)
        for row, token in zip(running, sampler(step[running])[0].tolist(), strict=True):
            together[row].append(token)
    assert together[0] == alone[0] and together[2] == alone[2] and together[1] == alone[1][:4]
    assert len({tuple(tokens) for tokens in alone}) == 3, "seeds differ"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\) must be 0 \(greedy\) or a positive number"),
        ({"temperature": INF}, r"temperature \(inf\) must be 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be 0"),
        ({"top_k": -1, "temperature": 1.0}, r"top_k \(-1\) must be at least 0; 0 draws from all"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p \(0.0\) must lie in \(0, 1\]; 1 draws from all"),
        ({"top_p": 1.25, "temperature": 1.0}, r"top_p \(1.25\) must lie in \(0, 1\]"),
        ({"min_p": 1.5, "temperature": 1.0}, r"min_p \(1.5\) must lie in \[0, 1\]; 0 draws from all"),
        ({"min_p": -0.5, "temperature": 1.0}, r"min_p \(-0.5\) must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be positive; 1 is no penalty"),
        ({"repetition_penalty": INF}, r"repetition_penalty \(inf\) must be positive"),
        ({"top_p": 0.9}, "^{?top_p}? must be left out at {?temperature}? 0"),
        ({"top_k": 5, "min_p": 0.1}, "top_k and min_p must be left out at temperature 0.*set a temperature above 0"),
    ],
)
def test_settings_outside_of_their_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-9, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9, "min_p": 0.0},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 1.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 0.5},
    ],
)
def test_settings_at_the_ends_of_their_range_are_accepted(settings):
    assert all(getattr(Sampling(**settings), name) == value for name, value in settings.items())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), INF])
def test_logits_that_are_not_finite_end_generation_with_one_message(temperature, broken):
    sampler = Sampler(Sampling(temperature=temperature), [0, 1], [[], []])
    with pytest.raises(TrainingDiverged, match=r"the logits of the model are not finite.* use an earlier checkpoint"):
        sampler(torch.tensor([[1.0, 2.0, -INF], [1.0, broken, 0.0]]))


@pytest.mark.parametrize(("seeds", "named"), [([2**63 - 1, 2**63], 2**63), ([0, -1], -1)])
def test_a_seed_outside_the_generators_range_is_refused(seeds, named):
    Sampler(Sampling(temperature=1.0), seeds[:1], [[1]])
    with pytest.raises(ConfigError, match=rf"seed \({named}\) must lie from 0 to 2\^63 - 1"):
        Sampler(Sampling(temperature=1.0), seeds, [[1], [1]])
