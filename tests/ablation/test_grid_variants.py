"""How the records of a grid become variants, cells, axes, and names, each at the edge of its rule."""

from __future__ import annotations

import pytest
from scipy.stats import t as student_t

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.grid.expert_figures import differences
from qsparse_moe.ablation.grid.scan_figures import (
    MEAN,
    _lines,
    _sparsity_at,
    shortened,
    sparsity_axis,
)
from qsparse_moe.ablation.grid.variants import (
    cells_label,
    changed_cells,
    choice_labels,
    is_sparsity,
    other_settings,
    seeds_text,
    variant_results,
    varied_sparsity,
)
from qsparse_moe.config.labels import setting_label
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.test_grid_figures import HIDDEN, OVERRIDES, record, variant


def test_a_variant_is_made_of_its_finished_runs_by_seed_and_described_by_the_first():
    rows = [
        record("b", 4.0, 7, mark="first"),
        record("a", 1.0, 0),
        record("b", 9.0, 1, finished=False),
        record("b", None, 2),
        record("b", 6.0, 3, mark="last"),
    ]
    b, a = variant_results(rows)
    assert (b.record["mark"], b.loss, b.spread, b.by_seed) == ("first", 5.0, pytest.approx(2**0.5), {7: 4.0, 3: 6.0})
    assert (a.loss, a.by_seed) == (1.0, {0: 1.0})
    without = [{key: value for key, value in row.items() if key != "seed"} for row in rows]
    assert variant_results(without)[0].by_seed == {0: 4.0, 1: 6.0}


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((1, 1), "one seed: no spread known"),
        ((0, 1), "one seed: no spread known"),
        ((3, 3), "mean ± standard deviation over 3 seeds"),
        ((1, 3, 2), "mean ± standard deviation over 1 to 3 seeds"),
    ],
)
def test_a_note_has_the_fewest_and_the_most_seeds(counts, text):
    assert seeds_text([variant(seeds=dict.fromkeys(range(count), 1.0)) for count in counts]) == text


def test_settings_of_s_are_whole_paths_and_others_are_compared_with_their_type():
    of_s = ["default", "sites.expert_hidden", "overrides.0.sparsity", "plan"]
    others = ["sites_more", "planned", "rescale", "selection"]
    assert [is_sparsity(f"model.sparsity.{name}") for name in of_s + others] == [True] * 4 + [False] * 4
    one, other = (variant(settings={"a": value, OVERRIDES: [value]}) for value in (1, "1"))
    assert other_settings(one) == {"a": "1"} != other_settings(other) == {"a": "'1'"}


def test_an_s_of_all_experts_is_that_of_every_expert_that_another_variant_lists():
    variants = [
        variant(cells=[(0, HIDDEN, None, 0.5), (1, HIDDEN, None, 0.25), (0, "attention_input", None, 0.0)]),
        variant(cells=[(0, HIDDEN, [8], 0.9), (0, HIDDEN, [1], 0.5), (1, HIDDEN, None, 0.75)]),
        variant(cells=[(0, HIDDEN, [1], 0.7), (0, HIDDEN, [8], 0.5), (1, HIDDEN, None, 0.25)]),
    ]
    found = varied_sparsity(variants)
    assert list(found.items()) == [
        (Cell(0, HIDDEN, 1), [0.5, 0.5, 0.7]),
        (Cell(0, HIDDEN, 8), [0.5, 0.9, 0.5]),
        (Cell(1, HIDDEN, None), [0.25, 0.75, 0.25]),
    ]
    assert changed_cells(variants[0], variants[1]) == {Cell(0, HIDDEN, 8): 0.9, Cell(1, HIDDEN, None): 0.75}


def test_a_label_of_cells_merges_layers_and_sites_and_says_where_every_expert_is_meant():
    cells = [Cell(0, "attention_input", None), Cell(1, "attention_input", None)]
    assert cells_label(cells) == "layers 0-1 attention_input"
    assert cells_label([Cell(2, HIDDEN, None)]) == "layer 2 expert_hidden, every expert"
    both = [Cell(0, HIDDEN, 1), Cell(0, "expert_input", 1), Cell(3, HIDDEN, 0), Cell(3, HIDDEN, 2)]
    assert cells_label(both) == "layer 0 expert 1 expert_hidden and expert_input; layer 3 experts 0,2 expert_hidden"


def test_labels_of_choices_are_those_that_set_some_of_the_paths():
    choices = [("one", ["a", "b"]), ("two", ["c"]), ("three", ["b", "d"])]
    assert choice_labels(variant(choices=choices), {"b", "x"}) == ["one", "three"]
    # Records of before the choices were stored.
    old = variant(settings={"model.num_layers": 3, "model.init_std": 1})
    assert choice_labels(old, {"model.num_layers"}) == [setting_label("model.num_layers", 3)]


