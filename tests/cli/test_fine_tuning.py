"""A model trained on text learns to answer: fine-tuned on conversations, asked in one, and evaluated."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.tokenizer import load_tokenizer
from qsparse_moe.interop.training import train
from tests.data.conversations import EOS, PLAIN, WORDS, chat, save_chat_tokenizer, write_chats

torch.set_num_threads(1)
ANSWERS = {word: f"{WORDS[(3 * i + 1) % 10]} {word}" for i, word in enumerate(WORDS)}


def settings(folder, name, sources, **training):
    return {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "init_std": 0.08,
            "moe": {"num_experts": 4, "expert_hidden_size": 32},
            "sparsity": {"default": 0.3, "backend": "torch", "rescale": "preserve"},
        },
        "data": {
            "sources": sources,
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 32,
            "validation_fraction": 0.1,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "name": name,
            "output_dir": str(folder / "runs"),
            "global_batch_size": 8,
            "learning_rate": 1e-2,
            "engine": "torch",
            "device": "cpu",
        }
        | training,
        "metrics": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The folder and the reports of a run that started from one on text; its chat template comes from a file."""
    folder = tmp_path_factory.mktemp("tuned")
    save_chat_tokenizer(folder / "tokenizer", template=None)
    (folder / "chat.jinja").write_text(PLAIN)
    lines = [json.dumps({"text": " ".join(WORDS[i % 10] for i in range(n, n + 20))}) for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    first, second = list(ANSWERS.items()), list(ANSWERS.items())[::-1]
    chats = [chat(f"u:{q}", f"a:{a}", f"u:{p}", f"a:{b}") for q, a in first for p, b in second]
    write_chats(folder / "chats.jsonl", chats)
    text = [{"kind": "jsonl", "path": str(folder / "text.jsonl")}]
    base = train(RunConfig.model_validate(settings(folder, "base", text, steps=4)))
    sources = [{"kind": "jsonl", "path": str(folder / "chats.jsonl"), "format": "chat"}]
    config = settings(folder, "tuned", sources, steps=110, init_from=str(base.run_dir), warmup_steps=10)
    config["data"]["chat"] = {"template": str(folder / "chat.jinja")}
    reports = []
    return train(RunConfig.model_validate(config), [reports.append]).run_dir, reports


def test_the_loss_of_answers_falls_and_the_manifest_counts_conversations(fine_tuned):
    run_dir, reports = fine_tuned
    losses = [report.losses["lm_loss"] for report in reports]
    assert losses[0] > 1.2 and losses[-1] < 0.1
    part = json.loads((run_dir / "manifest.json").read_text())
    assert part["conversations"] == {"data.sources.0": {"conversations": 100, "cut": 0, "dropped": 0}}
    assert part["initial_weights"]["path"].endswith("base")


def test_a_conversation_is_answered_in_the_trained_form(fine_tuned, capsys, monkeypatch):
    run_dir, _ = fine_tuned
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\ng\nc\n"))
    assert run(["generate", "--interactive", str(run_dir), "--max-tokens", "9", "--engine", "torch"]) == 0
    # The answers end by themselves, with a token that is not the document token.
    assert load_tokenizer(str(run_dir / "tokenizer")).document_token == EOS
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [ANSWERS[word] for word in "agc"]


def test_calibration_measures_the_loss_of_the_answers(fine_tuned, capsys, tmp_path):
    run_dir, _ = fine_tuned
    assert run(["evaluate", str(run_dir), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert run(["calibrate", str(run_dir), "--output", str(tmp_path / "plan.json"), "--rows", "8", "--json"]) == 0
    calibrated = json.loads(capsys.readouterr().out)
    assert calibrated["loss_topk"] == pytest.approx(evaluated["loss"], rel=1e-4)
    # Other files are read as conversations too, of which the same ones are held out: they have the same texts.
    other = shutil.copy(run_dir.parents[1] / "chats.jsonl", tmp_path / "other.jsonl")
    for verb in (
        ["calibrate", "--output", str(tmp_path / "again.json"), "--rows", "8"],
        ["sensitivity", "--estimate-only"],
    ):
        assert run([verb[0], str(run_dir), *verb[1:], "--data", str(other), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.get("loss_topk", found.get("loss")) == pytest.approx(evaluated["loss"], rel=1e-4)


def test_a_run_on_conversations_is_evaluated_without_its_files_of_tokenizer_and_template(
    fine_tuned, capsys, monkeypatch, tmp_path
):
    run_dir, _ = fine_tuned
    (run_dir.parents[1] / "chat.jinja").unlink()
    shutil.rmtree(run_dir.parents[1] / "tokenizer")
    monkeypatch.chdir(tmp_path)
    for files in ([], ["--data", str(run_dir.parents[1] / "chats.jsonl")]):
        assert run(["evaluate", str(run_dir), *files, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["loss"] < 0.3
        # Three tokens of an answer, with the one that ends it, encode three bytes: two letters and a space.
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=0.01)
        assert files or found["unigram_bits_per_byte"] > 1
