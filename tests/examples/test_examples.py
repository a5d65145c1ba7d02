"""Every example runs as its own description says, on a small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
SMALL = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.moe.expert_hidden_size=32",
    "data.sequence_length=32",
    "training.warmup_steps=0",
    "training.evaluation_rows=4",
]


def run_python(folder: Path, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with some text, in which the examples run one after the other."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "corpus").mkdir()
    for number in range(60):
        words = " ".join(f"word{(number * 7 + i * i) % 97} and some more text" for i in range(60))
        (folder / "corpus" / f"{number}.txt").write_text(f"Document {number}. {words}\n")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_own_data_trains_a_tokenizer_and_a_model_whose_run_can_be_read_in_the_notebook(folder):
    cache = f"data.cache_dir={folder / 'cache'}"
    options = ["--text", "corpus/*.txt", "--vocab-size", "300", "--steps", "12"]
    settings = [*SMALL, cache, "metrics.interval=2", "data.validation_fraction=0.2"]
    output = run_python(folder, str(EXAMPLES / "own_data.py"), *options, *settings)
    assert re.search(r"12 steps, \d+\.\d+ bits per byte", output)
    tokenizer = json.loads((folder / "tokenizers" / "own-data" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 300
    pytest.importorskip("pandas")
    notebook = json.loads((EXAMPLES / "read_metrics.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    said = run_python(folder, "-c", code, RUN="runs/own-data", MPLBACKEND="agg")
    assert re.search(r"active [\d,]+, of which [\d,]+ have an input that is not zero", said)


@pytest.mark.slow
@pytest.mark.distributed
def test_training_loop_prints_a_falling_loss_and_a_rising_sparsity(folder):
    settings = [*SMALL, "data.sources.0.max_bytes=1000000", f"data.cache_dir={folder / 'cache'}"]
    output = run_python(folder, str(EXAMPLES / "training_loop.py"), "--steps", "31", *settings)
    found = re.findall(
        r"loss (\S+)  S (\S+)  load imbalance (\S+)  zeros (\S+)  kept energy (\S+), lowest of an expert (\S+)", output
    )
    loss, sparsity, _, zeros, energy, least = (list(map(float, column)) for column in zip(*found, strict=True))
    assert loss[-1] < loss[0] - 0.5
    assert sparsity == [0.0, 0.25, 0.5, 0.75]
    assert energy[0] == 1.0 and energy[0] > energy[-1] > 0.25
    assert all(zero >= requested for zero, requested in zip(zeros, sparsity, strict=True))
    assert all(low <= mean for low, mean in zip(least, energy, strict=True))


def test_the_sweep_names_every_run_it_would_train(folder):
    listed = run_python(folder, "-m", "qsparse_moe", "ablate", str(EXAMPLES / "per_expert_sweep.yaml"), "--list")
    assert "layer0-expert1-seed0" in listed and len(re.findall("seed[01]", listed)) == 10


@pytest.mark.slow
@pytest.mark.distributed
def test_a_model_is_trained_in_transformers_and_comes_back(folder):
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    corpus = ["data.sources.0.kind=text", "data.sources.0.path=corpus/*.txt", f"data.cache_dir={folder / 'cache'}"]
    run = ["training.steps=2", "training.engine=torch", "training.name=small", "data.validation_fraction=0.2"]
    tiny = str(REPOSITORY / "configs" / "tiny.yaml")
    run_python(folder, "-m", "qsparse_moe", "train", tiny, *SMALL, *corpus, *run)
    run_python(folder, "-m", "qsparse_moe", "export", "runs/small", "exported", "--format", "native")
    options = ["exported", "--text", "corpus/*.txt", "--output", "tuned", "--steps", "20", "--length", "32"]
    output = run_python(folder, str(EXAMPLES / "in_transformers.py"), *options)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", output)]
    assert losses[-1] < losses[0] - 0.5
    assert "Document 0. " in output
    run_python(folder, "-m", "qsparse_moe", "import", "tuned", "--output", "imported")
    said = run_python(folder, "-m", "qsparse_moe", "generate", "imported", "--prompt", "Document", "--max-tokens", "4")
    assert said.strip()


@pytest.mark.slow
def test_finetune_trainer_lowers_the_loss_while_s_rises_and_its_files_restore_the_plan(folder):
    pytest.importorskip("transformers")
    output = run_python(folder, str(EXAMPLES / "finetune_trainer.py"), "--steps", "30", "--text", "corpus/7.txt")
    (found,) = re.findall(r"loss (\S+) -> (\S+), S (\S+), loaded again (\S+)", output)
    first, last, sparsity, again = map(float, found)
    assert last < first - 1 and abs(again - last) < 1 and sparsity == 0.5
    zeros = dict(re.findall(r"(\w+) +zeros (\S+)", output))
    assert zeros == dict.fromkeys(["attention_input", "attention_output", "expert_input", "expert_hidden"], "0.500")
    assert "qsparse_moe" in json.loads((folder / "finetuned" / "config.json").read_text())


@pytest.mark.slow
def test_finetune_lora_lowers_the_loss_with_sparse_adapters_on_attention_and_experts(folder):
    pytest.importorskip("peft")
    output = run_python(folder, str(EXAMPLES / "finetune_lora.py"), "--steps", "30", "--text", "corpus/7.txt")
    (found,) = re.findall(r"loss (\S+) -> (\S+) at S (\S+), dense (\S+), ([\d,]+) in adapters", output)
    first, last, sparsity, dense = map(float, found[:4])
    assert last < first - 1 and sparsity == 0.5 and abs(dense - last) > 0.001
    # By hand: rank 8 for q, k, v, o in two layers, and for the fused and the down matrices of four experts.
    attention = 8 * (2 * (64 + 64) + 2 * (64 + 32))
    experts = 4 * 8 * ((64 + 128) + (64 + 64))
    assert int(found[4].replace(",", "")) == 2 * (attention + experts)
    assert (folder / "adapters" / "sparsity_plan.json").is_file()
