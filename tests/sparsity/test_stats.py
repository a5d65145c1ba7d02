"""Statistics of a site: their values, the expert to which they belong, and sums over any split of the rows."""

import pytest
import torch

from qsparse_moe.kernels.site_sums.op import NATIVE, TORCH
from qsparse_moe.sparsity.log_counts import MAGNITUDES
from qsparse_moe.sparsity.stats import SITE_FIELDS, Readers, add_stats, row_sums, site_stats, stack_layers
from qsparse_moe.sparsity.topk import topk_sparsify

ALL_ROWS_ONCE = Readers()


def stats_of(before, num_selected, readers=ALL_ROWS_ONCE, by=TORCH):
    after = topk_sparsify(before, num_selected)
    return site_stats(by.row_sums(before, after), by.row_pattern(after, readers), num_selected, readers)


def numbers(stats):
    return {name.removesuffix("_E"): value.tolist() for name, value in stats.items() if name.endswith("_E")}


@pytest.mark.parametrize("by", [TORCH, NATIVE], ids=lambda by: by.name)
def test_sums_count_selected_features_natural_zeros_energy_and_pattern(by):
    before = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 1.0], [5.0, 0.0, -2.0]])
    stats = stats_of(before, 2, Readers(continues_R=torch.tensor([True, True, False])), by)
    assert numbers(stats) == {
        "rows": [3], "selected": [6], "nonzero": [5], "energy": [55], "kept_energy": [55], "smallest": [3 + 1 + 2],
        "pairs_nonzero": [3], "pairs_common": [2],
    }  # fmt: skip
    assert stats["used_ED"].tolist() == [[True, False, True]]
    per_row = stats_of(before, torch.tensor([1, 2, 1]), by=by)
    assert per_row["selected_E"] == 4
    assert per_row["kept_energy_E"] == 16 + 1 + 25
    assert per_row["pairs_nonzero_E"] == 0  # it is not known which row continues another


@pytest.mark.parametrize("by", [TORCH, NATIVE], ids=lambda by: by.name)
def test_energy_is_that_before_the_selection_and_a_row_of_zeros_has_no_smallest(by):
    before = torch.tensor([[3.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    found = numbers(stats_of(before, 1, by=by))
    assert (found["energy"], found["kept_energy"], found["smallest"], found["nonzero"]) == ([14], [9], [3], [1])


def test_each_expert_has_the_sums_of_the_tokens_that_it_reads():
    before = torch.randn(5, 8)
    row, expert = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 0, 2, 2])
    continues = torch.tensor([False, False, True, False])
    stats = stats_of(before, 3, Readers(row, expert, 3, continues))
    for number, rows in enumerate(([0, 2], [], [2, 4])):
        alone = stats_of(before[rows], 3) if rows else None
        for name in ("rows", "selected", "nonzero", "energy", "kept_energy", "smallest"):
            want = alone[f"{name}_E"].item() if alone else 0.0
            assert stats[f"{name}_E"][number].item() == pytest.approx(want)
        assert torch.equal(stats["used_ED"][number], alone["used_ED"][0] if alone else torch.zeros(8, dtype=torch.bool))
    selected = topk_sparsify(before, 3) != 0
    assert stats["pairs_nonzero_E"].tolist() == [0, 0, 3]
    assert stats["pairs_common_E"].tolist() == [0, 0, (selected[2] & selected[3]).sum()]


def test_the_smallest_magnitude_of_a_row_counts_once_for_every_expert_that_reads_it():
    before = torch.tensor([[4.0, 1.0], [0.25, 8.0], [0.0, 0.0]])  # 4, 8 and nothing are selected
    row, expert = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 0, 0, 1, 2])
    counts_H = stats_of(before, 1, Readers(row, expert, 3))["smallest_counts_H"]
    at_4, at_8 = (MAGNITUDES.edges.index(exponent) for exponent in (2.0, 3.0))  # the bins that begin there
    # A row of zeros counts in the first bin.
    assert {bin_: counts_H[bin_].item() for bin_ in counts_H.nonzero().flatten().tolist()} == {0: 1, at_4: 3, at_8: 1}


def test_parts_add_up_to_the_whole():
    x = torch.randn(10, 8)
    whole = stats_of(x, 3)
    parts = [stats_of(part, 3) for part in x.split(3)]
    total = parts[0]
    for part in parts[1:]:
        total = add_stats(total, part)
    assert tuple(numbers(whole)) == SITE_FIELDS
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value, rtol=1e-6, atol=0)


def test_energy_of_many_rows_is_summed_in_fp64():
    x = torch.full((3, 4), 1e4)
    x[1:] = 1e-2
    sums = row_sums(x, x)
    stats = site_stats(sums, TORCH.row_pattern(x, ALL_ROWS_ONCE), 4, ALL_ROWS_ONCE)
    assert stats["energy_E"].item() == pytest.approx(4e8 + 8e-4, rel=1e-14, abs=1e-9)


def test_stacked_layers_have_a_suffix_in_their_name_and_the_order_of_the_layers():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    stacked = stack_layers(
        [
            {"rows": torch.tensor(1.0), "load_E": one},
            {"rows": torch.tensor(7.0)},
            {"rows": torch.tensor(4.0), "load_E": other, "site/used_ED": torch.tensor([[True, False]])},
        ]
    )
    assert {name: value.tolist() for name, value in stacked.items()} == {
        "rows_L": [1.0, 7.0, 4.0],
        "load_LE": [[1.0, 2.0], [3.0, 5.0]],
        "site/used_LED": [[[True, False]]],
    }


def test_sums_are_added_flags_combined_and_names_of_one_side_kept():
    left = {"rows_E": torch.tensor([1.0, 2.0]), "used_ED": torch.tensor([[True, False, True, False]])}
    right = {"rows_E": torch.tensor([4.0, 8.0]), "used_ED": torch.tensor([[True, True, False, False]])}
    total = add_stats(left | {"left": torch.tensor(1.0)}, right | {"right": torch.tensor(2.0)})
    assert {name: value.tolist() for name, value in total.items()} == {
        "rows_E": [5.0, 10.0], "used_ED": [[True, True, True, False]], "left": 1.0, "right": 2.0,
    }  # fmt: skip
    assert left["rows_E"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_native_sums_of_wide_rows_that_several_experts_read(dtype, num_threads):
    """More features than one thread's part, rows that nobody or two experts read, zeros, and negative values."""
    draw = torch.Generator().manual_seed(1)
    before = torch.randn(60, 700, generator=draw).to(dtype)
    before[17], before[41, :699] = 0, 0
    num_selected = torch.randint(1, 60, (60,), generator=draw)
    row = torch.randint(0, 50, (90,), generator=draw)
    readers = Readers(
        row, torch.randint(0, 5, (90,), generator=draw).sort().values, 6, torch.rand(90, generator=draw) < 0.5
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found, want = (stats_of(before, num_selected, readers, by) for by in (NATIVE, TORCH))
    finally:
        torch.set_num_threads(threads)
    assert want["used_ED"][:5].any(1).all() and not want["used_ED"].all(1).any() and not want["used_ED"][5].any()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
