"""Statistics of a site: their values, the expert to which they belong, and sums over any split of the rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    found = numbers(stats)
    # The energy may be the square of a norm.
    assert [found.pop(name) for name in ("energy", "kept_energy")] == [pytest.approx([55], rel=1e-6)] * 2
    assert found == {
        "rows": [3], "selected": [6], "nonzero": [5], "smallest": [3 + 1 + 2], "pairs_nonzero": [3], "pairs_common": [2]
    }  # fmt: skip
    assert stats["used_ED"].tolist() == [[True, False, True]]
    per_row = stats_of(before, torch.tensor([1, 2, 1]), by=by)
    assert per_row["selected_E"] == 4
    assert per_row["kept_energy_E"].item() == pytest.approx(16 + 1 + 25, rel=1e-6)
    assert per_row["pairs_nonzero_E"] == 0  # it is not known which row continues another


@pytest.mark.parametrize("by", [TORCH, NATIVE], ids=lambda by: by.name)
def test_energy_is_that_before_the_selection_and_a_row_of_zeros_has_no_smallest(by):
    before = torch.tensor([[3.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    found = numbers(stats_of(before, 1, by=by))
    assert (found["kept_energy"], found["smallest"], found["nonzero"]) == ([9], [3], [1])
    assert found["energy"] == pytest.approx([14], rel=1e-6)


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


class Wider(TorchDispatchMode):
    """Collects the operators that return a tensor with as many elements as the rows, of more bytes than theirs."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.found = rows, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().nbytes() > self.rows.untyped_storage().nbytes()
        ):
            self.found.append(operator)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "readers",
    [Readers(), Readers(torch.arange(64), torch.arange(4).repeat_interleave(16), 4)],
    ids=["one matrix", "experts"],
)
def test_no_temporary_of_stock_pytorch_is_wider_than_the_rows(dtype, readers):
    """Operators that a GPU runs in one pass: the norm there converts what it reads (see the test marked gpu)."""
    before = torch.randn(64, 96).to(dtype)
    after = topk_sparsify(before, 48)
    with Wider(after) as wider:
        TORCH.row_pattern(after, readers)
        TORCH.row_sums(before, after)
    assert wider.found == []
    with Wider(after) as wider:
        after.float()
    assert len(wider.found) == 1


def test_a_feature_that_bf16_cannot_count_is_used():
    """bf16 counts to 256 only; 0 + 1 + ... + 1 must not come back to 0, and a feature without a reader stays unused."""
    after = torch.zeros(70_000, 3, dtype=torch.bfloat16)
    after[:, 0], after[-1, 1] = 1, -1
    expert = torch.tensor([0, 2]).repeat_interleave(torch.tensor([69_000, 1_000]))
    used = TORCH.row_pattern(after, Readers(None, expert, 3)).used_ED
    assert used.tolist() == [[True, False, False], [False] * 3, [True, True, False]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_on_cuda_allocate_less_than_fp32_rows(dtype):
    before = torch.randn(4096, 1024, device="cuda").to(dtype)
    after = topk_sparsify(before, 512)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    TORCH.row_sums(before, after)
    # The flags take one byte per element.
    assert torch.cuda.max_memory_allocated() - allocated < 1.5 * before.numel()
