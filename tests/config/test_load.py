"""Loading a run file: files that are refused, several problems in one message, the round trip, and no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qsparse_moe.config.load import config_to_yaml, load_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "{}", "training:\n", "model: {sparsity: , moe: }\ndata: ~\n"]
)
def test_an_empty_file_or_section_has_the_default_settings(load, text):
    assert load(text) == RunConfig()


def test_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbftraining: {steps: 7}\n")
    assert load_config(path).training.steps == 7


@pytest.mark.parametrize(("text", "value"), [("[1]", "[1]"), ("steps", '"steps"'), ("3", "3"), ("false", "false")])
def test_a_file_that_is_not_a_mapping_is_refused(error_of, text, value):
    message = error_of(text)
    assert f"run.yaml ({value}) must contain settings by name, such as training: {{steps: 50}}" in message


def test_missing_file_names_the_nearest(tmp_path):
    for name in ("tiny.yaml", "small.yaml", "base.yaml", "other.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"tinny\.yaml does not exist; name a YAML file, such as \S*/tiny\.yaml$"):
        load_config(tmp_path / "tinny.yaml")
    with pytest.raises(ConfigError, match=r"nowhere/x\.yaml does not exist; name a YAML file$"):
        load_config(tmp_path / "nowhere" / "x.yaml")


def test_three_files_are_proposed_where_no_name_is_similar(tmp_path):
    (tmp_path / "configs").mkdir()
    for name in ("dddd.yaml", "bbbb.yaml", ".aaaa.yaml", "cccc.yaml", "configs/aaaa.yaml", "eeee.yml"):
        (tmp_path / name).touch()
    expected = ", ".join(str(tmp_path / name) for name in ("bbbb.yaml", "cccc.yaml", "dddd.yaml"))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "0123456789")
    assert str(caught.value) == f"{tmp_path / '0123456789'} does not exist; name a YAML file, such as {expected}"
    with pytest.raises(ConfigError, match=r"such as \S*/configs/aaaa\.yaml$"):
        load_config(tmp_path / "aaaa.yaml")


def test_folder_is_refused(tmp_path):
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a folder; name a YAML file, such as \S*/tiny\.yaml$"):
        load_config(tmp_path)


def test_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"training: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is not UTF-8 text \(byte 10\); save it as UTF-8"):
        load_config(path)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    def refuse(*_args, **_keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"x\.yaml cannot be read \(Permission denied\); make it readable"):
        load_config(tmp_path / "x.yaml")


def test_broken_yaml_names_file_and_line(error_of):
    message = error_of("training:\n  steps: [1\n")
    assert "run.yaml, line 3, column 1, is not valid YAML: expected ',' or ']'" in message
    assert message.endswith("(while parsing a flow sequence that begins in line 2); correct it there")


def test_a_repeated_key_is_reported_beside_the_other_errors(error_of):
    message = error_of("training:\n  steps: 1\n  steps: 0\n")
    assert "run.yaml, line 3: the key steps occurs twice (first in line 2); keep one of them" in message
    assert "training.steps (0) must be a whole number of at least 1; the default is 300" in message


def test_all_broken_rules_are_reported_together(error_of):
    text = """
model:
  num_kv_heads: 3
  sparsity: {shedule: {shape: linear}}
training:
  steps: 0
  nme: x
  global_batch_size: 12
data:
  shuffle_buffer: 100
