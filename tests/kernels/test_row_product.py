"""The product of selected rows with stored weights: every number format, odd sizes, and more threads than one."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.op import (
    row_product_native,
    row_product_reference,
)
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, load_dense, store
from qsparse_moe.sparsity.quantize import fake_quantize

needs_compiler = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)
# Below, at and above whole units of 32 and blocks of 256 columns, and more than are summed at a time: 2,048, and 8,192
# of ternary codes.
SHAPES = [(1, 1), (7, 31), (64, 32), (33, 97), (40, 256), (96, 300), (129, 2080), (35, 8500)]


def weights_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def chosen_rows(num_rows, share, num_tokens):
    generator = torch.Generator().manual_seed(num_rows)
    count = round(share * num_rows)
    rows_K = torch.randperm(num_rows, generator=generator)[:count].sort().values.int()
    return rows_K, torch.randn(count, num_tokens, generator=generator)


def rounding_of_codes(stored, rows_K, values_KT, which):
    """Return the largest difference that values in 15 bits can make, where codes are multiplied as integers."""
    weights_KO = load_dense(stored, which)[rows_K.long()]
    scales_K = weights_KO.abs().amax(-1, keepdim=True) / (127 if stored.weight_format == "int8" else 1)
    # Half a step of the largest value, in every term of a sum; a row's scale is a factor of its value.
    codes_KO = weights_KO / scales_K.clamp(min=torch.finfo(torch.float32).tiny)
    largest = (values_KT * scales_K).abs().max() if len(rows_K) else 0.0
    return 0.5 / 16256 * largest * (codes_KO.abs().sum(0).max() if len(rows_K) else 0.0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize(
    ("weight_format", "by_integers"), [*((name, False) for name in WEIGHT_FORMATS), ("int8", True), ("ternary", True)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_product_is_that_of_the_stored_values(weight_format, by_integers, shape, threads):
    stored = store(weights_of(3, *shape), weight_format)
    for num_tokens in range(1, 9):
        for share in (0.0, 0.4, 1.0):
            rows_K, values_KT = chosen_rows(shape[0], share, num_tokens)
            for which in (0, 2):
                exact = row_product_reference(stored, rows_K, values_KT.double(), which=which)
                plain = row_product_reference(stored, rows_K, values_KT, which=which)
                found = row_product_native(stored, rows_K, values_KT, which=which, by_integers=by_integers)
                assert found.shape == (num_tokens, shape[1])
                allowed = 4 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
                if by_integers:
                    allowed += rounding_of_codes(stored, rows_K, values_KT, which)
                assert (found - exact).abs().max() <= allowed, (num_tokens, share, which)


@needs_compiler
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8])
def test_ternary_products_of_whole_steps_are_exact(num_tokens, threads):
    stored = store(weights_of(129, 300), "ternary")
    rows_K, values_KT = chosen_rows(129, 0.7, num_tokens)
    codes_KT = (values_KT * 40).round().clamp(-128, 127)
    exact = row_product_reference(stored, rows_K, codes_KT.double() * 0.013)
    found = row_product_native(stored, rows_K, codes_KT * 0.013, step=0.013)
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


@needs_compiler
@pytest.mark.parametrize("weight_format", ["int8", "ternary"])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_products_by_integers_of_extreme_values(weight_format, step):
    """The largest sums of a group do not overflow; a group of zeros is 0; what is not finite stays visible."""
    stored = store(torch.ones(256, 64) * torch.tensor([1.0, -1.0])[:, None].repeat(128, 1), weight_format)
    rows_K = torch.arange(0, 256, 2, dtype=torch.int32)
    values_KT = torch.full((128, 1), 127.0)
    found = row_product_native(stored, rows_K, values_KT, step=step)
    torch.testing.assert_close(found, row_product_reference(stored, rows_K, values_KT), rtol=1e-5, atol=0)
    assert not row_product_native(stored, rows_K, 0 * values_KT, step=step).any()
    tiny = row_product_native(stored, rows_K, values_KT * 1e-40)
    assert tiny.isfinite().all() and tiny.abs().max() < 1e-30
    for bad in (torch.inf, -torch.inf, torch.nan):
        values_KT[77] = bad
        assert not row_product_native(stored, rows_K, values_KT).isfinite().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_weights_are_the_values_rounded_to_their_format(shape):
    weights = weights_of(2, *shape)
    for which, matrix in enumerate(weights):
        assert torch.equal(load_dense(store(weights, "fp32"), which), matrix)
        assert torch.equal(load_dense(store(weights, "bf16"), which), matrix.bfloat16().float())
        ternary = fake_quantize(weights, "ternary")[which]
        assert torch.equal(load_dense(store(weights, "ternary"), which), ternary)
        step = matrix.abs().amax(-1, keepdim=True) / 127
        error = (load_dense(store(weights, "int8"), which) - matrix).abs()
        assert (error <= 0.5001 * step).all()


def test_stored_bytes_are_those_of_the_format():
    shape, per_row = (64, 512), {"fp32": 2048, "bf16": 1024, "int8": 512, "ternary": 128}
    for weight_format in WEIGHT_FORMATS:
        stored = store(weights_of(*shape), weight_format)
        assert stored.data.shape[1] == per_row[weight_format]
        assert stored.num_bytes == 64 * per_row[weight_format] + {"int8": 64 * 4, "ternary": 4}.get(weight_format, 0)


def test_row_of_zeros_stays_zeros_in_codes():
    weights = weights_of(4, 40)
    weights[2] = 0
    for weight_format in ("int8", "ternary"):
        assert not load_dense(store(weights, weight_format))[2].any()


def test_weights_that_are_not_finite_have_no_codes():
    weights = weights_of(4, 40)
    weights[1, 3] = torch.inf
    for weight_format in ("int8", "ternary"):
        with pytest.raises(ValueError, match=rf"weights must be finite to be stored as {weight_format}"):
            store(weights, weight_format)
