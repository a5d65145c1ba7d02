from __future__ import annotations

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.runs.folder import MAY_CHANGE, check_run_folder, run_folder, write_config


def changed(config: RunConfig, path: str, value) -> RunConfig:
    settings = config.model_dump(mode="json")
    *above, name = path.split(".")
    section = settings
    for part in above:
        section = section[int(part)] if isinstance(section, list) else section[part]
    section[name] = value
    return RunConfig.model_validate(settings)


def test_a_free_folder_is_a_new_run_whatever_resume_says(make_config):
    for resume in (False, True):
        assert check_run_folder(make_config(resume=resume)) is False
    folder = run_folder(make_config())
    folder.mkdir(parents=True)
    assert check_run_folder(make_config()) is False
    (folder / ".config.yaml.new").write_text("half of a conf")
    assert check_run_folder(make_config()) is False
    write_config(folder, make_config())
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_never_overwrites_another(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    with pytest.raises(CheckpointError) as caught:
        check_run_folder(config)
    assert str(caught.value) == (
        f"{run_folder(config)}: exists, and a run never overwrites another (training.resume is false). Set "
        "training.resume=true to continue it, or give this run another training.name"
    )
    assert check_run_folder(make_config(resume=True)) is True


def test_something_else_in_the_folder_is_not_continued(make_config):
    folder = run_folder(make_config())
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is no run folder, it has no config\.yaml.*move it away, or choose"):
        check_run_folder(make_config(resume=True))
    folder = run_folder(make_config("file"))
    folder.write_text("a file")
    with pytest.raises(CheckpointError, match="never overwrites another"):
        check_run_folder(make_config("file"))


def test_another_run_is_named_with_every_setting_and_both_values(make_config):
    config = make_config()
    write_config(run_folder(config), config)
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
    assert message.endswith("Put them back, or start a new run under another training.name")
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
def test_what_does_not_make_another_run_may_change(make_config, path, value):
    config = make_config()
    write_config(run_folder(config), config)
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
