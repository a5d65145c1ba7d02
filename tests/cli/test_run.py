"""One small run through the verbs: train, resume, evaluate, generate, describe."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.cli.evaluate import requested_plan
from qsparse_moe.config.load import load_config
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.data.test_tokenizer import save_tokenizer

REPOSITORY = Path(__file__).parents[2]
CONFIG = """
model:
  hidden_size: 32
  num_layers: 1
  num_heads: 2
  moe: {num_experts: 4, expert_hidden_size: 32, backend: loop}
  sparsity: {default: 0.5, backend: torch}
data:
  sources: [{kind: text, path: FOLDER/text/*.txt}]
  sequence_length: 64
  validation_fraction: 0.2
  cache_dir: FOLDER/cache
training:
  name: mine
  output_dir: FOLDER/runs
  engine: torch
  device: cpu
  steps: 6
  global_batch_size: 4
  micro_batch_size: 2
metrics: {interval: 2, tensorboard: false}
"""


def write_inputs(folder):
    draw = random.Random(0)
    words = ["sparse", "expert", "router", "token", "größe", "layer"]
    (folder / "text").mkdir()
    for number in range(40):
        text = " ".join(draw.choice(words) for _ in range(60))
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    config = folder / "mine.yaml"
    config.write_text(CONFIG.replace("FOLDER", str(folder)), encoding="utf-8")
    return config


def train(config, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-u", "-m", "qsparse_moe", "--local_rank=0", "train", str(config), *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the path of the config, the run folder and the output of training."""
    folder = tmp_path_factory.mktemp("run with a space")
    config = write_inputs(folder)
    done = train(config, "--json")
    assert done.returncode == 0, done.stderr
    return config, folder / "runs" / "mine", done


@pytest.mark.slow
def test_training_prints_one_json_object_and_its_progress_on_standard_error(trained):
    _, run_dir, done = trained
    summary = json.loads(done.stdout)
    assert (summary["run_dir"], summary["step"], summary["tokens"]) == (str(run_dir), 6, 6 * 4 * 64)
    assert summary["stopped_by"] is None
    assert 3 < summary["loss"] < 6
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert f"validation {summary['validation']['bits_per_byte']:.4f} bits/byte" in lines[-1]


def test_run_is_never_overwritten(trained):
    config, run_dir, _ = trained
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = train(config)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run_dir}: exists")
    assert "Traceback" not in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resumed_run_ends_with_a_readable_summary(trained):
    config, run_dir, _ = trained
    done = train(config, "training.resume=true", "training.steps=8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("8 steps, 2,048 tokens, ")
    assert lines[1].startswith("loss of the last step")
    assert lines[2].startswith("validation")
    assert lines[3].split(maxsplit=2)[2] == str(run_dir)


def test_evaluation_reports_the_newest_checkpoint(trained, capsys):
    _, run_dir, _ = trained
    assert run(["evaluate", str(run_dir), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["run_dir"] == str(run_dir)
    assert figures["step"] in (6, 8)  # 8 where the resuming test has run before
    assert figures["perplexity"] == pytest.approx(2.718281828 ** figures["loss"])
    assert run(["evaluate", str(run_dir), "--rows", "3"]) == 0
    printed = capsys.readouterr().out
    assert "on 3 validation sequences" in printed
    assert f"unigram model     {figures['unigram_bits_per_byte']:.4f}" in printed


def test_evaluation_accepts_another_s_or_plan_and_files(trained, capsys, tmp_path):
    _, run_dir, _ = trained
    arguments = ["evaluate", str(run_dir), "--json"]
    losses = []
    plan, own = tmp_path / "plan.json", tmp_path / "own.txt"
    SparsityPlan.uniform(load_config(run_dir / "config.yaml").model, 0.75).save(plan)
    own.write_text("sparse expert " * 30, encoding="utf-8")
    for more in ([], ["--sparsity", "0.75"], ["--plan", str(plan)], ["--data", str(own)]):
        assert run([*arguments, *more]) == 0
        losses.append(json.loads(capsys.readouterr().out))
    assert losses[0]["loss"] != losses[1]["loss"] == losses[2]["loss"] != losses[3]["loss"]
    assert [one["sparsity"] for one in losses[1:3]] == pytest.approx([0.75, 0.75])
    # 421 tokens are 6 rows of 64 labels and 36 more.
    assert losses[3]["rows"] == 7 and losses[3]["unigram_bits_per_byte"] is None
    assert run(["evaluate", str(run_dir), "--data", str(own)]) == 0
    assert f"on all text of {own}, 7 sequences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "--sparsity (1.0) must be in [0, 1)"),
        (
            ["--sparsity", "0.5", "--plan", "p.json"],
            "--sparsity and --plan both give the S to evaluate with; keep one",
        ),
        (
            ["--rows", "3", "--data", "a.txt"],
            "--rows (3) limits the validation data, but --data reads all text of its files",
        ),
    ],
)
def test_evaluation_refuses_contradictory_options(trained, capsys, arguments, message):
    _, run_dir, _ = trained
    assert run(["evaluate", str(run_dir), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("relu", r"--sparsity changes nothing on .*: model.sparsity.selection is relu"),
        (
            "threshold",
            r"--sparsity \(0.5\) needs thresholds, .*qsparse-moe calibrate --sparsity, and name it with --plan",
        ),
    ],
)
def test_an_s_without_effect_on_the_selection_of_the_run_is_refused(trained, tmp_path, monkeypatch, selection, message):
    _, run_dir, _ = trained
    config = load_config(run_dir / "config.yaml")
    settings = config.model.sparsity.model_copy(update={"selection": selection})
    other = config.model_copy(update={"model": config.model.model_copy(update={"sparsity": settings})})
    monkeypatch.setattr("qsparse_moe.cli.evaluate.load_run_config", lambda run_dir: other)
    with pytest.raises(ConfigError, match=message):
        requested_plan(run_dir, sparsity=0.5, plan_file=None)


def test_generated_text_is_the_same_streamed_and_as_json(trained, capsys):
    _, run_dir, _ = trained
    arguments = ["generate", str(run_dir), "--prompt", "router tö", "--max-tokens", "12"]
    assert run(arguments) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("router tö")
    assert run([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["prompt"] + content["text"] + "\n" == streamed
    assert 1 <= content["num_tokens"] <= 12


def test_a_prompt_is_checked_against_the_window_and_the_encoding(trained, capsys):
    _, run_dir, _ = trained
    arguments = ["generate", str(run_dir), "--max-tokens", "1", "--prompt"]
    assert run([*arguments, "ab" * 40]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "--prompt (81 tokens, with the one that begins a document where it is a text) must be at most" in printed
    assert run([*arguments, "ab" * 40, "--truncate-prompt"]) == 0
    assert capsys.readouterr().out.startswith("ab" * 32)
    assert run([*arguments, b"caf\xe9".decode("utf-8", errors="surrogateescape")]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "must be UTF-8, and its byte 3 is not" in printed and "Traceback" not in printed


def test_draws_depend_on_the_seed(trained, capsys):
    _, run_dir, _ = trained

    def drawn(seed):
        options = ["--temperature", "1", "--max-tokens", "12", "--seed", seed, "--json"]
        assert run(["generate", str(run_dir), *options]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    assert drawn("1") == drawn("1") != drawn("2")


def test_run_folder_is_described(trained, capsys):
    _, run_dir, _ = trained
    assert run(["describe", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


def test_stopped_rank_s_code_is_passed_on(trained, monkeypatch, capsys):
    from qsparse_moe.runs.report import TrainingResult

    config, run_dir, _ = trained
    stopped = TrainingResult(run_dir, 4, 1024, 1.0, None, stopped_by=15)
    monkeypatch.setattr("qsparse_moe.training.loop.train", lambda *_arguments, **_keywords: stopped)
    assert run(["train", str(config), "training.name=another", "--json"]) == 143
    summary = json.loads(capsys.readouterr().out)
    assert (summary["step"], summary["loss"], summary["stopped_by"]) == (4, None, 15)


def test_describe_measures_the_weights_that_the_tokens_of_a_run_read(trained, capsys):
    _, run_dir, _ = trained
    assert run(["describe", str(run_dir), "--measure", "8", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["measured_unions"]
    assert [point["batch"] for point in points] == [1, 2, 4, 8]
    for name in ("routed", "input_rows", "up_elements", "hidden_rows"):
        measured = [point[name]["measured"] for point in points]
        assert points[0][name]["independent"] == pytest.approx(measured[0])
        assert measured == sorted(measured) and 0 < measured[0] < 1
    assert run(["describe", str(run_dir), "--measure", "8"]) == 0
    assert "elements of up, gate first" in capsys.readouterr().out


def test_measuring_is_refused_without_a_run_folder_and_with_settings(trained, capsys):
    config, run_dir, _ = trained
    for arguments in ([str(config)], [str(run_dir), "training.steps=99"]):
        assert run(["describe", *arguments, "--measure", "8"]) == 2
        assert "--measure (8) needs a run folder with a checkpoint" in capsys.readouterr().err


def test_an_export_is_made_once_and_reports_its_contents(trained, tmp_path, capsys):
    _, run_dir, _ = trained
    out = tmp_path / "out"
    assert run(["export", str(run_dir), str(out), "--dtype", "bf16", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["folder"], made["format"], made["files"]) == (str(out), "native", 1)
    assert made["bytes"] < (out / "model.safetensors").stat().st_size < made["bytes"] + 10_000
    assert run(["export", str(run_dir), str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: exists, and an export does not overwrite it")
    assert run(["export", str(run_dir), str(out), "--force"]) == 0
    assert f"{2 * made['bytes']:,} bytes, model type qsparse_moe" in capsys.readouterr().out


def test_a_finished_run_with_a_custom_tokenizer_works_from_another_folder(tmp_path, capsys, monkeypatch):
    """Paths were relative to the folder of the training; the tokenizer there is deleted, and the run has a copy."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    words = ["<unk>", "</s>", "sparse", "expert", "router", "token", "größe", "layer"]
    save_tokenizer(there / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = write_inputs(there)
    config.write_text(config.read_text(encoding="utf-8").replace(str(there), "."), encoding="utf-8")
    monkeypatch.chdir(there)
    settings = ["data.tokenizer=words", "data.sequence_length=16", "training.steps=2", "training.warmup_steps=0"]
    assert run(["train", "mine.yaml", *settings, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    (there / "words").rename(there / "gone")
    monkeypatch.chdir(elsewhere)
    run_dir = there / "runs" / "mine"
    assert run(["evaluate", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == summary["validation"]["loss"]
    assert run(["generate", str(run_dir), "--prompt", "router layer", "--max-tokens", "6", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["prompt"] == "router layer" and set(content["text"].split()) <= set(words)
    assert list(elsewhere.iterdir()) == []
