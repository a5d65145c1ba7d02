"""Decoding with a trained model under plans: what is read and compared, and the same weights in llama.cpp."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.bench import llama_peer
from qsparse_moe.bench.llama_peer import find_llama_cpp
from qsparse_moe.bench.llama_weights import (
    NAMES_FILE,
    llama_architecture,
    llama_tensors,
    paired_rows,
    write_llama_weights,
)
from qsparse_moe.bench.plans import OurEngine, PlansBenchmark, held_out_texts
from qsparse_moe.cli.app import run
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.data.loader import load_data
from qsparse_moe.inference.load import load_model
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.kernels import native
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.model.rope import Rotation, rotate
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config, write_text

needs_compiler = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)
MODEL = {
    "hidden_size": 64,
    "head_size": 32,
    "qk_norm": False,
    "vocab_size": 264,
    "init_std": 0.1,
    "moe": {"num_experts": 4, "expert_hidden_size": 32, "router": "topk_softmax", "activation": "swiglu"},
    "sparsity": {"backend": "torch"},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    write_text(folder / "text")
    config = tiny_config(folder, "run", engine="torch", steps=3, model=MODEL)
    run_dir = train(config, [Recorder(config)]).run_dir
    SparsityPlan.uniform(config.model, 0.5).with_experts({0: 1}).save(folder / "half.json")
    return run_dir


def options(run_dir, *more):
    half = run_dir.parent.parent / "half.json"
    return ["bench", "plans", str(run_dir), "--plan", str(half), "--tokens", "8", "--rounds", "2", *more]


@needs_compiler
def test_losses_and_bytes_are_those_of_the_model_under_each_plan(run_dir, tmp_path, capsys):
    output = tmp_path / "plans.json"
    assert run(options(run_dir, "--texts", "3", "--peers", "", "--output", str(output))) == 0
    assert "half" in capsys.readouterr().out
    result = json.loads(output.read_text())
    dense, half = result["formats"]["fp32"]["decode"]
    assert (dense["contender"], half["contender"]) == ("dense", "half")
    config, model, *_ = load_model(run_dir)
    texts = held_out_texts(load_data(config.data), PlansBenchmark(run_dir, {}, tokens=8, texts=3))
    labels = sum(len(text) - 1 for text in texts)
    assert result["texts"] == {"number": 3, "labels": labels}
    for plan, row in ((SparsityPlan.uniform(config.model, 0.0), dense), (SparsityPlan.load(half_of(run_dir)), half)):
        model.set_sparsity(plan)
        sums = [summed_loss(model, text) for text in texts]
        assert row["loss"] == pytest.approx(sum(sums) / labels, abs=1e-5)
        assert min(row["seconds_by_round"]) > 0 and len(row["seconds_by_round"]) == 2
    assert dense["same_choices_as_dense"] == 1 and dense["label_log_probability_off"] == 0
    assert half["label_log_probability_off"] > 0 and dense["times_dense"]["median"] == 1
    # By hand: qkv and output, two experts of three matrices, in two layers; one expert in layer 0 of the plan.
    attention, expert, head = 4 * 64 * 64, 3 * 64 * 32, 264 * 64
    assert dense["bytes_per_step"] == 4 * (2 * attention + 4 * expert + head)
    assert half["bytes_per_step"] == 4 * (attention + 1.5 * expert + head)


@needs_compiler
def test_the_processor_clock_does_not_count_waiting(run_dir, monkeypatch):
    model = load_model(run_dir).model
    engine = OurEngine(NativeDecode(model), model)
    decode = NativeDecode.decode
    monkeypatch.setattr(NativeDecode, "decode", lambda *arguments: (time.sleep(0.02), decode(*arguments))[1])
    tokens_BT = torch.ones(1, 5, dtype=torch.int64)
    assert engine.follow_seconds(tokens_BT, clock="processor") < 0.1 <= engine.follow_seconds(tokens_BT)


def half_of(run_dir):
    return run_dir.parent.parent / "half.json"


@torch.no_grad()
def summed_loss(model, text):
    tokens = torch.tensor([text])
    logits = model(tokens[:, :-1]).logits_BSV[0]
    logits[:, model.hidden_ids] = -torch.inf
    return float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))


@needs_compiler
def test_a_batch_reads_several_texts_and_leaves_llama_cpp_out(run_dir, caplog, capsys):
    assert run(options(run_dir, "--texts", "1", "--batch", "2", "--weights", "bf16,int8", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["clock"] == "wall"
    assert list(result["formats"]) == ["bf16", "int8"]
    rows = result["formats"]["bf16"]["decode"]
    assert [row["contender"] for row in rows] == ["dense", "half"]
    assert rows[0]["tokens_per_second"] == pytest.approx(2 * 8 / np.median(rows[0]["seconds_by_round"]))


def test_texts_end_before_the_next_document(run_dir):
    data = load_data(load_model(run_dir).config.data)
    texts = held_out_texts(data, PlansBenchmark(run_dir, {}, tokens=4, texts=30))
    assert len(texts) > 5 and all(data.tokenizer.document_token not in text[1:] for text in texts)
    assert all(len(text) > 4 for text in texts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "400"], "--tokens (400) must be at most 24, the longest held-out text of one document"),
        (["--plan", "other/half.json"], "the names of the files become those of the rows"),
        (["--plan", "dense.json"], "dense is the model without a plan; rename a file"),
        (["--plan", "absent.json"], "absent.json cannot be read as a sparsity plan"),
        (["--peers", "vllm"], "--peers 'vllm' contains 'vllm'; choose from llama.cpp"),
        (["--clock", "sun"], "--clock 'sun' contains 'sun'; choose from wall, processor"),
        (["--weights", "int3"], "--weights 'int3' contains 'int3'; choose from auto, fp32"),
    ],
)
def test_wrong_options_are_refused_with_the_way_out(words, said, run_dir, capsys):
    assert run(options(run_dir, *words)) == 2
    assert said in capsys.readouterr().err


def test_a_plan_of_another_model_is_refused_by_the_name_of_its_file(run_dir, tmp_path, capsys):
    other = tmp_path / "other.json"
    SparsityPlan.uniform(ModelConfig.model_validate(MODEL | {"num_layers": 3, "num_heads": 2}), 0.5).save(other)
    assert run(options(run_dir, "--plan", str(other))) == 2
    assert "other.json: sparsity plan: layer 2" in capsys.readouterr().err


def small(**changes):
    return ModelConfig.model_validate(MODEL | {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2} | changes)


def test_every_tensor_has_a_name_and_the_shape_that_llama_cpp_reads():
    model = build_model(small(qk_norm="per_head"))
    architecture, _ = llama_architecture(model.config)
    found = {name: tuple(tensor.shape) for name, tensor in llama_tensors(model, architecture)}
    layer = {
        "attn_norm": (64,), "attn_q": (128, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 128),
        "attn_q_norm": (32,), "attn_k_norm": (32,), "ffn_norm": (64,), "ffn_gate_inp": (4, 64),
        "ffn_gate_exps": (4, 32, 64), "ffn_up_exps": (4, 32, 64), "ffn_down_exps": (4, 64, 32),
    }  # fmt: skip
    want = {f"blk.{index}.{name}.weight": shape for index in range(2) for name, shape in layer.items()}
    want |= {"token_embd.weight": (264, 64), "output.weight": (264, 64), "output_norm.weight": (64,)}
    assert architecture == "qwen3moe" and found == want
    tied = build_model(small(tie_embeddings=True))
    tensors = dict(llama_tensors(tied, "llama"))
    assert torch.equal(tensors["output.weight"], tied.embedding.weight)


def test_written_weights_are_those_of_the_model(tmp_path):
    model = build_model(small())
    write_llama_weights(model, "llama", tmp_path)
    names = json.loads((tmp_path / NAMES_FILE).read_text())
    stored = {name: np.load(tmp_path / f"{number}.npy") for number, name in enumerate(names)}
    experts = model.layers[1].moe.experts
    assert np.array_equal(stored["blk.1.ffn_down_exps.weight"], experts.w_down.detach().transpose(1, 2).numpy())
    values = model.layers[0].attention.qkv.weight[-64:].detach()
    assert np.array_equal(stored["blk.0.attn_v.weight"], values.numpy())
    queries = model.layers[0].attention.qkv.weight[:128].detach()
    assert np.array_equal(stored["blk.0.attn_q.weight"], paired_rows(queries, 4).numpy())


def test_paired_rows_give_the_same_scores_if_neighbouring_channels_are_rotated():
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(2 * 8, 6, generator=generator), torch.randn(5, 6, generator=generator)
    angles = torch.randn(5, 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    ours = rotate((tokens @ weight.T).view(5, 2, 8).transpose(0, 1)[None], Rotation(cos, sin))[0]
    first, second = (tokens @ paired_rows(weight, 2).T).view(5, 2, 4, 2).transpose(0, 1).unbind(-1)
    theirs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    assert torch.allclose(ours @ ours.transpose(-1, -2), theirs @ theirs.transpose(-1, -2), atol=1e-4)
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe": MODEL["moe"] | {"activation": "relu2glu"}}, "no Hugging Face family"),
        ({"qk_norm": "all_heads"}, "the format of olmoe"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "model.rope_scaling.type (linear) is not written for llama.cpp",
        ),
    ],
)
def test_a_model_that_llama_cpp_cannot_compute_is_named_with_the_reason(changes, said):
    architecture, reason = llama_architecture(small(**changes))
    assert architecture is None and said in reason


def test_closing_ends_a_child_that_is_busy_and_removes_its_weights(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys, time\n"
        "open(json.loads(sys.argv[1])['file'], 'w').close()\n"
        "print(json.dumps({'version': '1'}), flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(llama_peer, "_CHILD", child)
    formats = llama_peer.LlamaFormats("BF16", "BF16")
    peer = llama_peer.LlamaCpp(sys.executable, small(), formats, folder=tmp_path / "files", capacity=8)
    assert peer.version == "1" and [file.name for file in (tmp_path / "files").iterdir()] == ["BF16-BF16.gguf"]
    start = time.monotonic()
    peer.close()
    assert time.monotonic() - start < 20 and list((tmp_path / "files").iterdir()) == []


@needs_compiler
@pytest.mark.skipif(find_llama_cpp()[0] is None, reason="needs llama-cpp-python and gguf")
@pytest.mark.parametrize("norms", [False, True])
def test_llama_cpp_computes_the_same_losses_from_the_same_weights(norms, tmp_path, capsys):
    write_text(tmp_path / "text")
    config = tiny_config(tmp_path, "run", engine="torch", steps=3, model=MODEL | {"qk_norm": norms})
    run_dir = train(config, [Recorder(config)]).run_dir
    words = ["--weights", "bf16", "--tokens", "4", "--rounds", "1", "--texts", "4", "--json"]
    assert run(["bench", "plans", str(run_dir), "--folder", str(tmp_path / "files"), *words]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["formats"]["bf16"]["decode"]
    assert theirs["contender"] == "llama.cpp BF16, output BF16"
    # llama.cpp rounds activations to bf16 before its products, and ours does not.
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=2e-3)
    assert theirs["same_choices_as_dense"] > 0.95
    assert list((tmp_path / "files").iterdir()) == []
