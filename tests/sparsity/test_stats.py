"""Sums of a site: what they count, and that they add up however the rows are cut."""

import torch

from qsparse_moe.sparsity.stats import SITE_FIELDS, add_stats, site_stats, stack_layers
from qsparse_moe.sparsity.topk import topk_sparsify


def test_sums_count_chosen_natural_zeros_and_energy():
    before = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
    stats = site_stats(before, topk_sparsify(before, 2), 2)
    assert {name: value.item() for name, value in stats.items()} == {
        "rows": 2, "features": 6, "kept": 4, "nonzero": 3, "energy": 26, "kept_energy": 26,
    }  # fmt: skip
    per_row = site_stats(before, topk_sparsify(before, torch.tensor([1, 2])), torch.tensor([1, 2]))
    assert per_row["kept"] == 3
    assert per_row["kept_energy"] == 17


def test_parts_add_up_to_the_whole():
    x = torch.randn(10, 8)
    whole = site_stats(x, topk_sparsify(x, 3), 3)
    parts = [site_stats(part, topk_sparsify(part, 3), 3) for part in x.split(3)]
    total = parts[0]
    for part in parts[1:]:
        total = add_stats(total, part)
    assert tuple(whole) == SITE_FIELDS
    for name in SITE_FIELDS:
        torch.testing.assert_close(total[name], whole[name], rtol=1e-6, atol=0)


def test_layers_stack_under_a_name_that_says_so():
    one = {"rows": torch.tensor(1.0), "load_E": torch.tensor([1.0, 2.0])}
    stacked = stack_layers([one, {"rows": torch.tensor(2.0)}, one])
    assert {name: tuple(value.shape) for name, value in stacked.items()} == {"rows_L": (3,), "load_LE": (2, 2)}
