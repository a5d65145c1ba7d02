"""Products of listed features in Triton: number formats, odd sizes, experts without tokens, memory that holds NaN."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.row_product.op import list_features, listed_product
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, load_dense, store
from tests.kernels.conformance import new_memory_holds_nan

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            tiles.why_not(torch.device("cpu")) is not None, reason="needs Triton and its interpreter"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
pytestmark = pytest.mark.parametrize("device", DEVICES)
# D, O, K: odd sizes, one feature, all features, several tiles of columns, several parts of a list.
SHAPES = [(1, 1, 1), (7, 31, 7), (40, 97, 1), (40, 256, 17), (129, 300, 129), (96, 600, 70)]


def sparse_rows(num_rows, num_features, num_selected, seed=0):
    """Return rows that each have their own ``num_selected`` features that are not zero."""
    draw = torch.Generator().manual_seed(seed + num_features)
    selected = torch.rand(num_rows, num_features, generator=draw).argsort(-1)[:, :num_selected]
    rows = torch.randn(num_rows, num_features, generator=draw)
    return torch.zeros_like(rows).scatter(1, selected, rows.gather(1, selected))


def weights_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(stored, rows, device, capacity=None, **settings):
    settings = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in settings.items()}
    with new_memory_holds_nan():
        lists = list_features(rows.to(device), capacity or rows.shape[1])
        # Places beyond the length would lie outside of the matrix, if they were read.
        beyond = torch.arange(lists.capacity, device=device) >= lists.lengths_L[:, None]
        lists.features_LM.masked_fill_(beyond, 2**30)
        return listed_product(stored.to(torch.device(device)), lists, **settings).cpu()


def check(found, exact):
    """Within a few roundings of fp32 of the product in fp64."""
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=3e-6 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_projection_is_the_product_with_the_stored_values(device, weight_format, shape):
    num_features, num_columns, num_selected = shape
    stored = store(weights_of(num_features, num_columns), weight_format)
    for num_tokens in (1, 3, 5) if num_features == 40 else (2,):
        rows = sparse_rows(num_tokens, num_features, num_selected)
        found = product(stored, rows, device, num_selected)
        check(found, rows.double() @ load_dense(stored).double())


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_gate_and_up_of_the_experts_of_a_token_share_its_list(device, weight_format):
    num_experts, choices, rows = 4, 2, sparse_rows(3, 40, 13)
    stored = store(weights_of(2 * num_experts, 40, 70), weight_format)
    # Experts 1 and 2 have no token, expert 3 has all.
    expert_TA = torch.tensor([[3, 0], [0, 3], [3, 0]])
    matrix_P = torch.cat((expert_TA.flatten(), expert_TA.flatten() + num_experts))
    found = product(stored, rows, device, 13, matrix_P=matrix_P, products_per_list=choices)
    dense = torch.stack([load_dense(stored, int(matrix)) for matrix in matrix_P]).double()
    check(found, torch.einsum("pd,pdo->po", rows.double().repeat_interleave(choices, 0).repeat(2, 1), dense))


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_down_adds_the_experts_of_a_token_with_their_weights(device, weight_format):
    num_tokens, choices = 2, 3
    rows = sparse_rows(num_tokens * choices, 100, 50)
    rows[1] = 0  # an expert without a selected feature
    stored = store(weights_of(5, 100, 33), weight_format)
    expert_P = torch.tensor([4, 0, 2, 2, 4, 1])
    weight_P = torch.rand(6, generator=torch.Generator().manual_seed(1))
    found = product(stored, rows, device, 50, matrix_P=expert_P, factors_P=weight_P, products_per_sum=choices)
    dense = torch.stack([load_dense(stored, int(expert)) for expert in expert_P]).double()
    each = torch.einsum("pd,pdo->po", rows.double(), dense) * weight_P[:, None].double()
    check(found, each.view(num_tokens, choices, -1).sum(1))


def strided(x):
    """Return the same values with other values between them in memory."""
    wide = torch.stack((x, torch.full_like(x, 3)), -1)
    return wide[..., 0]


# Lists so short that they are one part each, and so long that they are several.
@pytest.mark.parametrize(
    ("weight_format", "dtype", "num_features", "num_selected"),
    [("int8", torch.float32, 30, 11), ("ternary", torch.bfloat16, 130, 129)],
)
def test_shared_lists_factors_and_sums_together_of_strided_inputs(
    device, weight_format, dtype, num_features, num_selected
):
    stored = store(weights_of(5, num_features, 270), weight_format)
    rows = sparse_rows(2, num_features, num_selected).to(dtype)
    matrix_P = torch.tensor([4, 1, 3, 3, 0, 2, 1, 4])
    factor_P = torch.linspace(-1.0, 2.0, 8)
    settings = {"matrix_P": strided(matrix_P), "factors_P": strided(factor_P)}
    found = product(stored, strided(rows), device, num_selected, products_per_list=2, products_per_sum=2, **settings)
    assert (found.shape, found.dtype) == ((4, 270), torch.float32)
    dense = torch.stack([load_dense(stored, int(matrix)) for matrix in matrix_P]).double()
    each = torch.einsum("pd,pdo->po", rows.double()[[0, 0, 1, 1, 0, 0, 1, 1]], dense) * factor_P[:, None].double()
    check(found, each.view(4, 2, -1).sum(1))


def test_a_product_takes_the_first_features_of_a_list_that_is_full(device):
    stored, rows = store(weights_of(40, 70), "fp32"), sparse_rows(3, 40, 20)
    first = rows * ((rows != 0).cumsum(-1) <= 9)
    check(product(stored, rows, device, 9), first.double() @ load_dense(stored).double())


def test_equal_inputs_give_equal_bits(device):
    stored, rows = store(weights_of(200, 40), "fp32"), sparse_rows(2, 200, 150)
    assert torch.equal(product(stored, rows, device), product(stored, rows, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_hold_the_nonzero_features_in_order(device, dtype):
    rows = sparse_rows(5, 37, 9).to(dtype)
    rows[1], rows[2] = 0, 1
    rows[3, 36] = float("nan")
    lists = list_features(rows.to(device), 37)
    for number, row in enumerate(rows):
        features = row.nonzero()[:, 0]
        length = int(lists.lengths_L[number])
        assert length == len(features)
        assert torch.equal(lists.features_LM[number, :length].cpu().long(), features)
        torch.testing.assert_close(
            lists.values_LM[number, :length].cpu(), row[features].float(), rtol=0, atol=0, equal_nan=True
        )


def test_a_list_with_zeros_holds_every_feature(device):
    rows = sparse_rows(3, 37, 9)
    lists = list_features(rows.to(device), 37, with_zeros=True)
    assert lists.lengths_L.tolist() == [37] * 3
    assert torch.equal(lists.features_LM.cpu().long(), torch.arange(37).expand(3, -1))
    assert torch.equal(lists.values_LM.cpu(), rows)


def test_a_list_never_writes_beyond_its_length(device):
    rows = sparse_rows(3, 20, 8)
    lists = list_features(rows.to(device), 5)
    assert lists.lengths_L.tolist() == [5, 5, 5]
    assert torch.equal(lists.features_LM.cpu().long(), torch.stack([row.nonzero()[:5, 0] for row in rows]))


def test_an_empty_input_launches_no_kernel(device):
    stored = store(weights_of(20, 9), "bf16")
    assert product(stored, torch.zeros(0, 20), device).shape == (0, 9)
