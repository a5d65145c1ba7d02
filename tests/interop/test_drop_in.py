"""Q-Sparse in a model of transformers through its life: S changes, copies, files, generation, peft, and a trainer."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch

from qsparse_moe.errors import ConfigError, DataError
from qsparse_moe.interop.drop_in.calibration import calibrate
from qsparse_moe.interop.drop_in.model import current_plan, densify, set_sparsity, sites_of, sparsify
from qsparse_moe.interop.drop_in.zeros import measure_zeros
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.interop.drop_in_models import MODELS, build, reference, tokens, uniform_plan, varied_plan
from tests.interop.test_hugging_face import relative

transformers = pytest.importorskip("transformers")
MIXTRAL_SITES = ("attention_input", "attention_output", "expert_input", "expert_hidden")


@pytest.fixture(scope="module")
def built():
    return build("mixtral")


@pytest.fixture
def model(built):
    yield built
    if sites_of(built):
        densify(built)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_s_is_given_as_a_number_by_site_as_a_plan_and_as_a_file(model, tmp_path):
    varied = varied_plan(model)
    varied.save(tmp_path / "plan.json")
    by_site = {"expert_input": 0.25, "attention_output": 0.75}
    wanted = {
        "number": (0.5, None, dict.fromkeys(MIXTRAL_SITES, 0.5)),
        "by site": (by_site, None, {site: by_site.get(site, 0.0) for site in MIXTRAL_SITES}),
        "some sites": (0.5, ["expert_hidden"], {site: 0.5 * (site == "expert_hidden") for site in MIXTRAL_SITES}),
    }
    for given, sites, want in wanted.values():
        plan = sparsify(model, given, sites=sites)
        assert {place: set(values) for place, values in plan.values.items()} == {
            (layer, site): {value} for layer in range(2) for site, value in want.items()
        }
        densify(model)
    assert sparsify(model, tmp_path / "plan.json") == varied == current_plan(model)
    other = tmp_path / "other.json"
    SparsityPlan({(9, "expert_input"): (0.5,)}).save(other)
    with pytest.raises(ConfigError, match=rf"^{other}: sparsity plan: layer 0, .* has 0 values, but the model needs"):
        set_sparsity(model, other)
    densify(model)
    narrowed = sparsify(model, varied, sites=["expert_input"])
    assert narrowed.values[1, "expert_input"] == varied.values[1, "expert_input"]
    assert {site for (_, site), values in narrowed.values.items() if any(values)} == {"expert_input"}


def test_measured_zeros_are_those_of_the_plan_per_layer_site_and_expert(model):
    plan = varied_plan(model)
    sparsify(model, plan)
    before = logits(model)
    with measure_zeros(model) as zeros:
        assert relative(logits(model), before) < 1e-6
        logits(model)
    widths = {"attention_input": 48, "attention_output": 48, "expert_input": 48, "expert_hidden": 24}
    for (layer, site), values in plan.values.items():
        # round gives K, so the measured share differs from S by half a feature at most.
        for found, wanted in zip(zeros.by_expert(layer, site), values, strict=True):
            assert found == pytest.approx(1 - round((1 - wanted) * widths[site]) / widths[site])
    assert zeros.by_site()["attention_input"] == pytest.approx(
        sum(zeros.by_layer()[layer, "attention_input"] for layer in range(2)) / 2
    )
    set_sparsity(model, 0.0)
    with measure_zeros(model) as zeros:
        logits(model)
    assert max(zeros.by_site().values()) < 0.01
    densify(model)
    with pytest.raises(ConfigError, match="measure_zeros: MixtralForCausalLM is not sparse"), measure_zeros(model):
        pass


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "llama"])
def test_generation_with_a_cache_computes_what_a_whole_pass_computes(name):
    model = build(name)
    sparsify(model, varied_plan(model))
    prompt = tokens(rows=1, length=7)
    found = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    whole = model(found.sequences).logits[0, 6:-1]
    assert relative(torch.cat(found.scores), whole) < 1e-5
    two = model.generate(tokens(), attention_mask=torch.ones(2, 11), max_new_tokens=3, do_sample=False)
    assert two.shape == (2, 14)


def test_a_copy_and_a_pickle_are_sparse_and_independent(model):
    sparsify(model, varied_plan(model))
    sparse = logits(model)
    unpickled = pickle.load(io.BytesIO(pickle.dumps(model)))
    copied = copy.deepcopy(model)
    for other in (copied, unpickled):
        assert torch.equal(logits(other), sparse)
        set_sparsity(other, 0.9)
        assert relative(logits(other), sparse) > 0.01 and torch.equal(logits(model), sparse)
        densify(other)
        assert torch.equal(logits(model), sparse)


def test_models_that_share_a_configuration_are_sparse_one_by_one(model):
    other = transformers.MixtralForCausalLM(model.config).eval()
    dense = logits(other)
    sparsify(model, 0.5)
    assert torch.equal(logits(other), dense)
    sparsify(other, 0.75)
    densify(model)
    assert current_plan(other).mean == 0.75 and not torch.equal(logits(other), dense)
    densify(other)
    assert torch.equal(logits(other), dense)


def test_no_implementation_of_transformers_turns_the_sites_off(model):
    sparsify(model, 0.5)
    sparse, before = logits(model), model.config._experts_implementation
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert torch.equal(logits(model), sparse)
    model.set_experts_implementation(before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("selection", ["topk", "block", "threshold"])
def test_a_saved_model_contains_its_plan_and_one_call_restores_it(name, selection, tmp_path):
    model = build(name)
    plan = varied_plan(model) if selection != "threshold" else calibrate(model, [tokens()], varied_plan(model))
    sparsify(model, plan, selection=selection, group_size=8, rescale="unit", gradient="masked")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not sites_of(loaded)
    assert sparsify(loaded) == plan
    settings = next(iter(sites_of(loaded).values())).settings
    assert (settings.selection, settings.group_size, settings.rescale) == (selection, 8, "unit")
    assert settings.gradient == "masked"
    assert torch.equal(logits(loaded), logits(model))
    densify(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="contains no plan"):
        sparsify(type(model).from_pretrained(tmp_path / "dense"))


def test_gradient_checkpointing_changes_no_bit(model):
    sparsify(model, varied_plan(model), gradient="masked")
    found = []
    model.train()
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad(set_to_none=True)
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


def test_in_bf16_and_under_autocast_the_error_is_that_of_the_definition():
    model = build("mixtral")
    low = copy.deepcopy(model).to(torch.bfloat16)

    def found(run_sparse):
        """The logits in fp32, under autocast, and in bf16."""
        with run_sparse(model), run_sparse(low):
            exact = logits(model)
            with torch.autocast("cpu", torch.bfloat16):
                return exact, logits(model), logits(low)

    @contextlib.contextmanager
    def dropped_in(either):
        sparsify(either, uniform_plan(model))
        yield
        densify(either)

    ours, definition = found(dropped_in), found(lambda either: reference(either, uniform_plan(model), "ste"))
    assert relative(ours[0], definition[0]) < 2e-6 and ours[2].dtype == torch.bfloat16
    for rounded, slow in zip(ours[1:], definition[1:], strict=True):
        # The mean, because a rounding can change which features of a token are selected.
        errors = [(either.float() - ours[0]).abs().mean() for either in (rounded, slow)]
        assert 0 < errors[0] < 1.5 * errors[1]
    sparsify(model, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("order", ["sparse first", "peft first"])
def test_lora_matrices_read_the_sparse_rows_too(order):
    peft = pytest.importorskip("peft")
    model = build("mixtral")
    plan, target = uniform_plan(model), ["q_proj", "o_proj"]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(target_modules=target, target_parameters=parameters, r=4, init_lora_weights=False)
    expected = copy.deepcopy(model)
    if order == "sparse first":
        sparsify(model, plan)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, lora)
    if order == "peft first":
        sparsify(wrapped, plan)
    wrapped.eval()
    found = logits(wrapped)
    loss = wrapped(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in wrapped.named_parameters() if "lora_" in n)
    densify(wrapped)
    assert not sites_of(wrapped) and relative(logits(wrapped), found) > 0.01
    # Merged into the weights of the dense model, the adapters become part of the matrices that read sparse rows.
    merged = wrapped.merge_and_unload()
    expected.load_state_dict(merged.state_dict())
    with reference(expected, plan, "ste"):
        assert relative(found, logits(expected)) < 1e-5


def test_a_trainer_raises_s_along_the_schedule(model, tmp_path):
    from qsparse_moe.interop.drop_in.trainer import SparsitySchedule

    seen = []

    class Recorder(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(current_plan(model).mean)

    target = varied_plan(model)
    sparsify(model, target)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-4,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=4)]
    schedule = SparsitySchedule(warmup_steps=1, ramp_steps=4)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[schedule, Recorder()])
    trainer.train()
    model.eval()
    assert seen == pytest.approx([0.0, 0.0, target.mean / 4, target.mean / 2, 3 * target.mean / 4, target.mean])
    assert current_plan(model) == target
    with pytest.raises(ConfigError, match=r"SparsitySchedule: ramp_steps \(-1\) is not valid: .*greater"):
        SparsitySchedule(ramp_steps=-1)


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_thresholds_give_the_requested_zeros_and_leave_the_model_dense(name):
    model = build(name)
    before = logits(model)
    batches = [{"input_ids": tokens(8, 32, seed=seed), "attention_mask": torch.ones(8, 32)} for seed in (1, 2)]
    plan = calibrate(model, batches, 0.6)
    assert torch.equal(logits(model), before) and not sites_of(model)
    sparsify(model, plan, selection="threshold")
    with torch.no_grad(), measure_zeros(model) as zeros:
        for batch in batches:
            model(batch["input_ids"])
    assert all(share == pytest.approx(0.6, abs=0.05) for share in zeros.by_layer().values())
    # Calibrated again in place, its own S is used, and its own plan stays.
    assert calibrate(model, batches).thresholds == plan.thresholds and current_plan(model) == plan


def test_calibration_refuses_what_would_give_wrong_thresholds(model):
    padded = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 11, [0] * 3 + [1] * 8])}
    cases = {
        "attention_mask contains 0": (DataError, [padded], 0.5),
        "there is no batch": (DataError, [], 0.5),
        "the model is dense, so sparsity must be given": (ConfigError, [tokens()], None),
        "S is 0 at every site": (ConfigError, [tokens()], 0.0),
    }
    for message, (kind, batches, sparsity) in cases.items():
        with pytest.raises(kind, match=message):
            calibrate(model, batches, sparsity)
        assert not sites_of(model)


def test_a_plan_without_thresholds_cannot_be_annealed_by_threshold(model):
    plan = calibrate(model, [tokens()], 0.5)
    sparsify(model, plan, selection="threshold")
    with pytest.raises(ConfigError, match=r"layer 0, attention_input has S above 0 and no threshold"):
        set_sparsity(model, plan.scaled(0.5))
    assert current_plan(model) == plan
    set_sparsity(model, SparsityPlan({place: (0.0,) * len(values) for place, values in plan.values.items()}))
