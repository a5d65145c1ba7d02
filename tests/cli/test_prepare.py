"""``qsparse-moe prepare``: the summary, the progress, and the exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.cli.prepare import PrepareProgress
from tests.data.corpus import make_texts, write_jsonl


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    file = tmp_path / "c.yaml"
    file.write_text(
        f"data:\n  sources: [{{kind: jsonl, path: {path}}}]\n  sequence_length: 16\n  cache_dir: {tmp_path}/cache\n"
        f"  shard_bytes: 8000\n  validation_fraction: 0.2\n"
    )
    return str(file)


def test_prepare_prints_what_was_built_and_builds_nothing_twice(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prepare", config, "--processes", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    (source,) = first["sources"]
    texts = "".join(make_texts(200)).encode()
    # One token per byte, and one per document.
    assert source["train_tokens"] + source["validation_tokens"] == len(texts) + 200
    assert source["text_bytes"] == len(texts) and source["setting"] == "data.sources.0 (jsonl)"
    assert source["shards"] == source["shards_built"] == len(list(Path(source["folder"]).glob("shard-*"))) > 2
    assert first["train_sequences"] == (source["train_tokens"] - 1) // 16
    assert first["processes"] == 1
    assert run(["prepare", config, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["sources"][0]["shards_built"] == 0 and again["fingerprint"] == first["fingerprint"]


def test_a_repaired_shard_is_printed(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", config, "--processes", "1"]) == 0
    assert "repaired" not in capsys.readouterr().out
    (file,) = tmp_path.glob("cache/tables/*/shard-00001/train.bin")
    file.unlink()
    assert run(["prepare", config, "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 (1 were damaged)" in shown and f"repaired: {file} is missing" in shown
    assert "training and" in shown and "validation sequences" in shown


def test_what_cannot_be_prepared_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", config, "data.mode=streaming"]) == 2
    assert "error: data.mode (streaming) tokenizes while a run trains" in capsys.readouterr().err
    assert run(["prepare", config, "--processes", "0"]) == 2
    assert run(["prepare", config, "data.shard_bytes=0"]) == 2
    assert "data.shard_bytes" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("qsparse_moe.cli.prepare.time.monotonic", lambda: now[0])
    with PrepareProgress() as progress:
        progress("data.sources.0 (text)", 10_000_000, 40_000_000)
        now[0] = 5.0
        progress("data.sources.0 (text)", 20_000_000, 40_000_000)
        progress("data.sources.0 (text)", 30_000_000, 40_000_000)
        now[0] = 10.0
        progress("data.sources.1 (hub)", 5_000_000, None)
    assert capsys.readouterr().err.splitlines() == [
        "data.sources.0 (text): 20 of 40 (50 %) million bytes tokenized",
        "data.sources.1 (hub): 5 million bytes tokenized",
    ]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with PrepareProgress() as progress:
        progress("data.sources.0 (text)", 10_000_000, 40_000_000)
        progress("data.sources.1 (text)", 20_000_000, 20_000_000)
        assert len(progress._bar.tasks) == 1 and progress._bar.tasks[0].percentage == 100
    assert "data.sources.1 (text)" in terminal.getvalue()
