"""Single values: the rule of each setting, and text that looks like a number."""

from __future__ import annotations

import json
import re
import time

import pytest

from qsparse_moe.config.fields import PATTERN_WORDS, all_settings, run_schema, takes
from qsparse_moe.config.load import config_to_yaml


def test_numbers_may_be_written_in_common_notations(load):
    config = load(
        "training: {learning_rate: 1e-3, gradient_clipping: 2, epsilon: 1E-8}\ndata: {sources: [{max_bytes: 4_000}]}"
    )
    assert config.training.learning_rate == 1e-3
    assert (config.training.gradient_clipping, type(config.training.gradient_clipping)) == (2.0, float)
    assert config.training.epsilon == 1e-8
    assert config.data.sources[0].max_bytes == 4000


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "per_head"), ("false", "none"), ("all_heads", "all_heads"), ("none", "none")]
)
def test_norms_of_queries_and_keys_may_be_a_boolean_as_in_earlier_versions(load, written, meant):
    config = load(f"model: {{qk_norm: {written}}}")
    assert config.model.qk_norm == load("", f"model.qk_norm={written}").model.qk_norm == meant
    assert f"qk_norm: {meant}\n" in config_to_yaml(config)


COUNT = "must be a whole number of at least 1; "


RATE = "must be a number above 0; the default is 0.001"


NAME = "must be text of letters, digits, '.', '_' and '-', beginning with a letter or digit; "


INDICES = "must be a whole number or text or a list (each item a whole number) or null; "


SECTION = "must be a section (settings by name)"


# The first message below names both forms of a choice that was a boolean in earlier versions.
QK_NORM = "must be one of none, per_head, all_heads or true or false; "


WRONG_VALUES = [
    ("model.qk_norm", "all_head", f'("all_head") {QK_NORM}did you mean all_heads?'),
    ("model.qk_norm", "1", f'(1) {QK_NORM}the default is "none"'),
    ("training.steps", "0", f"(0) {COUNT}the default is 300"),
    ("training.steps", "1e3", f"(1000.0) {COUNT}write 1000"),
    ("training.steps", "1.5", f"(1.5) {COUNT}the default is 300"),
    ("training.steps", "'50'", f'("50") {COUNT}write 50 without quotes'),
    ("training.steps", "true", f"(true) {COUNT}the default is 300"),
    ("training.steps", "", f"(null) {COUNT}the default is 300"),
    ("training.steps", "{a: 1}", f'({{"a": 1}}) {COUNT}the default is 300'),
    ("training.learning_rate", ".inf", f"(.inf) {RATE}"),
    ("training.learning_rate", ".nan", f"(.nan) {RATE}"),
    ("training.learning_rate", "-.inf", f"(-.inf) {RATE}"),
    ("training.learning_rate", "fast", f'("fast") {RATE}'),
    ("training.min_learning_rate_ratio", "2", "(2) must be a number from 0 to 1; the default is 0.1"),
    ("training.resume", "yes", '("yes") must be true or false; write true'),
    ("training.resume", "On", '("On") must be true or false; write true'),
    ("training.resume", "no", '("no") must be true or false; write false'),
    ("training.resume", "off", '("off") must be true or false; write false'),
    ("training.resume", "0", "(0) must be true or false; the default is false"),
    ("training.precision", "bf15", '("bf15") must be one of fp32, bf16, fp16; did you mean bf16?'),
    ("training.precision", "double", '("double") must be one of fp32, bf16, fp16; the default is "fp32"'),
    ("training.name", "''", f'("") {NAME}the default is "run"'),
    ("training.name", "", f'(null) {NAME}the default is "run"'),
    ("training.steps", "12e4567", f'("12e4567") {COUNT}it is larger than the largest number, about 1.8e308'),
    ("model.num_layers", "1" + 30 * "0", f"(1{30 * '0'}) must be a whole number from 1 to 10000; the default is 4"),
    ("training.steps", "1" + 30 * "0", f"(1{30 * '0'}) must be a whole number from 1 to 10^12; the default is 300"),
    ("model.hidden_size", "16777217", "(16777217) must be a whole number from 1 to 2^24; the default is 128"),
    (
        "training.collective_timeout",
        "1e300",
        "(1e+300) must be a number above 0 and at most 10^8; the default is 600.0",
    ),
    (
        "model.vocab_size",
        "2147483648",
        "(2147483648) must be a whole number from 1 to 2^31 - 1 or null; the default is null",
    ),
    ("training.name", "../up", f'("../up") {NAME}the default is "run"'),
    ("training.deepspeed", "3", f"(3) {SECTION}"),
    ("model.sparsity.default", "1", "(1) must be a number of at least 0 and below 1 or null; the default is null"),
    (
        "model.sparsity.sites.expert_hidden",
        "1.5",
        "(1.5) must be a number of at least 0 and below 1 or null; the default is null",
    ),
    ("model.sparsity.overrides", "3", "(3) must be a list (each item a section (settings by name)); the default is []"),
    ("data.sources", "[]", "([]) must be a list of at least 1 (each item a section (settings by name))"),
    ("data.sources.0.weight", "-1", "(-1) must be a number above 0; the default is 1.0"),
    ("data.sources.0.path", "[1]", "([1]) must be text or a list (each item text) or null; the default is null"),
]


