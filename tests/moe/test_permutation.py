"""Permute and combine against their references. T tokens, A experts per token, E experts."""

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.kernels import native
from qsparse_moe.kernels.topk_select.op import TOPK_SELECTS
from qsparse_moe.moe.permutation import (
    GATHERS,
    ONE_PASS_GATHERS,
    TokenCounts,
    combine,
    combine_reference,
    permute_reference,
    sort_by_expert,
)
from qsparse_moe.moe.runtime import resolve_runtime

CASES = {
    "scattered": torch.tensor([[0, 2], [3, 1], [2, 0], [1, 2]]),
    "all on one expert": torch.tensor([[2], [2], [2]]),
    "an expert without rows": torch.tensor([[0, 3], [3, 0]]),
    "one token": torch.tensor([[3, 1]]),
}


@pytest.mark.parametrize("expert_ids_TA", CASES.values(), ids=CASES.keys())
def test_rows_are_sorted_by_expert_then_token_and_the_inverse_undoes_it(expert_ids_TA):
    dispatch = sort_by_expert(expert_ids_TA, 4)
    flat = expert_ids_TA.flatten()
    assert torch.equal(dispatch.expert_N, flat.sort().values)
    assert torch.equal(flat[dispatch.slot_N], dispatch.expert_N)
    assert torch.equal(dispatch.slot_N[dispatch.row_TA.flatten()], torch.arange(len(flat)))
    assert dispatch.tokens_per_expert_E.tolist() == [(flat == e).sum().item() for e in range(4)]
    for expert in range(4):
        tokens = dispatch.token_N[dispatch.expert_N == expert]
        assert torch.equal(tokens, tokens.sort().values)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("by", ["torch", "native", "triton"])
@pytest.mark.parametrize("expert_ids_TA", CASES.values(), ids=CASES.keys())
def test_permute_and_combine_match_their_definitions_in_value_and_every_gradient(expert_ids_TA, by, drops):
    skip_unless_it_runs(by)
    within_TA = (torch.arange(expert_ids_TA.numel()) % 3 > 0).view_as(expert_ids_TA) if drops else None
    dispatch = sort_by_expert(expert_ids_TA, 4, within_TA)
    num_tokens, choices = expert_ids_TA.shape
    # Triton's arithmetic is fp32.
    exact = {"dtype": torch.float32 if by == "triton" else torch.float64}
    x = torch.randn(num_tokens, 6, **exact, requires_grad=True)
    weights = torch.rand(num_tokens, choices, **exact, requires_grad=True)
    up_rows = torch.randn(len(dispatch.slot_N), 6, **exact)
    up_tokens = torch.randn(num_tokens, 6, **exact)
    results = []
    mine = ONE_PASS_GATHERS.get(by, GATHERS)
    for gather, add in ((mine.permute, mine.combine), (permute_reference, combine_reference)):
        rows = gather(x, dispatch)
        y = add(rows.sin(), weights, dispatch)
        results.append((rows, y, *torch.autograd.grad((rows, y), (x, weights), (up_rows, up_tokens))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def skip_unless_it_runs(by):
    selection = next(selection for selection in TOPK_SELECTS if selection.name == by)
    reason = selection.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    if by == "native":
        native.load()


@pytest.mark.parametrize("by", ["torch", "native", "triton"])
def test_combine_uses_the_kernel_of_the_implementation_of_the_selection(by):
    skip_unless_it_runs(by)
    config = ModelConfig(moe=MoEConfig(backend="loop"), sparsity=SparsityConfig(backend=by))
    assert resolve_runtime(config, "cpu").permutation is ONE_PASS_GATHERS.get(by, GATHERS)


def test_combine_adds_bf16_rows_in_fp32():
    rows = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)  # 256 + 0.5 + 0.5 is lost if rounded in between
    dispatch = sort_by_expert(torch.tensor([[0, 1]]), 2)
    y = combine(rows, torch.tensor([[1.0, 1.0]]), dispatch)
    assert y.dtype == torch.bfloat16
    assert y.item() == torch.tensor(257.0).bfloat16().item()


def test_row_counts_are_accepted_in_every_form():
    counts = TokenCounts(torch.tensor([2, 0, 3], dtype=torch.int32))
    assert (counts.ends_E.tolist(), counts.ends_E.dtype) == ([2, 2, 5], torch.int32)
    assert (counts.on_host.tolist(), counts.on_host.dtype) == ([2, 0, 3], torch.int64)
    assert counts.as_list == [2, 0, 3]
    assert counts.ends_E is counts.ends_E, "made once a layer"
