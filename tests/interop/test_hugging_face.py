"""Models of transformers compute the same here: logits, gradients, and every layout of their files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qsparse_moe import build_model, train
from qsparse_moe.config.shapes import has_experts
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.training.checkpoint.state import load_model, stored_shapes
from tests.interop.hugging_face_models import MODELS, VOCABULARY, build, change_tensors, save
from tests.support.runs import tiny_config, write_text

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of transformers, and the folder of it."""
    model = build(request.param)
    return model, save(model, tmp_path_factory.mktemp("models") / request.param)


def read(folder, **experts):
    weights = HuggingFaceWeights(folder)
    moe = weights.model.moe.model_copy(update={"backend": "loop"} | experts)
    model = build_model(weights.model.model_copy(update={"moe": moe}))
    assert stored_shapes(model) == weights.shapes
    load_model(model, weights.tensor, weights.shapes)
    return model


def tokens():
    return torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


def relative(found, want):
    return ((found - want).abs().max() / want.abs().max()).item()


def gradients_by_our_names(model, config):
    """The gradients of a model of transformers; the names and layouts are written out here, apart from the package."""
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {"embedding.weight": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tie_embeddings:
        found["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        a, b = f"layers.{layer}.", f"model.layers.{layer}."
        found[a + "attention_norm.weight"] = theirs[b + "input_layernorm.weight"]
        found[a + "feed_forward_norm.weight"] = theirs[b + "post_attention_layernorm.weight"]
        found[a + "attention.qkv.weight"] = torch.cat([theirs[f"{b}self_attn.{x}_proj.weight"] for x in "qkv"])
        found[a + "attention.output.weight"] = theirs[b + "self_attn.o_proj.weight"]
        if config.attention_bias != "none":
            found[a + "attention.qkv.bias"] = torch.cat([theirs[f"{b}self_attn.{x}_proj.bias"] for x in "qkv"])
        if config.attention_bias == "all":
            found[a + "attention.output.bias"] = theirs[b + "self_attn.o_proj.bias"]
        if config.qk_norm != "none":
            found[a + "attention.query_norm.weight"] = theirs[b + "self_attn.q_norm.weight"]
            found[a + "attention.key_norm.weight"] = theirs[b + "self_attn.k_norm.weight"]
        if has_experts(config, layer):
            gate, up = theirs[b + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
            found[a + "moe.experts.w_gate"], found[a + "moe.experts.w_up"] = gate.mT, up.mT
            found[a + "moe.experts.w_down"] = theirs[b + "mlp.experts.down_proj"].mT
            found[a + "moe.router.weight"] = theirs[b + "mlp.gate.weight"]
            if config.moe.num_shared_experts:
                for part in ("gate", "up", "down"):
                    found[f"{a}moe.shared.w_{part}"] = theirs[f"{b}mlp.shared_expert.{part}_proj.weight"].T
                found[a + "moe.shared.token_gate"] = theirs[b + "mlp.shared_expert_gate.weight"]
        else:
            for part in ("gate", "up", "down"):
                found[f"{a}dense.w_{part}"] = theirs[f"{b}mlp.{part}_proj.weight"].T
    return found


def assert_same_logits_and_gradients(theirs, ours, by_our_names):
    """``by_our_names`` gives the gradients of a model of transformers, from it and our configuration."""
    upstream = torch.randn(3, 17, VOCABULARY, generator=torch.Generator().manual_seed(2))
    want, found = theirs(tokens()).logits, ours(tokens()).logits_BSV
    assert want.std() > 0.1, "the model says too little to be compared"
    assert relative(found, want) <= 2e-6
    theirs.zero_grad()
    want.backward(upstream)
    found.backward(upstream)
    gradients = by_our_names(theirs, ours.config)
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert mine.keys() == gradients.keys()
    for name, gradient in mine.items():
        # A gradient sums over tokens, so its rounding error is larger than that of a logit.
        assert relative(gradient, gradients[name]) <= 5e-6, name


def test_logits_and_every_gradient_are_those_of_transformers(pair):
    theirs, folder = pair
    assert_same_logits_and_gradients(theirs, read(folder), gradients_by_our_names)


@pytest.mark.parametrize("layout", ["sharded", "fused", "sharded-and-fused"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense-first", "olmoe", "qwen2_moe-dense-first"])
def test_every_layout_of_the_files_gives_the_same_weights(tmp_path, name, layout):
    model = build(name)
    one = HuggingFaceWeights(save(model, tmp_path / "one"))
    options = {"save_original_format": "fused" not in layout}
    options |= {"max_shard_size": "20KB"} if "sharded" in layout else {}
    folder = save(model, tmp_path / "other", **options)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == ("sharded" in layout)
    index = folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    other = HuggingFaceWeights(folder)
    if "fused" in layout:
        assert any("gate_up_proj" in piece.name for recipe in other._recipes.values() for piece in recipe.pieces)
    assert not stored or any("gate_up_proj" in name for name in stored) == ("fused" in layout)
    assert one.shapes == other.shapes
    assert all(one.tensor(tensor).equal(other.tensor(tensor)) for tensor in one.shapes)


def test_one_stored_tensor_is_in_memory_beside_the_one_that_is_made(tmp_path, monkeypatch):
    weights = HuggingFaceWeights(save(build("mixtral"), tmp_path / "model"))
    asked = []
    original = weights._stored.read
    monkeypatch.setattr(weights._stored, "read", lambda name, rows=None: asked.append(name) or original(name, rows))
    weights.tensor("layers.1.moe.experts.w_up")
    assert asked == [f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(5)]


def test_bf16_files_keep_their_type_and_mixed_ones_take_the_widest(tmp_path):
    folder = save(build("mixtral").bfloat16(), tmp_path / "model")
    weights = HuggingFaceWeights(folder)
    assert {weights.dtype(name) for name in weights.shapes} == {torch.bfloat16}
    key = "model.layers.0.self_attn.k_proj.weight"
    exact = torch.full((20, 44), 1.0001)
    change_tensors(folder, lambda tensors: tensors.update({key: exact}))
    found = HuggingFaceWeights(folder).tensor("layers.0.attention.qkv.weight")
    assert found.dtype == torch.float32 and found[60:80].equal(exact)


def test_an_import_is_an_export_with_the_same_logits_and_tokenizer(pair, tmp_path):
    theirs, folder = pair
    done = import_model(folder, tmp_path / "out", part_bytes=40_000)
    assert done.files > 1 and sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    config, model, step = load_export(tmp_path / "out")
    assert step == 0 and model.sparsity_plan.mean == 0
    assert config.data.tokenizer == str(tmp_path / "out" / "tokenizer")
    assert config.data.sequence_length == min(2048, theirs.config.max_position_embeddings)
    with torch.no_grad():
        assert relative(model(tokens()).logits_BSV, theirs(tokens()).logits) <= 2e-6
    again, weights = open_weights(str(tmp_path / "out")), HuggingFaceWeights(folder)
    assert again.kind == "export" and all(again.tensor(name).equal(weights.tensor(name)) for name in weights.shapes)


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
def test_the_type_of_an_import(tmp_path, dtype):
    folder = save(build("qwen3_moe-dense-first").half(), tmp_path / "model")
    done = import_model(folder, tmp_path / "out", dtype=dtype)
    found = {parameter.dtype for parameter in load_export(tmp_path / "out")[1].parameters()}
    want = {"auto": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert found == {want}
    # By it, describe and allocate count the bytes of weights.
    precision = {"auto": "fp16"}.get(dtype, dtype)
    assert load_run_config(tmp_path / "out").training.precision == precision
    assert done.bytes == sum(p.numel() for p in load_export(tmp_path / "out")[1].parameters()) * want.itemsize


def test_the_tokenizer_can_be_named(tmp_path):
    folder = save(build("mixtral"), tmp_path / "model")
    words = shutil.copytree(folder, tmp_path / "words", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "tokenizer.json").unlink()
    import_model(folder, tmp_path / "out", tokenizer=str(words))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == (words / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense-first"])
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_starts_from_the_folder_and_trains_sparsely(tmp_path, name, engine):
    folder = save(build(name), tmp_path / "model", max_shard_size="20KB")
    write_text(tmp_path / "text")
    source = HuggingFaceWeights(folder)
    sparsity = source.model.sparsity.model_copy(update={"default": 0.5, "backend": "torch"})
    config = tiny_config(tmp_path, "started", steps=2, engine=engine, init_from=str(folder), learning_rate=1e-3)
    moe = source.model.moe.model_copy(update={"backend": "loop"})
    model = source.model.model_copy(update={"sparsity": sparsity, "moe": moe})
    data = config.data.model_copy(update={"tokenizer": str(folder)})
    metrics = config.metrics.model_copy(update={"tensorboard": False})
    config = config.model_copy(update={"model": model, "data": data, "metrics": metrics})
    run_dir = train(config, [Recorder(config)]).run_dir
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["train/sparsity"] for row in rows] == pytest.approx([0.5, 0.5])
    entry = json.loads((run_dir / "manifest.json").read_text())["initial_weights"]
    assert (entry["kind"], entry["step"], entry["folder"]) == ("hugging_face", 0, str(folder))
    assert entry["changed_settings"] == {"model.sparsity.default": [None, 0.5]}
