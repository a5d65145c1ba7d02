"""The parts of messages: values, lists of problems, valid values in words, and the numbers in both."""

from __future__ import annotations

import math

import pytest

from qsparse_moe.config.fields import (
    all_settings,
    item_node,
    missing_value,
    takes,
    takes_null,
    takes_text,
    value_of,
    walk,
    wrong_value,
)
from qsparse_moe.config.model_rules import nearest
from qsparse_moe.config.problems import Problem, dotted, raise_if_any, show
from qsparse_moe.config.removed import drop_removed
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.yaml_text import plain_scalar
from qsparse_moe.errors import ConfigError

NODES = dict(all_settings())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
        (math.nan, ".nan"),
        (None, "null"),
        (True, "true"),
        ("größe", '"größe"'),
        (0.5, "0.5"),
        ("x" * 58, f'"{"x" * 58}"'),
        ("x" * 59, f'"{"x" * 56}...'),
        ({1}, '"{1}"'),
    ],
)
def test_a_value_is_yaml_on_one_line_of_at_most_60_characters(value, text):
    assert show(value) == text
    assert len(text) <= 60


def test_a_path_has_dots_between_names_and_indices():
    assert dotted(("data", "sources", 0, "kind")) == "data.sources.0.kind"
    assert dotted(()) == ""


def test_problems_are_listed_once_each_in_order_and_one_alone_without_a_heading():
    raise_if_any([], "x.yaml")
    with pytest.raises(ConfigError) as caught:
        raise_if_any([Problem("one", ("a",)), Problem("one", ("b",))], "x.yaml")
    assert str(caught.value) == "one"
    with pytest.raises(ConfigError) as caught:
        raise_if_any([Problem("two"), Problem("one"), Problem("two"), Problem("three")], "x.yaml")
    assert str(caught.value) == "x.yaml breaks 3 rules:\n  two\n  one\n  three"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, ""),
        ({"minimum": 1}, " of at least 1"),
        ({"exclusiveMinimum": 0}, " above 0"),
        ({"maximum": 5}, " of at most 5"),
        ({"exclusiveMaximum": 1}, " below 1"),
        ({"minimum": 0, "maximum": 999_999}, " from 0 to 999999"),
        ({"minimum": 0, "maximum": 10**6}, " of at least 0"),
        ({"maximum": 10**6}, ""),
        ({"minimum": 0, "exclusiveMaximum": 1}, " of at least 0 and below 1"),
        ({"exclusiveMinimum": 0, "maximum": 10**7}, " above 0"),
        ({"exclusiveMinimum": 0, "maximum": 7}, " above 0 and at most 7"),
    ],
)
def test_limits_of_a_number_in_words(limits, words):
    assert takes({"type": "integer"} | limits) == f"a whole number{words}"
    assert takes({"type": "number"} | limits) == f"a number{words}"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999_999, "999999"),
        (10**6, "10^6"),
        (10**12, "10^12"),
        (2**20, "2^20"),
        (2**24, "2^24"),
        (2**31 - 1, "2^31 - 1"),
        (2**63 - 1, "2^63 - 1"),
    ],
)
def test_a_large_limit_is_a_power(number, text):
    node = {"type": "integer", "minimum": 1, "maximum": number}
    assert takes(node, guards=True) == f"a whole number from 1 to {text}"
    assert takes({"anyOf": [node, {"type": "null"}]}, guards=True) == f"a whole number from 1 to {text} or null"


def test_an_upper_limit_that_only_guards_is_named_from_a_million_on():
    node = {"type": "integer", "minimum": 1, "maximum": 10**12, "default": 3}
    for value, words in ((999_999, "of at least 1"), (10**6, "from 1 to 10^12"), (-(10**9), "of at least 1")):
        message = f"a.b ({value}) must be a whole number {words}; the default is 3"
        assert wrong_value(("a", "b"), node, value) == Problem(message, ("a.b",))


@pytest.mark.parametrize(
    ("path", "text", "null"),
    [
        ("training.name", True, False),
        ("metrics.variant", True, True),
        ("training.precision", False, False),
        ("training.steps", False, False),
        ("model.vocab_size", False, True),
        ("model.sparsity.overrides.N.layers", False, True),
        ("data.sources.N.path", True, True),
        ("metrics.hyperparameters", False, False),
    ],
)
def test_a_setting_takes_text_or_null(path, text, null):
    assert (takes_text(NODES[path]), takes_null(NODES[path])) == (text, null)


def test_a_list_is_found_among_other_forms_of_a_setting():
    assert item_node(NODES["data.sources.N.path"]) == {"type": "string"}
    assert item_node(NODES["model.sparsity.overrides.N.experts"]) == {"type": "integer"}
    assert item_node(NODES["training.steps"]) is None


def test_a_path_is_followed_as_far_as_it_exists():
    sources = walk(["data", "sources"])
    assert sources[0] == ("data", "sources") and sources[1]["type"] == "array"
    assert walk(["data", "sources", "first", "kind"]) == sources
    assert walk(["data", "sources", 3, "kind"])[0] == ("data", "sources", 3, "kind")
    assert walk(["data", "sources", "0", "kid", "x"])[0] == ("data", "sources", "0")


def test_a_missing_value_and_the_value_of_a_path():
    node = NODES["model.sparsity.overrides.N.sparsity"]
    assert missing_value(("a", 0, "b"), node) == Problem(
        "a.0.b is required; set it to a number of at least 0 and below 1", ("a.0.b",)
    )
    config = RunConfig.model_validate({"training": {"deepspeed": {"zero_stage": 2}}, "data": {"sources": [{}, {}]}})
    assert value_of(config, "training.deepspeed.zero_stage") == 2
    assert [source["kind"] for source in value_of(config, "data.sources")] == ["stdlib", "stdlib"]


@pytest.mark.parametrize(
    ("value", "fitting", "end"),
    [
        (7, [7], "only one that does is 7"),
        (4, [1, 3, 9], "nearest that do are 1 and 3"),
        (5, [9, 1, 6, 2], "nearest that do are 2 and 6"),
        (20, [1, 2, 15, 30], "nearest that do are 15 and 30"),
        (6, [8, 4, 2, 10], "nearest that do are 4 and 8"),
    ],
)
def test_the_two_nearest_numbers_are_proposed_in_ascending_order(value, fitting, end):
    assert nearest(value, fitting) == f"the {end}"


@pytest.mark.parametrize("settings", [{}, {"data": None}, {"data": 3}, {"data": [1]}, {"shuffle_buffer": 1}])
def test_a_file_without_a_removed_setting_is_left_as_it_is(settings):
    before = dict(settings)
    assert drop_removed(settings) == [] and settings == before


def test_a_removed_setting_is_deleted_whatever_its_value():
    for value, number in ((0, 0), (False, 1), (0.0, 1), (None, 1), (7, 1)):
        settings = {"data": {"shuffle_buffer": value, "seed": 1}}
        problems = drop_removed(settings)
        assert len(problems) == number and settings == {"data": {"seed": 1}}
        assert all(problem.paths == ("data.shuffle_buffer",) for problem in problems)


def test_a_scalar_is_returned_as_it_is_written():
    assert [plain_scalar(text) for text in ("4_711 # x", "'010'", "true", "[a]", "{a: 1}")] == [
        "4_711", "010", "true", "", "",
    ]  # fmt: skip
