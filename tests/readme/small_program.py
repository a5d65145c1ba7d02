"""Replace ``qsparse-moe`` and ``deepspeed`` in the README's commands by the same program with a small run.

The settings that make it small follow the README's own arguments, so that those are parsed too.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

SMALL_RUN = [
    "training.warmup_steps=0",
    "training.evaluation_rows=4",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.moe.expert_hidden_size=32",
    "data.sequence_length=32",
    "data.sources.0.max_bytes=1000000",
    "metrics.interval=1",
]
SMALL = {
    "generate": ["--max-tokens", "5"],
    "calibrate": ["--rows", "8"],
    "bench": ["--layers", "1", "--hidden-size", "64", "--rounds", "1", "--precision", "fp32"],
}


def smaller(arguments: list[str]) -> list[str]:
    """The arguments with a hundredth of the steps, or two, of a small model, and short outputs."""
    verb = next((word for word in arguments if word in ("train", *SMALL)), "")
    if verb != "train":
        return [*arguments, *SMALL.get(verb, [])]
    given = re.search(r"training\.steps=(\d+)", " ".join(arguments))
    steps = int(given[1]) // 100 if given else 2
    if any("ramp_steps" in argument for argument in arguments):
        arguments = [*arguments, "model.sparsity.schedule.ramp_steps=1"]
    return [*arguments, *SMALL_RUN, f"training.steps={steps}", f"data.cache_dir={os.environ['README_CACHE']}"]


def serves(command: list[str]) -> bool:
    """Return whether TensorBoard prints its address; it is ended then."""
    # A group of its own: the page is served by processes below the one that is started here.
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = any("http://" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    return said


def main(program: str, arguments: list[str]) -> int:
    """Run the program; its exit code."""
    if program == "deepspeed":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port, *smaller(arguments)]
        return subprocess.run(command, check=False).returncode
    command = [sys.executable, "-m", "qsparse_moe", *smaller(arguments)]
    if arguments[0] == "tensorboard":
        return 0 if serves(command) else 1
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
