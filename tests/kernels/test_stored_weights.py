"""Codes, scales, and bytes of stored weights, value by value, and the tiles of element-wise kernels."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.row_product.stored import load_dense, store, with_scales_per_output


def test_codes_of_int8_are_rounded_to_even_with_a_scale_of_the_largest_of_their_row():
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-254.0, 3.0, 5.0, 1.0, 0.0]])
    stored = store(rows, "int8")
    assert stored.scales.tolist() == [1.0, 0.0, 2.0]
    codes = stored.data.view(torch.int8)
    assert codes.shape == (3, 64) and not codes[:, 5:].any()
    # 3, 5, and 1 halved: 1.5, 2.5, and 0.5, each to the even neighbour.
    assert codes[:, :5].tolist() == [[127, 0, 2, -2, -127], [0] * 5, [-127, 2, 2, 0, 0]]
    assert load_dense(stored).tolist() == [[127, 0, 2, -2, -127], [0] * 5, [-254, 4, 4, 0, 0]]


@pytest.mark.parametrize(
    ("weight_format", "columns", "row_bytes"),
    [
        ("fp32", 32, 128),
        ("fp32", 33, 256),
        ("bf16", 32, 64),
        ("bf16", 33, 128),
        ("int8", 64, 64),
        ("int8", 65, 128),
        ("ternary", 256, 64),
        ("ternary", 257, 128),
    ],
)
def test_a_row_is_padded_to_the_next_multiple_and_not_beyond(weight_format, columns, row_bytes):
    stored = store(torch.ones(2, 3, columns), weight_format)
    assert stored.data.shape == (6, row_bytes) and (stored.num_matrices, stored.num_rows) == (2, 3)
    scales = {"int8": 6, "ternary": 2}.get(weight_format, 0)
    assert stored.num_bytes == 6 * row_bytes + 4 * scales and len(stored.scales) == scales


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "ternary"])
def test_each_matrix_of_a_stack_has_its_own_rows_and_scales_whatever_its_strides(weight_format):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 70, 5, generator=generator).transpose(1, 2) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    stored = store(stack, weight_format)
    for which in range(3):
        alone = store(stack[which].contiguous(), weight_format)
        found = load_dense(stored, which)
        # The mean of a matrix in another order of its values may differ in the last bit.
        torch.testing.assert_close(found, load_dense(alone), rtol=1e-6, atol=0)
        error = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "ternary": 3.0}[weight_format]
        assert (found - stack[which]).abs().max() <= error * stack[which].abs().max()


def test_ternary_codes_have_one_scale_per_matrix_and_lie_sixteen_columns_apart_in_a_word():
    weights = torch.zeros(2, 1, 300)
    weights[0, 0, 17], weights[0, 0, 299] = 4.0, -4.0
    weights[1] = 0.5
    stored = store(weights, "ternary")
    # Code 1 is a weight of 0: every field of 2 bits is 01. Column 17 is 16 * 1 + 1, at bit 2 of word 1.
    words = stored.data[0].view(torch.int32).tolist()
    none = 0x55555555
    assert words[1] == none + (1 << 2)
    # Column 299 is 43 in the second block: 16 * 2 + 11, at bit 4 of its word 11.
    assert words[16 + 11] == none - (1 << 4)
    assert {word for place, word in enumerate(words) if place not in (1, 27)} == {none}
    # The mean of the magnitudes is the scale; all else of the first matrix rounds to 0.
    assert stored.scales.tolist() == pytest.approx([8 / 300, 0.5])
    dense = load_dense(stored, 0)
    assert dense[0, 17] == -dense[0, 299] == stored.scales[0] and dense.count_nonzero() == 2
    assert torch.equal(load_dense(stored, 1), torch.full((1, 300), 0.5))


def test_codes_by_output_are_those_of_the_output_rows_turned_over():
    weights = torch.tensor([[254.0, 4.0, -6.0], [0.0, -25.4, 12.8]])
    codes, scales = with_scales_per_output(weights)
    assert scales.tolist() == pytest.approx([2.0, 0.2]) and codes.scales.tolist() == [1.0] * 3
    assert (codes.num_rows, codes.num_columns, codes.weight_format) == (3, 2, "int8")
    found = codes.data.view(torch.int8)
    assert found.shape == (3, 64) and not found[:, 2:].any()
    assert found[:, :2].tolist() == [[127, 0], [2, -127], [-3, 64]]
    assert torch.equal(load_dense(codes) * scales, load_dense(store(weights, "int8")).T)


@pytest.mark.parametrize("weight_format", ["int8", "ternary"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_have_no_code_are_refused_by_format(weight_format, value):
    weights = torch.ones(2, 2, 3)
    weights[1, 1, 2] = value
    with pytest.raises(ValueError, match=f"^weights must be finite to be stored as {weight_format}$"):
        store(weights, weight_format)


def test_stored_weights_keep_no_gradient_and_no_memory_of_the_parameter():
    parameter = torch.nn.Parameter(torch.ones(2, 32))
    stored = store(parameter, "fp32")
    with torch.no_grad():
        parameter.zero_()
    assert load_dense(stored).tolist() == [[1.0] * 32] * 2
    assert stored.to(torch.device("cpu")).num_columns == 32


@pytest.mark.parametrize(
    ("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048)]
)
def test_a_power_of_two_is_the_number_itself_or_the_next(number, power):
    assert tiles.power_of_two(number) == power


@pytest.mark.parametrize(
    ("rows", "features", "tile"),
    [
        (1000, 64, (32, 64, 4)),
        (3, 64, (4, 64, 4)),
        (1000, 2048, (1, 2048, 4)),
        (1000, 2049, (1, 2048, 4)),
        (1000, 65536, (1, 2048, 4)),
        (1000, 1, (1024, 1, 4)),
    ],
)
def test_a_tile_of_an_element_wise_operation_has_at_most_2048_values(rows, features, tile):
    assert tuple(tiles.flat_tile(rows, features)) == tile


def test_warps_hold_512_values_each_between_4_and_32():
    assert [tiles.row_tile(1, width).num_warps for width in (512, 2048, 4096, 8192, 16384, 65536)] == [
        4,
        4,
        8,
        16,
        32,
        32,
    ]


@pytest.mark.parametrize(("value", "is_on"), [(None, False), ("0", False), ("1", True), ("true", False)])
def test_the_interpreter_of_triton_is_on_with_1_alone(monkeypatch, value, is_on):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert tiles.interpreted() == is_on
