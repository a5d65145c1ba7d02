"""The root of the command line: verbs, exit codes, one message on standard error, ranks, no early torch."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from matplotlib.figure import Figure

from qsparse_moe.ablation.sensitivity.figures import _save
from qsparse_moe.cli import app as app_module
from qsparse_moe.cli.app import VERBS, build_app, main, run
from qsparse_moe.cli.console import print_json, write_json
from qsparse_moe.config.load import load_config
from qsparse_moe.errors import BackendUnavailable, CheckpointError, ConfigError, DataError, TrainingDiverged, naming
from qsparse_moe.runs.folder import write_atomically
from qsparse_moe.sparsity.plan import SparsityPlan

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "configs" / "tiny.yaml")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    waited = []
    monkeypatch.setattr("qsparse_moe.cli.console.time.sleep", waited.append)
    return waited


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_script_of_the_package_is_main():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"qsparse-moe": "qsparse_moe.__main__:main"}


def test_module_runs_the_same_program():
    done = python("-m", "qsparse_moe", "--local_rank=0", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "qsparse-moe 0.1.0\n", "")


def test_without_a_verb_the_help_names_every_verb(capsys):
    assert run([]) == 0
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.partition("Commands:\n")[2].splitlines() if line.strip()} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_its_help_and_explains_every_option(verb, capsys):
    assert run([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: qsparse-moe {verb}")
    command = typer.main.get_command(build_app()).commands[verb]
    assert command.help
    for below in getattr(command, "commands", {"": command}).values():
        for parameter in below.params:
            assert parameter.help, parameter.name


def help_texts(command):
    """Every help text of a command, of its parameters and of the commands below it."""
    yield command.help or ""
    for parameter in command.params:
        yield getattr(parameter, "help", None) or ""
    for below in getattr(command, "commands", {}).values():
        yield from help_texts(below)


def test_every_setting_that_a_help_gives_as_an_example_is_one():
    texts = " ".join(help_texts(typer.main.get_command(build_app())))
    examples = set(re.findall(r"such as ([a-z_.]+=[^\s,;]*[^\s,;.])", texts))
    assert {"training.steps=50", "model.sparsity.default=0.5", "metrics.interval=20"} <= examples
    for example in examples:
        name, _, value = example.partition("=")
        config = load_config(Path(TINY), [example])
        for part in name.split("."):
            config = getattr(config, part)
        assert str(config) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: No such command 'trian'. Did you mean 'train'? (see qsparse-moe --help)\n"),
        (["xyz"], "error: No such command 'xyz' (see qsparse-moe --help)\n"),
        (["train"], "error: Missing argument 'config' (see qsparse-moe train --help)\n"),
        (["describe", TINY, "--jsno"], "error: No such option: --jsno (Possible options: --json) (see qsparse-moe"),
        (["generate", "x", "--max-tokens", "0"], "error: Invalid value for '--max-tokens': "),
        (["train", "tiny.yml"], "error: tiny.yml does not exist; name a YAML file, such as configs/tiny.yaml\n"),
        (["train", TINY, "training.stps=1"], "error: training.stps is not a setting; did you mean training.steps?\n"),
        (["describe", TINY, "x"], 'error: "x" is not an override; write PATH=VALUE, such as training.steps=50\n'),
    ],
)
def test_wrong_input_is_one_message_and_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_all_broken_rules_are_printed(capsys):
    assert run(["train", TINY, "training.steps=0", "model.num_heads=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {TINY} breaks 2 rules:"
    assert [line.split()[0] for line in lines[1:]] == ["training.steps", "model.num_heads"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("what"), 2),
        (DataError("what"), 2),
        (BackendUnavailable("what"), 2),
        (CheckpointError("what"), 2),
        (TrainingDiverged("what"), 1),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_known_error_is_printed_once_over_all_ranks(error, code, rank, capsys, monkeypatch):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr("qsparse_moe.cli.describe.load_config", fail)
    monkeypatch.setenv("RANK", rank)
    assert run(["describe", TINY]) == code
    assert capsys.readouterr().err == ("error: what\n" if rank == "0" else "")


def test_a_usage_error_is_printed_once_over_all_ranks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run(["trian"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_ranks_wait_for_the_message_of_rank_zero_before_they_end(rank, one_process, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert run(["trian"]) == 2
    assert [seconds > 1 for seconds in one_process] == ([] if rank == "0" else [True])


def test_an_internal_error_prints_its_traceback(monkeypatch):
    def fail(*_arguments):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("qsparse_moe.cli.describe.load_config", fail)
    with pytest.raises(ZeroDivisionError):
        run(["describe", TINY])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_that_names_the_file(number, capsys, monkeypatch, tmp_path):
    def fail(*_arguments):
        with naming(tmp_path / "figure.png"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("qsparse_moe.cli.describe.load_config", fail)
    assert run(["describe", TINY]) == 2
    printed = capsys.readouterr().err
    assert printed == (
        f"error: {tmp_path}/figure.png: cannot be written ({os.strerror(number)}); free some "
        "space, or write to another disk\n"
    )


def test_another_operating_system_error_prints_its_traceback(monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("qsparse_moe.cli.describe.load_config", fail)
    with pytest.raises(OSError, match="Input/output"):
        run(["describe", TINY])


FULL = Path("/dev/full")
on_full_disk = pytest.mark.skipif(not FULL.exists(), reason="a device that is always full")


@on_full_disk
def test_plans_atomic_files_and_results_name_the_file_when_the_disk_is_full(tmp_path):
    plan = SparsityPlan.uniform(load_config(Path(TINY)).model, 0.5)
    writers = (plan.save, lambda file: write_json(file, {"a": 1}), lambda file: _save(Figure(), file))
    for write in writers:
        link = tmp_path / "link.json"
        link.symlink_to(FULL)
        with pytest.raises(OSError, match="No space left") as error:
            write(link)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(link))
        link.unlink()
    (tmp_path / ".report.md.new").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(tmp_path / "report.md", "text")
    assert error.value.filename == str(tmp_path / "report.md")


@on_full_disk
def test_a_result_on_a_full_standard_output_is_one_message():
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qsparse_moe", "describe", TINY, "--json"],
            cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: a file or standard output: cannot be written (No space left on device)")
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_130(capsys, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qsparse_moe.cli.describe.load_config", stop)
    assert run(["describe", TINY]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_main_ends_the_process_with_the_code():
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2


@pytest.mark.parametrize(("rank", "shown"), [("0", ["news", "trouble"]), ("1", ["trouble"])])
def test_log_goes_to_standard_error_from_rank_zero(rank, shown, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    run(["--version"])
    run(["--version"])  # a second call adds no second handler
    capsys.readouterr()
    logging.getLogger("qsparse_moe.training").info("news")
    logging.getLogger("qsparse_moe.training").error("trouble")
    printed = capsys.readouterr()
    assert printed.err.split() == shown
    assert printed.out == ""


def test_json_of_a_result_is_strict(capsys):
    print_json({"perplexity": float("inf"), "rows": [1.0, float("nan")], "name": "é"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"perplexity": None, "rows": [1.0, None], "name": "é"}


BROKEN = ["train", "configs/tiny.yaml", "model.sparsity.shedule.shape=linear"]
WRONG_LAYOUT = ["train", "configs/tiny.yaml", "training.global_batch_size=8", "training.micro_batch_size=8"]


@pytest.mark.parametrize(("arguments", "world_size"), [(BROKEN, "1"), (WRONG_LAYOUT, "2")])
def test_broken_run_is_refused_fast_before_torch_is_imported(arguments, world_size):
    code = (
        "import sys, time; began = time.process_time()\n"
        "from qsparse_moe.cli.app import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "print(code, heavy, time.process_time() - began, sep='|')\n"
    )
    done = python("-c", code, WORLD_SIZE=world_size)
    exit_code, heavy, seconds = done.stdout.strip().split("|")
    assert (exit_code, heavy) == ("2", "set()"), done.stderr
    assert done.stderr.startswith("error: ")
    # CPU time, because wall-clock time depends on the load of the machine. Measured 0.35 s.
    assert float(seconds) < 2


def test_existing_run_folder_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.yaml").touch()
    arguments = ["train", "configs/tiny.yaml", f"training.output_dir={tmp_path}"]
    code = f"from qsparse_moe.cli.app import run; import sys; print(run({arguments!r}), 'torch' in sys.modules)"
    done = python("-c", code)
    assert done.stdout == "2 False\n"
    assert "training.resume" in done.stderr


def test_verbs_are_modules_of_the_command_line_package():
    folder = Path(app_module.__file__).parent
    assert all((folder / f"{verb.replace('-', '_')}.py").is_file() for verb in VERBS)
