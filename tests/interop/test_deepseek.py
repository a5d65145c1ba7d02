"""DeepSeek-V2 and V3 of transformers compute the same here: logits, every gradient, routing, and generation."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe import train
from qsparse_moe.cli.app import run
from qsparse_moe.config.shapes import has_experts
from qsparse_moe.errors import CheckpointError
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.interop.hugging_face_models import SHAPES, YARN, change_settings, change_tensors, save
from tests.interop.test_hugging_face import assert_same_logits_and_gradients, read, tokens
from tests.support.runs import tiny_config, write_text

transformers = pytest.importorskip("transformers")

# 6 heads of 6 + 4 channels do not fill a width of 42. transformers' V2 fails on an odd number of channels.
SIZES = {name: value for name, value in SHAPES.items() if name != "head_dim"} | {
    "hidden_size": 42, "num_key_value_heads": 6, "n_routed_experts": 8, "moe_intermediate_size": 14,
    "intermediate_size": 36, "q_lora_rank": 13, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "first_k_dense_replace": 1, "max_position_embeddings": 144,
}  # fmt: skip
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
MODELS = {
    "v2": ("DeepseekV2", {}),
    "v2-lite": ("DeepseekV2", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "v2-groups": ("DeepseekV2", GROUPS | {"routed_scaling_factor": 16.0, "n_shared_experts": 3}),
    "v2-yarn": ("DeepseekV2", {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "v3": ("DeepseekV3", {"n_group": 4, "topk_group": 2}),
    "v3-one-group": ("DeepseekV3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None}),
    "v3-wide-values": (
        "DeepseekV3",
        {"n_group": 2, "topk_group": 1, "v_head_dim": 13, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    ),
    "v3-yarn": (
        "DeepseekV3",
        {"n_group": 4, "topk_group": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.6}},
    ),
}


def build(name):
    """The model of transformers, in fp32, with random norms, routers, and load-balancing biases."""
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.normal_(0.7, 0.3)
            elif parameter_name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of transformers, and the folder of it."""
    model = build(request.param)
    return model, save(model, tmp_path_factory.mktemp("models") / request.param)


