"""The portable engine computes what the training model's own parts compute, and reads only chosen rows."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.inference.cached_model import TorchDecode
from qsparse_moe.inference.engine import resolve_engine
from qsparse_moe.inference.gather_engine import GatherDecode, why_not
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.weights import fold_rounding, round_weights
from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.gather import GatheredMatrices, list_features_gather, listed_product_gather
from qsparse_moe.nn import runtime
from tests.inference.models import difference_from_torch, model, plan_per_expert
from tests.inference.test_cached_model import DENSE, SPARSE

torch.set_num_threads(1)


def largest_difference(built, prompts=(4, 2, 7), capacity=9, steps=6, **settings):
    return difference_from_torch(built, GatherDecode(built, **settings), prompts, capacity=capacity, steps=steps)


@pytest.mark.parametrize("settings", (DENSE | SPARSE).values(), ids=(DENSE | SPARSE).keys())
def test_gathered_logits_are_those_of_the_training_model(settings):
    assert largest_difference(model(**settings)) < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
def test_every_batch_and_odd_sizes(batch):
    built = model(hidden_size=72, num_heads=2, sparsity={"default": 0.6}, moe={"expert_hidden_size": 37})
    assert largest_difference(built, prompts=tuple(range(1, batch + 1)), capacity=20) < 1e-5


@pytest.mark.parametrize("selection", ["topk", "block", "threshold"])
def test_experts_with_an_s_of_their_own_select_for_themselves(selection):
    built = model(sparsity={"selection": selection, "group_size": 8})
    built.set_sparsity(plan_per_expert(built, selection))
    assert largest_difference(built) < 1e-5


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8"])
def test_weights_in_a_number_format_are_those_of_the_rounded_model(weight_format):
    built = model(sparsity={"default": 0.5})
    round_weights(built, weight_format)
    assert largest_difference(built) < 1e-5


def test_reading_every_row_changes_no_logit():
    built = model(sparsity={"default": 0.5}, moe={"num_shared_experts": 1})
    assert largest_difference(built, rows="all") < 1e-5
    assert [GatherDecode(built, rows=rows).rows for rows in ("auto", "selected", "all")] == [
        "selected",
        "selected",
        "all",
    ]


def logits_of(engine, built, dtype):
    cache = KeyValueCache.allocate(built.config, batch=3, capacity=4, dtype=dtype)
    return engine.decode(torch.tensor([3, 1, 200]), cache)


def test_a_model_in_bf16_is_as_exact_as_its_own_modules():
    errors = {"gather": 0.0, "torch": 0.0}
    for seed in range(4):
        built, exact = model(torch.bfloat16, seed=seed), model(seed=seed).bfloat16().float()
        expected = logits_of(TorchDecode(exact), exact, torch.float32)
        for engine, dtype in ((GatherDecode(built), torch.float32), (TorchDecode(built), torch.bfloat16)):
            errors[engine.name] += (logits_of(engine, built, dtype) - expected).square().mean().item()
    assert 0.25 * errors["torch"] < errors["gather"] < 2 * errors["torch"]


def test_the_experts_are_those_of_the_model_and_only_attention_is_copied():
    built = model()
    engine = GatherDecode(built)
    experts, stacks = built.layers[0].moe.experts, engine._weights._stacks
    assert stacks["layers.0.moe.experts.w_up"].data_ptr() == experts.w_up.data_ptr()
    assert stacks["layers.0.attention.qkv.weight"].data_ptr() != built.layers[0].attention.qkv.weight.data_ptr()
    assert engine.figures() == {
        "weights": "fp32",
        "head": "fp32",
        "weight_bytes": 4 * (2 * (64 * 3 * 64 + 64 * 64 + 4 * 3 * 64 * 32) + 264 * 64),
        "rows": "selected",
    }


def test_rounded_weights_are_folded_beneath_it_without_effect():
    built = model(sparsity={"default": 0.5, "quantization": {"weights": "ternary"}})
    engine = GatherDecode(built)
    before = logits_of(engine, built, torch.float32)
    fold_rounding(built)
    assert torch.equal(logits_of(engine, built, torch.float32), before)


def test_lists_hold_what_is_not_zero_and_their_padding_has_no_effect():
    rows_LD = torch.tensor([[0.0, 2.0, 0.0, torch.nan], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -3.0, 0.0]])
    lists = list_features_gather(rows_LD, 4)
    assert lists.lengths_L.tolist() == [2, 0, 2] and lists.features_LM.shape == (3, 8)
    assert lists.features_LM[:, :2].tolist() == [[1, 3], [0, 0], [0, 2]]
    assert lists.values_LM[2].tolist() == [1, -3, 0, 0, 0, 0, 0, 0] and lists.values_LM[0, 1].isnan()
    every = list_features_gather(rows_LD, 4, with_zeros=True)
    assert every.lengths_L.tolist() == [4, 4, 4] and every.features_LM[1, :4].tolist() == [0, 1, 2, 3]
    assert list_features_gather(torch.zeros(2, 4), 4).values_LM.tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("num_lists", [1, 3])
def test_products_are_those_of_dense_rows(num_lists):
    draw = torch.Generator().manual_seed(0)
    stacks = tuple(torch.randn(4, 20, 6, generator=draw) for _ in range(2))
    rows_LD = torch.randn(num_lists, 20, generator=draw) * (torch.rand(num_lists, 20, generator=draw) < 0.4)
    lists, matrices = list_features_gather(rows_LD, 20), GatheredMatrices(stacks)
    expert_N = torch.randint(0, 4, (2 * num_lists,), generator=draw)
    found = listed_product_gather(matrices, lists, matrix_P=torch.cat((expert_N, expert_N + 4)), products_per_list=2)
    rows_ND = rows_LD.repeat_interleave(2, 0)
    expected = torch.cat([torch.einsum("nd,ndo->no", rows_ND, stack[expert_N]) for stack in stacks])
    torch.testing.assert_close(found, expected)
    factors_N = torch.rand(2 * num_lists, generator=draw)
    summed = listed_product_gather(
        GatheredMatrices(stacks[:1]),
        lists,
        matrix_P=expert_N,
        products_per_list=2,
        factors_P=factors_N,
        products_per_sum=2,
    )
    expected = (expected[: 2 * num_lists] * factors_N[:, None]).view(num_lists, 2, 6).sum(1)
    torch.testing.assert_close(summed, expected)


def test_what_it_cannot_run_is_said_with_the_way_out():
    for built, reason in (
        (model(torch.float64), "the model is in torch.float64; use the engine torch"),
        (model(moe={"force_uniform_routing": True}), "force_uniform_routing is a setting for measurements"),
        (model().to("meta"), "the device is meta; use the engine torch"),
    ):
        assert reason in why_not(built)
    with pytest.raises(BackendUnavailable, match=r"engine \('gather'\) cannot run here: .*torch.float64"):
        resolve_engine("gather", model(torch.float64))


def refuse_to_compile(monkeypatch):
    def load(library=None):
        raise BackendUnavailable("compiling decode_model.cpp into /cache (TORCH_EXTENSIONS_DIR) failed: read-only")

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(native, "why_not", lambda device: None)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.5, "gather"), (0.1, "torch"), (0.0, "torch")])
def test_auto_goes_on_out_loud_where_the_native_engine_cannot_be_compiled(monkeypatch, caplog, sparsity, expected):
    built = model(sparsity={"default": sparsity})
    refuse_to_compile(monkeypatch)
    with caplog.at_level("INFO"):
        assert resolve_engine("auto", built).name == expected
    assert "engine=auto: native cannot be built (compiling decode_model.cpp into /cache" in caplog.text
    assert f"engine=auto: using {expected}; not native: compiling" in caplog.text
    assert ("it is faster than the engine torch from a mean S of 0.2 on" in caplog.text) == (expected == "torch")
    with pytest.raises(BackendUnavailable, match=r"\(TORCH_EXTENSIONS_DIR\) failed"):
        resolve_engine("native", built)
    assert resolve_engine("gather", built).name == "gather"


def test_auto_takes_it_for_a_model_whose_selection_is_relu_whatever_its_plan_says(monkeypatch):
    built = model(sparsity={"selection": "relu", "gradient": "masked"})
    refuse_to_compile(monkeypatch)
    assert resolve_engine("auto", built).name == "gather"


def test_a_model_is_built_with_selections_of_stock_pytorch_where_nothing_can_be_compiled(monkeypatch, caplog):
    refuse_to_compile(monkeypatch)
    # The tests could run Triton's interpreter.
    without_triton = tuple(spec for spec in runtime.TOPK_SELECTS if spec.name != "triton")
    monkeypatch.setattr(runtime, "TOPK_SELECTS", without_triton)
    built = model(sparsity={"default": 0.5, "backend": "auto"})
    assert built.runtime.names["model.sparsity.backend"] == "torch"
    assert "model.sparsity.backend=auto: native cannot be built (compiling" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"\(TORCH_EXTENSIONS_DIR\) failed"):
        model(sparsity={"default": 0.5, "backend": "native"})
