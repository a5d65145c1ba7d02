"""``calibrate``: from a run to a plan by which a run selects; every message comes before heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.cli.calibrate import requested_plan, settings_for, write_plan
from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.folder import write_config
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.support.runs import tiny_config, write_text

REPOSITORY = Path(__file__).parents[2]


def changed(config: RunConfig, **sparsity) -> RunConfig:
    settings = config.model_dump(mode="json")
    settings["model"]["sparsity"] |= sparsity
    return RunConfig.model_validate(settings)


def untrained(folder: Path, name: str, *, step: int | None = 6, **sparsity) -> Path:
    """Make the part of a run folder that the command line reads before anything is loaded."""
    write_config(folder / name, changed(tiny_config(folder, name), **sparsity))
    if step is not None:
        (folder / name / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from qsparse_moe.training.loop import train

    folder = tmp_path_factory.mktemp("calibrate")
    write_text(folder / "text")
    return train(tiny_config(folder, "run", engine="torch")).run_dir


def test_plan_of_a_run_is_written_used_for_training_and_evaluated(trained, tmp_path, capsys):
    plan_file = tmp_path / "a plan.json"
    assert run(["calibrate", str(trained), "--output", str(plan_file), "--rows", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_dir"], found["output"], found["step"]) == (str(trained), str(plan_file), 6)
    assert (found["rows"], found["held_out_rows"]) == (20, 11)
    for site in found["sites"].values():
        assert site["sparsity"] == 0.5
        assert site["zeros_threshold"] == pytest.approx(site["zeros_topk"], abs=0.05)
    assert found["loss_threshold"] == pytest.approx(found["loss_topk"], abs=0.1)
    assert list(tmp_path.iterdir()) == [plan_file]

    arguments = [*found["settings"], "training.name=by-threshold"]
    assert run(["train", str(trained / "config.yaml"), *arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 6
    assert run(["evaluate", summary["run_dir"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["validation"]["loss"])
    # What a run already selects by can be calibrated again, for its own S or for another.
    again = tmp_path / "again.json"
    assert run(["calibrate", summary["run_dir"], "--output", str(again), "--rows", "4"]) == 0
    assert SparsityPlan.load(again).values == SparsityPlan.load(plan_file).values


def test_the_readable_report_contains_the_same(trained, tmp_path, capsys):
    arguments = ["calibrate", str(trained), "--output", str(tmp_path / "plan.json"), "--rows", "6"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run([*arguments, "--force"]) == 0
    printed = capsys.readouterr().out
    assert "Fraction of zeros after step 6, on 11 validation sequences" in printed
    for site, measured in found["sites"].items():
        (line,) = (line for line in printed.splitlines() if site in line)
        shares = [f"{measured[name]:.4f}" for name in ("sparsity", "zeros_topk", "zeros_threshold", "largest_gap")]
        unseen = str(measured["experts_without_rows"])
        assert [cell.strip() for cell in line.strip("│").split("│")] == [site, "2", *shares, unseen]
    assert f"{found['loss_topk']:.4f} with exact top-K, {found['loss_threshold']:.4f} with thresholds" in printed
    assert "calibrated on     6 training sequences" in printed
    assert f"to use it         {' '.join(found['settings'])}\n" in printed


def test_s_is_that_of_the_run_or_the_requested_one(trained, tmp_path):
    def values(*arguments):
        output = tmp_path / "plan.json"
        assert run(["calibrate", str(trained), "--output", str(output), "--rows", "2", "--force", *arguments]) == 0
        return SparsityPlan.load(output)

    model = load_config(trained / "config.yaml").model
    assert values("--sparsity", "0.25").values == SparsityPlan.uniform(model, 0.25).values
    other = SparsityPlan.uniform(model, 0.125)
    other.save(tmp_path / "other.json")
    calibrated = values("--plan", str(tmp_path / "other.json"))
    assert calibrated.values == other.values and calibrated.thresholds.keys() == other.values.keys()
    requested = values(
        "model.sparsity.sites.expert_hidden=0.75", "model.sparsity.overrides=[{layers: 1, sparsity: 0.0}]"
    )
    assert requested.sparsity(0, "expert_hidden") == 0.75 and requested.sparsity(0, "expert_input") == 0.5
    assert not any(requested.values[1, "expert_hidden"]) and not any(requested.thresholds[1, "expert_hidden"])


def test_s_of_a_run_is_that_of_its_last_step_and_a_requested_s_is_not_scheduled(tmp_path):
    ramping = untrained(tmp_path, "ramping", step=3)  # one dense step, then an eighth more in each
    assert requested_plan(ramping).mean == pytest.approx(0.125)
    assert requested_plan(ramping, sparsity=0.5).mean == 0.5
    assert requested_plan(ramping, overrides=["model.sparsity.default=0.5"]).mean == 0.5
    SparsityPlan.uniform(load_config(ramping / "config.yaml").model, 0.25).save(tmp_path / "s=1.json")
    by_file = [f"model.sparsity.plan={tmp_path / 's=1.json'}", "model.sparsity.default=null"]
    assert requested_plan(ramping, overrides=by_file).mean == 0.25


WRONG = {
    "no such run": (["nothing"], "nothing does not exist; name a folder made by qsparse-moe train"),
    "no checkpoint": (["unsaved"], "unsaved/checkpoints: contains no complete checkpoint, and one is needed."),
    "no output": ([], "Missing option '--output' (see qsparse-moe calibrate --help)"),
    "output is there": (
        ["ready", "--output", "there.json"],
        "--output (there.json) exists and is not overwritten; name another file, or add --force",
    ),
    "output is a folder": (
        ["ready", "--output", "ready"],
        "--output (ready) is a folder; name a file, such as ready/pl",
    ),
    "output has no folder": (
        ["ready", "--output", "no/plan.json"],
        "--output (no/plan.json) must be in a folder that exists; create no, or name another",
    ),
    "two ways": (
        ["ready", "--sparsity", "0.5", "--plan", "there.json"],
        "--sparsity and --plan both give the S to calibrate for; keep one",
    ),
    "settings and a way": (
        ["ready", "model.sparsity.default=0.5", "--sparsity", "0.5"],
        "--sparsity and settings both give the S to calibrate for; keep one",
    ),
    "no fraction": (["ready", "--sparsity", "1"], "--sparsity (1.0) must be in [0, 1)"),
    "nothing to do": (
        ["ready", "--sparsity", "0"],
        "ready: S is 0 at every site, so there is no threshold to calibrate;",
    ),
    "a dense run": (
        ["dense"],
        "dense: S is 0 at every site, so there is no threshold to calibrate; give another S by",
    ),
    "still in its warm-up": (["early"], "early: S is 0 at every site"),
    "a router that sees sparse tokens": (
        ["sparse-router"],
        "sparse-router: its router reads the sparse tokens (model.moe.router_input is sparse), and thresholds differ",
    ),
    "another setting": (
        ["ready", "training.steps=5"],
        "training.steps does not set S, and only S may differ from the run; choose from model.sparsity.preset,",
    ),
    "the selection": (["ready", "model.sparsity.selection=topk"], "model.sparsity.selection does not set S"),
    "no override": (["ready", "0.5"], '"0.5" is not an override; write PATH=VALUE'),
    "a wrong value": (["ready", "model.sparsity.default=2"], "model.sparsity.default (2) must be"),
    "no plan file": (["ready", "--plan", "no.json"], "no.json cannot be read as a sparsity plan"),
    "no plan": (["ready", "--plan", "there.json"], "there.json: sparsity plan: not readable"),
    "a plan of another model": (
        ["ready", "--plan", "other.json"],
        "other.json: sparsity plan: layer 1, attention_input has 0 values, but the model needs 1; make the plan from",
    ),
    "no rows": (["ready", "--rows", "0"], "Invalid value for '--rows': "),
    "no device": (["ready", "--device", "tpu"], "Invalid value for '--device': "),
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    untrained(tmp_path, "ready")
    untrained(tmp_path, "unsaved", step=None)
    untrained(tmp_path, "dense", default=0.0)
    untrained(tmp_path, "early", step=1)
    text = (untrained(tmp_path, "sparse-router") / "config.yaml").read_text()
    (tmp_path / "sparse-router" / "config.yaml").write_text(text.replace("router_input: dense", "router_input: sparse"))
    (tmp_path / "there.json").write_text("mine")
    config = tiny_config(tmp_path, "other").model
    SparsityPlan.uniform(config.model_copy(update={"num_layers": 1}), 0.5).save(tmp_path / "other.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(arguments):
    output = [] if "--output" in arguments or not arguments else ["--output", "plan.json"]
    return ["calibrate", *(arguments or ["ready"]), *output]


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_message_and_code_2(arguments, message, inputs, capsys):
    before = sorted(inputs.rglob("*"))
    assert run(command(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}"), printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert sorted(inputs.rglob("*")) == before and (inputs / "there.json").read_text() == "mine"


def test_no_wrong_input_loads_torch(inputs):
    lines = [command(arguments) for arguments, _ in WRONG.values()]
    code = (
        "import sys\nfrom qsparse_moe.cli.app import run\n"
        f"print([run(line) for line in {lines!r}], {{'torch', 'numpy', 'datasets'}} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=inputs,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"{[2] * len(WRONG)} set()\n"


def test_output_that_this_user_may_not_write_is_refused(inputs, capsys, monkeypatch):
    monkeypatch.setattr(
        "qsparse_moe.cli.calibrate.os.access", lambda _, mode: mode != os.W_OK
    )  # root may write anywhere
    assert run(command(["ready"])) == 2
    assert capsys.readouterr().err == (
        "error: --output (plan.json) is in a folder without write permission; name another file\n"
    )


def test_output_made_in_the_meantime_is_not_overwritten(inputs):
    plan = requested_plan(Path("ready"))
    with pytest.raises(ConfigError, match=r"--output \(there\.json\) exists and is not overwritten"):
        write_plan(plan, Path("there.json"), force=False)
    assert Path("there.json").read_text() == "mine"
    write_plan(plan, Path("there.json"), force=True)
    assert SparsityPlan.load("there.json") == plan


def test_a_failing_disk_is_one_message(inputs, monkeypatch):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qsparse_moe.cli.calibrate.write_atomically", fail)
    with pytest.raises(ConfigError, match=r"--output \(new\.json\) cannot be written \(No space left on device\)"):
        write_plan(requested_plan(Path("ready")), Path("new.json"), force=False)


@pytest.mark.parametrize(
    "sparsity",
    [
        {},
        {"preset": "a4.8", "default": None, "schedule": {}},
        {"sites": {"expert_hidden": 0.7}, "overrides": [{"layers": 0, "sparsity": 0.1}], "selection": "statistical"},
    ],
)
def test_the_settings_that_it_prints_make_a_run_select_by_the_plan(sparsity, tmp_path):
    run_dir = untrained(tmp_path, "run", **sparsity)
    plan = requested_plan(run_dir)
    plan = plan.with_thresholds({place: (0.1,) * len(values) for place, values in plan.values.items()})
    # The name of the file is not to be read as YAML: this one ends with what would be a comment.
    output = tmp_path / "plan=1: a #2.json"
    plan.save(output)
    config = load_config(run_dir / "config.yaml")
    by_threshold = load_config(run_dir / "config.yaml", list(settings_for(config, output)))
    assert by_threshold.model.sparsity.selection == "threshold"
    assert SparsityPlan.from_config(by_threshold.model) == plan
    from qsparse_moe.config.shapes import model_sites, site_format

    for site in model_sites(config.model):
        assert site_format(by_threshold.model.sparsity, site) == site_format(config.model.sparsity, site)
