"""Kill a run by SIGKILL at random moments, resume it each time, and compare its end with that of an uninterrupted run.

    python -m tests.distributed.random_kills FOLDER --kills 100
    python -m tests.distributed.random_kills FOLDER --kills 30 --ranks 2 --compiled --moments write,step,save,load

The moments take turns: while the run loads (its first ones while the C++ operators are compiled, where a compiler is
there), in a step, while a checkpoint is written in the background, in an evaluation, while the state is copied for a
checkpoint. Two ranks are killed together, or every fifth time one of them alone.

A checkpoint is written while the next steps run, and the next one waits for it, so a kill costs at most the steps of
two intervals: more is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.kernels import native
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.training.checkpoint.store import list_checkpoints
from tests.distributed.test_layouts import state_of
from tests.support.launch import kill_group, start
from tests.support.metrics import same_in_every_run
from tests.support.runs import LAYOUTS, tiny_config, write_text

MOMENTS = ("load", "step", "write", "evaluation", "save")
INTERVAL = 2


def main() -> None:
    """Parse the command line; the exit code is 1 where the two runs differ or anything is left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", default=",".join(MOMENTS), help="in this order, again and again")
    parser.add_argument("--compiled", action="store_true", help="with the operators that this machine has compiled")
    given = parser.parse_args()
    moments = given.moments.split(",")
    if unknown := set(moments) - set(MOMENTS):
        parser.error(f"--moments: {', '.join(sorted(unknown))} is none of {', '.join(MOMENTS)}")
    found = run_with_kills(
        given.folder.resolve(),
        kills=given.kills,
        ranks=given.ranks,
        seed=given.seed,
        moments=moments,
        compiles=not given.compiled,
    )
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["differences"] or found["left_behind"]))


