from __future__ import annotations

import json

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.runs.folder import (
    MANIFEST_FILE,
    MAY_CHANGE,
    check_run_folder,
    check_steps,
    is_finished,
    run_folder,
    write_config,
)
from qsparse_moe.runs.manifest import write_manifest


def changed(config: RunConfig, path: str, value) -> RunConfig:
    settings = config.model_dump(mode="json")
    *above, name = path.split(".")
    section = settings
    for part in above:
        section = section[int(part)] if isinstance(section, list) else section[part]
    section[name] = value
    return RunConfig.model_validate(settings)


def make_run(config: RunConfig, *, step: int = 4) -> None:
    """Write the files of a run that has saved a checkpoint."""
    write_config(run_folder(config), config)
    (run_folder(config) / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize("partial", [(), ("manifest.json",), ("config.yaml",), ("manifest.json", "config.yaml")])
def test_a_free_folder_is_a_new_run_whatever_resume_says(partial, make_config):
    folder = run_folder(make_config())
    for resume in (False, True):
        assert check_run_folder(make_config(resume=resume)) is False
    folder.mkdir(parents=True)
    # A process that is killed while it writes its first files leaves these behind.
    for name in partial:
        (folder / f".{name}.new").write_text("half of a fi")
    for resume in (False, True):
        assert check_run_folder(make_config(resume=resume)) is False
    write_manifest(folder, {})
    write_config(folder, make_config())
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "manifest.json"]


def test_a_run_never_overwrites_another(make_config):
    config = make_config()
    make_run(config)
    with pytest.raises(CheckpointError) as caught:
        check_run_folder(config)
    assert str(caught.value) == (
        f"{run_folder(config)}: exists, and a run never overwrites another one (training.resume is false). Set "
        "training.resume=true to continue it, or give this run another training.name"
    )
    assert check_run_folder(make_config(resume=True)) is True


@pytest.mark.parametrize("left", [(), (".saving-step-00000001",)])
@pytest.mark.parametrize("rows", [None, "", '{"step": 1, "tok'])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_saved_no_step_may_start_again_with_other_settings(make_config, left, rows, resume):
    config = make_config()
    write_config(run_folder(config), config)
    (run_folder(config) / "manifest.json").touch()
    for name in left:
        (run_folder(config) / "checkpoints" / name).mkdir(parents=True)
    if rows is not None:
        (run_folder(config) / "metrics.jsonl").write_text(rows)
    assert check_run_folder(changed(make_config(resume=resume), "training.learning_rate", 0.5)) is False


def test_a_config_that_no_run_wrote_is_kept(make_config):
    write_config(run_folder(make_config()), make_config())
    with pytest.raises(CheckpointError, match="never overwrites another"):
        check_run_folder(make_config())


def test_a_run_with_a_logged_step_and_no_checkpoint_is_kept(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    (run_folder(config) / "manifest.json").touch()
    (run_folder(config) / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "seconds": 0.1}\n{"st')
    with pytest.raises(CheckpointError, match="never overwrites another"):
        check_run_folder(config)
    with pytest.raises(ConfigError, match=r"training\.learning_rate was 0\.005 and is 0\.5"):
        check_run_folder(changed(make_config(resume=True), "training.learning_rate", 0.5))
    assert check_run_folder(make_config(resume=True)) is True


def test_fewer_steps_than_a_run_has_done_are_refused(make_config):
    make_run(make_config(steps=4))
    for steps in (4, 5):
        check_steps(make_config(steps=steps, resume=True))
    with pytest.raises(ConfigError) as caught:
        check_steps(make_config(steps=3, resume=True))
    assert str(caught.value) == (
        f"training.steps (3) must be at least the 4 steps that the run in {run_folder(make_config())} has done; "
        "set training.steps=4 or more, or train under another training.name"
    )
    assert is_finished(make_config(steps=3, resume=True)), "a grid and the quickstart take it as it is"


def test_something_else_in_the_folder_is_not_continued(make_config):
    folder = run_folder(make_config())
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not a run folder .*no config\.yaml.*move it away, or choose"):
        check_run_folder(make_config(resume=True))
    folder = run_folder(make_config("file"))
    folder.write_text("a file")
    with pytest.raises(CheckpointError, match="never overwrites another"):
        check_run_folder(make_config("file"))


def test_another_run_is_named_with_every_setting_and_both_values(make_config):
    config = make_config()
    make_run(config)
    other = changed(make_config(resume=True), "training.learning_rate", 0.5)
    other = changed(other, "model.moe.activation", "swiglu")
    other = changed(other, "data.sources.0.max_bytes", 10)
    with pytest.raises(ConfigError) as caught:
        check_run_folder(other)
    message = str(caught.value)
    assert message.startswith(f"{run_folder(config)}/config.yaml: was made with other settings")
    assert "training.learning_rate was 0.005 and is 0.5" in message
    assert 'model.moe.activation was "relu2glu" and is "swiglu"' in message
    assert "data.sources.0.max_bytes was null and is 10" in message
    assert message.endswith("another training.name (for the runs of a grid: another --output-dir of ablate)")
    assert message.count(" was ") == 4, "no other setting is named"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.steps", 99),
        ("training.micro_batch_size", 4),
        ("training.engine", "deepspeed"),
        ("training.deepspeed.zero_stage", 3),
        ("training.evaluation_rows", 3),
        ("model.moe.backend", "loop"),
        ("metrics.interval", 7),
        ("data.cache_dir", "elsewhere"),
    ],
)
def test_settings_that_do_not_make_another_run_may_change(make_config, path, value):
    config = make_config()
    make_run(config)
    assert check_run_folder(changed(make_config(resume=True), path, value)) is True


def test_every_setting_that_may_change_exists():
    settings = RunConfig().model_dump()
    for path in MAY_CHANGE:
        section = settings
        for part in path.split("."):
            assert part in section, path
            section = section[part]


def test_the_written_config_is_read_back_equal(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    assert load_config(run_folder(config) / "config.yaml") == config
    assert [path.name for path in run_folder(config).iterdir()] == ["config.yaml"]


def test_a_manifest_keeps_those_of_the_earlier_parts_of_its_run_the_oldest_first(tmp_path):
    for start_step in (0, 4, 9):
        write_manifest(tmp_path, {"start_step": start_step})
    stored = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert stored == {"start_step": 9, "earlier_parts": [{"start_step": 0}, {"start_step": 4}]}
