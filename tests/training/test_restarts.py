"""When a failed run is restarted, and what is said; the attempts are fakes that leave checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsparse_moe.errors import ConfigError
from qsparse_moe.training.restarts import ERROR_FILE, record_error, run_with_restarts, take_max_restarts

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path):
    """Return a function that runs attempts, each ``(exit code, step of the newest checkpoint, error)``."""
    (tmp_path / "run.yaml").write_text((REPOSITORY / "configs" / "tiny.yaml").read_text())
    settings = [f"training.output_dir={tmp_path}", "training.name=run", "training.steps=100"]
    arguments = ["--num_gpus", "2", "--module", "qsparse_moe", "train", str(tmp_path / "run.yaml"), *settings]

    def run(*attempts, max_restarts=3):
        left, given = list(attempts), []

        def attempt(words, variables):
            given.append(list(words))
            code, step, error = left.pop(0)
            if step:
                (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
            if error:
                Path(variables[ERROR_FILE]).write_text(error)
            return code

        code = run_with_restarts(arguments, max_restarts, attempt)
        assert given[0] == arguments and all(words == [*arguments, "training.resume=true"] for words in given[1:])
        return code, len(given)

    return run


def test_a_run_that_fails_is_restarted_with_resume_until_it_is_finished(runs, capsys, tmp_path):
    assert runs((1, 20, "rank 1: lost\nrank 0: later\n"), (247, 40, ""), (0, 100, "")) == (0, 3)
    folder = tmp_path / "run"
    assert capsys.readouterr().err.splitlines() == [
        "qsparse_moe: restart 1 of at most 3: the run ended with exit code 1 (rank 1: lost), and the newest checkpoint "
        f"in {folder} is of step 20",
        "qsparse_moe: restart 2 of at most 3: the run ended with exit code 247 (no rank has named an error), and the "
        f"newest checkpoint in {folder} is of step 40",
    ]


def test_it_is_restarted_at_most_as_often_as_asked(runs, capsys):
    assert runs((1, 20, ""), (1, 40, ""), (9, 60, ""), max_restarts=2) == (9, 3)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qsparse_moe: not restarted: the run ended with exit code 9 ")
    assert last.endswith("is of step 60, and --max_restarts is 2")


@pytest.mark.parametrize(("step", "where"), [(20, "is of step 20"), (None, "has no checkpoint")])
def test_it_is_not_restarted_after_two_failures_at_the_same_checkpoint(runs, capsys, step, where):
    assert runs((1, step, ""), (1, step, "rank 0: diverged")) == (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qsparse_moe: not restarted: the run ended with exit code 1 (rank 0: diverged), and ")
    assert last.endswith(f"{where}, as before restart 1; it would fail there again")


@pytest.mark.parametrize("code", [2, 130, 138, 143])
def test_neither_wrong_input_nor_a_signal_restarts_it(runs, capsys, code):
    assert runs((code, 20, "rank 0: x")) == (code, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [129, 137, 139])
def test_a_killed_launcher_is_a_failure(runs, code):
    assert runs((code, 20, ""), (0, 100, "")) == (0, 2)


def test_exit_code_0_before_the_last_step_is_a_failure(runs, capsys):
    """DeepSpeed's launcher exits with it if its inner process is killed."""
    assert runs((0, 20, ""), (0, 20, "")) == (1, 2)
    assert "the run ended with exit code 1 (no rank has named an error)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["--module qsparse_moe ablate x.yaml", "--module other train x.yaml", "script.py", "--module qsparse_moe train"],
)
def test_only_train_is_restarted(command):
    with pytest.raises(
        ConfigError, match=r"^--max_restarts restarts runs of: --module qsparse_moe train CONFIG, and the"
    ):
        run_with_restarts(command.split(), 1, lambda words, variables: 0)


@pytest.mark.parametrize(
    ("given", "left", "number"),
    [
        ("--max_restarts 3 --num_gpus 2 --module m x", "--num_gpus 2 --module m x", 3),
        ("--num_gpus 2 --max_restarts=12 --module m", "--num_gpus 2 --module m", 12),
        ("--num_gpus 2 --module m --max_restarts 3", "--num_gpus 2 --module m --max_restarts 3", 0),
        ("--max_restarts 0 --module m", "--module m", 0),
    ],
)
def test_the_option_is_taken_from_those_of_the_launcher(given, left, number):
    assert take_max_restarts(given.split()) == (left.split(), number)


@pytest.mark.parametrize("given", ["--max_restarts", "--max_restarts=", "--max_restarts=-1", "--max_restarts x"])
def test_a_number_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match=r"^--max_restarts \(.*\) must be a whole number: how often a failed run is"):
        take_max_restarts(given.split())


def test_errors_of_several_ranks_are_lines_of_one_file(monkeypatch, tmp_path):
    record_error("without a file nothing happens")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "errors"))
    monkeypatch.setenv("RANK", "3")
    record_error("two\nlines")
    monkeypatch.delenv("RANK")
    record_error("more")
    assert (tmp_path / "errors").read_text() == "rank 3: two lines\nrank 0: more\n"
