"""Steps, settings, paths, and files of run folders, each at the edge of its rule; manifests, reports, and results."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.runs import manifest
from qsparse_moe.runs.find import ModelFolder, find_initial_weights, is_hub_name
from qsparse_moe.runs.folder import (
    _absolute_path,
    _changed,
    _from_anywhere,
    _own_plan,
    check_run_folder,
    check_steps,
    checkpoint_step,
    holds_no_step,
    init_from,
    is_finished,
    load_run_config,
    may_change,
    newest_step,
    no_checkpoint,
    run_folder,
    settings_by_path,
    write_atomically,
    write_config,
)
from qsparse_moe.runs.report import TrainingResult, notify
from tests.training.test_run_folder import changed, make_run


def test_the_newest_checkpoint_is_the_largest_number_and_names_of_incomplete_ones_are_none(tmp_path):
    names = ("step-9", "step-10", "step-00000008", "step-11.part", "step-", "12", "step-x13", "last")
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 10 and newest_step(tmp_path / "checkpoints") is None
    assert [checkpoint_step(Path(name)) for name in names] == [9, 10, 8, None, None, None, None, None]


@pytest.mark.parametrize(
    ("rows", "holds_none"), [(None, True), (b"", True), (b'{"step": 1', True), (b"{}\n", False), (b"{}\n{", False)]
)
def test_a_logged_step_is_a_whole_line(tmp_path, rows, holds_none):
    if rows is not None:
        (tmp_path / "metrics.jsonl").write_bytes(rows)
    assert holds_no_step(tmp_path) == holds_none
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert not holds_no_step(tmp_path)


@pytest.mark.parametrize(("step", "finished"), [(8, False), (9, True), (10, True)])
def test_a_run_is_finished_with_a_checkpoint_of_its_last_step_or_a_later_one(make_config, step, finished):
    config = changed(make_config(), "training.steps", 9)
    config = changed(config, "training.resume", True)
    assert not is_finished(config)
    make_run(config, step=step)
    assert is_finished(config) == finished
    if step <= 9:
        check_steps(config)
        return
    with pytest.raises(ConfigError) as caught:
        check_steps(config)
    assert str(caught.value) == (
        f"training.steps (9) must be at least the 10 steps that the run in {run_folder(config)} has done; "
        "set training.steps=10 or more, or train under another training.name"
    )


def test_initial_weights_are_read_unless_the_run_goes_on_from_a_checkpoint(make_config):
    config = changed(make_config(), "training.init_from", "org/model")
    assert [init_from(config, resumes=resumes) for resumes in (False, True)] == ["org/model"] * 2
    make_run(config)
    assert [init_from(config, resumes=resumes) for resumes in (False, True)] == ["org/model", None]


def test_the_folder_of_a_run_may_be_below_the_home_folder(make_config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = changed(make_config(), "training.output_dir", "~/runs")
    assert run_folder(config) == Path("/home/somebody/runs") / config.training.name


def test_a_folder_without_a_checkpoint_is_named_with_the_ways_to_one(tmp_path):
    assert str(no_checkpoint(tmp_path)) == (
        f"{tmp_path / 'checkpoints'}: contains no complete checkpoint, and one is needed. Train the run to its end "
        "(training.resume=true), or set training.checkpoint_interval"
    )


def test_a_run_with_a_manifest_and_no_step_is_free_but_a_config_alone_is_not(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    with pytest.raises(CheckpointError, match=r"exists, and a run never overwrites another one"):
        check_run_folder(config)
    (run_folder(config) / "manifest.json").write_text("{}")
    assert check_run_folder(config) is False
    (run_folder(config) / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"\(training.resume is false\)"):
        check_run_folder(config)
    assert check_run_folder(changed(config, "training.resume", True)) is True


def test_settings_are_listed_by_path_with_one_entry_per_item_of_a_list_of_sections():
    value = {"a": {"b": 1, "c": []}, "d": [{"e": [1, 2]}, {"e": 3}], "f": [1, {"g": 4}], "h": None}
    assert settings_by_path(value) == {
        "a.b": 1,
        "a.c": [],
        "d.0.e": [1, 2],
        "d.1.e": 3,
        "f.0": 1,
        "f.1.g": 4,
        "h": None,
    }
    assert settings_by_path({"b": 1}, "a") == {"a.b": 1}


@pytest.mark.parametrize(
    ("path", "may"),
    [
        ("metrics.interval", True),
        ("metrics", True),
        ("training.steps", True),
        ("training.deepspeed.zero_stage", True),
        ("data.sources.12.path", True),
        ("data.tokenizer", True),
        ("training.steps_more", False),
        ("training", False),
        ("data.sources.12.paths", False),
        ("data.sources.x.path", False),
        ("more.data.sources.1.path", False),
        ("data.chat", False),
        ("model.moe.backends", False),
    ],
)
def test_what_may_change_is_a_setting_a_whole_section_or_the_path_of_a_source(path, may):
    assert may_change(path) == may


def test_values_that_are_cut_alike_are_written_in_full():
    assert _changed("a.b", 0.5, "x") == 'a.b was 0.5 and is "x"'
    before, now = ["x" * 300 + end for end in ("1", "2")]
    assert _changed("a.b", before, now) == f"a.b was {before!r} and is {now!r}"


def test_every_difference_from_the_run_before_is_named_in_the_order_of_the_paths(make_config):
    config = make_config()
    make_run(config)
    other = changed(changed(config, "training.resume", True), "training.beta1", 0.5)
    other = changed(changed(other, "model.init_std", 0.5), "training.keep_last", 7)
    with pytest.raises(ConfigError) as caught:
        check_run_folder(other)
    stored, beta1 = run_folder(config) / "config.yaml", config.training.beta1
    assert str(caught.value) == (
        f"{stored}: was made with other settings than the run that continues it (training.resume=true): "
        f"model.init_std was {config.model.init_std} and is 0.5; training.beta1 was {beta1} and is 0.5. "
        "Restore them, or start a new run with another training.name (for the runs of a grid: another --output-dir of "
        "ablate)"
    )


def test_paths_of_data_are_absolute_in_the_folder_and_names_on_the_hub_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)

    def stored(**settings):
        return _absolute_path(SourceConfig.model_validate(settings))

    assert stored(kind="stdlib") is None
    assert stored(kind="text", path="a/*.txt") == str(tmp_path / "a" / "*.txt")
    assert stored(kind="text", path=["a.txt", "/b.txt"]) == (str(tmp_path / "a.txt"), "/b.txt")
    assert stored(kind="hub", path="org/name") == "org/name"
    assert stored(kind="hub", path="org/local") == str(tmp_path / "org" / "local")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert stored(kind="text", path="~/a.txt") == "/home/somebody/a.txt"


def test_initial_weights_are_a_path_where_the_folder_above_exists(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "tokens").mkdir()
    kept = {}
    for name in ("runs/one", "org/model", "one"):
        config = changed(changed(make_config(), "training.init_from", name), "data.tokenizer", "tokens")
        made = _from_anywhere(config)
        kept[name] = made.training.init_from
        assert made.data.tokenizer == str(tmp_path / "tokens") and os.path.isabs(made.data.cache_dir)
    assert kept == {"runs/one": f"{tmp_path}/runs/one", "org/model": "org/model", "one": f"{tmp_path}/one"}
    assert _from_anywhere(changed(make_config(), "data.tokenizer", "bytes")).data.tokenizer == "bytes"


def test_the_copy_of_the_tokenizer_is_used_unless_an_override_names_another(make_config, tmp_path):
    config = make_config()
    write_config(tmp_path, config)
    assert load_run_config(tmp_path).data.tokenizer == config.data.tokenizer
    (tmp_path / "tokenizer").mkdir()
    assert load_run_config(tmp_path).data.tokenizer == str(tmp_path / "tokenizer")
    found = load_run_config(tmp_path, ["training.beta1=0.5"])
    assert (found.data.tokenizer, found.training.beta1) == (str(tmp_path / "tokenizer"), 0.5)
    assert load_run_config(tmp_path, ["data.tokenizer=other"]).data.tokenizer == "other"


def test_a_plan_is_that_of_an_export_only_beside_its_weights(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert _own_plan(tmp_path, []) == []
    (tmp_path / "model-1-of-2.safetensors").write_text("")
    (override,) = _own_plan(tmp_path, ["training.steps=3"])
    assert override.startswith("model.sparsity.plan=") and str(tmp_path / "plan.json") in override
    assert _own_plan(tmp_path, ["model.sparsity.plan=mine.json"]) == []
    (tmp_path / "plan.json").unlink()
    assert _own_plan(tmp_path, []) == []


def test_a_file_is_replaced_at_once_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    file, synced = tmp_path / "a.json", []
    file.write_text("old")
    replace = Path.replace

    def seen(beside, target):
        synced.append((file.read_text(), beside.read_text("utf-8"), beside.parent))
        return replace(beside, target)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append("fsync") or fsync(number))
    monkeypatch.setattr(Path, "replace", seen)
    write_atomically(file, "new é")
    assert synced == ["fsync", ("old", "new é", tmp_path)]
    assert file.read_text("utf-8") == "new é" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(Exception, match="no-folder"):
        write_atomically(tmp_path / "no-folder" / "a.json", "x")


def test_the_step_of_a_folder_is_that_of_its_name_or_of_its_newest_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-12").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-7").mkdir()
    of_kind = {kind: ModelFolder(tmp_path, kind).step for kind in ("run", "export", "hugging_face", "hub")}
    assert of_kind == {"run": 12, "export": None, "hugging_face": None, "hub": None}
    assert ModelFolder(tmp_path / "checkpoints" / "step-7", "export").step is None, "whatever its name"
    checkpoint = ModelFolder(tmp_path / "checkpoints" / "step-7", "checkpoint")
    assert (checkpoint.step, checkpoint.config_folder) == (7, tmp_path)
    assert ModelFolder(tmp_path, "run").config_folder == tmp_path


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/model", True),
        ("Org-1.x/model_2.0", True),
        ("model", False),
        ("org/model/more", False),
        ("-org/model", False),
        ("org/.model", False),
        ("/org/model", False),
        ("here/model", False),  # the folder above exists
        ("herr/model", False),  # mistyped
        ("org/mo del", False),
    ],
)
def test_a_name_on_the_hub_has_two_parts_and_is_near_no_folder(tmp_path, monkeypatch, name, is_one):
    (tmp_path / "here").mkdir()
    (tmp_path / "orgs").write_text("")
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == is_one
    if is_one:
        assert find_initial_weights(name) == ModelFolder(Path(name), "hub")


def test_initial_weights_of_another_program_have_its_config_and_none_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_initial_weights(str(tmp_path)).kind == "hugging_face"
    (tmp_path / "config.yaml").write_text("")
    assert find_initial_weights(str(tmp_path)).kind == "run"
    with pytest.raises(CheckpointError) as caught:
        find_initial_weights(str(tmp_path / "none"))
    assert str(caught.value).startswith(f"training.init_from ({tmp_path / 'none'}): {tmp_path / 'none'} does not exist")


def test_a_commit_is_marked_if_tracked_files_differ_and_unknown_outside_of_a_checkout(monkeypatch):
    asked, status = [], ""

    def run(command, **_):
        asked.append(command[3:])
        return SimpleNamespace(stdout="abc\n" if command[3] == "rev-parse" else status)

    monkeypatch.setattr(subprocess, "run", run)
    assert manifest._git_commit() == "abc"
    assert asked == [["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
    status = " M file\n"
    assert manifest._git_commit() == "abc+changes"

    def fails(*_, **__):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fails)
    assert manifest._git_commit() is None


def test_an_entry_of_an_earlier_part_is_that_of_the_newest_one(tmp_path):
    assert manifest.earlier_entry(tmp_path, "seed") is None
    for seed in (1, 2, 3):
        manifest.write_manifest(tmp_path, {"seed": seed})
    assert manifest.earlier_entry(tmp_path, "seed") == 3 and manifest.earlier_entry(tmp_path, "other") is None
    assert [part["seed"] for part in manifest.earlier_entry(tmp_path, "earlier_parts")] == [1, 2]


def test_packages_that_are_not_installed_have_no_version_and_the_others_still_do(monkeypatch):
    def version(package):
        if package in ("torch", "triton"):
            raise manifest.PackageNotFoundError
        return f"{package} 1"

    monkeypatch.setattr(manifest, "version", version)
    found = manifest.describe_environment()["packages"]
    assert "torch" not in found and found["numpy"] == "numpy 1" and found["deepspeed"] == "deepspeed 1"


@pytest.mark.parametrize(("stopped_by", "code"), [(None, 0), (2, 130), (15, 143)])
def test_an_exit_code_is_128_and_the_signal(stopped_by, code):
    assert TrainingResult(Path(), 1, 2, 3.0, None, stopped_by).exit_code == code


def test_listeners_that_have_no_method_for_a_moment_are_left_out():
    told = []
    listeners = [SimpleNamespace(begin=lambda news: told.append(("one", news))), lambda report: None]
    listeners += [SimpleNamespace(begin=lambda news: told.append(("two", news)), end=None)]
    notify(listeners, "begin", "news")
    notify(listeners, "end", "news")
    assert told == [("one", "news"), ("two", "news")]
