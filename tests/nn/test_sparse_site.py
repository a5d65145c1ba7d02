"""A sparse site under every selection: selected features, gradients, and one S or one S per expert."""

from statistics import NormalDist

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, SparsityConfig
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.model.transformer import build_model
from qsparse_moe.nn.hooks import site_hooks
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import fake_quantize
from qsparse_moe.sparsity.selection import relu_mask, statistical_mask, threshold_mask
from qsparse_moe.sparsity.topk import apply_mask, topk_mask

torch.set_num_threads(1)
D = 24
SELECTIONS = ("topk", "block", "threshold", "statistical")


def make(values, thresholds=None, **settings):
    config = SparsityConfig.model_validate({"group_size": 8} | settings)
    site = SparseSite("expert_hidden", D, config, select_rows_torch, num_experts=len(values))
    site.set_sparsity(values, thresholds)
    return site


def mask_of(selection, x, sparsity, threshold):
    """The mask of rows that all have the same S."""
    if sparsity == 0:
        return torch.ones_like(x, dtype=torch.bool)
    if selection == "threshold":
        return threshold_mask(x, torch.tensor([threshold]))
    if selection == "relu":
        return x > 0
    if selection == "statistical":
        return statistical_mask(x, torch.tensor([NormalDist().inv_cdf(sparsity)]))
    return topk_mask(x, round(D * (1 - sparsity)), group_size=8 if selection == "block" else None)


@pytest.mark.parametrize("selection", (*SELECTIONS, "relu"))
@pytest.mark.parametrize("number_format", ["none", "int8"])
@pytest.mark.parametrize("rescale", ["none", "preserve"])
@pytest.mark.parametrize("gradient", ["ste", "masked", "blend"])
@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5, 0.5), (0.0, 0.5, 0.75)], ids=["one", "alike", "per expert"])
def test_every_selection_is_its_mask_with_the_site_s_gradient_and_rescale(
    selection, number_format, rescale, gradient, values
):
    thresholds = [0.2 + 0.5 * value for value in values]
    settings = {"selection": selection, "rescale": rescale, "gradient": gradient}
    site = make(
        values, thresholds, quantization={"activations": number_format}, blend={"start": 0.3, "end": 0.3}, **settings
    )
    assert site.is_uniform == (len(set(values)) == 1)
    experts = torch.arange(12) % len(values)
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(12, D, dtype=torch.float64)
    got, stats = site(x, experts, with_stats=True)
    masks = [mask_of(selection, row, values[e], thresholds[e]) for row, e in zip(x.detach(), experts, strict=True)]
    mask = torch.stack(masks)
    rounded = x if number_format == "none" else fake_quantize(x, number_format)
    want = apply_mask(rounded, mask, gradient=0.3 if gradient == "blend" else gradient)
    if rescale == "preserve":
        want = want * (x.norm(dim=-1, keepdim=True) / want.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    assert stats["selected_E"] == mask.sum()
    assert stats["rows_E"] == 12


@pytest.mark.parametrize("selection", SELECTIONS)
def test_at_s_0_the_input_tensor_itself_is_returned(selection):
    site, x = make((0.0, 0.0), selection=selection), torch.randn(5, D)
    assert site(x, with_stats=False)[0] is x
    assert site(x, with_stats=True)[1]["selected_E"] == x.numel()


def test_a_cast_of_the_model_does_not_round_the_threshold():
    site = make((0.5,), (1.005,), selection="threshold").bfloat16()
    x = torch.zeros(1, D, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, 1.0078125])  # neighbours in bf16; 1.005 rounds to the upper one
    assert site(x, with_stats=False)[0].nonzero().tolist() == [[0, 1]]


