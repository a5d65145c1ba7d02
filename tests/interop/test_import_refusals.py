"""What a Hugging Face folder may not have is named, with the file, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch

from qsparse_moe import train
from qsparse_moe.cli.app import run
from qsparse_moe.errors import BackendUnavailable, CheckpointError
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.named_tensors import num_not_finite
from tests.interop.hugging_face_models import NUM_WORDS, build, change_settings, change_tensors, save
from tests.support.runs import tiny_config, write_text

pytest.importorskip("transformers")

QUERY = "model.layers.0.self_attn.q_proj.weight"
NEW = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder per family, and one in several files."""
    root = tmp_path_factory.mktemp("saved")
    model = build("mixtral")
    save(model, root / "mixtral")
    save(model, root / "sharded", max_shard_size="20KB")
    for name in ("qwen3_moe", "olmoe", "qwen2_moe", "llama", "mistral", "qwen2", "qwen3"):
        save(build(name), root / name)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    return lambda name="mixtral": shutil.copytree(saved / name, tmp_path / name)


def refused(folder):
    """The message; nothing was written."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        import_model(folder, folder.parent / "out")
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "mixtral",
            {"hidden_act": "gelu"},
            'hidden_act ("gelu") must be "silu" or "swish" here; another value changes',
        ),
        ("mixtral", {"attention_bias": True}, "attention_bias (true) must be false here"),
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout (0.1) must be 0.0 here"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise (0.1) must be 0.0 here"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window (4096) must be null here"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
        (
            "mixtral",
            {"rope_scaling": {"type": "linear"}},
            'rope_scaling ({"type": "linear"}) stands beside rope_parameters, and one must describe both; remove one',
        ),
        ("mixtral", {"rope_parameters": [1]}, "rope_parameters ([1]) must be an object of JSON; correct it"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4}},
            'rope_parameters ({"rope_type": "dynamic", "factor": 4}) must have one of these types: default, linear, ',
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "linear"}},
            "lacks factor, which linear needs; download the file",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "default", "factor": 4}},
            "has a setting that is not known for the type default: factor; it may change the result",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "partial_rotary_factor": 0.5}},
            "has a setting that is not known for the type linear: partial_rotary_factor",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
            'rope_parameters ({"rope_type": "linear", "factor": "two"}) must be a positive number',
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "truncate": False}},
            "must have truncate true or absent; channels that are not whole change the frequencies",
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_fast": "many"}},
            'beta_fast": "many"}) must be a positive number',
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "low_freq_factor": 2}},
            "has a setting that is not known for the type yarn: low_freq_factor",
        ),
        ("mixtral", {"rope_theta": 5.0}, "rope_theta (5.0) differs from rope_parameters.rope_theta (1000000.0)"),
        ("mixtral", {"rope_parameters": {"rope_theta": -1}}, 'rope_parameters ({"rope_theta": -1}) must be a positive'),
        ("mixtral", {"rms_norm_eps": "small"}, 'rms_norm_eps ("small") must be a positive number; correct it'),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings (1) must be true or false"),
        ("mixtral", {"num_hidden_layers": 2.5}, "num_hidden_layers (2.5) must be a positive integer"),
        ("mixtral", {"num_local_experts": ...}, "num_local_experts (absent) must be a positive integer"),
        (
            "mixtral",
            {"quantization_config": {"bits": 4}},
            'quantization_config ({"bits": 4}) must be null here; quantized',
        ),
        ("mixtral", {"num_key_value_heads": 4}, "(model.num_kv_heads (4) must divide model.num_heads (6)"),
        ("mixtral", {"head_dim": 10, "num_experts_per_tok": 9}, "(model.moe.experts_per_token (9) must be at most"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, 'mlp_only_layers ("0") must be a list of layers'),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1]},
            "mlp_only_layers ([1]) with decoder_sparse_step (1) leaves experts in the layers [0, 2], and this package",
        ),
        (
            "mixtral",
            {"model_type": "gpt_oss"},
            'model_type ("gpt_oss") has attention sinks, biases in attention, router, and experts, and a clamped '
            "activation function in the experts, which this package's model does not have; name a model of one of ",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv (8.0) must be null here; another value changes the result"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
        (
            "qwen2_moe",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            'layer_types (["full_attention", "sliding_attention", "full_attention"]) must be null or ["full_attention"',
        ),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "(0) must be a positive integer; correct it"),
        ("llama", {"mlp_bias": True}, "mlp_bias (true) must be false here"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp (2) must be 1 here"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved (true) must be false here"),
        ("qwen2", {"use_mrope": True}, "use_mrope (true) must be false here"),
        (
            "mistral",
            {"sliding_window": 4096},
            "sliding_window (4096) must be null or at least max_position_embeddings (131072): attention has no window "
            "here; up to 4096 tokens the window changes nothing, so set max_position_embeddings to 4096 for",
        ),
        (
            "mistral",
            {"sliding_window": ...},
            "sliding_window (absent) must be null or at least max_position_embeddings",
        ),
        ("mistral", {"attention_bias": True}, "attention_bias (true) must be false here"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "must be null or"),
        ("mixtral", {"model_type": "gpt2"}, 'model_type ("gpt2") is not a family that can be read; name a model of'),
    ],
)
def test_a_setting_that_is_not_supported_is_named_with_its_value(copy, family, settings, message):
    folder = copy(family)
    change_settings(folder, **settings)
    assert refused(folder).startswith(f"{folder / 'config.json'}: ")
    assert message in refused(folder)


def test_a_config_that_is_no_object_is_named(copy):
    folder = copy()
    (folder / "config.json").write_text("[1]")
    assert refused(folder) == f"{folder}/config.json: is [1], and must be an object of JSON; download it again"
    (folder / "config.json").write_text("{")
    assert refused(folder).startswith(f"{folder}/config.json: cannot be read (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks the tensor {QUERY}, which the model"),
        (lambda tensors: tensors.update({NEW: torch.zeros(60)}), f"contains the tensor {NEW}, which the model of"),
        (
            lambda tensors: tensors.update({QUERY: torch.zeros(60, 43)}),
            f"{QUERY} has the shape (60, 43) in the file and (60, 44) by",
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(80, 44)}),
            "model.embed_tokens.weight has the shape (80, 44) in the file and (83, 44) by",
        ),
        (
            lambda tensors: tensors.update({QUERY: torch.zeros(60, 44, dtype=torch.int8)}),
            f"{QUERY} has the dtype I8, which must be one of F32, BF16, F16, F64; name weights that were not quantized",
        ),
        (
            lambda tensors: tensors[QUERY].view(-1)[:2].fill_(float("nan")),
            f"2 of 2640 values of {QUERY} are not finite, and all must be; download the file again",
        ),
    ],
    ids=["missing", "extra", "shape", "vocabulary", "dtype", "nan"],
)
def test_a_tensor_that_does_not_fit_is_named(copy, change, message):
    folder = copy()
    change_tensors(folder, change)
    assert message in refused(folder)


def test_values_that_are_not_finite_are_counted_and_large_ones_are_not():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
        assert num_not_finite(largest) == 0, "their sum overflows in some types"
        largest[1, 2], largest[3, 0], largest[0, 4] = float("nan"), float("inf"), -float("inf")
        assert num_not_finite(largest) == 3


def test_all_layers_of_another_number_are_missing_or_extra(copy):
    folder = copy()
    change_settings(folder, num_hidden_layers=4)
    assert re.search(r"lacks the tensor model\.layers\.3\.\S+ \(and 21 more\)", refused(folder))
    change_settings(folder, num_hidden_layers=2)
    assert re.search(r"contains the tensor model\.layers\.2\.\S+ \(and 21 more\)", refused(folder))


def test_a_truncated_shard_and_a_missing_one_are_named(copy):
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    found = refused(folder)
    assert re.match(rf"{shard}: cannot be read \(.*\), and every file of the model is needed; download it", found)
    shard.unlink()
    index = folder / "model.safetensors.index.json"
    assert refused(folder) == (
        f"{index}: names the file {shard.name}, which does not exist in the folder, and every file of the model is "
        "needed; download it again"
    )
    index.write_text("{}")
    assert refused(folder).startswith(f"{index}: cannot be read ('weight_map')")
    # A file outside of the folder is not read, even if it exists.
    (folder.parent / "outside").touch()
    index.write_text(json.dumps({"weight_map": {QUERY: "../outside"}}))
    assert f"{index}: names the file ../outside, which does not exist in the folder" in refused(folder)


def test_a_tensor_in_two_files_is_refused(copy):
    folder = copy("sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copy(folder / index[QUERY], folder / "model-twice.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index | {"twice": "model-twice.safetensors"}})
    )
    found = refused(folder)
    assert re.search(r"model-twice\.safetensors: contains \S+, which is in \S+ too, and a tensor must be", found)


def test_pickles_are_never_read(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder}: has its weights in pytorch_model.bin, which is a pickle and can run any program when it is read; "
        "only safetensors files are read. Download the model's safetensors files, or, if you trust its author, convert "
        "it with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )
    (folder / "pytorch_model.bin").unlink()
    assert "contains neither model.safetensors nor model.safetensors.index.json" in refused(folder)


def test_a_missing_or_too_large_tokenizer_is_refused(copy):
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["large"] = 83
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "cannot be used: model.vocab_size (83) must be at least the tokenizer's (84)" in refused(folder)
    (folder / "tokenizer.json").unlink()
    found = refused(folder)
    assert f"{folder} contains no tokenizer.json, and the tokenizer of the weights must be known; copy" in found
    assert found.endswith("Name another one with --tokenizer (tokenizer=... in Python)")
    config = tiny_config(write_text(folder.parent / "text").parent, "started", engine="torch", init_from=str(folder))
    with pytest.raises(CheckpointError, match=r"training\.init_from .* compared: .*contains no tokenizer\.json"):
        train(config)


def test_init_from_names_the_setting_in_front_of_the_file(copy):
    folder = copy()
    change_settings(folder, attention_bias=True)
    config = tiny_config(write_text(folder.parent / "text").parent, "started", engine="torch", init_from=str(folder))
    with pytest.raises(CheckpointError, match=rf"init_from \({folder}\): {folder}/config\.json: attention_bias"):
        train(config)
    assert not run_folder(config).exists()


def test_a_folder_that_is_no_hugging_face_model_is_refused(copy, tmp_path):
    done = copy()
    import_model(done, tmp_path / "done")
    assert "so it is a run or an export of this package and needs no import" in refused(tmp_path / "done")
    (tmp_path / "thesis").mkdir()
    assert "thesis: contains no config.json, and the folder of a Hugging Face model is needed" in refused(
        tmp_path / "thesis"
    )
    assert "name: is no folder, and the folder of a Hugging Face model is needed; models are not downloaded" in refused(
        tmp_path / "name"
    )


def test_nothing_but_an_earlier_export_is_replaced(copy, tmp_path):
    folder = copy()
    import_model(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists, and an export does not overwrite it"):
        import_model(folder, tmp_path / "out")
    assert import_model(folder, tmp_path / "out", force=True, dtype="bf16").files == 1


def test_a_missing_library_is_named(copy, tmp_path, monkeypatch):
    folder = copy()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BackendUnavailable, match=r'need safetensors, .* pip install "qsparse-moe\[hf\]"'):
        import_model(folder, tmp_path / "out")
    with pytest.raises(BackendUnavailable, match="Hugging Face models need safetensors"):
        HuggingFaceWeights(folder)


def test_the_verb_imports_and_the_other_verbs_read_the_result(copy, tmp_path, capsys):
    folder, out = copy("qwen3_moe"), tmp_path / "out"
    assert run(["import", str(folder), "--output", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["source"], made["folder"], made["step"], made["files"]) == (str(folder), str(out), 0, 1)
    assert made["bytes"] < (out / "model.safetensors").stat().st_size < made["bytes"] + 10_000
    assert run(["import", str(folder), "--output", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: exists, and an export does not overwrite it")
    assert run(["import", str(folder), "--output", str(out), "--force", "--dtype", "bf16"]) == 0
    assert f"{made['bytes'] // 2:,} bytes" in capsys.readouterr().out
    greedy = ["--prompt", "word1 word2", "--max-tokens", "4", "--temperature", "0", "--engine", "torch"]
    assert run(["generate", str(out), *greedy]) == 0
    assert "word" in capsys.readouterr().out
    assert run(["generate", str(folder), *greedy]) == 2
    assert f"qsparse-moe import {folder} --output FOLDER" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("word3 word40 word5 word7 " * 30)
    assert run(["import", str(folder), "--output", str(out), "--force"]) == 0
    capsys.readouterr()
    assert run(["evaluate", str(out), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    # The document token, and then the words, whose ids are their numbers plus 2.
    ids = torch.tensor([1, *[5, 42, 7, 9] * 30])[None]
    with torch.no_grad():
        logits = build("qwen3_moe")(ids).logits[0, :-1, :NUM_WORDS]
    assert evaluation["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item(), rel=1e-5)
    assert (evaluation["sparsity"], evaluation["step"]) == (0, 0)
