"""Runs that start from the weights of a run, a checkpoint, or an export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qsparse_moe import train
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import init_from, load_run_config, run_folder
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from qsparse_moe.training.evaluate import load_run
from tests.interop.trained_sources import DENSE, SOURCES, make, prepared, without_tensorboard
from tests.training.test_loop import stop_after


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
        moments = [run.engine.held(name, "exp_avg_sq") for name in run.engine.shapes()]
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
        return {name: run.engine.held(name, "weight").clone() for name in run.engine.shapes()}

    found = prepared(make(folder, tmp_path, sources["run"], engine=engine, precision="bf16"), masters)
    assert found.keys() == source.shapes.keys()
    assert all(found[name].equal(source.tensor("weight", name).flatten()) for name in found)
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
    assert prepared(config, lambda run: run.engine.held("embedding.weight", "weight").equal(weight.flatten()))
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
