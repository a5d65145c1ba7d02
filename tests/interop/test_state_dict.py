"""A run's weights out to safetensors and back: the same model, whatever the size of the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsparse_moe.errors import BackendUnavailable, CheckpointError
from qsparse_moe.interop.export_folder import group_by_size
from qsparse_moe.interop.state_dict import export_run, load_export
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.evaluate import load_run
from qsparse_moe.training.loop import train
from tests.support.runs import STOP_STEP, tiny_config, write_text
from tests.training.test_loop import stop_after

# Buffers too: the biases that balance the experts.
MODEL = {
    "tie_embeddings": True,
    "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "bias_update_rate": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("export") / "text").parent


@pytest.fixture(scope="module")
def run_dir(folder):
    return train(tiny_config(folder, "run", engine="torch", model=MODEL)).run_dir


def tokens():
    return torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))


def names(path):
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_an_export_has_the_modes_that_the_umask_leaves_and_is_loaded_by_its_name(
    run_dir, tmp_path, umask, file_mode, folder_mode
):
    before = os.umask(umask)
    try:
        export_run(run_dir, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {file_mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert load_export(str(tmp_path / "out"))[2] == 6


@pytest.mark.parametrize("part_bytes", [2**30, 20_000, 1], ids=["one file", "parts", "one tensor a file"])
def test_the_model_comes_back_exactly_with_its_sparsity(run_dir, tmp_path, part_bytes):
    export = export_run(run_dir, tmp_path / "out", part_bytes=part_bytes)
    config, model, step = load_export(tmp_path / "out")
    want_config, want, _ = load_run(run_dir)
    assert (export.step, step, config) == (6, 6, want_config)
    assert model.sparsity_plan == want.sparsity_plan
    state, theirs = model.state_dict(), want.state_dict()
    assert any(name.endswith("expert_bias") and value.abs().sum() > 0 for name, value in theirs.items())
    assert state.keys() == theirs.keys() and all(state[name].equal(value) for name, value in theirs.items())
    assert torch.equal(model(tokens()).logits_BSV, want(tokens()).logits_BSV)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == export.files and (export.files == 1) == (part_bytes == 2**30)
    assert export.files == export.tensors or part_bytes > 1


def test_the_parts_are_those_that_other_tools_expect(run_dir, tmp_path):
    export = export_run(run_dir, tmp_path / "out", part_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == export.bytes
    numbered = {f"model-{number:05d}-of-{export.files:05d}.safetensors" for number in range(1, export.files + 1)}
    assert set(index["weight_map"].values()) == numbered
    found, num_bytes = {}, 0
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / "out" / file)
        num_bytes += sum(tensor.nbytes for tensor in part.values())
        assert sum(tensor.nbytes for tensor in part.values()) <= 20_000 or len(part) == 1
        found |= dict.fromkeys(part, file)
    assert found == index["weight_map"]
    assert (export.bytes, export.tensors) == (num_bytes, len(found))
    assert "head.weight" not in found, "a tied weight is written once"


def test_a_part_is_filled_to_its_last_byte_and_a_larger_tensor_is_alone():
    sizes = {"a": 3, "b": 2, "c": 5, "d": 6, "e": 1, "f": 3, "g": 2}
    assert group_by_size(sizes, 5) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]


def test_bf16_rounds_the_weights_and_nothing_else(run_dir, tmp_path):
    export_run(run_dir, tmp_path / "out", dtype="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    _, want, _ = load_run(run_dir)
    parameters = dict(want.named_parameters())
    for name, tensor in found.items():
        if name in parameters:
            assert tensor.dtype == torch.bfloat16 and tensor.equal(parameters[name].bfloat16())
        else:
            assert tensor.equal(want.state_dict()[name]) and tensor.dtype == torch.float32
    assert {p.dtype for p in load_export(tmp_path / "out")[1].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_export(tmp_path / "out", dtype=torch.float32)[1].parameters()} == {torch.float32}


def test_a_plan_file_goes_with_the_export(folder, tmp_path):
    config = tiny_config(folder, "with-plan", engine="torch", steps=2)
    # A space and a number sign begin a comment in YAML, a colon and a space follow a key.
    plan = SparsityPlan.uniform(config.model, 0.25)
    plan.save(tmp_path / "plan.json")
    sparsity = config.model.sparsity.model_copy(update={"default": None, "plan": str(tmp_path / "plan.json")})
    model = config.model.model_copy(update={"sparsity": sparsity})
    run_dir = train(config.model_copy(update={"model": model})).run_dir
    export_run(run_dir, tmp_path / "out: #1")
    (tmp_path / "plan.json").unlink()
    _, model, _ = load_export(tmp_path / "out: #1")
    assert model.sparsity_plan == plan


def test_an_export_from_the_middle_of_a_ramp_has_the_sparsity_of_its_last_step(folder, tmp_path):
    run_dir = train(tiny_config(folder, "ramp", engine="torch"), [stop_after(STOP_STEP)]).run_dir
    assert export_run(run_dir, tmp_path / "out").step == STOP_STEP
    config, model, _ = load_export(tmp_path / "out")
    schedule = config.model.sparsity.schedule
    assert (schedule.warmup_steps, schedule.ramp_steps, STOP_STEP) == (1, 4, 4)
    # Steps count from 0: the last was number 3, two steps into the ramp of four, and S is half of 0.5.
    assert {s for values in model.sparsity_plan.values.values() for s in values} == {0.25}


def test_nothing_is_overwritten_unless_it_is_an_earlier_export(run_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_run(run_dir, out)
    with pytest.raises(CheckpointError, match="exists, and an export does not overwrite it; name another folder"):
        export_run(run_dir, out, dtype="bf16")
    assert load_file(out / "model.safetensors")["final_norm.weight"].dtype == torch.float32
    export_run(run_dir, out, dtype="bf16", force=True, part_bytes=20_000)
    assert "model.safetensors" not in names(out) and "model.safetensors.index.json" in names(out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for force, message in ((False, "exists"), (True, "is not an earlier export, so --force does not replace it")):
        with pytest.raises(CheckpointError, match=message):
            export_run(run_dir, other, force=force)
    assert names(other) == ["thesis.tex"] and names(tmp_path) == ["other", "out"]


def test_a_failed_export_leaves_nothing_behind(run_dir, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\)"):
        export_run(run_dir, tmp_path / "out")
    assert names(tmp_path) == []

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(run_dir, tmp_path / "out")
    assert names(tmp_path) == []


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one_there(run_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_run(run_dir, out)
    before = (out / "model.safetensors").read_bytes()
    rename = Path.rename

    def fails(path, target):
        if path.name == ".out.partial":
            assert not out.exists() and (tmp_path / ".out.replaced" / "model.safetensors").read_bytes() == before
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(Input/output error\)"):
        export_run(run_dir, out, dtype="bf16", force=True)
    assert names(tmp_path) == ["out"] and (out / "model.safetensors").read_bytes() == before


def test_a_file_size_limit_of_the_system_is_one_message_of_an_export(run_dir, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from qsparse_moe.cli.app import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(run(['export', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", code, str(run_dir), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: {tmp_path}/out: cannot be written (File too large)" in done.stderr
    assert names(tmp_path) == []


def test_a_damaged_or_foreign_file_is_named(run_dir, tmp_path):
    out = tmp_path / "out"
    export_run(run_dir, out, part_bytes=20_000)
    part = next(iter(sorted(out.glob("*.safetensors"))))
    content = part.read_bytes()
    part.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=rf"{part}: cannot be read \("):
        load_export(out)
    part.write_bytes(content)
    (out / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read"):
        load_export(out)
    (out / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_export(out)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"was not written by qsparse-moe export of this version \(format None"):
        load_export(out)


def test_a_tensor_that_does_not_fit_the_config_is_named(run_dir, tmp_path):
    export_run(run_dir, tmp_path / "out")
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace("expert_hidden_size: 24", "expert_hidden_size: 32"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.moe\.experts\.w_down .*\(4, 24, 40\).*\(4, 32, 40\)"):
        load_export(tmp_path / "out")


def test_a_run_without_a_checkpoint_and_a_missing_library_are_reported(run_dir, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="contains no complete checkpoint"):
        export_run(empty, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "qsparse-moe\[hf\]"'):
        export_run(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and list_checkpoints(run_dir)


def test_a_part_is_filled_to_its_last_byte(run_dir, tmp_path):
    whole = export_run(run_dir, tmp_path / "whole")
    assert export_run(run_dir, tmp_path / "exact", part_bytes=whole.bytes).files == 1
    assert export_run(run_dir, tmp_path / "less", part_bytes=whole.bytes - 1).files == 2
