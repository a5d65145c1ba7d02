"""Prompts and figures of a comparison at their limits, written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qsparse_moe.data.batch import IGNORED_LABEL, make_batch
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.comparison.continuations import compare_continuations, continued, judged
from qsparse_moe.inference.comparison.figures import comparison_figures
from qsparse_moe.inference.comparison.measure import Comparison, LayerChange, Prompts, choose_prompts
from qsparse_moe.inference.comparison.run import ComparedModels
from qsparse_moe.inference.comparison.sides import check_comparable
from qsparse_moe.inference.comparison.sums import HiddenChange, OutputChange, RoutingChange
from qsparse_moe.inference.scoring import Score
from tests.inference.models import model
from tests.inference.test_comparison import DOCUMENT, batch_of, generation, side
from tests.inference.test_scoring import Table


@pytest.fixture(scope="module")
def own():
    return side(model(), 0.5, name="own", length=32)


@pytest.mark.parametrize(("prompt", "new"), [(20, 12), (12, 20), (1, 31)])
def test_prompt_and_new_tokens_may_fill_the_length_of_training_and_no_more(own, prompt, new):
    assert len(choose_prompts(own, [batch_of()], Prompts(3, prompt, new))) == 3
    with pytest.raises(ConfigError, match=rf"\({prompt}\) and new_tokens \({new + 1}\) must together be at most .*32"):
        choose_prompts(own, [batch_of()], Prompts(3, prompt, new + 1))


def test_a_sequence_with_as_many_labels_as_a_prompt_has_tokens_is_long_enough(own):
    batch = batch_of()
    batch.targets_BS[0, 12:] = IGNORED_LABEL
    batch.targets_BS[1, 11:] = IGNORED_LABEL
    found = choose_prompts(own, [batch], Prompts(3, 12, 1))
    assert found == [batch.tokens_BS[row, :12].tolist() for row in (0, 2)]


def test_prompts_are_evenly_spaced_over_the_sequences_of_all_batches(own):
    batches = [batch_of(2), batch_of(3, seed=1), batch_of(3, seed=2)]
    rows = [row.tolist() for batch in batches for row in batch.tokens_BS[:, :4]]
    assert choose_prompts(own, batches, Prompts(3, 4, 1)) == [rows[index] for index in (0, 2, 5)]
    assert choose_prompts(own, batches, Prompts(99, 4, 1)) == rows


def test_a_prompt_begins_with_the_last_document_that_it_reaches_where_documents_are_apart(own):
    tokens = np.arange(21)[None].copy()
    tokens[0, [0, 5, 9]] = DOCUMENT
    for crosses, first in ((False, 5), (True, 0)):
        batch = make_batch(tokens, document_token=DOCUMENT, attend_across_documents=crosses)
        assert choose_prompts(own, [batch], Prompts(1, 8, 1)) == [tokens[0, first:8].tolist()]


def test_continuations_are_greedy_and_made_in_batches():
    asked = []

    class Generator:
        def generate(self, prompts, **settings):
            asked.append((prompts, settings))
            return [generation([prompt[0]]) for prompt in prompts]

    found = continued(Generator(), [[1], [2], [3], [4], [5]], new_tokens=7, batch_size=2)
    assert [one.token_ids for one in found] == [(1,), (2,), (3,), (4,), (5,)]
    assert asked == [(prompts, {"max_tokens": 7}) for prompts in ([[1], [2]], [[3], [4]], [[5]])]


def test_generated_tokens_are_judged_after_their_prompt_and_a_document_that_ended_at_once_is_not():
    table = Table()
    texts = [generation([3, 4]), generation([], ended=True), generation([6])]
    found = judged(table, [[1, 2], [7], [5]], texts, batch_size=8)
    (batch,) = table.batches
    assert batch.tokens_BS.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert found[1] == Score((), ())
    for one, inputs, targets, first in ((found[0], (1, 2, 3), (3, 4), 1), (found[2], (5,), (6,), 0)):
        rows = [table.after(token, place).log_softmax(-1) for place, token in enumerate(inputs)][first:]
        want = [float(row[token]) for row, token in zip(rows, targets, strict=True)]
        assert one.log_probabilities == pytest.approx(want, abs=1e-6)


def test_positions_that_only_one_continuation_has_do_not_count():
    reference, own = [generation([], ended=True)], [generation([1, 1, 1])]
    found = compare_continuations(
        reference, own, [Score((-1.0, -2.0, -6.0), (True, False, False))], new_tokens=3, end=256
    )
    assert (found.agreement_by_position, found.agreement) == ((0.0, None, None), 0.0)
    assert found.first_differences == (0,) and math.isnan(found.reference_log_probability)
    assert (found.drift_agreement, found.drift_log_probability) == (pytest.approx(1 / 3), -3.0)
    both = compare_continuations(reference, reference, [Score((), ())], new_tokens=3, end=256)
    assert both.first_differences == (None,) and both.agreement == 1.0 and both.drift == ()
    assert math.isnan(both.drift_agreement)


@pytest.mark.parametrize(
    ("differences", "median", "same"),
    [
        ((4, 2), 3, 0),
        ((7, 1, 2), 2, 0),
        ((None, 3), None, 1 / 2),
        ((None, 3, 5), 5, 1 / 3),
        ((None, 3, None), None, 2 / 3),
    ],
)
def test_the_median_counts_continuations_that_never_differ_as_the_longest(differences, median, same):
    one = generation([1])
    found = compare_continuations([one], [one], [Score((-1.0,), (True,))], new_tokens=1, end=256)
    found = replace(found, first_differences=differences, num_prompts=len(differences))
    assert (found.median_first_difference, found.never_parts) == (median, same)
    named = found.as_dict()
    assert (named["median_first_difference"], named["never_parts"], named["drift"][0]["begin"]) == (median, same, 0)


def routing(changed, tokens, first):
    return RoutingChange(changed, tokens, first, (4, 2), (1, 0), (2, 1))


def three_layers():
    """A dense layer and two with experts."""
    hidden = [HiddenChange(0.5, 0.9), HiddenChange(0.25, 0.6), HiddenChange(0.0, 0.3)]
    local = [HiddenChange(7.0, 7.0)] * 3
    return (
        LayerChange(0, hidden[0], local[0], None, None),
        LayerChange(1, hidden[1], local[1], routing(0.125, 0.25, 0.5), routing(0.0, 0.0, 0.0)),
        LayerChange(2, hidden[2], local[2], routing(0.375, 0.75, 0.25), routing(0.75, 1.0, 1.0)),
    )


def compared(continuations=None):
    outputs = OutputChange(10, kl_divergence=math.inf, top1_agreement=0.75, reference_loss=1.0, loss=1.5)
    found = Comparison(outputs, three_layers(), continuations)
    return ComparedModels(found, Path("run"), 4, 0.5, "dense", 0.0, 3, (1, 2))


def test_means_over_the_layers_are_over_those_that_have_the_figure():
    figures = comparison_figures(compared())
    assert figures.scalars == pytest.approx(
        {
            # Without the divergence, which is infinite.
            "comparison/top1_agreement": 0.75,
            "comparison/hidden_error": 0.25,
            "comparison/hidden_cosine": 0.6,
            "comparison/choices_changed": 0.25,
            "comparison/first_choice_changed": 0.375,
            "comparison/choices_changed_locally": 0.375,
            "comparison/hidden_error/layer_0": 0.5,
            "comparison/hidden_cosine/layer_0": 0.9,
            "comparison/hidden_error/layer_1": 0.25,
            "comparison/hidden_cosine/layer_1": 0.6,
            "comparison/choices_changed/layer_1": 0.125,
            "comparison/first_choice_changed/layer_1": 0.5,
            "comparison/choices_changed_locally/layer_1": 0.0,
            "comparison/hidden_error/layer_2": 0.0,
            "comparison/hidden_cosine/layer_2": 0.3,
            "comparison/choices_changed/layer_2": 0.375,
            "comparison/first_choice_changed/layer_2": 0.25,
            "comparison/choices_changed_locally/layer_2": 0.75,
        }
    )
    assert figures.layers == (1, 2) and figures.curves == {}
    assert figures.maps["comparison/choices_lost"][1].tolist() == [[0.25, 0.0]] * 2
    assert figures.maps["comparison/choices_gained"][1].tolist() == [[0.5, 0.5]] * 2
    named = compared().as_dict()
    assert (named["choices_changed"], named["tokens_changed"], named["first_choice_changed"]) == (0.25, 0.5, 0.375)
    assert (named["choices_changed_locally"], named["continuations"]) == (0.375, None)


def test_curves_have_a_point_per_position_that_has_a_value():
    texts = [generation([1, 2, 3], [-1.0] * 3), generation([], ended=True)]
    other = [generation([1, 5, 3], [-1.0] * 3), generation([7], [-1.0], ended=True)]
    scores = [Score((-1.0, -3.0, -5.0), (True, False, True)), Score((-2.0,), (False,))]
    found = compare_continuations(texts, other, scores, new_tokens=4, end=256)
    figures = comparison_figures(compared(found))
    assert figures.curves == {
        "comparison/greedy_agreement": [(0, 0.5), (1, 0.0), (2, 1.0)],
        "comparison/drift_agreement": [(0, 0.5), (1, 0.0), (2, 1.0)],
        "comparison/drift_log_probability": [(0, -1.5), (1, -3.0), (2, -5.0)],
    }
    assert figures.scalars["comparison/greedy_agreement"] == 2 / 4
    assert figures.scalars["comparison/never_parts"] == 0.0
    assert figures.scalars["comparison/drift_agreement"] == pytest.approx(2 / 4)
    assert figures.scalars["comparison/drift_log_probability"] == pytest.approx(-11 / 4)


def test_a_reference_with_another_tokenizer_is_refused(own):
    class Other(ByteTokenizer):
        fingerprint = "other"

    other = side(model(), name="other")
    check_comparable(other, own)
    other = replace(other, loaded=other.loaded._replace(tokenizer=Other()))
    with pytest.raises(ConfigError, match=r"the tokenizer \(data\.tokenizer\) is other and bytes"):
        check_comparable(other, own)
