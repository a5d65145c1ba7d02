"""A folder that transformers saved comes back: as an export, and as the initial weights of a run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from qsparse_moe import Generator, train
from qsparse_moe.errors import CheckpointError
from qsparse_moe.inference.load import load_model
from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from qsparse_moe.interop.auto_model.config import QSparseMoEConfig
from qsparse_moe.interop.export_model import export_model
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.training.checkpoint.store import list_checkpoints
from tests.interop.auto_models import MODELS, build, random_ids, threshold_plan
from tests.support.runs import tiny_config, write_text


def saved(model, folder, **options):
    QSparseMoEForCausalLM.of(model, max_position_embeddings=64).save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def logits(model):
    return model(random_ids(), with_stats=False).logits_BSV


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_folder_computes_the_same(name, tmp_path):
    model = build(name, vocab_size=264)
    folder = saved(model, tmp_path / "saved", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    import_model(folder, tmp_path / "imported", tokenizer="bytes")
    config, imported, step = load_export(tmp_path / "imported")
    assert torch.equal(logits(imported), logits(model))
    assert (step, config.data.sequence_length) == (0, 64)
    assert imported.sparsity_plan == model.sparsity_plan


def test_a_plan_set_in_transformers_travels_with_number_formats_and_without_a_schedule(tmp_path):
    schedule = {"shape": "linear", "warmup_steps": 4, "ramp_steps": 4}
    model = build("sparse", vocab_size=264, sparsity={"default": None, "preset": "a4.8", "schedule": schedule})
    wrapped = QSparseMoEForCausalLM.of(model)
    plan = model.sparsity_plan.with_(sparsity=0.25, site="expert_hidden", experts=[0])
    wrapped.set_sparsity(plan)
    wrapped.save_pretrained(tmp_path / "saved")
    import_model(tmp_path / "saved", tmp_path / "imported", tokenizer="bytes")
    # Wherever the export is moved to.
    shutil.move(tmp_path / "imported", tmp_path / "moved")
    loaded = load_model(tmp_path / "moved")
    assert loaded.model.sparsity_plan == plan
    wanted = logits(wrapped.model)
    assert torch.equal(logits(loaded.model)[..., :257], wanted[..., :257])
    assert open_weights(str(tmp_path / "moved")).model.sparsity.plan == str(tmp_path / "moved" / "plan.json")


def test_a_run_can_start_from_it(tmp_path):
    model = build("sparse")
    weights = open_weights(str(saved(model, tmp_path / "saved")))
    assert type(weights) is HuggingFaceWeights
    assert weights.model == model.config
    state = model.state_dict()
    assert set(weights.shapes) == set(state)
    assert all(torch.equal(weights.tensor(name), value) for name, value in state.items())


def test_bf16_weights_keep_the_router_biases(tmp_path):
    model = build("sparse", vocab_size=264)
    import_model(saved(model, tmp_path / "saved"), tmp_path / "imported", tokenizer="bytes", dtype="bf16")
    imported = load_export(tmp_path / "imported")[1]
    assert imported.head.weight.dtype == torch.bfloat16
    assert torch.equal(imported.routers()[0].expert_bias, model.routers()[0].expert_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, r"config.json: num_hidden_layers \(2\) must be 3, which follows"),
        ({"sparsity_plan": {"format": "x", "values": []}}, "config.json: sparsity_plan: sparsity plan: format is 'x'"),
        ({"model_type": "qsparse_mo"}, r'model_type \("qsparse_mo"\) is not a family that can be read'),
    ],
)
def test_an_edited_file_is_refused_before_anything_is_written(change, message, tmp_path):
    folder = saved(build("sparse"), tmp_path / "saved")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        import_model(folder, tmp_path / "imported", tokenizer="bytes")
    assert not (tmp_path / "imported").exists()


def test_a_missing_tensor_is_named(tmp_path):
    folder = saved(build("sparse"), tmp_path / "saved")
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["qsparse_moe"]["qk_norm"] = "none"
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"contains the tensor model.layers.0.attention.key_norm.weight \(and 5"):
        open_weights(str(folder))


def test_transformers_refuses_the_same_edited_file(tmp_path):
    folder = saved(build("threshold"), tmp_path / "saved")
    plan = threshold_plan(build("threshold")).with_thresholds({})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sparsity_plan": json.loads(plan.to_json())}))
    with pytest.raises(
        Exception, match=r"S above 0 and no threshold, which model.sparsity.selection \(threshold\) needs"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The export of a checkpoint from the middle of a ramp, of a run with experts of different S."""
    folder = write_text(tmp_path_factory.mktemp("run") / "text").parent
    sparsity = {"default": 0.5, "overrides": [{"sparsity": 0.75, "site": "expert_hidden", "experts": [1]}]}
    schedule = {"shape": "linear", "warmup_steps": 1, "ramp_steps": 5}
    # Seven more rows than tokens: ids that are never generated.
    model = {"vocab_size": 264, "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop"}}
    model |= {"sparsity": sparsity | {"schedule": schedule, "backend": "torch"}}
    config = tiny_config(folder, "sparse", engine="torch", model=model, steps=6, checkpoint_interval=3)
    export_model(list_checkpoints(train(config).run_dir)[0], folder / "exported")
    return folder / "exported"


def test_an_export_is_opened_by_transformers_with_the_plan_in_use(export):
    _, own, step = load_export(export)
    found = AutoModelForCausalLM.from_pretrained(export)
    assert type(found) is QSparseMoEForCausalLM
    assert found.model.sparsity_plan == own.sparsity_plan
    assert 0 < own.sparsity_plan.mean < 0.5, step
    assert torch.equal(logits(found.model), logits(own))
    assert (found.config.eos_token_id, found.config.dtype) == (256, torch.float32)
    wanted = QSparseMoEConfig.of(own.config, own.sparsity_plan, max_position_embeddings=24).to_dict()
    same = wanted.keys() - {"architectures", "dtype", "_name_or_path", "bos_token_id", "eos_token_id"}
    found_settings = found.config.to_dict()
    assert {name: found_settings[name] for name in same} == {name: wanted[name] for name in same}


def test_an_export_in_bf16_is_opened_in_bf16(export, tmp_path):
    export_model(export, tmp_path / "small", dtype="bf16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (found.dtype, found.config.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(logits(found.model), logits(load_export(tmp_path / "small")[1]))


def test_its_text_is_that_of_our_generator(export):
    generator = Generator.load(export, engine="torch")
    (wanted,) = generator.generate(["The "], max_tokens=12)
    generate = pipeline("text-generation", model=str(export))
    ids = generate.tokenizer("The ")["input_ids"]
    assert ids == [256, *b"The "]
    found = generate.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert tuple(found.tolist()) == wanted.token_ids
    (result,) = generate("The ", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert result["generated_text"] == wanted.text
    assert generate.model.generation_config.suppress_tokens == list(range(257, 264))
