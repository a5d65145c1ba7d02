"""Options that another one leaves without effect, and results that cannot be written, are refused before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qsparse_moe.cli import generate
from qsparse_moe.cli.app import run

REFUSED = {
    "a report of one task": (
        ["ablate", "grid.yaml", "--task", "3", "--output", "here"],
        "--output (here) has no effect with --task; leave out one of them",
    ),
    "a list that trains": (
        ["ablate", "grid.yaml", "--list", "--ranks", "2", "--jobs", "4", "--devices", "0,1", "--output", "here"],
        "--ranks (2) and --jobs (4) and --devices (0,1) and --output (here) have no effect with --list; leave out one",
    ),
    "results of a grid in a file": (["ablate", "grid.yaml", "--output", "file"], "--output (file) is a file; name a"),
    "a list that writes": (
        ["init", "--list", "--output", "here", "--force"],
        "--output (here) and --force have no effect with --list; leave out one of them",
    ),
    "nothing to replace": (
        ["fit-law", "results.jsonl", "--force"],
        "--force replaces an earlier law in --output, which is not given; name it, or leave out --force",
    ),
    "an answer of several prompts": (
        ["generate", "RUN", "--interactive", "--batch-size", "2"],
        "--batch-size (2) has no effect with --interactive; leave out one of them",
    ),
    "peers of a GPU": (
        ["bench", "decode", "--device", "cuda", "--prompt", "64", "--peers", "llama.cpp", "--folder", "there"],
        "--prompt (64) and --peers (llama.cpp) and --folder (there) have no effect with --device cuda; leave out one",
    ),
    "weights for no peer": (
        ["bench", "decode", "--peers", "transformers", "--folder", "there"],
        "--folder (there) has no effect with --peers 'transformers'; leave out one of them",
    ),
    "weights for no llama.cpp": (
        ["bench", "plans", "RUN", "--peers", "", "--folder", "there"],
        "--folder (there) has no effect with --peers ''; leave out one of them",
    ),
    "a vocabulary that is not made": (
        ["bench", "prepare", "--tokenizer", "bytes", "--vocabulary", "1000"],
        "--vocabulary (1000) has no effect with --tokenizer bytes; leave out one of them",
    ),
    "a measurement of less than nothing": (["describe", "RUN", "--measure", "-1"], "Invalid value for '--measure'"),
}
TIMED = (
    *(["step"], ["ops"], ["moe"], ["metrics"], ["decode"], ["plans", "RUN"], ["drop-in"], ["prepare"]),
    *(["start", "tiny.yaml"], ["shared-features", "RUN"]),
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return a folder with one file, in which the verbs are called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused(name, folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "find_model", lambda run: SimpleNamespace(path=run))
    arguments, message = REFUSED[name]
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("benchmark", TIMED, ids=" ".join)
def test_a_benchmark_refuses_a_file_that_it_cannot_write_before_it_measures(benchmark, folder, capsys):
    for output, message in (
        (".", "--output (.) is a folder; name a file, such as result.json"),
        ("file/new/times.json", "the folder of --output (file/new) is below file, which is a file; name a folder"),
    ):
        assert run(["bench", *benchmark, "--output", output]) == 2
        assert message.replace("below file", f"below {folder / 'file'}") in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["file"]
