"""Budgets of the command line: what they mean, and every refusal."""

from __future__ import annotations

import pytest

from qsparse_moe.ablation.allocation.budget import Budget, check_decoding, parse_budget, parse_front
from qsparse_moe.cli.allocation_options import check_no_joint_options, given_once, joint_budgets, requested_budget
from qsparse_moe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "budget", "again"),
    [
        ("bytes=0.5@batch=4", Budget("bytes", 0.5, 4), "bytes=0.5@batch=4"),
        ("bytes = 2e6", Budget("bytes", 2e6), "bytes=2000000@batch=1"),
        ("flops=0.6", Budget("flops", 0.6), "flops=0.6"),
        ("parameters=1@batch=1", Budget("parameters", 1.0), "parameters=1"),
        ("flops=12345678901", Budget("flops", 12345678901.0), "flops=12345678901"),
        ("ms=0.25@batch=1", Budget("ms", 0.25), "ms=0.25@batch=1"),
        ("ms=0.2ms", Budget("ms", 0.2, is_cost=True), "ms=0.2ms@batch=1"),
        ("ms=1ms@batch=1", Budget("ms", 1.0, is_cost=True), "ms=1ms@batch=1"),
        ("ms=3.5", Budget("ms", 3.5), "ms=3.5ms@batch=1"),
        ("ms= 3.5 ms", Budget("ms", 3.5), "ms=3.5ms@batch=1"),
    ],
)
def test_a_budget_is_read_and_written(text, budget, again):
    assert parse_budget(text) == budget and budget.text == again and parse_budget(again) == budget


def test_a_value_up_to_one_is_a_share_of_the_dense_cost():
    assert Budget("bytes", 0.25).target(400.0) == 100.0 and Budget("flops", 1.0).target(400.0) == 400.0
    assert Budget("bytes", 300.0).target(400.0) == 300.0
    assert parse_budget("ms=0.2").target(0.5) == 0.1 and parse_budget("ms=0.2ms").target(0.5) == 0.2
    assert (parse_budget("ms=0.2").name, parse_budget("ms=0.2ms").name) == ("ms-0.2", "ms-0.2ms")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0.5",
            r"--budget \(0.5\) must be one of parameters, flops, bytes, ms with a value, such as bytes=",
        ),
        ("seconds=0.5", r"--budget \(seconds=0.5\) must be one of"),
        ("bytes", r"--budget \(bytes\) must be one of"),
        ("bytes=half", r"--budget \(bytes=half\): the value 'half' must be a number above 0"),
        (
            "bytes=205,824@batch=8",
            r"the value '205,824' must be a number above 0 without separators of thousands; .*ms=0.2ms is a time",
        ),
        ("bytes=5ms", r"the value '5ms' must be a number above 0"),
        ("ms=ms", r"the value 'ms' must be a number above 0"),
        ("bytes=0", r"the value '0' must be a number above 0"),
        ("flops=nan", r"the value 'nan' must be a number above 0"),
        ("flops=inf", r"the value 'inf' must be a number above 0"),
        ("bytes=0.5@batch=0", r"behind @ stands batch=B with a whole number B of at least 1"),
        ("bytes=0.5@tokens=4", r"behind @ stands batch=B"),
        ("bytes=0.5@batch=1.5", r"behind @ stands batch=B"),
        (
            "flops=0.5@batch=4",
            r"flops is a cost of one token, so that batch can only be 1; leave @batch out, or limit bytes",
        ),
        ("ms=0.5@batch=2", r"--budget \(ms=0.5@batch=2\): ms is a cost of one token"),
    ],
)
def test_a_malformed_budget_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_budget(text)


def test_a_front_has_both_ends():
    assert parse_front("0.3:0.9:0.1") == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert parse_front("0.5:0.5:0.1") == (0.5,) and parse_front("0.2:1:0.5") == (0.2, 0.7)