def run_with_kills(
    folder: Path,
    *,
    kills: int,
    ranks: int,
    seed: int = 0,
    moments: Sequence[str] = MOMENTS,
    compiles: bool = True,
) -> dict[str, Any]:
    """Train one run with ``kills`` kills and one without; how often each moment was met, and what differs at the end.

    Args:
        folder: an empty one, for everything.
        kills: how many.
        ranks: 1 without a launcher, or more with it.
        seed: of the delays.
        moments: what the run has begun when it is killed, in turn.
        compiles: begin without compiled operators, so that kills meet the compiler; else the machine's are used.
    """
    write_text(folder / "text")
    environment = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")} if compiles else {}
    steps = 4 * kills
    killed, whole = (_config(folder, name, steps=steps, ranks=ranks) for name in ("killed", "whole"))
    draw = random.Random(seed)
    counts: dict[str, int] = {}
    lost: dict[int, int] = {}
    begin = time.monotonic()
    for number in range(kills):
        moment = "compile" if compiles and number < max(1, kills // 12) else moments[number % len(moments)]
        newest = _newest(killed)
        met, begun = _kill_once(folder, killed, moment, number, ranks, draw, environment)
        counts[met] = counts.get(met, 0) + 1
        steps_lost = newest + begun - _newest(killed)
        lost[steps_lost] = lost.get(steps_lost, 0) + 1
        seconds = time.monotonic() - begin
        print(
            f"{number + 1}/{kills} {met}, newest step {_newest(killed)}, {steps_lost} lost, {seconds:.0f} s", flush=True
        )
        assert steps_lost <= 2 * INTERVAL, f"{steps_lost} steps lost, with a checkpoint every {INTERVAL} steps"
    for config in (killed, whole):
        code = _start(folder, config, ranks, environment, slow=False).wait(900)
        assert code == 0, f"{config.training.name} ended with {code}:\n{(folder / 'log.txt').read_text()[-3000:]}"
    return {
        "kills": counts,
        "kills_by_steps_lost": dict(sorted(lost.items())),
        "steps": steps,
        "differences": _differences(_run_dir(killed), _run_dir(whole)),
        "left_behind": _left_behind(folder),
    }


def _config(folder: Path, name: str, *, steps: int, ranks: int) -> RunConfig:
    backend = "native" if native.why_not(torch.device("cpu")) is None else "torch"
    schedule = {"shape": "linear", "warmup_steps": 1, "ramp_steps": steps - 2}
    settings = LAYOUTS["torch" if ranks == 1 else "zero2"] | {"resume": True, "steps": steps}
    settings |= {"checkpoint_interval": INTERVAL, "keep_last": 2, "evaluation_interval": 3}
    config = tiny_config(
        folder,
        name,
        model={
            "hidden_size": 40,
            "num_layers": 2,
            "num_heads": 2,
            "head_size": 10,
            "vocab_size": 257,
            "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "grouped"},
            "sparsity": {"default": 0.5, "backend": backend, "schedule": schedule},
        },
        **settings,
    )
    # A window that kills at any moment fall into.
    changes = {"tensorboard": False, "dead_expert_window": 7}
    return config.model_copy(update={"metrics": config.metrics.model_copy(update=changes)})


def _start(
    folder: Path, config: RunConfig, ranks: int, environment: dict[str, str], *, slow: bool
) -> subprocess.Popen[bytes]:
    file = folder / f"{config.training.name}.yaml"
    file.write_text(config_to_yaml(config))
    more = environment | {"KILLED_RUN_MOMENTS": str(folder / "moments"), "KILLED_RUN_SLOW": "1" if slow else ""}
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        with (folder / "log.txt").open("ab") as log:
            script = str(Path(__file__).with_name("killed_run.py"))
            return start([script, "train", str(file)], ranks=ranks, output=log)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _kill_once(
    folder: Path,
    config: RunConfig,
    moment: str,
    number: int,
    ranks: int,
    draw: random.Random,
    environment: dict[str, str],
) -> tuple[str, int]:
    """Start the run and kill it; return the last operation that it had begun, and how many steps it had begun."""
    moments = folder / "moments"
    moments.unlink(missing_ok=True)
    process = _start(folder, config, ranks, environment, slow=True)
    try:
        wanted = {"load": "start", "compile": "compile"}.get(moment, moment)
        _wait_for(moments, wanted, draw.randint(1, 2) if moment in ("step", "save", "write") else 1, process, folder)
        time.sleep(draw.uniform(0, {"load": 4.0, "compile": 8.0}.get(moment, 0.06)))
        met = _seen(moments)[-1].split()[0]
        if ranks > 1 and number % 5 == 2:
            rank = draw.randrange(ranks)
            pids = [line.split()[2] for line in _seen(moments) if line.startswith(f"start {rank} ")]
            if pids:
                os.kill(int(pids[0]), signal.SIGKILL)
                process.wait(120)
    finally:
        if process.poll() is None:
            kill_group(process)
    return met, sum(line.split()[:2] == ["step", "0"] for line in _seen(moments))


def _wait_for(moments: Path, wanted: str, times: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + 900
    while sum(line.split()[0] == wanted for line in _seen(moments)) < times:
        log = folder / "log.txt"
        assert process.poll() is None, f"the run ended by itself ({process.returncode}):\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"the run hangs before its {wanted}:\n{log.read_text()[-3000:]}"
        time.sleep(0.005)


def _seen(moments: Path) -> list[str]:
    return moments.read_text().splitlines() if moments.exists() else []


def _run_dir(config: RunConfig) -> Path:
    return Path(config.training.output_dir) / config.training.name


def _newest(config: RunConfig) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    paths = list_checkpoints(_run_dir(config))
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


def _differences(killed: Path, whole: Path) -> list[str]:
    have, want = ([same_in_every_run(row) for row in read_metrics(run / "metrics.jsonl")] for run in (killed, whole))
    if [row["step"] for row in have] != [row["step"] for row in want]:
        return [f"logged steps: {len(have)} and {len(want)}"]
    found = []
    for left, right in zip(have, want, strict=True):
        found += [
            f"step {left['step']}: {name} {left.get(name)} {right.get(name)}"
            for name in sorted(left.keys() | right.keys())
            if left.get(name) != right.get(name)
        ]
    states = state_of(killed)[1], state_of(whole)[1]
    found += [f"tensor {key}" for key in states[1] if not states[0][key].equal(states[1][key])]
    return found[:20]


def _left_behind(folder: Path) -> list[str]:
    """Return locks, and files and folders with temporary names."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".lock", ".new", ".part")
        or path.name in ("lock", ".lock")
        or ".partial-" in path.name
        or path.name.startswith(".saving-")
    )


if __name__ == "__main__":
    main()