def test_differences_need_the_seeds_that_all_variants_have():
    losses = [{0: 2.0, 1: 3.0, 5: 99.0}, {1: 3.5, 0: 2.25}, {0: 1.75, 1: 3.25, 9: 0.0}]
    change, half = differences([variant(sum(own.values()), seeds=own) for own in losses])
    assert change == pytest.approx([0.375, 0.0])
    # Means of rows 2.5, 2.875, 2.5, of columns 2, 3.25: residuals 0.125, 0, -0.125 and their opposites.
    variance = 4 * 0.125**2 / 2
    assert half == pytest.approx(student_t.ppf(0.975, 2) * (2 * variance / 2) ** 0.5)
    change, half = differences([variant(7.0, seeds={0: 2.0, 1: 8.0}), variant(1.0, seeds={0: 2.5, 2: 0.0})])
    assert (change.tolist(), half) == ([0.5], None), "one seed in common: its losses, and no means of others"
    assert differences([variant(2.0, seeds={0: 2.0}), variant(5.0, seeds={1: 5.0})])[0].tolist() == [3.0]


def test_the_axis_of_s_is_that_of_the_cells_or_the_mean_if_both_agree():
    def at(*values, sparsity=None, **changes):
        return [
            variant(cells=[(0, HIDDEN, [1], s)], sparsity=s if sparsity is None else sparsity, **changes)
            for s in values
        ]

    assert sparsity_axis(at(0.0, 0.5)) == (MEAN, [0.0, 0.5])
    assert sparsity_axis(at(0.0, 0.5, sparsity=0.3)) == ("S at layer 0 expert 1 expert_hidden", [0.0, 0.5])
    two = variant(cells=[(0, HIDDEN, [1], 0.9), (1, HIDDEN, [1], 0.7)])
    same = [variant(cells=[(0, HIDDEN, [1], s), (1, HIDDEN, [1], s)]) for s in (0.0, 0.5)]
    assert sparsity_axis(same)[1] == [0.0, 0.5] and sparsity_axis([*same, two]) == ("", [])
    missing = variant(cells=[(0, HIDDEN, [1], 0.9)])
    assert sparsity_axis([*same, missing]) == ("", []), "a cell that not every variant has"


@pytest.mark.parametrize(
    ("settings", "has_axis"),
    [
        ([{}, {"model.sparsity.default": 0.5}], True),
        ([{"model.sparsity.default": 0.2}, {"model.sparsity.default": 0.5}], True),
        ([{"model.sparsity.sites.a": 0.2}, {"model.sparsity.sites.b": 0.5}], False),
        ([{}, {"model.sparsity.plan": "p"}], False),
        ([{}, {"model.sparsity.overrides.0.sparsity": 0.5}], False),
        ([{}, {}], True),
    ],
)
def test_the_mean_s_is_an_axis_where_every_variant_sets_s_in_the_same_way(settings, has_axis):
    variants = [variant(settings=own, sparsity=s) for own, s in zip(settings, (0.25, 0.5), strict=True)]
    assert sparsity_axis(variants) == ((MEAN, [0.25, 0.5]) if has_axis else ("", []))


def test_a_label_of_up_to_70_characters_is_kept():
    assert shortened("x" * 70) == "x" * 70 and shortened("x" * 71) == "the cells that the grid varies"


def test_lines_are_named_by_experts_and_by_the_other_settings_that_differ():
    def with_settings(router, beta, **record):
        own = {"model.moe.router": router, "training.beta1": beta, "model.hidden_size": 3, "model.sparsity.default": 0}
        choices = [(f"router {router}", ["model.moe.router"]), (f"beta {beta}", ["training.beta1"])]
        return variant(settings=own, choices=choices, **record)

    found = _lines([with_settings("a", 0.5), with_settings("b", 0.5), with_settings("a", 0.5, num_experts=8)])
    assert list(found) == ["E=4, A=2, router a", "E=4, A=2, router b", "E=8, A=2, router a"]


def test_the_s_of_the_first_variant_is_that_of_the_cells_if_it_is_the_same_in_all_of_them():
    base = variant(cells=[(0, HIDDEN, [1], 0.25), (1, HIDDEN, [1], 0.5), (2, HIDDEN, [1], 0.25)])
    other = variant(cells=[(layer, HIDDEN, [1], 0.9) for layer in (0, 1, 2)])
    zero, one, two = (Cell(layer, HIDDEN, 1) for layer in (0, 1, 2))
    assert _sparsity_at(base, [zero, two], other) == 0.25 and _sparsity_at(base, [zero, one], other) is None


def test_cells_have_names_and_change_their_own_s_alone():
    plan = SparsityPlan({(0, "attention_input"): (0.25,), (1, HIDDEN): (0.5, 0.6, 0.7)})
    attention, *experts_ = cells_of(plan)
    assert [cell.name for cell in (attention, experts_[2])] == [
        "layer 0, attention_input",
        "layer 1, expert_hidden, expert 2",
    ]
    assert [sparsity_of(plan, cell) for cell in cells_of(plan)] == [0.25, 0.5, 0.6, 0.7]
    found = with_cells(plan, {attention: 0.1, experts_[0]: 0.2, experts_[2]: 0.3})
    assert found.values == {(0, "attention_input"): (0.1,), (1, HIDDEN): (0.2, 0.6, 0.3)}
