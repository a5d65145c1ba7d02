"""The native engine computes what the training model's own parts compute, for every kind of model and number format."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.inference import native as native_engine
from qsparse_moe.inference import row_costs
from qsparse_moe.inference.engine import EngineSettings, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.native import NativeDecode, why_not
from qsparse_moe.inference.weights import (
    check_weights,
    fold_rounding,
    head_format,
    own_format,
    round_weights,
    site_matrices,
)
from qsparse_moe.kernels import native
from tests.inference.models import all_at_once, difference_from_torch, model, plan_per_expert, random_tokens
from tests.inference.test_cached_model import DENSE, SPARSE

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)
STEPS = 10


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def largest_difference(built, weight_format=None, prompts=(4, 2, 7), capacity=9, by_integers=True):
    engine = NativeDecode(built, weight_format, by_integers=by_integers)
    return difference_from_torch(built, engine, prompts, capacity=capacity, steps=STEPS)


@pytest.mark.parametrize("settings", (DENSE | SPARSE).values(), ids=(DENSE | SPARSE).keys())
def test_native_logits_are_those_of_the_training_model(settings):
    assert largest_difference(model(**settings)) < 1e-5


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk_renormalized"])
def test_biases_groups_and_the_scaling_factor_of_a_router_are_applied(router):
    moe = {"num_experts": 8, "num_expert_groups": 4, "groups_per_token": 2, "group_score": "top2_sum"}
    built = model(moe={**moe, "router": router, "router_scaling_factor": 2.5, "bias_update_rate": 0.1})
    for block in built.blocks():
        block.moe.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8).roll(3))
    assert largest_difference(built) < 1e-5


def test_activations_in_four_bits_are_those_of_the_training_model():
    built = model(sparsity={"default": 0.5, "quantization": {"activations": "int4"}})
    assert largest_difference(built) < 1e-5


def test_a_statistical_threshold_far_from_the_mean_is_that_of_the_training_model():
    # At an S of 0.5 the threshold is near the mean magnitude, whatever the standard deviation is.
    built = model(sparsity={"default": 0.9, "selection": "statistical"})
    assert largest_difference(built, prompts=range(1, 9), capacity=20) < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 17])
def test_a_batch_reads_every_row_that_some_token_needs_once(batch):
    # With a gate, so that every token has another share of the shared experts.
    built = model(sparsity={"default": 0.5}, moe={"num_shared_experts": 1, "shared_expert_gate": True})
    assert largest_difference(built, prompts=tuple(range(1, batch + 1))[::-1], capacity=20) < 1e-5


@pytest.mark.parametrize("selection", ["topk", "block", "threshold"])
def test_experts_with_their_own_s_select_separately(selection):
    built = model(sparsity={"selection": selection, "group_size": 8})
    built.set_sparsity(plan_per_expert(built, selection))
    assert largest_difference(built) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"sparsity": {"default": 0.6}}, {"hidden_size": 72, "num_heads": 2}])
@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8"])
def test_weights_in_a_number_format_are_those_of_the_rounded_model(settings, weight_format):
    built = model(**settings)
    if weight_format == "bf16":
        built = built.bfloat16().float()
    before = built.layers[0].attention.qkv.weight.clone()
    round_weights(built, weight_format)
    assert torch.equal(before, built.layers[0].attention.qkv.weight) == (weight_format != "int8")
    assert largest_difference(built, weight_format, by_integers=False) < 1e-5


@pytest.mark.parametrize("prompts", [(5,), (4, 2, 7), (1, 2, 3, 4, 5, 6, 7, 8)], ids=["1", "3", "8"])
def test_products_by_integers_move_logits_far_less_than_int8_weights_do(prompts):
    built, rounded = model(hidden_size=128), model(hidden_size=128)
    round_weights(rounded, "int8")
    settings = {"prompts": prompts, "capacity": 9, "steps": 1}
    moved = difference_from_torch(built, NativeDecode(rounded, "int8", by_integers=False), **settings)
    assert difference_from_torch(rounded, NativeDecode(rounded, "int8"), **settings) < moved / 30


@pytest.mark.parametrize(
    ("batch", "activations", "rescale"),
    [
        *((batch, activations, "none") for batch in (1, 3, 8) for activations in ("int8", "int4")),
        # A rescale moves the step of the codes along with the values.
        (1, "int8", "unit"),
        (3, "int4", "preserve"),
    ],
)
def test_ternary_products_by_integers_are_exact_where_activations_have_codes(batch, activations, rescale):
    quantization = {"weights": "ternary", "activations": activations}
    sparsity = {"default": 0.5, "quantization": quantization, "rescale": rescale}
    settings = {"sparsity": sparsity, "moe": {"num_shared_experts": 1}}
    found = [largest_difference(model(**settings, seed=seed), prompts=range(1, batch + 1)) for seed in (3, 4, 5)]
    # The median of three models: an activation halfway between two codes is rounded to the other one in some of them,
    # by products in fp32 as well.
    assert sorted(found)[1] < 1e-5, found


def test_ternary_products_by_integers_round_other_activations_to_15_bits():
    built = model(sparsity={"quantization": {"weights": "ternary"}})
    assert largest_difference(built, by_integers=False) < 1e-5
    assert largest_difference(built) < 2e-3


@pytest.mark.parametrize("activation", ["relu2glu", "reglu", "drelu"])
@pytest.mark.parametrize("weight_format", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["experts", "shared experts", "dense layer"])
def test_up_only_where_the_gate_is_positive_changes_no_logit(part, weight_format, activation):
    moe = {"shared experts": {"num_shared_experts": 1}, "dense layer": {"num_dense_layers": 1}}.get(part, {})
    built = model(moe={"activation": activation, **moe}, sparsity={"default": 0.4}).bfloat16().float()
    for batch in (1, 3, 17):
        difference = [
            difference_from_torch(
                built,
                NativeDecode(built, weight_format, gate_first=gate_first),
                range(1, batch + 1),
                capacity=20,
                steps=3,
            )
            for gate_first in (True, False)
        ]
        assert max(difference) < 1e-5, (batch, difference)


def test_bytes_of_up_are_those_of_the_positive_gates():
    built = model(num_layers=1, moe={"activation": "relu2glu", "num_experts": 2, "experts_per_token": 1})
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    gates, activation = [], built.layers[0].moe.experts.activation

    def observed(gate_NF, *arguments, **settings):
        gates.append(gate_NF)
        return activation(gate_NF, *arguments, **settings)

    built.layers[0].moe.experts.activation = observed
    all_at_once(built, torch.tensor([[7]]))
    built.layers[0].moe.experts.activation = activation
    positive = int((gates[0] > 0).sum())
    assert 0 < positive < 32 == gates[0].numel()
    read, hidden = {}, 0
    for gate_first in (True, False):
        cache.positions_B.zero_()
        engine = NativeDecode(built, "fp32", gate_first=gate_first)
        engine.decode(torch.tensor([7]), cache)
        read[gate_first] = engine.bytes_read
        hidden = engine.figures()["bytes_read_without_zeros"]
    # Up is (32, 64) output-major, and (64, 32) input-major, where no input feature is 0; down skips the zeros in both.
    assert read[False] - read[True] == 4 * 64 * (32 - positive)
    assert hidden - read[False] == 4 * 64 * (32 - positive)


def test_the_gate_comes_first_where_the_input_site_leaves_more_than_half():
    def names(sparsity=0.0, weight_format="fp32", **moe):
        built = model(moe=moe, sparsity={"default": sparsity})
        return NativeDecode(built, weight_format)._gate_first

    everywhere = {f"layers.{layer}.moe.{part}.w_up" for layer in (0, 1) for part in ("experts", "shared")}
    assert names(activation="relu2glu", num_shared_experts=1) == everywhere
    assert names(0.4, activation="reglu", num_dense_layers=1) == {"layers.0.dense.w_up", "layers.1.moe.experts.w_up"}
    assert names(0.6, activation="relu2glu") == names(activation="swiglu") == names(activation="relu2") == set()
    assert names(weight_format="int8", activation="relu2glu") == set()
    with pytest.raises(ValueError, match="gate_first needs an activation of drelu, reglu, relu2glu .* swiglu and fp32"):
        NativeDecode(model(moe={"activation": "swiglu"}), gate_first=True)


def test_int8_moves_no_weight_by_more_than_half_a_step():
    built, exact = model(), model()
    round_weights(built, "int8")
    for matrix, before in zip(site_matrices(built), site_matrices(exact), strict=True):
        rows, rows_before = ((one.parameter.T if one.is_output_major else one.parameter) for one in (matrix, before))
        step = rows_before.abs().amax(-1, keepdim=True) / 127
        moved = (rows - rows_before).abs()
        assert (moved <= 0.501 * step).all() and moved.any(), matrix.name


def test_bytes_that_a_step_reads_are_counted_by_hand():
    # One token, S 0.75 everywhere, no activation of zero: a quarter of the rows of every matrix, and the whole head.
    built = model(sparsity={"default": 0.75}, moe={"activation": "swiglu", "experts_per_token": 2})
    engine = NativeDecode(built, "fp32")
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    engine.decode(torch.tensor([7]), cache)
    figures = engine.figures()
    rows_of_layer = 64 * 3 * 64 + 64 * 64 + 2 * (2 * 64 * 32 + 32 * 64)  # qkv, output, two experts
    head = built.head.weight.numel()
    assert figures["bytes_read_without_zeros"] == 4 * (2 * rows_of_layer + head)
    assert figures["bytes_read"] == 4 * (2 * rows_of_layer // 4 + head)
    assert (figures["rows"], figures["passes"], figures["passes_over_all_rows"]) == ("selected", 2 * (2 + 2 * 3), 0)
    whole = NativeDecode(built, "fp32", rows="all")
    cache.positions_B.zero_()
    whole.decode(torch.tensor([7]), cache)
    assert whole.figures()["bytes_read"] == figures["bytes_read_without_zeros"]
    assert whole.figures()["passes_over_all_rows"] == whole.figures()["passes"] == figures["passes"]


@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_choice_of_rows_to_read_changes_no_logit(batch, weight_format, monkeypatch):
    built = model(sparsity={"default": 0.5})
    cache = KeyValueCache.allocate(built.config, batch=batch, capacity=4, dtype=torch.float32)
    tokens_B = torch.tensor([3, 1, 200])[:batch]
    # More than half of the rows are needed by no single token, and by some passes of three.
    monkeypatch.setattr(native_engine, "shares_to_read_all", lambda weight_format: [0.5, 0.6, 0.6, 0.6])
    found, passes = {}, {}
    for rows in ("selected", "all", "auto"):
        # In fp32: products by integers would round the features in other groups of rows.
        engine = NativeDecode(built, weight_format, rows=rows, by_integers=False)
        cache.positions_B.zero_()
        found[rows] = engine.decode(tokens_B, cache)
        passes[rows] = engine.figures()["passes_over_all_rows"]
    torch.testing.assert_close(found["selected"], found["all"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["selected"], found["auto"], rtol=1e-5, atol=1e-5)
    assert passes["selected"] == 0 < passes["auto"] <= passes["all"]


def test_whole_matrices_are_read_where_reading_selected_rows_is_slower():
    def seconds(stored, rows_K, num_tokens):
        share = len(rows_K) / 1024
        # One token: choosing costs nothing. Two: a little more. Four: slower at 0.7 by accident, and never above.
        return {1: share, 2: share + 0.07 * (share < 1), 4: 2.0 if 0.69 < share < 0.71 else share, 8: 1.5 - share / 2}[
            num_tokens
        ]

    assert row_costs.measure_shares("ternary", seconds) == [row_costs.NEVER, 0.95, row_costs.NEVER, 0.6]


def test_the_table_of_costs_is_measured_once_and_cached(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(row_costs, "measure_shares", lambda name: measured.append(name) or [0.9, 0.8, 2.0, 0.7])
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert row_costs.shares_to_read_all("bf16") == [0.9, 0.8, 2.0, 0.7]
    assert measured == ["bf16"] and caplog.text.count("measuring when to read whole matrices in bf16") == 1
    row_costs.costs_file().write_text("half a file")
    row_costs.shares_to_read_all("int8"), row_costs.shares_to_read_all("int8")
    assert measured == ["bf16", "int8"]
    torch.set_num_threads(torch.get_num_threads() + 1)
    row_costs.shares_to_read_all("int8")
    assert measured[2:] == ["int8"], "another number of threads has another table"


def test_the_read_bandwidth_is_that_of_the_fastest_round_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path))
    times = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0, 30.0, 35.0])
    monkeypatch.setattr(row_costs.time, "perf_counter", lambda: next(times))
    assert row_costs.measure_read_bandwidth(4096, repeats=3) == 4096 / 2.0  # 1 s warms up; then 4, 2 and 5
    monkeypatch.setattr(row_costs, "measure_read_bandwidth", lambda: 5e9)
    row_costs.known_read_bandwidth()
    monkeypatch.undo()
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(row_costs, "measure_read_bandwidth", lambda: 1.0)
    assert row_costs.known_read_bandwidth() == 5e9


def test_ternary_weights_take_two_bits_each():
    built = model(sparsity={"quantization": {"weights": "ternary"}}, hidden_size=256, moe={"expert_hidden_size": 256})
    assert own_format(built) == "ternary" and head_format(built, "ternary") == "fp32"
    layer = (256 * 768 + 256 * 256 + 4 * 3 * 256 * 256) // 4  # bytes, without the scales
    scales = 4 * (2 + 4 * 3)
    assert NativeDecode(built).figures()["weight_bytes"] == 2 * (layer + scales) + built.head.weight.numel() * 4


def test_folding_the_rounding_changes_no_logit_and_is_done_once():
    built = model(sparsity={"default": 0.5, "quantization": {"weights": "ternary"}}, moe={"num_shared_experts": 1})
    tokens_BS = random_tokens(2, 6)
    before = all_at_once(built, tokens_BS)
    fold_rounding(built)
    assert torch.equal(all_at_once(built, tokens_BS), before)
    assert len(built.layers[0].moe.experts.w_up[0].unique()) == 3
    fold_rounding(built)
    assert torch.equal(all_at_once(built, tokens_BS), before)


@pytest.mark.parametrize("token", [-1, 264])
def test_an_id_outside_the_vocabulary_is_refused(token):
    built = model()
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"the id {token} must be from 0 to 263"):
        NativeDecode(built).decode(torch.tensor([token]), cache)


def test_ids_that_the_model_hides_have_no_probability():
    built = model()
    built.hide_ids([260, 261])
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    logits_BV = NativeDecode(built).decode(torch.tensor([7]), cache)
    assert logits_BV[0, 260:262].isneginf().all() and logits_BV.isfinite().sum() == logits_BV.numel() - 2


def test_a_full_cache_is_refused_before_a_step():
    built = model()
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=1, dtype=torch.float32)
    engine = NativeDecode(built)
    engine.decode(torch.tensor([7]), cache)
    with pytest.raises(ConfigError, match=r"holds 1 tokens per sequence, and a sequence has 2.*max_length"):
        engine.decode(torch.tensor([7]), cache)


def test_unsupported_models_are_refused_with_the_way_out():
    for built, reason in (
        (model(torch.float64), "the model is in torch.float64; use the engine torch"),
        (model(moe={"force_uniform_routing": True}), "force_uniform_routing is a setting for measurements"),
    ):
        assert reason in why_not(built)
        with pytest.raises(BackendUnavailable, match="engine \\('native'\\) cannot run here"):
            resolve_engine("native", built)
        assert resolve_engine("auto", built).name == "torch"


@pytest.mark.parametrize(
    ("weights", "trained", "message"),
    [
        ("int4", "none", r"weights \('int4'\) must be one of auto, fp32, bf16, int8, ternary"),
        ("ternary", "none", r"weights \(ternary\) .*quantization.weights=ternary, .* trained with none.* Use int8"),
        ("int8", "ternary", r"weights \(int8\) .* Use ternary"),
    ],
)
def test_a_number_format_that_does_not_fit_is_refused(weights, trained, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(weights, trained)
    for fits in ("auto", "fp32", "bf16", "ternary" if trained == "ternary" else "int8"):
        check_weights(fits, trained)


def test_rows_cannot_be_selected_with_an_engine_that_reads_them_all():
    with pytest.raises(ConfigError, match=r"rows \('selected'\) must be all or auto with the engine torch"):
        resolve_engine("torch", model(), settings=EngineSettings(rows="selected"))
