"""Every command of the README is run: as it stands, with small programs of the same name behind it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.training.restarts import take_max_restarts
from tests.readme.blocks import OWN_CI_STEP, REPOSITORY, blocks, commands, launch_commands, session_commands

SMALL_PROGRAM = Path(__file__).with_name("small_program.py")
RECORDER = """#!/bin/sh
case "$*" in *qsparse_moe.training.launcher*) printf '%s\\n' "$@" >"{folder}/call-$$";; *) exec {python} "$@";; esac
"""
SBATCH = """#!/bin/bash
[[ $1 == --nodes=* ]] && shift
SLURM_SUBMIT_DIR="$PWD" SLURM_GPUS_ON_NODE=8 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n bash "$@"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@"
"""


def add_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder as the user's: configs, scripts, an environment to activate; programs of our making first in PATH."""
    for name in ("configs", "launch"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name in ("qsparse-moe", "deepspeed"):
        arguments = shlex.join([sys.executable, str(SMALL_PROGRAM), name])
        add_program(tmp_path / "bin", name, f'#!/bin/sh\nexec {arguments} "$@"\n')
    return tmp_path


def run_session(lines: list[str], folder: Path, **environment: str) -> str:
    script = "set -euo pipefail\n" + "".join(f"echo {shlex.quote('+ ' + line)} >&2\n{line}\n" for line in lines)
    known = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "README_CACHE": str(folder / "cache")}
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=known | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_the_commands_of_the_session_are_found_in_the_readme():
    assert len(session_commands()) >= 8
    assert set(OWN_CI_STEP) <= set(commands())


@pytest.mark.distributed
@pytest.mark.slow
def test_session_runs_from_its_first_command_to_its_last(checkout):
    output = run_session(session_commands(), checkout)
    assert "bits_per_byte" in output and "def __init__(self" in output
    steps = [row["step"] for row in read_metrics(checkout / "runs" / "first" / "metrics.jsonl")]
    assert steps == [1, 2]


def test_every_script_that_needs_its_own_ci_step_has_one():
    steps = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    for command in OWN_CI_STEP:
        assert any(step == command or step.startswith(f"{command} ") for step in steps), command


def recorded_calls(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted(folder.glob("call-*"))]


def test_scripts_for_more_machines_start_the_launcher_with_what_it_and_train_accept(checkout):
    recorder = checkout / "bin" / "recorder"
    add_program(recorder.parent, "recorder", RECORDER.format(folder=checkout, python=shlex.quote(sys.executable)))
    setup = checkout / "launch" / "setup.sh"
    before, made, after = setup.read_text().partition("\nset_up\n")
    assert made, "the environment is no longer made by set_up"
    setup.write_text(f"{before}\npython={shlex.quote(str(recorder))}\n{after}")
    add_program(checkout / "bin", "sbatch", SBATCH)
    add_program(checkout / "bin", "srun", SRUN)
    add_program(checkout / "bin", "scontrol", "#!/bin/sh\necho worker-1; echo worker-2\n")
    lines = launch_commands()
    run_session(lines, checkout)
    calls = recorded_calls(checkout)
    assert len(calls) == len([line for line in lines if "launch/" in line]) == 4
    from deepspeed.launcher.runner import parse_args

    for call in calls:
        assert call[:2] == ["-m", "qsparse_moe.training.launcher"]
        # The launcher takes its own option and leaves the others to DeepSpeed's.
        arguments, max_restarts = take_max_restarts(call[2:])
        assert max_restarts == 0
        launch = parse_args(arguments)
        assert launch.module and launch.user_script == "qsparse_moe" and launch.user_args[0] == "train"
        load_config(REPOSITORY / launch.user_args[1], launch.user_args[2:])


def test_python_example_runs(checkout):
    (program,) = blocks("python")
    result = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "tensor" in result.stdout


def test_yaml_examples_are_configurations(tmp_path):
    texts = blocks("yaml")
    assert len(texts) >= 2
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        load_config(tmp_path / f"{number}.yaml")
