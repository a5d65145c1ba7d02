"""The Slurm job on two simulated nodes, both on this machine, without ssh and Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsparse_moe
from qsparse_moe.metrics.jsonl import read_metrics

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" && wait $first
"""
TINY_RUN = [
    "configs/tiny.yaml",
    "training.steps=2",
    "training.warmup_steps=1",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.moe.expert_hidden_size=32",
    "data.sequence_length=32",
    "data.sources.0.max_bytes=1000000",
    "training.evaluation_rows=4",
    "training.device=cpu",
    "metrics.interval=1",
]


def add_program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def job(tmp_path):
    """Return the variables that Slurm sets for a job of two nodes with one slot each, without the set-up."""
    programs = tmp_path / "bin"
    programs.mkdir()
    add_program(programs, "srun", SRUN)
    add_program(programs, "scontrol", "#!/bin/sh\necho localhost; echo 127.0.0.1\n")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text(
        f'repository="{tmp_path}"\npython="{sys.executable}"\ncd "{REPOSITORY}"\n'
    )
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "two",
        "DS_ACCELERATOR": "cpu",
    }


@pytest.mark.distributed
@pytest.mark.slow
def test_job_trains_one_run_over_its_nodes(job, tmp_path):
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    folders = [f"training.output_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    command = ["bash", script, *TINY_RUN, *folders]
    result = subprocess.run(command, env=job, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert not list(tmp_path.glob("hosts-*"))


def test_the_warning_before_the_time_limit_reaches_the_ranks_and_does_not_end_the_launcher(job, tmp_path):
    """Slurm sends it to every process of a step."""
    add_program(tmp_path / "bin", "launcher", '#!/bin/sh\nkill -USR1 $$\necho "node $SLURM_NODEID continues"\n')
    with (tmp_path / "launch" / "setup.sh").open("a") as setup:
        setup.write("python=launcher\n")
    script = REPOSITORY / "launch" / "slurm.sbatch"
    assert "#SBATCH --signal=USR1@300\n" in script.read_text()
    result = subprocess.run(["bash", str(script), "x.yaml"], env=job, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["node 0 continues", "node 1 continues"]


@pytest.mark.distributed
@pytest.mark.slow
def test_job_of_an_array_trains_its_run_of_a_grid_through_the_launcher(job, tmp_path):
    add_program(tmp_path / "bin", "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (tmp_path / "mini.yaml").write_text(
        f"base: {REPOSITORY / 'configs' / 'tiny.yaml'}\nseeds: [0]\naxes: {{model.sparsity.default: [0, 0.5]}}\n"
    )
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    small = [*TINY_RUN[1:], f"data.cache_dir={tmp_path / 'cache'}"]
    command = ["bash", script, "ablate", str(tmp_path / "mini.yaml"), *small, "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(
        command, env=job | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    folder = tmp_path / "out" / "mini"
    assert sorted(path.name for path in folder.iterdir()) == ["S0.5-seed0", "S0.5-seed0.log", "S0.5-seed0.yaml"]
    assert [row["step"] for row in read_metrics(folder / "S0.5-seed0" / "metrics.jsonl")] == [1, 2]
    assert "deepspeed" in (folder / "S0.5-seed0.log").read_text()


def test_a_grid_outside_of_an_array_is_refused_with_the_way_out(job):
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    result = subprocess.run(["bash", script, "ablate", "x.yaml"], env=job, capture_output=True, text=True)
    assert result.returncode != 0
    assert "SLURM_ARRAY_TASK_ID: is set by Slurm in an array" in result.stderr and "--array=0-11" in result.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "limit", "requeued"),
    [
        (138, None, "2", True),
        (143, "1", "2", True),
        (138, "2", "2", False),
        (138, None, None, False),
        (1, None, "2", False),
        (0, None, "2", False),
    ],
)
def test_a_stopped_run_is_requeued_until_the_limit_and_resumes(job, tmp_path, code, restarts, limit, requeued):
    add_program(tmp_path / "bin", "scontrol", '#!/bin/sh\necho "$@" >>scontrol.log; test "$1" = requeue || echo one\n')
    add_program(
        tmp_path / "bin", "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n'
    )
    add_program(tmp_path / "bin", "launcher", f'#!/bin/sh\necho "$@"\nexit {code}\n')
    with (tmp_path / "launch" / "setup.sh").open("a") as setup:
        setup.write(f'python=launcher\ncd "{tmp_path}"\n')
    script = REPOSITORY / "launch" / "slurm.sbatch"
    variables = {"MAX_RESTARTS": "4", "SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": limit}
    environment = job | {name: value for name, value in variables.items() if value is not None}
    result = subprocess.run(["bash", str(script), "x.yaml"], env=environment, capture_output=True, text=True)
    assert result.returncode == code
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert asked == ["show hostnames two", f"requeue {job['SLURM_JOB_ID']}"][: 1 + requeued]
    assert ("requeued, for the" in result.stderr) == requeued
    words = result.stdout.split()
    assert words[-1] == ("x.yaml" if restarts is None else "training.resume=true")
    assert words[words.index("--max_restarts") + 1] == "4"
    assert "#SBATCH --requeue\n" in script.read_text(), "Slurm requeues a preempted job only if the job allows it"


@pytest.mark.parametrize("name", ["SLURM_SUBMIT_DIR", "SLURM_GPUS_ON_NODE"])
def test_outside_of_a_job_with_gpus_the_way_out_is_printed(job, name):
    del job[name]
    result = subprocess.run(["bash", REPOSITORY / "launch" / "slurm.sbatch"], env=job, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"{name}: is set by Slurm" in result.stderr and "sbatch" in result.stderr


def test_multi_node_needs_a_file_of_hosts(tmp_path):
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "multi_node.sh"
    script.write_text((REPOSITORY / "launch" / "multi_node.sh").read_text())
    setup = (REPOSITORY / "launch" / "setup.sh").read_text()
    fail = setup[setup.index("fail() {") : setup.index("}\n", setup.index("fail() {")) + 2]
    (tmp_path / "launch" / "setup.sh").write_text(fail)
    command = ["bash", str(script), "configs/base.yaml"]
    result = subprocess.run(command, env=os.environ | {"HOSTFILE": "gone"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "HOSTFILE is 'gone', which is not a file: name one with a line" in result.stderr
