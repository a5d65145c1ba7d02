"""The devices that the runs of a grid are given, and the end of a grid after a signal."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qsparse_moe.ablation.grid.children import Children, _wait_for_group
from qsparse_moe.ablation.grid.placement import Placement
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.folder import newest_step

CONFIG = Path("x.yaml")
BASE = """
model:
  {hidden_size: 16, num_layers: 1, num_heads: 2, moe: {num_experts: 2, experts_per_token: 2, expert_hidden_size: 16}}
data: {sequence_length: 32, sources: [{max_bytes: 200000}]}
training: {steps: 1000000, global_batch_size: 2, micro_batch_size: 2, engine: torch, device: cpu, evaluation_rows: 4}
metrics: {interval: 5, tensorboard: false}
"""
SLEEPER = """
import signal, sys, time
def end(*_):
    print("saved", flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_one_process_needs_no_launcher_and_several_processes_or_an_explicit_request_use_it():
    assert "qsparse_moe.training.launcher" not in Placement().command(CONFIG, ())
    several = Placement(ranks=2).command(CONFIG, ())
    assert several[several.index("--num_gpus") + 1] == "2" and several[-3:] == ["qsparse_moe", "train", "x.yaml"]
    assert "qsparse_moe.training.launcher" in Placement(launcher="deepspeed").command(CONFIG, ())


def test_runs_divide_the_devices():
    placement = Placement(ranks=2, jobs=2, devices=("0", "1", "4", "5"))
    first, second = placement.slots()
    assert placement.environment(second, 8, given={}) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "4,5"}
    command = placement.command(CONFIG, first)
    assert command[command.index("--include") + 1] == "localhost:0,1" and "--num_gpus" not in command
    assert Placement(jobs=3).environment((), 2, given={}) == {"OMP_NUM_THREADS": "1"}
    ports = [one[one.index("--master_port") + 1] for one in (command, placement.command(CONFIG, second))]
    assert len({*ports, "29500"}) == 3, "launchers at one time have ports of their own"


def test_a_number_of_threads_that_the_user_has_set_is_respected():
    given = {"OMP_NUM_THREADS": "3", "HOME": "/home"}
    assert Placement(jobs=2).environment((), 8, given=given) == given
    devices = Placement(devices=("1",)).environment(("1",), 8, given=given | {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert devices == given | {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"devices": ("0", "1"), "jobs": 2, "ranks": 2},
            r"--devices \(0,1\) must name 4 devices for 2 runs.* 2 processes.*set --jobs 1",
        ),
        (
            {"devices": ("7",), "jobs": 3, "ranks": 2},
            r"--devices \(7\) must name 6 devices for 3 runs at a time \(--jobs\) of 2 processes each \(--ranks\); "
            r"name more devices, or set --jobs 1$",
        ),
        (
            {"devices": tuple("01234"), "jobs": 3, "ranks": 2},
            r"--devices \(0,1,2,3,4\) must name 6 devices .* or set --jobs 2$",
        ),
        ({"devices": ("0", "0")}, r'--devices \("0,0"\) must be different indices of CUDA devices, such as 0,1'),
        ({"devices": ("cuda:0",)}, r'--devices \("cuda:0"\) must be different indices'),
        ({"launcher": "none", "ranks": 2}, "--launcher none starts one process per run, but --ranks is 2; leave"),
    ],
)
def test_an_impossible_placement_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Placement(**settings)


def test_a_signal_lets_children_save_and_starts_no_further_run(tmp_path):
    log, codes = tmp_path / "log", []

    def work():
        codes.append(children.run([sys.executable, "-c", SLEEPER], log, os.environ))
        codes.append(children.run([sys.executable, "-c", SLEEPER], log, os.environ))

    before = signal.getsignal(signal.SIGINT)
    with Children() as children:
        thread = threading.Thread(target=work)
        thread.start()
        wait_for(lambda: log.exists() and "ready" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
        thread.join(60)
    assert (codes, children.stopped_by, log.read_text()) == ([143, None], signal.SIGINT, "ready\nsaved\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    log, codes = tmp_path / "log", []
    deaf = SLEEPER.replace('print("saved", flush=True); sys.exit(143)', "print('deaf', flush=True)")
    with Children() as children:
        thread = threading.Thread(
            target=lambda: codes.append(children.run([sys.executable, "-c", deaf], log, os.environ))
        )
        thread.start()
        wait_for(lambda: log.exists() and "ready" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: "deaf" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
        thread.join(60)
    assert codes == [-signal.SIGKILL]


@pytest.mark.parametrize(("lives", "waited"), [(0.0, 0.0), (3.0, 3.0), (1000.0, 45.0)])
def test_a_stopped_grid_waits_for_the_ranks_that_still_save_but_not_for_ever(monkeypatch, lives, waited):
    now, asked = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 0.5))
    monkeypatch.setattr("qsparse_moe.ablation.grid.children.time", clock)
    monkeypatch.setattr(
        "qsparse_moe.ablation.grid.children._send",
        lambda group, number: asked.append((group, number)) or now[0] < lives,
    )
    _wait_for_group(4711)
    assert now == [waited] and set(asked) == {(4711, 0)}


@pytest.mark.slow
def test_a_stopped_grid_saves_its_run_and_resumes_from_it(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mini.yaml").write_text("base: base.yaml\nseeds: [0]\naxes: {model.sparsity.default: [0, 0.5]}\n")
    command = [sys.executable, "-m", "qsparse_moe", "ablate", "mini.yaml", "--output-dir", "out"]
    run = tmp_path / "out" / "mini" / "S0-seed0"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as grid:
        wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
        grid.send_signal(signal.SIGTERM)
        assert grid.wait(120) == 128 + signal.SIGTERM
    saved = newest_step(run)
    assert saved and not (tmp_path / "out" / "mini" / "S0.5-seed0").exists()
    rows = [json.loads(line) for line in (run.parent / "results.jsonl").read_text().splitlines()]
    assert [row["error"].split(",")[0] for row in rows] == ["stopped", "not started"]
    steps = saved + 5
    again = subprocess.run([*command, f"training.steps={steps}"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    metrics = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics == sorted(set(metrics)) and metrics[-1] == steps
    assert f"step {saved}" in (run.parent / "S0-seed0.log").read_text()
    assert "2/2  S0.5-seed0" in again.stderr and "best " in again.stderr
