"""Runs that start from the weights of a run, a checkpoint, or an export, and refusals before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsparse_moe import train
from qsparse_moe.config.load import load_config
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import init_from, load_run_config, run_folder
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training import loop
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.evaluate import load_run
from qsparse_moe.training.initial_weights import read_initial_weights
from qsparse_moe.training.prepare import prepare_run
from tests.data.test_tokenizer import save_tokenizer
from tests.support.runs import tiny_config, write_text
from tests.training.checkpoint.small_checkpoints import flip_a_byte
from tests.training.test_loop import stop_after

MOE = {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "bias_update_rate": 0.013}
DENSE = {"moe": MOE, "sparsity": {"default": 0.0, "backend": "torch"}}
SOURCES = ("run", "checkpoint", "export", "parts", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("initial") / "text").parent


@pytest.fixture(scope="module")
def sources(folder):
    """The same weights as a run, its newest checkpoint, and exports; in bf16 they are rounded."""
    config = tiny_config(folder, "dense", engine="torch", model=DENSE, checkpoint_interval=3)
    run_dir = train(config, [Recorder(without_tensorboard(config))]).run_dir
    for name, options in {"export": {}, "parts": {"part_bytes": 20_000}, "bf16": {"dtype": "bf16"}}.items():
        export_run(run_dir, folder / name, **options)
    exports = {name: folder / name for name in ("export", "parts", "bf16")}
    return {"run": run_dir, "checkpoint": list_checkpoints(run_dir)[-1]} | exports


def without_tensorboard(config):
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"tensorboard": False})})


def make(folder, output, source, *, model=DENSE, **training):
    settings = {"engine": "torch", "output_dir": str(output), "init_from": str(source)} | training
    return tiny_config(folder, "started", model=model, **settings)


def prepared(config, check):
    """Return ``check(run)`` of a prepared run that has not done a step."""
    with open_distributed("cpu") as distributed:
        data = load_data(config.data)
        initial = read_initial_weights(config, config.training.init_from, distributed, open_weights)
        run = prepare_run(config, distributed, data, resumes=False, initial=initial)
        try:
            return check(run)
        finally:
            run.engine.close()


def tokens():
    return torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))


def manifest(run_dir):
    return json.loads((run_dir / "manifest.json").read_text())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_the_first_step_has_the_logits_of_the_source(folder, sources, tmp_path, source, engine):
    dtype = torch.bfloat16 if source == "bf16" else None
    _, want, _ = load_run(sources["run"], dtype=dtype)
    want = want.float()
    assert want.router_bias_LE.abs().sum() > 0

    def logits_and_state(run):
        model = run.engine.model.eval()
        assert run.start.step == 0 and run.engine.adam_step == 0
        moments = [run.engine.get_full(name, "exp_avg_sq") for name in run.engine.shapes()]
        assert not any(moment.any() for moment in moments)
        with torch.no_grad():
            return model(tokens()).logits_BSV.clone(), model.router_bias_LE.clone()

    logits, bias = prepared(make(folder, tmp_path, sources[source], engine=engine, seed=7), logits_and_state)
    with torch.no_grad():
        assert torch.equal(logits, want(tokens()).logits_BSV)
    assert torch.equal(bias, want.router_bias_LE)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_bf16_starts_from_fp32_masters_that_are_not_rounded(folder, sources, tmp_path, engine):
    source = Checkpoint(sources["checkpoint"])

    def masters(run):
        return {name: run.engine.get_full(name, "weight").clone() for name in run.engine.shapes()}

    found = prepared(make(folder, tmp_path, sources["run"], engine=engine, precision="bf16"), masters)
    assert found.keys() == source.shapes.keys()
    assert all(found[name].equal(source.tensor("weight", name)) for name in found)
    assert any(not value.equal(value.bfloat16().float()) for value in found.values())


def test_a_dense_run_becomes_sparse(folder, sources, tmp_path):
    schedule = {"warmup_steps": 1, "ramp_steps": 3, "shape": "linear"}
    sparse = DENSE | {"sparsity": {"default": 0.6, "backend": "torch", "schedule": schedule}}
    config = make(folder, tmp_path, sources["run"], model=sparse, learning_rate=1e-3)
    result = train(config, [Recorder(without_tensorboard(config))])
    rows = read_metrics(result.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/sparsity"] for row in rows] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.6])
    last, first = (read_metrics(sources["run"] / "metrics.jsonl")[i]["train/lm_loss"] for i in (-1, 0))
    assert abs(rows[0]["train/lm_loss"] - last) < 0.2 * (first - last), "it does not go on from the source's loss"
    _, model, step = load_run(result.run_dir)
    assert step == 6 and model.sparsity_plan.mean == pytest.approx(0.6)


def test_the_manifest_says_where_the_weights_come_from(folder, sources, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(sources["run"].parent.parent)
    sparse = DENSE | {"rope_theta": 5000.0, "sparsity": {"default": 0.6, "backend": "torch"}}
    config = make(folder, tmp_path, "runs/dense", model=sparse, steps=1)
    caplog.set_level("INFO")
    run_dir = train(config).run_dir
    digest = manifest(run_dir)["initial_weights"].pop("digest")
    assert manifest(run_dir)["initial_weights"] == {
        "path": "runs/dense",
        "kind": "run",
        "folder": str(sources["checkpoint"]),
        "step": 6,
        "digest": digest,
        "changed_settings": {"model.rope_theta": [10000.0, 5000.0], "model.sparsity.default": [0.0, 0.6]},
    }
    assert "starting from the weights of runs/dense/checkpoints/step-00000006 after step 6" in caplog.text
    assert "settings that differ: model.rope_theta (10000.0 there, 5000.0 here)" in caplog.text
    assert caplog.text.count("model.moe.backend=loop: using loop") == 1, "the model that has shapes only says nothing"
    assert load_run_config(run_dir).training.init_from == str(sources["run"])
    others = {}
    for source in ("checkpoint", "parts"):
        others[source] = manifest(
            train(make(folder, tmp_path / source, sources[source], model=sparse, steps=1)).run_dir
        )["initial_weights"]
    assert (others["checkpoint"]["kind"], others["parts"]["kind"]) == ("checkpoint", "export")
    assert others["checkpoint"]["digest"] == digest != others["parts"]["digest"] and len(digest) == 32
    assert manifest(sources["run"])["initial_weights"] is None


def test_an_earlier_checkpoint_of_a_run_can_be_named(folder, sources, tmp_path):
    earlier = list_checkpoints(sources["run"])[0]
    config = make(folder, tmp_path, earlier)
    weight = Checkpoint(earlier).tensor("weight", "embedding.weight")
    assert prepared(config, lambda run: run.engine.get_full("embedding.weight", "weight").equal(weight))
    found = manifest(run_folder(config))["initial_weights"]
    assert (found["kind"], found["step"]) == ("checkpoint", 3)


def test_a_resumed_run_does_not_read_the_weights_again(folder, sources, tmp_path, monkeypatch):
    """Not even if they are gone; a run that has no checkpoint yet does."""
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(sources["run"], tmp_path / "source")
    whole = train(make(folder, tmp_path / "whole", source, steps=6)).run_dir
    config = make(folder, tmp_path / "runs", "source", steps=6)
    train(config, [stop_after(4)])
    first = manifest(run_folder(config))["initial_weights"]
    assert first["path"] == "source"
    shutil.rmtree(source)
    resume = make(folder, tmp_path / "runs", "source", steps=6, resume=True)
    assert init_from(resume, resumes=True) is None
    assert train(resume).step == 6
    mine, other = (Checkpoint(list_checkpoints(run)[-1]) for run in (run_folder(config), whole))
    assert all(mine.tensor("weight", name).equal(other.tensor("weight", name)) for name in mine.shapes)
    assert manifest(run_folder(config))["initial_weights"] == first
    with pytest.raises(ConfigError, match=r"training\.init_from was '.*/source' and is '.*/other'"):
        train(make(folder, tmp_path / "runs", "other", steps=7, resume=True))
    shutil.rmtree(run_folder(config) / "checkpoints")
    (run_folder(config) / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "seconds": 0.1}\n')
    with pytest.raises(CheckpointError, match=r"training\.init_from \(source\): source does not exist"):
        train(resume)


def test_thresholds_are_those_of_the_plan(folder, sources, tmp_path):
    plan = SparsityPlan.uniform(load_run_config(sources["run"]).model, 0.5)
    shape = {cell: tuple(0.25 for _ in values) for cell, values in plan.values.items()}
    SparsityPlan(plan.values, shape).save(tmp_path / "plan.json")
    model = DENSE | {"sparsity": {"plan": str(tmp_path / "plan.json"), "selection": "threshold", "backend": "torch"}}
    config = make(folder, tmp_path, sources["run"], model=model)
    assert prepared(config, lambda run: run.engine.model.sparsity_plan) == SparsityPlan.load(tmp_path / "plan.json")


def refused(config, tmp_path, error=ConfigError):
    """Return the message of a refusal; nothing was written, and no data was read."""
    data = config.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(error) as caught:
        train(config.model_copy(update={"data": data}))
    assert not run_folder(config).exists() and not (tmp_path / "cache").exists()
    return str(caught.value)


@pytest.mark.parametrize("source", ["run", "export"])
def test_other_shapes_are_refused_with_the_settings_that_differ(folder, sources, tmp_path, source):
    model = DENSE | {"moe": MOE | {"expert_hidden_size": 32}}
    assert refused(make(folder, tmp_path / "runs", sources[source], model=model), tmp_path) == (
        f"training.init_from ({sources[source]}): layers.0.moe.experts.w_down has the shape (4, 24, 40) in the weights "
        "and (4, 32, 40) in the model (and 5 more tensors differ); they must be equal. Set the model's shapes as in "
        f"{sources[source] / 'config.yaml'}, or name other weights. Settings that differ: "
        "model.moe.expert_hidden_size (24 there, 32 here)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_embeddings": True}, "head.weight has the shape (257, 40) in the weights and none (no such tensor)"),
        (
            {"num_layers": 3},
            "layers.2.attention.key_norm.weight has the shape none (no such tensor) in the weights and (10,)",
        ),
        (
            {"moe": MOE | {"bias_update_rate": 0.0}},
            "layers.0.moe.router.expert_bias has the shape (4,) in the weights and none (no such tensor)",
        ),
    ],
    ids=["extra", "missing", "biases"],
)
def test_missing_and_extra_tensors_are_refused(folder, sources, tmp_path, change, message):
    found = refused(make(folder, tmp_path / "runs", sources["run"], model=DENSE | change), tmp_path)
    assert message in found and "Settings that differ: model." in found


def test_heads_of_another_size_are_refused_although_the_shapes_are_equal(folder, sources, tmp_path):
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_size": 20, "qk_norm": False}
    model = DENSE | heads | {"num_heads": 4, "num_kv_heads": 4, "head_size": 10}
    source = make(folder, tmp_path / "source", sources["run"], model=DENSE | heads, init_from=None, steps=1)
    run_dir = train(source).run_dir
    assert refused(make(folder, tmp_path / "runs", run_dir, model=model), tmp_path) == (
        f"model.num_heads (4) must be that of the weights of training.init_from ({run_dir}), 2, whose matrices have "
        "the same shapes and another meaning; set model.num_heads=2"
    )


def test_another_vocabulary_is_refused(folder, sources, tmp_path):
    config = make(folder, tmp_path / "runs", sources["export"])
    model = config.model.model_copy(update={"vocab_size": None})
    assert refused(config.model_copy(update={"model": model}), tmp_path) == (
        f"model.vocab_size (264) must be that of the weights of training.init_from ({sources['export']}), 257; set "
        "model.vocab_size=257"
    )


def test_another_tokenizer_is_refused(folder, sources, tmp_path):
    words = ["<unk>", "</s>", *(f"word{number}" for number in range(9))]
    save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = make(folder, tmp_path / "runs", sources["run"])
    other = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tmp_path / "words")})})
    assert refused(other, tmp_path) == (
        f"data.tokenizer ({tmp_path / 'words'}) must be the tokenizer of the weights of training.init_from "
        f"({sources['run']}), and it encodes text differently; set data.tokenizer=bytes"
    )
    own = other.training.model_copy(update={"init_from": None, "name": "words", "steps": 1})
    run_dir = train(other.model_copy(update={"training": own})).run_dir
    shutil.rmtree(tmp_path / "words")
    found = refused(make(folder, tmp_path / "runs", run_dir), tmp_path)
    assert found.endswith(f"and it encodes text differently; set data.tokenizer={run_dir / 'tokenizer'}")
    copied = config.data.model_copy(update={"tokenizer": str(run_dir / "tokenizer")})
    started = config.model_copy(
        update={"data": copied, "training": config.training.model_copy(update={"init_from": str(run_dir), "steps": 1})}
    )
    assert train(started).step == 1
    shutil.rmtree(run_dir / "tokenizer")
    found = refused(make(folder, tmp_path / "other", run_dir), tmp_path, CheckpointError)
    assert found.startswith(
        f"training.init_from ({run_dir}): the tokenizer of the weights cannot be compared: data.tokenizer "
        f"({tmp_path / 'words'}): "
    )


def test_a_folder_that_holds_no_weights_is_refused(folder, sources, tmp_path):
    def message(source):
        return refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)

    assert message(tmp_path / "nothing").startswith(
        f"training.init_from ({tmp_path}/nothing): {tmp_path}/nothing does not"
    )
    (tmp_path / "thesis").mkdir()
    assert "thesis is not a run folder: it contains no config.yaml" in message(tmp_path / "thesis")
    assert message("no-such-owner/model").endswith(
        "no-such-owner/model does not exist, and models are not downloaded; if it is a name on the Hugging Face hub, "
        "download it (hf download no-such-owner/model --local-dir FOLDER) and name the folder"
    )
    (tmp_path / "thesis" / "config.json").write_text("{}")
    assert message(tmp_path / "thesis") == (
        f'training.init_from ({tmp_path}/thesis): {tmp_path}/thesis/config.json: model_type ("") is not a family that '
        "can be read; name a model of one of these: mixtral, qwen3_moe"
    )
    with pytest.raises(CheckpointError, match=r"is a Hugging Face model, and training\.loop\.train alone reads runs"):
        loop.train(make(folder, tmp_path / "runs", tmp_path / "thesis"))
    with pytest.raises(CheckpointError, match=r"thesis contains config\.json .* qsparse-moe import .*thesis --output"):
        find_model(tmp_path / "thesis")
    (tmp_path / "empty").mkdir()
    shutil.copy(sources["run"] / "config.yaml", tmp_path / "empty")
    assert "checkpoints: contains no complete checkpoint" in message(tmp_path / "empty")
    with pytest.raises(
        CheckpointError, match=r"is an export, and training\.loop\.train alone reads runs and checkpoints"
    ):
        loop.train(make(folder, tmp_path / "runs", sources["export"]))


def test_a_damaged_checkpoint_is_refused(folder, sources, tmp_path):
    source = shutil.copytree(sources["run"], tmp_path / "source")
    checkpoint = list_checkpoints(source)[-1]
    flip_a_byte(checkpoint / "rank-00000-of-00001.pt")
    found = refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)
    file = checkpoint / "rank-00000-of-00001.pt"
    assert found.startswith(
        f"training.init_from ({source}): {file} does not have the checksum that it was written with"
    )
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} has " in refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)
    file.unlink()
    assert f"{file} is missing" in refused(make(folder, tmp_path / "runs", checkpoint), tmp_path, CheckpointError)


def test_a_damaged_export_is_refused(folder, sources, tmp_path):
    export = shutil.copytree(sources["parts"], tmp_path / "export")
    part = sorted(export.glob("*.safetensors"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:-8])

    def message():
        return refused(make(folder, tmp_path / "runs", export), tmp_path, CheckpointError)

    assert message().startswith(f"training.init_from ({export}): {part}: cannot be read (")
    part.unlink()
    assert message().startswith(f"training.init_from ({export}): {part}: cannot be read (")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value.index_fill(0, torch.tensor(3), torch.nan), "40 of 10280 values of {name} are not finite"),
        (lambda value: value.to(torch.int8), "{name} has the dtype torch.int8, which must be fp32, bf16, or fp16"),
    ],
    ids=["NaN", "int8"],
)
def test_weights_that_cannot_be_trained_on_are_refused(folder, sources, tmp_path, spoil, message):
    export, name = shutil.copytree(sources["export"], tmp_path / "export"), "head.weight"
    file = export / "model.safetensors"
    weights = load_file(file)
    metadata = {"format": "pt", "qsparse_moe": "qsparse_moe.state-dict/1", "step": "6"}
    save_file(weights | {name: spoil(weights[name])}, file, metadata=metadata)
    config = make(folder, tmp_path / "runs", export)
    with pytest.raises(CheckpointError) as caught:
        train(config)
    assert str(caught.value).startswith(f"training.init_from ({export}): {export}: {message.format(name=name)}")
    assert not run_folder(config).exists()


def test_the_weights_are_read_one_tensor_at_a_time(folder, sources, tmp_path, monkeypatch):
    read = []
    source = open_weights(str(sources["parts"]))
    monkeypatch.setattr(type(source), "tensor", _recording(type(source).tensor, read))
    prepared(make(folder, tmp_path, sources["parts"]), lambda run: None)
    assert sorted(read) == sorted(source.shapes), "every tensor once"


@pytest.mark.parametrize("source", ["run", "parts"])
def test_ranks_divide_the_files_to_verify(sources, source):
    opened = open_weights(str(sources[source]))
    whole = opened.checksums(part=0, parts=1)
    files = {file.name for file in opened.path.iterdir() if file.suffix in {".pt", ".safetensors"}}
    assert files <= whole.keys() and len(whole) > 1
    first, second = (opened.checksums(part=part, parts=2) for part in range(2))
    assert not first.keys() & second.keys() and first | second == whole


def _recording(tensor, read):
    def recorded(self, name):
        read.append(name)
        return tensor(self, name)

    return recorded


def test_the_command_refuses_before_torch_is_imported(sources, tmp_path, capsys):
    from qsparse_moe.cli.app import run

    config = Path(load_config.__code__.co_filename).parents[2] / "configs" / "tiny.yaml"
    arguments = ["train", str(config), f"training.output_dir={tmp_path}", f"training.init_from={tmp_path / 'nothing'}"]
    assert run(arguments) == 2
    assert f"error: training.init_from ({tmp_path}/nothing): " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
