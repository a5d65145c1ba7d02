"""The benchmarks of the command line, each from its first word to its table, on the smallest shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from qsparse_moe.bench import llama_peer
from qsparse_moe.cli.app import run
from qsparse_moe.kernels import native
from tests.support.runs import write_text

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.mark.parametrize("shown", ["table", "json"])
def test_the_step_benchmark_runs_whole(shown, tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"layers": 1, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 16, "rows": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    output = tmp_path / "new" / "step.json"
    options = ["--sequence-length", "8", "--rounds", "1", "--precision", "fp32", "--clock", "processor"]
    options += ["--output", str(output)]
    assert run(["bench", "step", *words, *options, *(["--json"] if shown == "json" else [])]) == 0
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert written["fp32"]["clock"] == "processor"
    assert len(written["fp32"]["seconds"]) >= 3 and min(written["fp32"]["seconds"].values()) > 0
    if shown == "json":
        assert json.loads(printed) == written
    else:
        assert "One training step of 16 tokens" in printed and "fp32" in printed


def test_the_step_benchmark_adds_the_steps_that_measure_to_the_time_of_shared_sets(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"layers": 1, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 16, "rows": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    options = ["--sequence-length", "8", "--rounds", "2", "--precision", "fp32", "--selection", "shared"]
    options += ["--gradient", "masked", "--output", f"{tmp_path}/step.json"]
    assert run(["bench", "step", *words, *options]) == 0
    assert "fp32: with one step in 10 that measures, " in capsys.readouterr().out
    written = json.loads((tmp_path / "step.json").read_text())["fp32"]
    rounds = written["seconds_by_round"]
    measuring = rounds["with Q-Sparse, a step that measures"]
    mean = [0.9 * plain + 0.1 * other for plain, other in zip(rounds["with Q-Sparse"], measuring, strict=True)]
    faster = [dense / one for dense, one in zip(rounds["without Q-Sparse"], mean, strict=True)]
    assert written["shared_sets"]["seconds"] == pytest.approx(sum(mean) / 2)
    assert written["shared_sets"]["times_faster_than_dense"]["min"] == pytest.approx(min(faster))
    assert (written["shape"]["selection"], written["shape"]["gradient"]) == ("shared", "masked")


@pytest.mark.parametrize("shown", ["table", "json"])
def test_the_drop_in_benchmark_runs_whole(shown, tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = {"layers": 1, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 16, "rows": 2}
    sizes |= {"sequence-length": 8, "prompt": 3, "new-tokens": 2, "rounds": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    output = tmp_path / "drop-in.json"
    options = ["--clock", "processor", "--output", str(output), *(["--json"] if shown == "json" else [])]
    assert run(["bench", "drop-in", *words, *options]) == 0
    written, printed = json.loads(output.read_text())["fp32"], capsys.readouterr().out
    for work in ("step", "generate"):
        unchanged, sparse = written["seconds_by_round"][work].values()
        ratios = sorted(b / a for a, b in zip(unchanged, sparse, strict=True))
        assert [written["cost"][work][name] for name in ("min", "max")] == pytest.approx(ratios)
    assert written["shape"]["clock"] == "processor"
    if shown == "json":
        assert json.loads(printed)["fp32"] == written
    else:
        assert "Q-Sparse inside transformers' Mixtral" in printed and "generate" in printed


@pytest.mark.parametrize("tokenizer", ["bytes", "made"])
def test_the_prepare_benchmark_runs_whole(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # set by the benchmark, and restored after the test
    write_text(tmp_path / "text")
    options = ["--files", f"{tmp_path}/text/*", "--processes", "1", "--rounds", "2", "--output", f"{tmp_path}/it.json"]
    options += ["--tokenizer", "bytes", "--json"] if tokenizer == "bytes" else ["--vocabulary", "300"]
    assert run(["bench", "prepare", *options]) == 0
    written, printed = json.loads((tmp_path / "it.json").read_text()), capsys.readouterr().out
    if tokenizer == "bytes":
        assert json.loads(printed) == written
        assert written["tokens"] == written["text_bytes"] + written["documents"]
    else:
        assert "datasets.map" in printed and "speed of the tokenizer alone" in printed
        assert written["tokens"] < written["text_bytes"]
    for clock, seconds in written["seconds"].items():
        alone, mapped = (seconds[name] for name in ("tokenizer alone", "datasets.map"))
        ratios = sorted(a / b for a, b in zip(alone, mapped, strict=True))
        found = written["speed_of_tokenizer"][clock]["datasets.map"]
        assert [found["min"], found["max"]] == pytest.approx(ratios)


@pytest.mark.slow
def test_the_metrics_benchmark_runs_whole(tmp_path, capsys):
    write_text(tmp_path / "text")
    small = [
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.moe.expert_hidden_size=16",
        "data.sequence_length=24",
        f'data.sources=[{{"kind": "text", "path": "{tmp_path}/text/*.txt"}}]',
        f"data.cache_dir={tmp_path}/cache",
        "training.evaluation_rows=4",
        "training.warmup_steps=0",
        "training.device=cpu",
    ]
    output = tmp_path / "cost.json"
    assert run(["bench", "metrics", TINY, *small, "--steps", "2", "--rounds", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "a record every" in printed and "ms per step" in printed
    assert json.loads(output.read_text())["steps"] == 2


@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja")
@pytest.mark.parametrize(("shown", "selection"), [("table", "topk"), ("json", "shared")])
def test_the_decode_benchmark_runs_whole(shown, selection, tmp_path, capsys):
    sizes = {"layers": 1, "hidden-size": 64, "heads": 2, "experts": 4, "expert-hidden-size": 128, "vocab-size": 256}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    output = tmp_path / "decode.json"
    options = ["--weights", "bf16,int8,ternary", "--sparsity", "0.5", "--batch", "1,3", "--rounds", "1"]
    options += ["--context", "4", "--tokens", "2", "--prompt", "8", "--peers", "transformers", "--output", str(output)]
    options += ["--selection", selection]
    assert run(["bench", "decode", *words, *options, *(["--json"] if shown == "json" else [])]) == 0
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    rows = written["formats"]["int8"]["decode"]
    assert [(row["contender"], row["batch"]) for row in rows] == [
        ("ours S 0", 1),
        ("ours S 0.5", 1),
        ("ours S 0", 3),
        ("ours S 0.5", 3),
    ]
    # By hand, one token: qkv, output, two experts of three matrices, and the head; a byte per weight.
    attention, head, gate_and_up, down = 64 * 192 + 64 * 64, 256 * 64, 2 * 2 * 64 * 128, 2 * 128 * 64
    assert rows[0]["bytes_per_step"] == attention + gate_and_up + down + head
    # Shared features leave out half of the columns of gate and up, too.
    share = {"topk": 1 / 2, "shared": 1 / 4}[selection]
    assert rows[1]["bytes_per_step"] == attention / 2 + gate_and_up * share + down / 2 + head
    assert all(row["tokens_per_second"] > 0 for row in rows)
    if shown == "json":
        assert json.loads(printed) == written
    else:
        assert "Decoding with weights in ternary, head in bf16" in printed and "Prefill of 8 tokens" in printed


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--weights", "int3", "choose from fp32, bf16, int8, ternary"),
        ("--sparsity", "0.5,1", "S from 0 up to below 1"),
        ("--selection", "topk,shared", "must be topk or shared; choose one of them"),
        (
            "--site",
            "expert",
            "must be attention_input or attention_output or expert_input or expert_hidden; choose one",
        ),
        ("--batch", "0", "whole numbers from 1"),
        ("--head", "ternary", "choose from auto, fp32, bf16, int8"),
        ("--peers", "vllm", "choose from transformers, llama.cpp"),
        ("--device", "tpu", "must be cpu or cuda"),
    ],
)
def test_options_of_the_decode_benchmark_are_checked(option, value, rule, capsys):
    assert run(["bench", "decode", option, value]) == 2
    said = capsys.readouterr().err
    assert option in said and repr(value) in said and rule in said


@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja")
def test_the_decode_benchmark_reads_a_head_in_the_requested_format(tmp_path, capsys):
    words = ["--layers", "1", "--hidden-size", "64", "--heads", "2", "--experts", "2", "--expert-hidden-size", "64"]
    words += ["--vocab-size", "256", "--weights", "ternary", "--sparsity", "0", "--batch", "1", "--rounds", "1"]
    words += ["--context", "1", "--tokens", "1", "--prompt", "0", "--peers", "", "--json", "--head"]
    bytes_read = {}
    for head in ("auto", "int8"):
        assert run(["bench", "decode", *words, head]) == 0
        measured = json.loads(capsys.readouterr().out)["formats"]["ternary"]
        bytes_read[measured["head"]] = measured["decode"][0]["bytes_per_step"]
    assert bytes_read["bf16"] - bytes_read["int8"] == 256 * 64
    assert run(["bench", "decode", *words, "fp32"]) == 2
    assert "--head (fp32) must be auto, bf16, or int8 where the model itself is in bf16" in capsys.readouterr().err


def test_llama_cpp_is_measured_with_an_output_as_ours_too():
    labels = lambda *formats: [one.label for one in llama_peer.formats_beside(*formats)]  # noqa: E731
    assert labels("bf16", "bf16") == ["llama.cpp BF16, output BF16"]
    assert labels("int8", "int8") == ["llama.cpp Q8_0, output Q8_0", "llama.cpp Q4_0, output Q4_0"]
    assert labels("ternary", "bf16") == ["llama.cpp TQ2_0, output TQ2_0", "llama.cpp TQ2_0, output BF16"]
    assert labels("ternary", "int8")[1:] == ["llama.cpp TQ2_0, output Q8_0"]
    assert labels("int8", "fp32")[2:] == ["llama.cpp Q8_0, output F32"]
    assert labels("fp32", "fp32") == []


def test_a_missing_llama_cpp_is_reported_with_the_way_out(monkeypatch):
    monkeypatch.setattr(llama_peer, "find_spec", lambda name: None)
    monkeypatch.delenv(llama_peer.PYTHON_VARIABLE, raising=False)
    python, reason = llama_peer.find_llama_cpp()
    assert python is None and "pip install llama-cpp-python gguf" in reason and llama_peer.PYTHON_VARIABLE in reason
    monkeypatch.setenv(llama_peer.PYTHON_VARIABLE, sys.executable)
    monkeypatch.setattr(
        llama_peer.subprocess, "run", lambda *words, **options: CompletedProcess(words, 1, "", "No module")
    )
    python, reason = llama_peer.find_llama_cpp()
    assert python is None and sys.executable in reason and "No module" in reason


@pytest.mark.parametrize("verb", ["step", "moe"])
@pytest.mark.parametrize("value", ["-1", "1", "nan"])
def test_an_s_of_a_benchmark_is_a_fraction_below_one(verb, value, capsys):
    assert run(["bench", verb, f"--sparsity={value}"]) == 2
    said = capsys.readouterr().err
    assert "--sparsity" in said and str(float(value)) in said and "[0, 1)" in said