"""
    lines = error_of(text, "metrics.interval=-1", "foo").splitlines()
    assert lines[0].endswith("run.yaml breaks 8 rules:")
    assert [line.split()[0] for line in lines[1:]] == [
        "data.shuffle_buffer",
        '"foo"',
        "model.sparsity.shedule",
        "training.steps",
        "training.nme",
        "metrics.interval",
        "model.num_kv_heads",
        "training.global_batch_size",
    ]
    assert all(line.startswith("  ") for line in lines[1:])


def test_removed_setting_at_its_former_default_is_read(load):
    assert load("data: {shuffle_buffer: 0, sequence_length: 64}") == load("data: {sequence_length: 64}")


@pytest.mark.parametrize("value", ["100", "false", "null"])
def test_removed_setting_with_another_value_is_refused_with_what_replaces_it(error_of, value):
    message = error_of(f"data: {{shuffle_buffer: {value}}}")
    assert re.search(rf"^data\.shuffle_buffer \({value}\) was removed.* 0,.*delete it.*data\.shuffle=true", message)


def test_removed_setting_on_the_command_line_is_refused_with_what_replaces_it(error_of):
    message = error_of("", "data.shuffle_buffer=0")
    assert re.search(r"^data\.shuffle_buffer was removed.*delete it.*data\.shuffle=true", message)


def test_a_rule_about_a_broken_setting_is_not_checked_with_its_default(error_of):
    # warmup_steps 400 is above the default of steps (300), but the steps that were meant are not known.
    message = error_of("training: {steps: many, warmup_steps: 400}")
    assert message.startswith('training.steps ("many")')
    assert "\n" not in message
    # Nor by the default of a setting whose name is misspelt.
    assert "\n" not in error_of("training: {step: 500, warmup_steps: 400}")


def test_a_rule_about_another_setting_is_checked_beside_a_broken_one(error_of):
    text = "model: {moe: {router: x, router_input: sparse}, sparsity: {overrides: [{sparsity: 0.5, experts: 0}]}}"
    # The name of the one begins with that of the other, which does not contain it.
    starts = [line.split()[0] for line in error_of(text).splitlines()[1:]]
    assert starts == ["model.moe.router", "model.moe.router_input"]
    lines = error_of("data: {sources: [{kind: text}, {max_bytes: 0}]}\nmodel: {vocab_size: 3}").splitlines()
    # Without its broken item, the list would be another one.
    assert [line.split()[0] for line in lines[1:]] == ["data.sources.1.max_bytes", "model.vocab_size"]


def test_config_is_frozen_all_the_way_down(load):
    config = load("data: {sources: [{kind: text, path: [a, b]}]}")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.data.sources[0].max_bytes = 3
    hash(config)  # a list anywhere would raise


def test_dumped_config_stays_readable(load):
    text = config_to_yaml(load("data: {cache_dir: größe, sources: [{kind: text, path: [a.txt]}]}"))
    assert text.startswith("model:\n  vocab_size: null\n")
    assert "  cache_dir: größe\n" in text
    assert "    path:\n    - a.txt\n" in text


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


trees = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {
                "cache_dir": texts | st.sampled_from(["1e-3", "yes", "null", "2024-01-01", "010", "~"]),
                "sources": st.lists(
                    st.fixed_dictionaries({"kind": st.just("text"), "path": texts | st.lists(texts, min_size=1)}),
                    min_size=1,
                ),
            }
        ),
        "training": st.fixed_dictionaries(
            {"learning_rate": st.floats(min_value=1e-300, max_value=1e300), "seed": st.integers(0, 2**70)}
        ),
        "model": st.fixed_dictionaries(
            {
                "sparsity": st.fixed_dictionaries(
                    {
                        "default": st.floats(0, 1, exclude_max=True),
                        "overrides": st.lists(
                            st.fixed_dictionaries(
                                {
                                    "sparsity": st.sampled_from([0, 0.5]),
                                    "layers": st.sampled_from([None, 1, "0-3", [0, 2]]),
                                    "experts": st.sampled_from([None, 1, "0-3", [0, 2]]),
                                }
                            )
                        ),
                    }
                )
            }
        ),
    }
)


@given(tree=trees)
def test_dumped_config_is_read_back_equal(tree, tmp_path_factory):
    config = RunConfig.model_validate(tree)
    path = tmp_path_factory.mktemp("round") / "run.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_broken_config_is_reported_fast_and_without_torch(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {sparsity: {shedule: 1}}\n", encoding="utf-8")
    code = (
        "import sys, time; began = time.process_time()\n"
        "import qsparse_moe\n"
        "from qsparse_moe.errors import ConfigError\n"
        f"try: qsparse_moe.load_config({os.fspath(path)!r})\n"
        "except ConfigError as error: print(error)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(time.process_time() - began)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    message, seconds = done.stdout.splitlines()
    assert message == "model.sparsity.shedule is not a setting; did you mean model.sparsity.schedule?"
    # Measured 0.3 s on a quiet machine; the limit allows for a busy one.
    assert float(seconds) < 2