WRONG_ITEMS = [
    ("data.sources=[3]", f"data.sources.0 (3) {SECTION}"),
    (
        "data.sources=[{}, {max_bytes: 0}]",
        "data.sources.1.max_bytes (0) must be a whole number of at least 1 or null; ",
    ),
    (
        "model.sparsity.overrides=[{layers: 1}]",
        "model.sparsity.overrides.0.sparsity is required; set it to a number of at least 0 and below 1",
    ),
    (
        "model.sparsity.overrides=[{sparsity: 0.5, layers: [1.5]}]",
        f"model.sparsity.overrides.0.layers ([1.5]) {INDICES}the default is null",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_VALUES)
def test_wrong_value_names_path_value_rule_and_way_out(error_of, path, value, message):
    assert error_of("", f"{path}={value}") == f"{path} {message}"


@pytest.mark.parametrize("value", ["7", "1e3", "0.50"])
def test_text_written_as_a_number_must_be_quoted_in_a_file(error_of, value):
    way_out = "write it in quotes in the file, so that it is text"
    assert error_of(f"training: {{name: {value}}}").endswith(f"{NAME}{way_out}")


@pytest.mark.parametrize("name", ["4711", "1e3", "12e4567", "0.50", "1_000", "true", "null", "2024-01-01", "010"])
def test_on_the_command_line_a_name_that_looks_like_a_number_is_a_name(load, name):
    config = load("", f"training.name={name}", f"data.cache_dir={name}", f"training.output_dir={name}")
    assert (config.training.name, config.data.cache_dir, config.training.output_dir) == (name, name, name)
    assert config_to_yaml(config).count(f"'{name}'" if name not in ("010", "2024-01-01") else name) >= 3
    # What may be null still can be, and quotes and comments are YAML's.
    again = load("", "data.sources.0.subset=null", 'training.name="4711"', "training.output_dir=5 # five")
    assert again.data.sources[0].subset is None
    assert (again.training.name, again.training.output_dir) == ("4711", "5")


def test_a_name_too_large_for_a_number_is_text_in_a_file_too(load):
    config = load("training: {name: 12e4567}")
    assert config.training.name == "12e4567" and "name: '12e4567'" in config_to_yaml(config)


def test_numbers_of_any_size_are_checked_at_once(error_of):
    """Rules must not search for divisors of a number, or count up to it, before its limit has been checked."""
    integers = [
        name
        for name, node in all_settings()
        if {"integer"} & {option.get("type") for option in node.get("anyOf", [node])} and ".N" not in name
    ]
    assert len(integers) > 40
    begin = time.process_time()
    for name in integers:
        message = error_of("", f"{name}=1{30 * '0'}")
        assert f"{name} (1{30 * '0'}) must be a whole number" in message
    everything = error_of("", *(f"{name}=1{30 * '0'}" for name in integers))
    assert all(f"{name} (" in everything for name in integers)
    # The largest that are admitted cost little too.
    largest = [
        f"{name}={option['maximum']}"
        for name, node in all_settings()
        if name in integers
        for option in node.get("anyOf", [node])
        if "maximum" in option
    ]
    assert len(largest) == len(integers)
    error_of("model: {moe: {router_input: sparse}, sparsity: {selection: block}}", *largest)
    assert time.process_time() - begin < 20


@pytest.mark.parametrize(("override", "message"), WRONG_ITEMS)
def test_wrong_item_of_a_list_is_named_by_its_index(error_of, override, message):
    assert error_of("", override).startswith(message)


def test_every_pattern_has_a_description_in_words():
    patterns = set(re.findall(r'"pattern": "([^"]+)"', json.dumps(run_schema())))
    assert patterns == PATTERN_WORDS.keys()


def test_every_setting_documents_its_values_and_its_meaning():
    for path, node in all_settings():
        assert takes(node), path
        assert node["description"], path