@pytest.mark.parametrize("text", ["0.3", "0.3:0.9", "0.9:0.3:0.1", "0:0.5:0.1", "0.3:1.5:0.1", "0.3:0.9:0", "a:b:c"])
def test_a_malformed_front_is_refused(text):
    with pytest.raises(ConfigError, match=r"--front \(.*\) must be LOW:HIGH:STEP with 0 < LOW <= HIGH <= 1"):
        parse_front(text)


def test_a_front_of_too_many_budgets_is_refused():
    with pytest.raises(ConfigError, match=r"--front \(0.1:0.9:0.001\) has 801 budgets, and at most 50 are allowed"):
        parse_front("0.1:0.9:0.001")


def test_the_front_stands_behind_the_budget_and_has_its_quantity():
    found = joint_budgets("bytes=0.5@batch=4", "0.4:0.6:0.1", others=[])
    assert found == [Budget("bytes", share, 4) for share in (0.5, 0.4, 0.6)]
    assert joint_budgets("flops=0.5", None, others=[]) == [Budget("flops", 0.5)]


def test_a_front_of_shares_may_stand_behind_a_cost():
    found = joint_budgets("ms=0.5ms", "0.5:0.6:0.1", others=[])
    assert [budget.text for budget in found] == ["ms=0.5ms@batch=1", "ms=0.5@batch=1", "ms=0.6@batch=1"]


def test_contradictory_options_are_refused():
    with pytest.raises(ConfigError, match=r"--budget \(bytes=0.5\) and --sparsity and --flops: give one budget"):
        joint_budgets("bytes=0.5", None, others=["--sparsity", "--flops"])
    with pytest.raises(ConfigError, match=r"--budget is given 2 times \(flops=0.9 and bytes=0.1\), .* keep one"):
        given_once("--budget", ["flops=0.9", "bytes=0.1"])
    assert given_once("--flops", [0.0]) == 0.0 and given_once("--flops", None) is given_once("--flops", []) is None


def test_a_batch_belongs_to_the_bytes_of_s_alone():
    message = r'--batch \(8\) belongs to --bytes; .* has one: write --budget "bytes=0.5@batch=8"$'
    with pytest.raises(ConfigError, match=message):
        joint_budgets("bytes=0.5", None, others=[], batch=8)
    with pytest.raises(ConfigError, match=r"--batch \(8\) .* of --budget \(flops=0.5\) .* has one: leave it out$"):
        joint_budgets("flops=0.5", None, others=[], batch=8)
    none = {"sparsity": None, "parameters": None, "flops": None, "bytes_": None}
    with pytest.raises(ConfigError, match=r"--batch \(8\) has no effect on --flops, .*; leave it out, or limit"):
        requested_budget(**none | {"flops": 5.0}, batch=8)
    assert requested_budget(**none | {"bytes_": 5.0}, batch=8) == ("bytes", 5.0)


def test_options_of_both_sparsities_are_refused_for_s_alone():
    given = {"--front": "0.3:0.9:0.1", "--held-out": 3, "--folder": None}
    with pytest.raises(ConfigError, match=r"^--front \(0.3:0.9:0.1\) and --held-out \(3\) apply to a budget of both"):
        check_no_joint_options(given)
    with pytest.raises(ConfigError, match=r"^--held-out \(3\) applies .*; leave it out, or give --budget, such as --b"):
        check_no_joint_options({"--held-out": 3})
    check_no_joint_options({"--front": None})


def test_the_decode_engine_is_measured_in_one_process(monkeypatch):
    in_bytes, in_ms = parse_budget("bytes=0.5"), parse_budget("ms=0.5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_decoding(in_bytes, decode=False)
    rule = r" measures the decode engine in one process, and the launcher started 2 \(WORLD_SIZE\); start qsparse-moe "
    with pytest.raises(ConfigError, match=r"--decode" + rule + "allocate without it"):
        check_decoding(in_bytes, decode=True)
    with pytest.raises(ConfigError, match=r"--budget \(ms=0\.5@batch=1\)" + rule):
        check_decoding(in_ms, decode=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_decoding(in_ms, decode=True)
