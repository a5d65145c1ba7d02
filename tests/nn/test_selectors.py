"""The two selectors by themselves: K or a threshold per expert in no order, when a site fuses, and pairs of tokens."""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.nn.selectors import Selection
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import fake_quantize

D = 20


def make(values, thresholds=None, **settings):
    config = SparsityConfig.model_validate({"group_size": 5} | settings)
    site = SparseSite("expert_hidden", D, config, select_rows_torch, num_experts=len(values))
    site.set_sparsity(values, thresholds)
    return site


@pytest.mark.parametrize(
    ("values", "counts", "uniform", "largest", "selects_all"),
    [
        ([0.5, 0.25, 0.9, 0.6], [10, 15, 2, 8], None, 15, False),
        ([0.6, 0.5, 0.6], [8, 10, 8], None, 10, False),
        ([0.0, 0.5, 0.0], [20, 10, 20], None, 20, False),
        ([0.0, 0.0], [20, 20], 20, 20, True),
        ([0.5, 0.5], [10, 10], 10, 10, False),
        ([0.99], [1], 1, 1, False),
        # Two values of S that round to one K.
        ([0.5, 0.51], [10, 10], 10, 10, False),
    ],
)
def test_k_of_every_expert_and_of_all_of_them(values, counts, uniform, largest, selects_all):
    ranking = make(values).ranking
    assert ranking.num_selected_E.tolist() == counts
    assert (ranking.uniform_num_selected, ranking.largest_num_selected) == (uniform, largest)
    assert (ranking.is_uniform, ranking.selects_all) == (uniform is not None, selects_all)
    ids = torch.tensor([len(values) - 1, 0, len(values) - 1])
    found = ranking.num_selected_of_rows(ids)
    assert found == uniform if uniform else found.tolist() == [counts[-1], counts[0], counts[-1]]
    if uniform is None:
        with pytest.raises(AssertionError, match="the expert of every row is required"):
            ranking.num_selected_of_rows(None)


@pytest.mark.parametrize(("selection", "group"), [("topk", None), ("block", 5), ("threshold", None)])
def test_only_block_selection_has_groups(selection, group):
    assert make([0.5], [1.0], selection=selection).ranking.group_size == group


@pytest.mark.parametrize(
    ("values", "thresholds", "uniform", "selects_all"),
    [
        ([0.5, 0.0, 0.5], [2.0, 0.0, 2.0], False, False),
        ([0.0, 0.5, 0.0], [2.0, 1.0, 2.0], False, False),
        ([0.5, 0.25, 0.5], [2.0, 1.0, 2.0], False, False),
        ([0.0, 0.0], [2.0, 1.0], True, True),
        ([0.5, 0.25], [1.0, 1.0], True, False),
    ],
)
def test_the_threshold_of_every_expert_and_of_all_of_them(values, thresholds, uniform, selects_all):
    comparison = make(values, thresholds, selection="threshold").comparison
    assert (comparison.is_uniform, comparison.selects_all) == (uniform, selects_all)
    want = [threshold if value else -math.inf for value, threshold in zip(values, thresholds, strict=True)]
    assert comparison.threshold_bits_E.view(torch.float32).tolist() == want
    x = torch.full((2, D), 1.5)
    ids = torch.tensor([len(values) - 1, 1])
    mask = comparison.select(x, ids, ste_share=1.0).chosen
    # Of equal features below the threshold, the first is selected.
    assert mask.sum(-1).tolist() == [D if want[expert] < 1.5 else 1 for expert in ids]


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_numbers_of_a_site_stay_where_they_are_and_out_of_checkpoints(selection):
    site = make([0.5, 0.25], [2.0, 1.0], selection=selection)
    selector = site.selector
    name = "num_selected_E" if selection == "topk" else "threshold_bits_E"
    before = getattr(selector, name)
    site.set_sparsity([0.25, 0.75], [1.0, 3.0])
    assert getattr(selector, name) is before, "a new tensor would be on the CPU whatever the device of the model"
    want = [15, 5] if selection == "topk" else torch.tensor([1.0, 3.0]).view(torch.int32).tolist()
    assert before.tolist() == want and before.dtype == (torch.int64 if selection == "topk" else torch.int32)
    assert not site.state_dict()


