"""YAML in and out: the traps of YAML 1.1, repeated keys, and the round trip."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.yaml_text import dump_yaml, parse_yaml
from qsparse_moe.errors import ConfigError


def parse(text):
    value, problems = parse_yaml(text, "x.yaml")
    assert not problems
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("+1e+3", 1e3),
        ("-2.5e-3", -2.5e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("4_000_000", 4_000_000),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_scalar_is_what_a_reader_expects(text, value):
    read = parse(text)
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse(".nan"))


@pytest.mark.parametrize("text", ["yes", "no", "on", "Off", "2024-01-01", "12:30", "010", "0x1F", "1e", "e3", "1.2.3"])
def test_scalar_stays_text(text):
    assert parse(text) == text


def test_every_repeated_key_is_named_with_both_lines():
    text = "training:\n  steps: 1\n  seed: 2\n  steps: 3\ndata: {mode: table, mode: streaming}\n"
    _, problems = parse_yaml(text, "x.yaml")
    assert [problem.message for problem in problems] == [
        "x.yaml, line 4: the key steps occurs twice (first in line 2); keep one of them",
        "x.yaml, line 5: the key mode occurs twice (first in line 5); keep one of them",
    ]


def test_merge_key_may_repeat_a_name():
    text = "base: &base {steps: 1, seed: 2}\nrun: {<<: *base, steps: 3}\n"
    assert parse(text)["run"] == {"steps": 3, "seed": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", r"x\.yaml, line 2, column 2, is not valid YAML: .*; correct it there"),
        ("a: 1\n  b: 2\n", r"x\.yaml, line 2, column 4, is not valid YAML: mapping values"),
        ("\tb: 2\n", r"x\.yaml, line 1, column 1, is not valid YAML: found character '\\t'"),
        ("a: 1\n---\nb: 2\n", r"x\.yaml, line 2, column 1, is not valid YAML: but found another document"),
        ("a: !!python/name:os.system x\n", r"x\.yaml, line 1, column 4, is not valid YAML: could not determine"),
        ("a: \x00\n", r"x\.yaml is not valid YAML: special characters are not allowed"),
        ("? [1]\n: 2\n? {a: 1}\n: 2\n", r"x\.yaml, line 1, column 3, is not valid YAML: found unhashable key"),
        ("9" * 5000, r"x\.yaml cannot be read as YAML: Exceeds the limit"),
        ("[" * 5000, r"x\.yaml cannot be read as YAML: maximum recursion depth"),
    ],
)
def test_broken_yaml_is_one_sentence_with_the_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x.yaml")


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [
            "1e-3",
            "1e3",
            "yes",
            "no",
            "010",
            "0x1F",
            "2024-01-01",
            "12:30",
            "1_0",
            ".5",
            "~",
            "",
            "<<",
            "=",
            "\x85",
            "a\u2028b",
        ]
    )
)
trees = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("ab1e-.", min_size=1), below, max_size=3),
)


@given(trees)
def test_a_dumped_tree_is_read_back_equal(value):
    assert parse(dump_yaml(value)) == value


@given(trees)
def test_a_reader_of_yaml_1_1_reads_the_same(value):
    assert yaml.safe_load(dump_yaml(value)) == value
