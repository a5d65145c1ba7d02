"""Models in the format of their family: transformers opens them, and imports go back bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qsparse_moe.interop.export_model import export_model
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.state_dict import load_export
from tests.interop.hugging_face_models import MODELS, VOCABULARY, build, save
from tests.interop.test_deepseek import MODELS as DEEPSEEK
from tests.interop.test_deepseek import build as build_deepseek

transformers = pytest.importorskip("transformers")

EXPORTED = [*MODELS, *(f"deepseek_{name}" for name in DEEPSEEK)]


# Its other implementations of experts refuse matrices of odd widths.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def tokens():
    return torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


def relative(found, want):
    return ((found - want).abs().max() / want.abs().max()).item()


def weights(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, tmp_path_factory):
    """A model of transformers, the folder of it, and the export of its import."""
    root = tmp_path_factory.mktemp("exported")
    name = request.param
    model = build(name) if name in MODELS else build_deepseek(name.removeprefix("deepseek_"))
    theirs = save(model, root / "theirs", max_shard_size="20KB")
    import_model(theirs, root / "imported")
    export_model(root / "imported", root / "ours", part_bytes=15_000)
    return model, theirs, root


def test_an_import_goes_back_to_the_same_tensors(exported):
    _, theirs, root = exported
    want, found = weights(theirs), weights(root / "ours")
    assert found.keys() == want.keys()
    assert all(value.dtype == want[name].dtype and value.equal(want[name]) for name, value in found.items())
    index = json.loads((root / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == want.keys() and len(set(index["weight_map"].values())) > 3


def test_transformers_opens_it_and_computes_the_same(exported):
    model, _, root = exported
    opened = transformers.AutoModelForCausalLM.from_pretrained(root / "ours", **EAGER)
    assert type(opened) is type(model) and opened.dtype == torch.float32
    ours = load_export(root / "imported")[1]
    with torch.no_grad():
        want, found = ours(tokens()).logits_BSV, opened(tokens()).logits
        assert want.std() > 0.1 and relative(found, want) <= 2e-6
        assert relative(found, model(tokens()).logits) <= 2e-6
    # Every setting of the function is that of the original, which may leave it to a default.
    skipped = {
        "_name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "max_position_embeddings",
    }
    skipped |= {
        "rope_parameters",
        "router_aux_loss_coef",
        "dtype",
        "transformers_version",
        "architectures",
        "output_router_logits",
    }
    mine, others = opened.config.to_dict(), model.config.to_dict()
    others["head_dim"] = others.get("head_dim") or mine.get("head_dim")
    assert {name for name in others if name not in skipped and mine.get(name) != others[name]} <= {
        "decoder_sparse_step",
        "intermediate_size",
        "mlp_only_layers",
        # A window of all positions is none.
        *(("sliding_window",) if others.get("sliding_window") == others["max_position_embeddings"] else ()),
        # Without groups, DeepSeek-V2's have no effect.
        *(("n_group", "topk_group") if others.get("topk_method") == "greedy" else ()),
    }
    assert opened.config.max_position_embeddings == model.config.max_position_embeddings


def test_the_export_of_its_import_has_the_same_bytes(exported, tmp_path):
    _, _, root = exported
    import_model(root / "ours", tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "ours", part_bytes=15_000)
    want, found = contents(root / "ours"), contents(tmp_path / "ours")
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"} < want.keys()
    assert found == want


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense-first"])
def test_the_names_are_the_published_ones(tmp_path, name):
    """Those that the files on the hub have, and that vLLM, SGLang, and llama.cpp's converter read."""
    import_model(save(build(name), tmp_path / "theirs"), tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "ours", dtype="bf16")
    found = weights(tmp_path / "ours")
    common = {"input_layernorm", "post_attention_layernorm"}
    common |= {f"self_attn.{matrix}_proj" for matrix in "qkvo"}
    if name == "mixtral":
        block = {"block_sparse_moe.gate", *(f"block_sparse_moe.experts.{e}.w{n}" for e in range(5) for n in (1, 2, 3))}
        layers = [common | block] * 3
    else:
        common |= {"self_attn.q_norm", "self_attn.k_norm"}
        matrices = ("gate_proj", "up_proj", "down_proj")
        block = {"mlp.gate", *(f"mlp.experts.{expert}.{matrix}" for expert in range(5) for matrix in matrices)}
        layers = [common | {f"mlp.{matrix}" for matrix in matrices}, common | block, common | block]
    want = {f"model.layers.{layer}.{part}.weight" for layer, parts in enumerate(layers) for part in parts}
    assert found.keys() == want | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    # The shapes too: experts are (F, D), (F, D), and (D, F).
    expert = "block_sparse_moe.experts.0.w{}" if name == "mixtral" else "mlp.experts.0.{}_proj"
    names = (1, 3, 2) if name == "mixtral" else ("gate", "up", "down")
    shapes = [tuple(found[f"model.layers.2.{expert.format(matrix)}.weight"].shape) for matrix in names]
    assert shapes == [(14, 44), (14, 44), (44, 14)]
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    # Written out, because programs of other authors read them.
    standard = {
        "architectures": ["MixtralForCausalLM" if name == "mixtral" else "Qwen3MoeForCausalLM"],
        "model_type": "mixtral" if name == "mixtral" else "qwen3_moe",
        "vocab_size": 83,
        "hidden_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_experts_per_tok": 3,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rope_theta": 1e6 if name == "mixtral" else 1e4,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5 if name == "mixtral" else 1e-6,
        "max_position_embeddings": 131072 if name == "mixtral" else 32768,
    }
    if name == "mixtral":
        standard |= {"num_local_experts": 5, "intermediate_size": 14, "sliding_window": None}
    else:
        standard |= {"num_experts": 5, "moe_intermediate_size": 14, "intermediate_size": 36, "norm_topk_prob": False}
        standard |= {"mlp_only_layers": [0], "decoder_sparse_step": 1, "attention_bias": False}
    assert {key: settings.get(key) for key in standard} == standard