@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_ranking_selects_per_group_with_the_given_share_of_the_gradient_behind_each_k(group_size, share, dropped):
    selection = {} if group_size is None else {"selection": "block"}
    site = make([0.8, 0.2], **selection)
    x = torch.arange(1.0, D + 1).repeat(2, 1).requires_grad_()
    found = site.ranking.select(x, torch.tensor([1, 0]), ste_share=share)
    assert found.num_selected.tolist() == [16, 4]
    width, kept = (D, (16, 4)) if group_size is None else (5, (4, 1))
    mask = torch.stack([(torch.arange(D) % width) >= width - count for count in kept])
    assert torch.equal(found.rows, x * mask)
    (grad,) = torch.autograd.grad(found.rows, x, torch.full((2, D), 3.0))
    assert torch.equal(grad, torch.where(mask, 3.0, 3.0 * dropped))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_what_is_not_above_the_threshold_has_the_given_share_of_the_gradient(share):
    x = torch.tensor([[2.0, 0.5, -3.0, *[0.0] * (D - 3)]], requires_grad=True)
    found = make([0.5], [1.0], selection="threshold").comparison.select(x, None, ste_share=share)
    (grad,) = torch.autograd.grad(found.rows, x, torch.full((1, D), 4.0))
    assert grad.tolist() == [[4.0, 4.0 * share, 4.0, *[4.0 * share] * (D - 3)]]


def test_a_threshold_is_compared_in_fp32_with_the_unrounded_row():
    config = {"selection": "threshold", "quantization": {"activations": "int4"}}
    x = torch.zeros(2, D)
    x[:, :4] = torch.tensor([4.0, 1.003, 1.001, -1.002])
    for values, thresholds, ids in (([0.5], [1.0015], None), ([0.5, 0.25], [3.0, 1.0015], torch.tensor([1, 1]))):
        found = make(values, thresholds, **config).comparison.select(x, ids, ste_share=1.0)
        assert found.chosen.nonzero().tolist() == [[row, at] for row in range(2) for at in (0, 1, 3)]
        assert torch.equal(found.rows, fake_quantize(x, "int4") * found.chosen)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (7, 7),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([[True, False, True], [False, False, True]]), [2, 1]),
        (torch.tensor([[[True, True]], [[False, True]]]), [[2], [1]]),
    ],
)
def test_the_number_of_selected_features_is_k_or_counted_in_the_mask(chosen, count):
    found = Selection(torch.zeros(2, 3), chosen).num_selected
    assert found == count if isinstance(found, int) else found.tolist() == count


FUSED = {"selection": "topk", "rescale": "unit"}


@pytest.mark.parametrize(
    ("values", "changes", "fused"),
    [
        ([0.5], {}, True),
        ([0.5], {"rescale": "none"}, True),
        ([0.5], {"rescale": "preserve"}, False),
        ([0.5], {"selection": "block"}, False),
        ([0.5], {"selection": "statistical"}, False),
        ([0.5], {"debug": True}, False),
        ([0.5], {"quantization": {"activations": "int8"}}, False),
        ([0.5], {"gradient": "masked"}, True),
        ([0.5], {"gradient": "blend", "blend": {"start": 0.5, "end": 0.5}}, False),
        ([0.0], {}, False),
        ([0.0, 0.5], {}, True),
        ([0.5, 0.0], {}, True),
    ],
)
def test_every_setting_by_itself_that_keeps_a_site_from_being_fused(values, changes, fused):
    site = make(values, **(FUSED | changes))
    assert site.can_fuse is fused
    with site_hooks({site: lambda x, ids, sparse: sparse}):
        assert not site.can_fuse and not site.is_uniform
    assert site.can_fuse is fused and site.is_uniform is (len(set(values)) == 1)


def test_hooks_are_removed_after_an_error_and_no_site_has_two():
    sites = [make([0.5]), make([0.5])]
    with pytest.raises(KeyError), site_hooks({site: lambda x, ids, sparse: sparse for site in sites}, ranks=True):
        assert [site.hook.ranks for site in sites] == [True, True]
        raise KeyError
    assert [site.hook for site in sites] == [None, None]
    for own in sites:
        both = {site: lambda x, ids, sparse: sparse for site in sites}
        with site_hooks({own: lambda x, ids, sparse: sparse}):
            assert not own.hook.ranks
            with pytest.raises(AssertionError, match="a site has a hook already"), site_hooks(both):
                pass
            assert own.hook is not None


def test_pairs_are_of_neighbours_within_a_sequence_and_unknown_without_sequences():
    site = make([0.0])
    x = torch.ones(2, 3, D)
    x[0, 1, :4], x[1, 2, :] = 0, 0
    # Two sequences of three tokens: the last token of each has no next one.
    _, stats = site(x, with_stats=True)
    assert stats["pairs_nonzero_E"].tolist() == [D + (D - 4) + D + D]
    assert stats["pairs_common_E"].tolist() == [(D - 4) + (D - 4) + D + 0]
    _, flat = site(x.flatten(0, 1), with_stats=True)
    assert (flat["pairs_nonzero_E"].item(), flat["pairs_common_E"].item(), flat["rows_E"].item()) == (0, 0, 6)
    _, one = site(x[:, :1], with_stats=True)
    assert (one["pairs_nonzero_E"].item(), one["rows_E"].item()) == (0, 2)
