"""Every fast version of every operation against its definition: outputs, every gradient, in memory full of NaN."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels.registry import OPS
from tests.kernels.conformance import new_memory_holds_nan, outputs_and_grads, too_far_off

COMBINATIONS = [
    pytest.param(spec, name, case, dtype, id=f"{spec.name}-{name}-{case}-{str(dtype).removeprefix('torch.')}")
    for spec in OPS
    for name in spec.fast
    for case in spec.cases
    for dtype in spec.dtypes
]


def check(spec, name, case, dtype, device):
    reason = spec.fast[name].why_not(torch.device(device))
    if reason:
        pytest.skip(reason)
    example = spec.example_inputs(case, dtype, device)
    exact = outputs_and_grads(spec.reference, example, torch.float64)
    plain = outputs_and_grads(spec.reference, example, dtype)
    with new_memory_holds_nan():
        fast = outputs_and_grads(spec.load(name), example, dtype)
    assert fast.keys() == exact.keys()
    eps = torch.finfo(dtype).eps if spec.budget else 0.0
    wrong = {part: too_far_off(fast[part], plain[part], exact[part], budget=spec.budget, eps=eps) for part in exact}
    assert not {part: fault for part, fault in wrong.items() if fault}


@pytest.mark.parametrize(("spec", "name", "case", "dtype"), COMBINATIONS)
def test_matches_the_reference(spec, name, case, dtype):
    check(spec, name, case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "name", "case", "dtype"), COMBINATIONS)
def test_matches_the_reference_on_a_gpu(spec, name, case, dtype):
    check(spec, name, case, dtype, "cuda")


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_the_check_detects_a_lost_upstream_factor_and_a_lost_feature(spec):
    example = spec.example_inputs(spec.cases[0], torch.float32, "cpu")
    exact = outputs_and_grads(spec.reference, example, torch.float64)
    for part, right in exact.items():
        if not part.startswith("gradient"):
            continue
        for wrong in (
            torch.ones_like(right),
            right * 1.001,
            right.clone().flatten().index_fill_(0, right.abs().argmax(), 0),
        ):
            fault = too_far_off(wrong.view_as(right), right, right, budget=spec.budget, eps=1e-6)
            assert fault and fault.startswith("error")


def test_the_check_detects_memory_that_was_never_written():
    with new_memory_holds_nan():
        unwritten = torch.empty(3)
    fault = too_far_off(unwritten, torch.zeros(3), torch.zeros(3), budget=1e9, eps=1.0)
    assert fault == "error nan, allowed 0.000e+00"


def test_operations_have_names_of_their_own_and_a_case_for_benchmarks():
    assert len({spec.name for spec in OPS}) == len(OPS)
    for spec in OPS:
        assert next(iter(spec.example_inputs("large", torch.float32, "cpu").tensors.values())).numel() > 1e6