def gradients_by_our_names(model, config):
    """The gradients of a model of transformers; names and the order of rows are written out, apart from the package."""
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {"embedding.weight": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tie_embeddings:
        found["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        a, b = f"layers.{layer}.", f"model.layers.{layer}."
        found[a + "attention_norm.weight"] = theirs[b + "input_layernorm.weight"]
        found[a + "feed_forward_norm.weight"] = theirs[b + "post_attention_layernorm.weight"]
        attention = {name.removeprefix(b + "self_attn."): g for name, g in theirs.items() if b + "self_attn." in name}
        latent = attention["kv_a_proj_with_mqa.weight"]
        latent = torch.cat((latent[:12], latent[[12, 14]], latent[[13, 15]]))
        has_rank = "q_b_proj.weight" in attention
        query = attention["q_b_proj.weight" if has_rank else "q_proj.weight"].unflatten(0, (6, 10))
        query = torch.cat((query[:, :6], query[:, [6, 8]], query[:, [7, 9]]), 1).flatten(0, 1)
        found[a + "attention.down.weight"] = torch.cat((attention["q_a_proj.weight"] if has_rank else query, latent))
        if has_rank:
            found[a + "attention.query_up.weight"] = query
            found[a + "attention.query_latent_norm.weight"] = attention["q_a_layernorm.weight"]
        found[a + "attention.latent_norm.weight"] = attention["kv_a_layernorm.weight"]
        found[a + "attention.latent_up.weight"] = attention["kv_b_proj.weight"]
        found[a + "attention.output.weight"] = attention["o_proj.weight"]
        if has_experts(config, layer):
            gate, up = theirs[b + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
            found[a + "moe.experts.w_gate"], found[a + "moe.experts.w_up"] = gate.mT, up.mT
            found[a + "moe.experts.w_down"] = theirs[b + "mlp.experts.down_proj"].mT
            found[a + "moe.router.weight"] = theirs[b + "mlp.gate.weight"]
        ours, block = ("moe.shared", "mlp.shared_experts") if has_experts(config, layer) else ("dense", "mlp")
        for part in ("gate", "up", "down"):
            found[f"{a}{ours}.w_{part}"] = theirs[f"{b}{block}.{part}_proj.weight"].T
    return found


def test_logits_and_every_gradient_are_those_of_transformers(pair):
    theirs, folder = pair
    assert_same_logits_and_gradients(theirs, read(folder), gradients_by_our_names)


def test_the_same_experts_are_chosen_with_a_margin(pair):
    """By more than rounding: the comparison of logits above does not depend on a near tie."""
    theirs, folder = pair
    ours = read(folder)
    chosen, wanted, margins = [], [], []
    for router in ours.routers():
        router.register_forward_hook(lambda _, inputs, routing: chosen.append(routing.expert_ids_TA.sort().values))
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _, inputs, out: wanted.append(out[2].sort().values))
            layer.mlp.gate.register_forward_hook(
                lambda _, inputs, out: margins.append(out[0].sort().values.diff().min())
            )
    with torch.no_grad():
        ours(tokens()), theirs(tokens())
    assert len(chosen) == len(wanted) == len(ours.routers()) > 0
    assert all(one.equal(other) for one, other in zip(chosen, wanted, strict=True))
    assert min(margins) > 1e-5


def test_an_import_decodes_the_tokens_of_transformers(pair, tmp_path):
    theirs, folder = pair
    import_model(folder, tmp_path / "out", part_bytes=40_000)
    config, model, _ = load_export(tmp_path / "out")
    again, weights = open_weights(str(tmp_path / "out")), HuggingFaceWeights(folder)
    assert all(again.tensor(name).equal(weights.tensor(name)) for name in weights.shapes)
    engine = resolve_engine("auto", model)
    assert config.model.latent_attention.key_value_rank == 12
    prompt = tokens()[:1, :5]
    with torch.no_grad():
        want = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    cache = KeyValueCache.allocate(model.config, batch=1, capacity=16, dtype=torch.float32)
    logits, found = prefill(model, [prompt[0].tolist()], cache), []
    for _ in range(8):
        found.append(logits.argmax(-1))
        logits = engine.decode(found[-1], cache)
    assert torch.cat(found).tolist() == want.tolist()


def test_biases_stay_in_fp32_in_an_import_to_bf16(tmp_path):
    model = build("v3")
    folder = save(model, tmp_path / "model")
    import_model(folder, tmp_path / "out", dtype="bf16")
    loaded = load_export(tmp_path / "out")[1]
    router = loaded.layers[1].moe.router
    assert (router.weight.dtype, router.expert_bias.dtype) == (torch.bfloat16, torch.float32)
    assert router.expert_bias.equal(model.model.layers[1].mlp.gate.e_score_correction_bias)


def test_the_layers_of_the_multi_token_prediction_are_left_out_aloud_and_no_other_layer(tmp_path, caplog):
    folder = save(build("v3"), tmp_path / "model")
    want = HuggingFaceWeights(folder).shapes
    assert not caplog.text
    extra = "model.layers.3.input_layernorm.weight"
    change_tensors(folder, lambda tensors: tensors.update({extra: torch.ones(42)}))
    with pytest.raises(CheckpointError, match=r"contains the tensor model\.layers\.3\.input_layernorm\.weight, which"):
        HuggingFaceWeights(folder)
    projection = {"model.layers.3.eh_proj.weight": torch.ones(42, 84)}
    change_tensors(folder, lambda tensors: tensors.update(projection))
    assert HuggingFaceWeights(folder).shapes == want
    assert f"{folder}: the tensor model.layers.3.eh_proj.weight (and 1 more) is left out" in caplog.text
    assert "belongs to the multi-token prediction" in caplog.text


def test_the_verbs_say_what_is_left_out_and_describe_and_generate_what_is_imported(tmp_path, capsys):
    folder, out = save(build("v3"), tmp_path / "model"), tmp_path / "out"
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(42, 84)}))
    assert run(["import", str(folder), "--output", str(out), "--json"]) == 0
    assert "model.layers.3.eh_proj.weight is left out" in capsys.readouterr().err
    assert run(["describe", str(out / "config.yaml"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    # 3 layers with a vector of 12 channels and a rotated key of 4, in fp32.
    assert described["memory"]["kv_cache_bytes_per_token"] == 3 * 16 * 4
    assert described["parameters"]["stored"] == sum(p.numel() for p in build("v3").parameters())
    assert described["forward_flops_by_site"]["attention"]["kept"] > 0
    assert run(["generate", str(out), "--prompt", "word1 word2", "--max-tokens", "3", "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert "engine=auto: using" in printed.err and "word" in printed.out


def test_a_sparse_run_starts_from_the_folder_with_its_biases(tmp_path):
    theirs = build("v3")
    folder = save(theirs, tmp_path / "model")
    write_text(tmp_path / "text")
    source = HuggingFaceWeights(folder).model
    sparsity = source.sparsity.model_copy(update={"default": 0.5, "backend": "torch"})
    moe = source.moe.model_copy(update={"backend": "loop", "bias_update_steps": 0})
    config = tiny_config(tmp_path, "started", steps=1, engine="torch", init_from=str(folder), learning_rate=1e-3)
    data = config.data.model_copy(update={"tokenizer": str(folder)})
    model = source.model_copy(update={"sparsity": sparsity, "moe": moe})
    run_dir = train(config.model_copy(update={"model": model, "data": data})).run_dir
    stored = Checkpoint(list_checkpoints(run_dir)[-1])
    want = theirs.model.layers[2].mlp.gate.e_score_correction_bias
    # Without an update the biases are still those of the file; the router has learned.
    assert stored.buffer("layers.2.moe.router.expert_bias").equal(want)
    assert not stored.tensor("weight", "layers.2.moe.router.weight").equal(theirs.model.layers[2].mlp.gate.weight)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "v3",
            {"quantization_config": {"quant_method": "fp8"}},
            '"fp8"}) must be null here; quantized weights (fp8, 4',
        ),
        ("v3", {"attention_bias": True}, "attention_bias (true) must be false here"),
        ("v3", {"rope_interleave": False}, "rope_interleave (false) must be true here; another value changes"),
        ("v3", {"scoring_func": "softmax"}, 'scoring_func ("softmax") must be "sigmoid" here'),
        ("v3", {"topk_method": "greedy"}, 'topk_method ("greedy") must be "noaux_tc" here'),
        ("v3", {"num_key_value_heads": 3}, "num_key_value_heads (3) must be 6 here"),
        ("v3", {"first_k_dense_replace": -1}, "first_k_dense_replace (-1) must be an integer of at least 0"),
        ("v3", {"n_group": 3}, "(model.moe.num_expert_groups (3) must divide model.moe.num_experts (8)"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob (true) must be false here; DeepSeek's code and transformers"),
        ("v2", {"moe_layer_freq": 2}, "moe_layer_freq (2) must be 1 here; DeepSeek's code and transformers compute"),
        ("v2", {"topk_method": "noaux_tc"}, 'topk_method ("noaux_tc") must be "greedy" or "group_limited_greedy" here'),
        ("v2", {"mlp_bias": True}, "mlp_bias (true) must be false here"),
        ("v2", {"q_lora_rank": 0}, "q_lora_rank (0) must be a positive integer"),
        ("v2", {"n_shared_experts": 0}, "n_shared_experts (0) must be a positive integer"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folders, name, settings, message):
    folder = folders(name)
    change_settings(folder, **settings)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceWeights(folder)
    assert str(caught.value).startswith(f"{folder}/config.json: ") and message in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    return {name: save(build(name), root / name, tokenizer=False) for name in ("v2", "v3")}


@pytest.fixture
def folders(saved, tmp_path):
    def copied(name):
        (tmp_path / "config.json").write_text((saved[name] / "config.json").read_text())
        (tmp_path / "model.safetensors").hardlink_to(saved[name] / "model.safetensors")
        return tmp_path

    return copied


# The settings of the published files that decide about anything here, apart from sizes.
PUBLISHED = {
    "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x"}, "aux_loss_alpha": 0.001,
    "ep_size": 1, "hidden_act": "silu", "moe_layer_freq": 1, "pretraining_tp": 1, "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 10000, "rope_parameters": ...,
    "max_position_embeddings": 163840, "num_key_value_heads": 6,
}  # fmt: skip
SCALING = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}


@pytest.mark.parametrize(
    ("name", "settings", "mscale"),
    [
        ("v2", GROUPS | {"scoring_func": "softmax", "norm_topk_prob": False}, 0.707),
        ("v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}, 1.0),
    ],
)
def test_the_settings_of_published_files_are_all_known(folders, name, settings, mscale):
    folder = folders(name)
    scaling = SCALING | {"mscale": mscale, "mscale_all_dim": mscale}
    change_settings(folder, **PUBLISHED, **settings, rope_scaling=scaling)
    found = HuggingFaceWeights(folder).model.rope_scaling
    assert (found.type, found.factor, found.original_length) == ("yarn", 40.0, 4096)
    assert (found.beta_fast, found.beta_slow, found.attention_factor) == (32.0, 1.0, 1.0)
    # ln 40 is 3.6889.
    assert found.score_factor == pytest.approx((0.36889 * mscale + 1) ** 2, rel=1e-5)


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_absent_settings_have_the_defaults_of_transformers(folders, name, monkeypatch):
    folder = folders(name)
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    needed += ("num_experts_per_tok",) if name == "v2" else ()
    theirs = getattr(transformers, f"Deepseek{name.upper()}Config")()
    change_settings(
        folder,
        **dict.fromkeys(set(theirs.to_dict()) - set(needed), ...),
        **{key: value for key, value in SIZES.items() if key in needed},
    )
    monkeypatch.setattr("qsparse_moe.interop.hugging_face._check_tensors", lambda *_: None)
    ours = HuggingFaceWeights(folder).model
    moe, latent = ours.moe, ours.latent_attention
    assert (moe.num_experts, moe.expert_hidden_size) == (theirs.n_routed_experts, theirs.moe_intermediate_size)
    assert (moe.num_shared_experts, moe.router_scaling_factor) == (
        theirs.n_shared_experts,
        theirs.routed_scaling_factor,
    )
    assert moe.num_dense_layers == min(theirs.first_k_dense_replace, 3)
    assert not moe.num_dense_layers or moe.dense_hidden_size == theirs.intermediate_size
    sizes = (
        theirs.kv_lora_rank,
        theirs.q_lora_rank,
        theirs.qk_nope_head_dim,
        theirs.qk_rope_head_dim,
        theirs.v_head_dim,
    )
    assert tuple(latent.model_dump().values()) == sizes
    assert (ours.norm_epsilon, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.default_theta
    if name == "v3":
        assert (moe.num_expert_groups, moe.groups_per_token) == (theirs.n_group, theirs.topk_group)
        assert moe.experts_per_token == theirs.num_experts_per_tok and theirs.norm_topk_prob
    assert moe.router == {"v2": "softmax_topk", "v3": "sigmoid_topk_renormalized"}[name]
