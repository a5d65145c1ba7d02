"""The C++ operators on one thread and on two, over more rows and columns than one thread's chunk holds."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import native
from qsparse_moe.kernels.registry import OPS
from tests.kernels.conformance import new_memory_holds_nan, outputs_and_grads, too_far_off

CASES = {
    "fused_glu": ("relu2glu many_rows", "swiglu many_rows"),
    "combine_rows": ("many_rows", "tiles_of_columns"),
    "block_topk": ("many_rows",),
}
"""By the operation's name, where they are not ``many_rows`` and ``tiles_of_columns``, whose many columns are what the
flags of used features are shared out by."""
COMBINATIONS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case}-{str(dtype).removeprefix('torch.')}")
    for spec in OPS
    if "native" in spec.fast
    for case in CASES.get(spec.name, ("many_rows", "tiles_of_columns"))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def num_threads(request):
    reason = native.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("spec", "case", "dtype"), COMBINATIONS)
def test_every_row_is_that_of_the_reference_on_any_number_of_threads(spec, case, dtype, num_threads):
    example = spec.example_inputs(case, dtype, "cpu")
    exact = outputs_and_grads(spec.reference, example, torch.float64)
    plain = outputs_and_grads(spec.reference, example, dtype)
    with new_memory_holds_nan():
        fast = outputs_and_grads(spec.load("native"), example, dtype)
    eps = torch.finfo(dtype).eps if spec.budget else 0.0
    wrong = {part: too_far_off(fast[part], plain[part], exact[part], budget=spec.budget, eps=eps) for part in exact}
    assert fast.keys() == exact.keys()
    assert not {part: fault for part, fault in wrong.items() if fault}


@pytest.mark.parametrize("spec", [spec for spec in OPS if "native" in spec.fast], ids=lambda spec: spec.name)
def test_two_threads_never_disturb_each_other(spec):
    """Memory that two threads share is overwritten only while both run, so that the call is made many times."""
    example = spec.example_inputs("many_rows", torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    for num_threads, calls in ((1, 1), (2, 20)):
        torch.set_num_threads(num_threads)
        try:
            results += [outputs_and_grads(spec.load("native"), example, torch.float32) for _ in range(calls)]
        finally:
            torch.set_num_threads(before)
    alone, *together = results
    assert len(together) == 20
    assert not {name for parts in together for name in alone if not torch.equal(parts[name], alone[name])}
