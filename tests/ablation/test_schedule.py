"""The order in which the runs of a grid start, with several at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.grid.schedule import Schedule
from tests.ablation.search_runs import SEARCH, loss_of


@pytest.fixture
def grid(write, tmp_path):
    return load_grid(write(SEARCH), output_dir=str(tmp_path / "out"))


@pytest.fixture
def result(grid):
    """A function from a run to its result, as if it had been trained."""
    one = result_of(grid, grid.runs[0])

    def ended(run, *, finished=True):
        bits = loss_of(run) if finished else None
        return replace(one, id=run.id, variant=run.variant, seed=run.seed, finished=finished, bits_per_byte=bits)

    return ended


def started(schedule, room):
    """Up to ``room`` runs that can start now."""
    runs = (schedule.next() for _ in range(room))
    return [run for run in runs if run is not None]


@pytest.mark.parametrize("jobs", [1, 2, 3, 8, 100])
def test_with_any_number_of_runs_at_a_time_each_needed_run_starts_once_after_all_that_it_waits_for(grid, result, jobs):
    draw = random.Random(jobs)
    schedule, running, order, ended = Schedule(grid), [], [], []
    while True:
        running += (now := started(schedule, jobs - len(running)))
        order += now
        for run in now:
            search = [one for one in grid.runs if one.entry == run.entry and grid.cell(one) == grid.cell(run)]
            if run.only_best:
                assert all(one in ended for one in search if not one.only_best)
        folders = [run.config.training.name for run in running]
        assert len(set(folders)) == len(folders), "no two lengths of a folder are trained at the same time"
        if not running:
            break
        run = running.pop(draw.randrange(len(running)))
        ended.append(run)
        schedule.ended(result(run))
    assert len(order) == len({run.id for run in order}) == grid.num_needed
    lengths = {run.config.training.name: [] for run in order}
    for run in order:
        lengths[run.config.training.name].append(run.config.training.steps)
    assert all(steps in ([2, 4], [4]) for steps in lengths.values())
    assert [one.id for one in schedule.results] == [run.id for run in grid.runs if run in order]
    if jobs == 1:
        assert order == [run for run in grid.runs if run in order]


def test_room_that_a_search_leaves_goes_to_the_next_variant_and_then_to_the_next_length(grid, result):
    schedule = Schedule(grid)
    first = started(schedule, 8)
    assert [run.id.partition("-learning")[0] for run in first] == ["a-steps-2"] * 6 + ["b-steps-2"] * 2
    for run in first[:5]:
        schedule.ended(result(run))
    # The search of a lacks one run: the rest of b's, and the longer runs of a whose shorter ones have ended.
    more = started(schedule, 100)
    assert [run.id for run in more[:4]] == [run.id for run in grid.runs if run.id.startswith("b-steps-2")][2:6]
    assert {run.id.partition("-learning")[0] for run in more[4:]} == {"a-steps-4"} and len(more) == 4 + 5
    schedule.ended(result(first[5]))
    assert [run.id for run in started(schedule, 1)] == ["a-steps-2-learning_rate-0.002-seed5"]


def test_a_search_with_a_failed_run_has_no_best_value_and_the_grid_still_ends(grid, result):
    schedule, ids = Schedule(grid), []
    while run := schedule.next():
        ids.append(run.id)
        schedule.ended(result(run, finished=run.id != "a-steps-2-learning_rate-0.004-seed1"))
    assert "b-steps-2-learning_rate-0.004-seed5" in ids and "a-steps-4-learning_rate-0.002-seed5" in ids
    assert not any(one.startswith("a-steps-2") and one.endswith("seed5") for one in ids)


def test_runs_without_a_search_and_without_lengths_wait_for_nothing(write):
    plain = SEARCH.replace("best_over: {axis: training.learning_rate, seeds: [5]}\ncontinue_over_steps: true\n", "")
    grid = load_grid(write(plain))
    assert started(Schedule(grid), 100) == list(grid.runs)
