"""Which engine is chosen, what is said about the others, and the formats and messages of loading, without any model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import ArgumentError, BackendUnavailable, ConfigError
from qsparse_moe.inference import weights as weights_module
from qsparse_moe.inference.comparison import run as run_module
from qsparse_moe.inference.comparison.measure import Comparison
from qsparse_moe.inference.comparison.sides import Side, check_comparable
from qsparse_moe.inference.engine import ENGINES, EngineSettings, EngineSpec, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.load import _checked_plan
from qsparse_moe.inference.weights import LOADED_DTYPES, check_head, check_weights, own_format, why_not_stored
from qsparse_moe.sparsity.plan import SparsityPlan

MODEL = SimpleNamespace()


def spec(name, *, why_not=None, why_not_auto=None, fails=None):
    def build(model, settings):
        if fails is not None:
            raise BackendUnavailable(fails)
        return SimpleNamespace(name=name, model=model, settings=settings)

    return EngineSpec(name, lambda model: why_not, build, lambda model: why_not_auto)


def test_auto_takes_the_first_engine_that_runs_and_pays_and_a_name_any_that_runs(caplog):
    engines = (spec("a", why_not="no compiler"), spec("b", why_not_auto="slower here"), spec("c"), spec("d"))
    settings = EngineSettings("int8", "bf16", "all")
    with caplog.at_level("INFO"):
        found = resolve_engine("auto", MODEL, settings=settings, engines=engines)
    assert (found.name, found.model, found.settings) == ("c", MODEL, settings)
    assert "no compiler" in caplog.text and "slower here" in caplog.text
    assert resolve_engine("b", MODEL, engines=engines).name == "b"
    assert resolve_engine("d", MODEL, engines=engines).settings == EngineSettings(None, None, "auto")
    with pytest.raises(BackendUnavailable, match="no compiler"):
        resolve_engine("a", MODEL, engines=engines)
    with pytest.raises(BackendUnavailable) as caught:
        resolve_engine("e", MODEL, engines=engines)
    assert str(caught.value) == "engine ('e') must be one of auto, a, b, c, d; choose one of them"


def test_auto_goes_on_from_each_engine_that_cannot_be_built_and_a_requested_one_is_an_error(caplog):
    engines = (spec("a", fails="compiler failed"), spec("b", fails="disk full"), spec("c"))
    assert resolve_engine("auto", MODEL, engines=engines).name == "c"
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warnings == [
        "engine=auto: a cannot be built (compiler failed); trying the next engine",
        "engine=auto: b cannot be built (disk full); trying the next engine",
    ]
    with pytest.raises(BackendUnavailable, match="^disk full$"):
        resolve_engine("b", MODEL, engines=engines)
    with pytest.raises(BackendUnavailable, match="compiler failed.*disk full"):
        resolve_engine("auto", MODEL, engines=engines[:2])


def test_engines_are_tried_in_the_order_of_their_speed_and_a_gpu_one_after_the_one_that_runs_everywhere():
    assert [one.name for one in ENGINES] == ["native", "gather", "torch", "triton"]


@pytest.mark.parametrize(
    ("positions", "new", "needed"), [([3, 5], [1, 1], 6), ([5, 0], [0, 6], 6), ([0, 2], [9, 1], 9)]
)
def test_a_cache_without_a_slot_says_how_many_a_sequence_needs(positions, new, needed):
    def cache(slides):
        empty = torch.zeros(1, 2, 1, 5, 4)
        made = KeyValueCache(empty, empty, slides=slides)
        made.positions_B = torch.tensor(positions)
        return made

    with pytest.raises(ConfigError) as caught:
        cache(False).check_space(torch.tensor(new))
    assert str(caught.value) == (
        f"the key-value cache holds 5 tokens per sequence, and a sequence has {needed}; make the cache larger with "
        "max_length, or let it slide"
    )
    cache(True).check_space(torch.tensor(new))


def test_a_cache_has_the_sizes_of_the_model_and_of_its_latents():
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    plain = KeyValueCache.allocate(ModelConfig.model_validate(sizes), batch=5, capacity=7, dtype=torch.bfloat16)
    assert plain.key_LBHPC.shape == plain.value_LBHPC.shape == (3, 5, 2, 7, 16)
    assert (plain.batch, plain.capacity, plain.num_bytes) == (5, 7, 2 * 3 * 5 * 2 * 7 * 16 * 2)
    assert plain.key_LBHPC.dtype == torch.bfloat16 and not plain.slides and not plain.key_LBHPC.any()
    assert plain.positions_B.tolist() == [0] * 5 and plain.positions_B.dtype == torch.int64


@pytest.mark.parametrize(
    ("weights", "trained", "message"),
    [
        ("int4", "none", " ('int4') must be one of auto, fp32, bf16, int8, ternary; choose one of them"),
        ("ternary", "none", "this one was trained with none: rounding would leave little of it. Use int8"),
        ("ternary", "int8", "this one was trained with int8: rounding"),
        ("int8", "ternary", " (int8) must be those of a model that was not trained in ternary numbers"),
    ],
)
def test_a_format_that_does_not_fit_the_training_is_refused(weights, trained, message):
    with pytest.raises(ArgumentError) as caught:
        check_weights(weights, trained)
    assert message in str(caught.value)
    for fine in (("auto", "none"), ("auto", "ternary"), ("int8", "none"), ("ternary", "ternary"), ("bf16", "ternary")):
        check_weights(*fine)


def test_a_head_is_not_wider_than_the_model_and_never_ternary():
    with pytest.raises(ArgumentError, match=r"\('ternary'\) must be one of auto, fp32, bf16, int8; choose one"):
        check_head("ternary")
    with pytest.raises(ArgumentError, match=r"\(fp32\) must be auto, bf16, or int8 where the model itself is in bf16"):
        check_head("fp32", torch.bfloat16)
    for head, dtype in (("fp32", torch.float32), ("fp32", None), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)):
        check_head(head, dtype)
    assert [LOADED_DTYPES[name] for name in ("fp32", "bf16", "int8")] == [torch.float32, torch.bfloat16, torch.float32]


def of_dtype(dtype, weights="none"):
    quantization = SimpleNamespace(weights=weights)
    config = SimpleNamespace(sparsity=SimpleNamespace(quantization=quantization))
    return SimpleNamespace(head=SimpleNamespace(weight=torch.zeros(1, dtype=dtype)), config=config)


def test_the_own_format_is_ternary_before_the_dtype_and_only_two_dtypes_can_be_stored():
    assert [own_format(of_dtype(dtype)) for dtype in (torch.float32, torch.bfloat16)] == ["fp32", "bf16"]
    assert own_format(of_dtype(torch.bfloat16, "ternary")) == "ternary"
    assert [why_not_stored(of_dtype(dtype)) for dtype in (torch.float32, torch.bfloat16)] == [None, None]
    assert why_not_stored(of_dtype(torch.float16)) == (
        "its weights come from fp32 or bf16, and the model is in torch.float16; use the engine torch"
    )
    assert weights_module.head_format(of_dtype(torch.bfloat16), "int8") == "int8"


def test_a_plan_replaces_another_unless_the_selection_has_none(tmp_path):
    config = ModelConfig()
    plan = SparsityPlan.uniform(config, 0.25)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert _checked_plan(None, config) is None and _checked_plan(plan, config) is plan
    assert _checked_plan(str(tmp_path / "plan.json"), config) == _checked_plan(tmp_path / "plan.json", config) == plan
    relu = config.model_copy(update={"sparsity": config.sparsity.model_copy(update={"selection": "relu"})})
    assert _checked_plan(None, relu) is None
    with pytest.raises(ArgumentError, match="a plan has no effect on this model, because its model.sparsity.selection"):
        _checked_plan(plan, relu)
    with pytest.raises(ConfigError):
        _checked_plan(SparsityPlan.uniform(config.model_copy(update={"num_layers": 1}), 0.25), config)


def side(name, **changes):
    moe = ModelConfig().moe.model_copy(update={k: v for k, v in changes.items() if k in ("num_experts",)})
    rest = {key: value for key, value in changes.items() if key in ("hidden_size", "num_layers")}
    config = ModelConfig().model_copy(update={"vocab_size": 300, "moe": moe} | rest)
    run = SimpleNamespace(model=config)
    return Side(SimpleNamespace(config=run, tokenizer=SimpleNamespace(fingerprint="bytes")), None, name)


def test_all_differences_from_a_reference_are_named_with_both_values_the_reference_first():
    with pytest.raises(ConfigError) as caught:
        check_comparable(side("one", num_experts=4, hidden_size=32), side("other", num_experts=16, hidden_size=64))
    assert str(caught.value) == (
        "one cannot be the reference of other, because tokens, hidden states, and experts are compared one by one: "
        "model.hidden_size is 32 and 64; model.moe.num_experts is 4 and 16; name a reference of the same vocabulary "
        "and shapes"
    )
    check_comparable(side("one"), side("other"))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_prompts", -1, 0), ("prompt_tokens", 0, 1), ("new_tokens", 0, 1), ("batch_size", 0, 1)],
)
def test_numbers_of_a_comparison_have_a_least_value(monkeypatch, name, value, least):
    monkeypatch.setattr(run_module, "load_model", None)
    shown = {"num_prompts": "prompts"}.get(name, name)
    with pytest.raises(ArgumentError, match=rf"{shown}}}? \({value}\) must be at least {least}"):
        run_module.compare_folder("runs/x", **{name: value})


@pytest.mark.parametrize(("length", "half"), [(64, 32), (7, 3), (1, 1)])
def test_prompts_and_new_tokens_are_half_of_the_length_unless_given(monkeypatch, length, half):
    plan = SparsityPlan.uniform(ModelConfig(), 0.5)
    training = SimpleNamespace(evaluation_rows=9)
    config = SimpleNamespace(model=ModelConfig(), data=SimpleNamespace(sequence_length=length), training=training)
    loaded = SimpleNamespace(config=config, model=SimpleNamespace(sparsity_plan=plan), step=5, tokenizer=None)
    asked = {}

    def compare(other, own, batches, prompts, notify):
        asked.update(other=other, own=own, prompts=prompts)
        return Comparison(None, (), None)

    monkeypatch.setattr(run_module, "load_model", lambda folder, **_: loaded)
    monkeypatch.setattr(run_module, "held_out_batches", lambda loaded, **named: ([named["batch_size"]], 12))
    monkeypatch.setattr(run_module, "compare", compare)
    found = run_module.compare_folder("runs/x", num_prompts=3, batch_size=2, engine="gather", device="cpu")
    assert asked["prompts"] == (3, half, half, 2, "gather")
    assert asked["other"].plan.mean == 0.0 and asked["other"].loaded is loaded and asked["own"].plan is plan
    assert (found.step, found.sparsity, found.reference, found.reference_sparsity, found.num_sequences) == (
        *(5, 0.5, "dense", 0.0, 12),
    )
    run_module.compare_folder("runs/x", prompt_tokens=5, new_tokens=2, device="cpu")
    assert asked["prompts"] == (16, 5, 2, 8, "torch")


def test_a_reference_is_a_folder_a_plan_or_dense_and_relu_has_only_other_models(tmp_path):
    config = ModelConfig()
    relu = config.model_copy(update={"sparsity": config.sparsity.model_copy(update={"selection": "relu"})})

    def own(model):
        return Side(SimpleNamespace(config=SimpleNamespace(model=model)), None, "mine")

    with pytest.raises(
        ArgumentError, match=r"\(none.json\) must be dense, a plan file, or the folder of another model"
    ):
        run_module._reference("none.json", own(config), None)
    with pytest.raises(ArgumentError, match=r"\(dense\) changes nothing on mine: model.sparsity.selection is relu"):
        run_module._reference("dense", own(relu), None)
    plan = SparsityPlan.uniform(config, 0.75)
    (tmp_path / "p.json").write_text(plan.to_json())
    assert run_module._reference(tmp_path / "p.json", own(config), None).plan == plan
    loaded = SimpleNamespace(model=SimpleNamespace(sparsity_plan="its own"))
    found = run_module._reference(tmp_path, own(relu), lambda path: loaded)
    assert (found.plan, found.name, found.loaded) == ("its own", str(tmp_path), loaded)
