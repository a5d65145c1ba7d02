"""Two ranks that divide a model between them find the figures that one process finds with all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.training.loop import train
from tests.distributed.measure_ranks import main
from tests.support.launch import REPOSITORY, end, start
from tests.support.runs import MIXED_MODEL, tiny_config, write_text

pytest.importorskip("deepspeed")
pytest.importorskip("safetensors")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUNS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The figures of one process, of both ranks, and the folder of the exports."""
    folder: Path = tmp_path_factory.mktemp("measured")
    write_text(folder / "text")
    # Three sequences, of which the second rank has none in its last turn.
    (folder / "own.txt").write_text((folder / "text" / "text-00.txt").read_text()[:70])
    for name, model in zip(RUNS, ({}, MIXED_MODEL), strict=True):
        train(tiny_config(folder, name, model=model, engine="torch", steps=5, precision=name))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        main(folder, list(RUNS))
    arguments = [str(REPOSITORY / "tests/distributed/measure_ranks.py"), str(folder), ",".join(RUNS)]
    with (folder / "log.txt").open("w") as output:
        process = start(arguments, ranks=2, output=output)
        try:
            code = process.wait(480)
        finally:
            end([process])
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    files = ("measured-1-rank0.json", "measured-2-rank0.json", "measured-2-rank1.json")
    return *(json.loads((folder / file).read_text()) for file in files), folder


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_finds_the_bits_of_one_process(measured, name):
    alone, *ranks, _ = measured
    same = ("evaluation", "files", "calibrated", "sensitivity", "allocated", "planned", "comparisons")
    same += ("joint", "joint_comparisons")
    for found in ranks:
        for figure in same:
            # As text, in which nan equals nan.
            assert json.dumps(found[name][figure]) == json.dumps(alone[name][figure]), figure
        assert found[name]["calibration_losses"] == pytest.approx(alone[name]["calibration_losses"], rel=1e-12)
    assert alone[name]["gathered"] == 0 < ranks[0][name]["gathered"] == ranks[1][name]["gathered"]


def test_figures_are_of_every_kind_and_not_of_the_trivial_one(measured):
    alone, *_ = measured
    for name in RUNS:
        found = alone[name]
        assert 3 < found["evaluation"]["loss"] < 6 and found["files"]["rows"] == 3
        assert '"threshold"' in found["calibrated"] and '"threshold"' not in found["allocated"]
        changes = found["sensitivity"]["changes"]
        assert all(len({change[kind] for change in changes}) > 15 for kind in ("estimate", "exact"))
        assert {"allocated", "uniform", "greedy by layer", "random 0", "dense"} < {
            one["name"] for one in found["comparisons"]
        }
        assert len({change["exact"] for change in found["sensitivity"]["routing"]}) >= (2 if name == "fp32" else 1)
        assert len(found["sensitivity"]["plans"]["evaluated"]) == 3
        assert any("experts per token" in one["name"] for one in found["comparisons"])
        assert any("features" in one["name"] for one in found["comparisons"])

    assert len(set(alone["bf16"]["joint"])) >= 3, "S alone, experts alone, and both"


def test_training_goes_on_under_zero_3_as_in_one_process_to_rounding(measured):
    alone, first, second, _ = measured
    assert first["fp32"]["trained"] == second["fp32"]["trained"]
    names = [one["name"] for one in alone["fp32"]["trained"]]
    assert names == ["allocated", "uniform", "greedy by layer", "random 0", "dense"]
    for want, found in zip(alone["fp32"]["trained"], first["fp32"]["trained"], strict=True):
        assert found["name"] == want["name"] and found["cost"] == pytest.approx(want["cost"], rel=1e-3)
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-5)
    # The step has changed the model.
    untrained = {one["name"]: one["loss"] for one in alone["fp32"]["comparisons"]}
    assert all(one["loss"] < untrained[one["name"]] - 1e-3 for one in alone["fp32"]["trained"])


@pytest.mark.parametrize("name", RUNS)
def test_the_files_that_two_ranks_export_are_those_of_one(measured, name):
    folder = measured[-1]
    ours, theirs = (folder / f"exports-{ranks}" / name for ranks in (1, 2))
    files = sorted(file.name for file in ours.iterdir())
    assert "model.safetensors" in files and files == sorted(file.name for file in theirs.iterdir())
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