def test_relu_is_relu_wherever_s_is_above_0_and_its_gradient_too():
    site, x = make((0.0, 0.3), selection="relu", gradient="masked"), torch.randn(6, D, requires_grad=True)
    experts, upstream = torch.arange(6) % 2, torch.randn(6, D)
    got, stats = site(x, experts, with_stats=True)
    want = torch.where((experts == 1)[:, None], x.relu(), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    assert stats["nonzero_E"] == stats["selected_E"] == want.count_nonzero()


def test_relu_passes_nan_and_drops_values_that_are_not_positive():
    nan, inf = float("nan"), float("inf")
    assert relu_mask(torch.tensor([nan, inf, -inf, 0.0, -0.0, -1.0, 1e-30]), torch.zeros(1)).tolist() == [
        True, True, False, False, False, False, True,
    ]  # fmt: skip


def test_missing_thresholds_are_an_internal_error():
    with pytest.raises(AssertionError, match="needs thresholds"):
        make((0.5,), selection="threshold")


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nan_and_infinity_pass_through_every_selection(selection):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, D)
        x[2, 5] = bad
        got, _ = make((0.75,), (0.5,), selection=selection)(x, with_stats=False)
        assert not got[2, 5].isfinite()
        assert got[[0, 1, 3]].isfinite().all()


def broken_model(debug, **sparsity):
    moe = {"num_experts": 3, "expert_hidden_size": 24, "num_dense_layers": 1}
    settings = {"default": 0.5, "debug": debug, "group_size": 8} | sparsity
    model = build_model(
        ModelConfig.model_validate(
            {"vocab_size": 40, "hidden_size": 32, "num_layers": 3, "moe": moe, "sparsity": settings}
        )
    )
    with torch.no_grad():
        model.layers[1].moe.experts.w_up[:, 3, 5] = float("nan")
    return model


TOKENS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def test_debug_names_the_first_site_that_receives_a_nan():
    model = broken_model(True)
    with pytest.raises(TrainingDiverged) as caught:
        model(TOKENS)
    assert "layer 1, expert_hidden: NaN in" in str(caught.value)
    assert "model.sparsity.debug is true" in str(caught.value)
    assert "resume from the last checkpoint" in str(caught.value)


def test_debug_counts_rows_with_nan_and_ignores_finite_and_infinite_ones():
    site = make((0.5,), debug=True)
    x = torch.randn(3, 4, D)
    x[2, 1, 7] = float("inf")
    site(x, with_stats=False)
    x[1, 2, 3] = x[2, 0, 0] = float("nan")
    with pytest.raises(
        TrainingDiverged, match=r"^expert_hidden: NaN in 2 of 12 rows, first in row 6 \(model.sparsity.debug is true\)"
    ):
        site(x, with_stats=False)
    with pytest.raises(TrainingDiverged, match="NaN in 1 of 1 rows"):
        make((0.0,), debug=True)(torch.full((1, D), float("nan")), with_stats=False)


@pytest.mark.parametrize("selection", ["topk", "block", "statistical"])
@pytest.mark.parametrize("formats", [{}, {"activations": "int8"}, {"activations": "int4", "weights": "ternary"}])
def test_without_debug_a_nan_reaches_the_loss(selection, formats):
    model = broken_model(False, selection=selection, quantization=formats)
    assert model(TOKENS, TOKENS).loss.isnan()


@pytest.mark.parametrize("number_format", ["none", "int8"])
@pytest.mark.parametrize("selection", ["topk", "relu"])
def test_the_sums_contain_the_energy_before_the_selection(selection, number_format):
    x = torch.randn(6, D)
    quantization = {"sites": {"expert_hidden": number_format}} if number_format != "none" else {}
    _, stats = make((0.5,), selection=selection, quantization=quantization)(x, with_stats=True)
    torch.testing.assert_close(stats["energy_E"], x.double().square().sum()[None], rtol=1e-5, atol=0.0)
    assert stats["kept_energy_E"].item() < 0.99 * stats["energy_E"].item()


def test_a_hook_receives_the_selection_of_the_threshold_unless_it_requests_exact_top_k():
    site = make((0.5,), (1.2,), selection="threshold")
    x = torch.randn(7, D)
    experts = torch.zeros(7, dtype=torch.long)
    plain = site(x, experts, with_stats=False)[0]
    seen = []
    for ranks in (False, True):
        with site_hooks({site: lambda rows, ids, sparse: seen.append(sparse) or sparse}, ranks=ranks):
            site(x, experts, with_stats=False)
    compared, ranked = seen
    assert torch.equal(compared, plain) and torch.equal(compared, x * threshold_mask(x, torch.tensor([1.2])))
    assert torch.equal(ranked, x * topk_mask(x, D // 2)) and not torch.equal(ranked, compared)
