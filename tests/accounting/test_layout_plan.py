"""The search over layouts: those that train accepts, the ones that fit first, and the nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qsparse_moe.accounting.devices import KNOWN
from qsparse_moe.accounting.layout_plan import Machine, find_layouts, make_plan, nearest_layout
from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import accepts_layout, broken_rules, check_world_size
from qsparse_moe.errors import ConfigError
from tests.accounting.test_layout_memory import run

CONFIGS = Path(__file__).parents[2] / "configs"
MIXTRAL = CONFIGS / "recipes" / "mixtral-8x7b.yaml"
H100 = KNOWN["h100-80gb"]


def test_every_layout_is_one_that_train_accepts_and_is_listed_once():
    machine = Machine(H100, 4)
    plans = find_layouts(run(), machine)
    for plan in plans:
        assert not broken_rules(plan.config)
        check_world_size(plan.config, 4)
    assert len({plan.config.model_dump_json() for plan in plans}) == len(plans)
    # Stages with offload: 1, 2, 2, 4; experts over 1, 2 or 4; micro-batches of 1 or 2; five ways to recompute.
    assert len(plans) == (1 + 2 + 2 + 4) * 3 * 2 * 5


@pytest.mark.parametrize(
    "training",
    [
        {"expert_parallel_size": 3},
        {"micro_batch_size": 3},
        {"micro_batch_size": 4},
        {"deepspeed": {"zero_stage": 1, "offload_parameters": "cpu"}},
    ],
)
def test_a_layout_that_train_refuses_is_no_layout(training):
    assert accepts_layout(run(), 4)
    assert not accepts_layout(run(**training), 4)


def test_those_that_fit_come_first_by_time_and_the_others_by_what_they_lack():
    plans = find_layouts(load_config(MIXTRAL), Machine(H100, 16, 2))
    fitting = [plan for plan in plans if plan.fits]
    assert 0 < len(fitting) < len(plans)
    assert plans[: len(fitting)] == fitting
    times = [plan.time.total for plan in fitting]
    assert times == sorted(times)
    lacking = [plan.excess for plan in plans[len(fitting) :]]
    assert lacking == sorted(lacking) and lacking[0] > 0


def test_the_overrides_of_a_layout_make_its_config():
    config = load_config(MIXTRAL)
    for plan in find_layouts(config, Machine(H100, 16, 2))[:40:8]:
        assert load_config(MIXTRAL, plan.overrides) == plan.config


def test_the_nearest_layout_changes_as_little_as_possible():
    config = load_config(MIXTRAL, ["training.deepspeed.zero_stage=2"])
    machine = Machine(H100, 64, 8)
    assert not make_plan(config, machine).fits
    nearest = nearest_layout(config, machine)
    assert nearest is not None and nearest.overrides == ("training.deepspeed.zero_stage=3",)
    assert nearest_layout(config, Machine(H100, 1)) is None


def test_a_verdict_names_what_lacks():
    config = load_config(MIXTRAL)
    large = make_plan(config, Machine(H100, 1))
    assert large.verdict.startswith("needs ") and "more on the device; optimizer take 560.4 GB" in large.verdict
    moved = load_config(MIXTRAL, ["training.deepspeed.offload_optimizer=cpu"])
    hosted = make_plan(moved, Machine(H100, 8, 1, host_memory=8e9))
    assert hosted.verdict.endswith("more of host memory per rank")
    assert make_plan(config, Machine(H100, 64, 8)).verdict.startswith("fits, ")


def test_on_a_cpu_device_and_host_are_one_memory():
    plan = make_plan(run(), Machine(replace(KNOWN["cpu"], memory=1e9), 1))
    assert plan.device_need == plan.memory.device + plan.memory.host + KNOWN["cpu"].reserve
    assert plan.host_need == 0


def test_ranks_that_do_not_divide_the_batch_have_no_layout():
    with pytest.raises(ConfigError, match=r"training.global_batch_size \(8\) must be a multiple of"):
        find_layouts(run(), Machine(H100, 3))
