"""A run that receives Ctrl-C or SIGTERM, at moments from its start to its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.data.claims import Claims
from qsparse_moe.data.token_data import load_data
from qsparse_moe.kernels import native
from qsparse_moe.locks import acquire_lock
from qsparse_moe.runs.folder import newest_step
from tests.cli.test_run import REPOSITORY, write_inputs
from tests.support.launch import free_port

pytestmark = pytest.mark.distributed

# The program itself, which pauses at the moment that a test names and reports it.
PROGRAM = """
import sys, time
from qsparse_moe import __main__ as program

def stand_here(*_, **__):
    print("it stands there", file=sys.stderr, flush=True)
    time.sleep(600)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            stand_here()

moment = sys.argv.pop(1)
if moment == "import":
    sys.meta_path.insert(0, Finder())
elif moment == "first step":
    from qsparse_moe.training import loop
    loop.train_step = stand_here
elif moment == "after the loop":
    from qsparse_moe.cli import train
    train.summarize = stand_here
elif moment == "rendezvous":
    from qsparse_moe.training import loop
    open_distributed = loop.open_distributed
    def say_and_open(*arguments, **named):
        print("it joins the others", file=sys.stderr, flush=True)
        return open_distributed(*arguments, **named)
    loop.open_distributed = say_and_open
program.main()
"""


class Running:
    """A process whose standard error is read as it comes."""

    def __init__(self, *arguments, **environment):
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stderr))
        # extend adds line by line.
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._process.stderr.close()

    @property
    def said(self):
        return "".join(self.lines)

    def wait_for(self, text, seconds=120):
        end = time.monotonic() + seconds
        while text not in self.said:
            assert self._process.poll() is None, f"it ended by itself:\n{self.said}"
            assert time.monotonic() < end, f"{text!r} is not in:\n{self.said}"
            time.sleep(0.02)

    def end_by(self, number, seconds=20):
        """The exit code after the signal; the process must not take longer than ``seconds``."""
        self._process.send_signal(number)
        code = self._process.wait(seconds)
        self._reader.join()
        return code


def assert_one_line(said, number):
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert said.splitlines()[-1] == f"error: stopped by {name}"
    assert "Traceback" not in said and said.count("stopped by") == 1


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("import", signal.SIGINT),
        ("first step", signal.SIGTERM),
        ("after the loop", signal.SIGTERM),
    ],
)
def test_a_run_ends_at_once_when_there_is_nothing_to_save(tmp_path, moment, number):
    config = write_inputs(tmp_path)
    with Running("-c", PROGRAM, moment, "train", str(config)) as process:
        process.wait_for("it stands there")
        assert process.end_by(number) == 128 + number
        assert_one_line(process.said, number)


@pytest.mark.parametrize(("wait", "number"), [("operators", signal.SIGTERM), ("data", signal.SIGINT)])
def test_a_run_ends_at_once_while_it_waits_for_a_lock(tmp_path, monkeypatch, wait, number):
    config = write_inputs(tmp_path)
    arguments = ["-m", "qsparse_moe", "train", str(config)]
    if wait == "operators":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
        library = native.library_path()
        library.parent.mkdir(parents=True)
        held, waits = acquire_lock(library.with_name(f"{library.name}.lock")), "waiting for the C++ operators, held by"
        # Without the experts' operators, which would be compiled first.
        arguments += ["model.sparsity.backend=native", "model.moe.backend=loop"]
    else:
        load_data(load_config(config).data)
        (table,) = (tmp_path / "cache" / "tables").iterdir()
        shutil.rmtree(table)
        table.mkdir()
        held, waits = Claims(table).take("shard-00000"), "waiting for the tokens in "
    with held, Running(*arguments) as process:
        process.wait_for(waits)
        assert process.end_by(number) == 128 + number
        assert_one_line(process.said, number)


@pytest.mark.skipif(native.why_not(native.torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_a_run_ends_at_once_while_it_compiles(tmp_path):
    config = write_inputs(tmp_path)
    extensions = tmp_path / "extensions"
    arguments = ["-m", "qsparse_moe", "train", str(config), "model.sparsity.backend=native"]
    with Running(*arguments, TORCH_EXTENSIONS_DIR=str(extensions)) as process:
        process.wait_for("compiling the C++ operators for this machine, once")
        assert process.end_by(signal.SIGTERM) == 143
        assert_one_line(process.said, signal.SIGTERM)
    assert list((extensions / "qsparse_moe").iterdir()) == []


def test_a_run_ends_soon_while_it_waits_in_cpp_for_another_rank(tmp_path):
    """Python runs no handler there."""
    config = write_inputs(tmp_path)
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": "0"}
    with Running("-c", PROGRAM, "rendezvous", "train", str(config), **launcher, LOCAL_RANK="0") as process:
        process.wait_for("it joins the others")
        time.sleep(1.0)
        assert process.end_by(signal.SIGTERM) == 143
        assert_one_line(process.said, signal.SIGTERM)


def test_from_the_second_step_on_a_run_saves_first(tmp_path):
    number = signal.SIGINT
    config = write_inputs(tmp_path)
    with Running("-m", "qsparse_moe", "train", str(config), "training.steps=100000", "metrics.interval=1") as process:
        process.wait_for("step 1/")
        assert process.end_by(number) == 128 + number
        assert f"{number.name}: stopping after this step, with a checkpoint" in process.said
        step = newest_step(tmp_path / "runs" / "mine")
        assert f"{number.name}: stopped after step {step} of 100000 with a checkpoint" in process.said
