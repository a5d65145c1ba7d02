"""Any model as a model of transformers: the same logits, through its attention, masks, caches, and files."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from qsparse_moe.interop.auto_model.config import QSparseMoEConfig
from qsparse_moe.model.device import use_runtime
from qsparse_moe.moe.runtime import resolve_runtime
from qsparse_moe.nn.selectors import RankingSelector
from tests.interop.auto_models import MODELS, build, config, left_padded, random_ids


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def sparse():
    return build("sparse")


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


@torch.no_grad()
def own_logits(model, ids, **arguments):
    return model(ids, with_stats=False, **arguments).logits_BSV


def test_logits_are_the_same_bits(model):
    ids = random_ids()
    assert torch.equal(logits(QSparseMoEForCausalLM.of(model), ids), own_logits(model, ids))


def test_a_saved_folder_opens_with_the_same_logits_and_is_saved_again_with_the_same_bytes(model, tmp_path):
    QSparseMoEForCausalLM.of(model, eos_token_id=1).save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(again) is QSparseMoEForCausalLM
    assert not again.training
    assert again.model.config == model.config
    assert again.model.sparsity_plan == model.sparsity_plan
    assert torch.equal(logits(again, random_ids()), own_logits(model, random_ids()))
    again.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_configuration_carries_the_model_and_the_names_that_tools_read():
    found = AutoConfig.for_model(**QSparseMoEConfig.of(config(), eos_token_id=3).to_dict())
    assert found.read()[0] == config()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [getattr(found, name) for name in names] == [83, 44, 3, 6, 2, 10]
    assert (found.num_experts, found.num_local_experts, found.num_experts_per_tok) == (5, 5, 3)
    assert (found.tie_word_embeddings, found.eos_token_id) == (False, 3)
    assert QSparseMoEConfig.of(config(vocab_size=None)).vocab_size == 264


def test_bf16_keeps_the_router_biases_in_fp32(sparse, tmp_path):
    QSparseMoEForCausalLM.of(sparse).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, value in found.state_dict().items() if value.dtype != torch.bfloat16}
    assert wide == {f"model.layers.{layer}.moe.router.expert_bias" for layer in (1, 2)}
    own = build("sparse").bfloat16()
    assert torch.equal(logits(found, random_ids()), own_logits(own, random_ids()))


@pytest.mark.parametrize("name", ["sparse", "tied"])
def test_eager_attention_computes_the_same(name):
    model = build(name)
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5, seed=1)[0]])
    sdpa, eager = (QSparseMoEForCausalLM.of(model, attn_implementation=kind) for kind in ("sdpa", "eager"))
    torch.testing.assert_close(logits(eager, ids), logits(sdpa, ids), rtol=1e-5, atol=2e-6)
    found, wanted = (logits(part, ids, attention_mask=mask)[mask.bool()] for part in (eager, sdpa))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.slow  # it is compiled
def test_flex_attention_computes_the_same(sparse):
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5, seed=1)[0]])
    sdpa, flex = (QSparseMoEForCausalLM.of(sparse, attn_implementation=kind) for kind in ("sdpa", "flex_attention"))
    found, wanted = (logits(part, ids, attention_mask=mask)[mask.bool()] for part in (flex, sdpa))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)


def test_padding_in_front_does_not_change_a_sequence(model):
    rows = [random_ids(1, length, seed=length)[0] for length in (9, 5, 1)]
    ids, mask = left_padded(rows)
    wrapped = QSparseMoEForCausalLM.of(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(wrapped, ids, attention_mask=mask, position_ids=positions)
    for place, row in enumerate(rows):
        wanted = own_logits(model, row[None])[0]
        torch.testing.assert_close(found[place, -len(row) :], wanted, rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_see_each_other(sparse):
    first, second = random_ids(1, 7), random_ids(1, 4, seed=1)
    positions = torch.cat((torch.arange(7), torch.arange(4)))[None]
    # As in other models, positions tell sequences apart only where nothing is cached.
    wrapped, ids = QSparseMoEForCausalLM.of(sparse), torch.cat((first, second), 1)
    found = logits(wrapped, ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found[:, 7:], own_logits(sparse, second), rtol=1e-5, atol=2e-6)


def test_a_cache_continues_a_sequence(model):
    ids, wrapped = random_ids(2, 10), QSparseMoEForCausalLM.of(model)
    whole = own_logits(model, ids)
    cache, found = DynamicCache(config=wrapped.config), []
    for part in ids.split([6, 1, 3], dim=1):
        found.append(logits(wrapped, part, past_key_values=cache))
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(wrapped, ids, logits_to_keep=2), whole[:, -2:])


def test_a_registered_attention_receives_the_arguments_that_a_server_passes(sparse):
    received = []

    def attention(module, query, key, value, mask, **options):
        received.append((module.layer_idx, module.num_key_value_groups, query.shape, key.shape, options))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("of_a_server", attention)
    wrapped = QSparseMoEForCausalLM.of(sparse, attn_implementation="sdpa")
    try:
        wrapped.set_attn_implementation("of_a_server")
        found = logits(wrapped, random_ids(), slots=[4, 2])
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["of_a_server"]
    torch.testing.assert_close(found, own_logits(sparse, random_ids()), rtol=1e-5, atol=2e-6)
    assert [layer for layer, *_ in received] == [0, 1, 2]
    _, groups, query, key, options = received[1]
    assert (groups, tuple(query), tuple(key)) == (3, (2, 6, 12, 10), (2, 2, 12, 10))
    assert options["slots"] == [4, 2]
    assert options["scaling"] == pytest.approx(10**-0.5)
    assert torch.equal(options["position_ids"], torch.arange(12)[None])


def test_hidden_states_attentions_and_router_logits_are_returned(sparse):
    wrapped, ids = QSparseMoEForCausalLM.of(sparse, attn_implementation="eager"), random_ids()
    with torch.no_grad():
        found = wrapped(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    hidden = []
    sparse(ids, layer_hook=lambda _, value: hidden.append(value))
    wanted = [sparse.embedding(ids), *hidden[:-1], sparse.final_norm(hidden[-1])]
    assert len(found.hidden_states) == 4
    for value, expected in zip(found.hidden_states, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(sparse.head(found.hidden_states[-1]), found.logits)
    assert len(found.attentions) == 3
    weights = found.attentions[2]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 12))
    assert not weights.triu(1).any()
    # Layer 0 is dense. The normed input of a router and its weight give its logits.
    assert [tuple(value.shape) for value in found.router_logits] == [(24, 5), (24, 5)]
    assert found.past_key_values.get_seq_length() == 12
    assert wrapped(ids, return_dict=False)[0].shape == found.logits.shape
    embedded = sparse.embedding(ids)
    torch.testing.assert_close(wrapped(inputs_embeds=embedded).logits, found.logits)


def test_router_logits_are_those_of_the_router(sparse):
    seen = []
    handle = sparse.routers()[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = QSparseMoEForCausalLM.of(sparse)(random_ids(), output_router_logits=True)
    handle.remove()
    assert torch.equal(found.router_logits[1], seen[0] @ sparse.routers()[1].weight.T)


def test_another_plan_is_used_at_once_and_saved(tmp_path):
    model = build("sparse")
    wrapped, dense = QSparseMoEForCausalLM.of(model), build("sparse", sparsity={"default": 0.0})
    before = logits(wrapped, random_ids())
    wrapped.set_sparsity(dense.sparsity_plan)
    after = logits(wrapped, random_ids())
    assert torch.equal(after, own_logits(dense, random_ids()))
    assert not torch.allclose(after, before)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), random_ids()), after)


def test_device_map_and_offloading_to_disk(tmp_path):
    pytest.importorskip("accelerate")
    model = build("tied")
    QSparseMoEForCausalLM.of(model).save_pretrained(tmp_path / "saved")
    for device_map in ("auto", "cpu", {"model": "cpu", "attentions": "cpu", "model.layers.1": "disk"}):
        split = {"": "cpu"} if device_map == "cpu" else device_map
        if isinstance(split, dict) and "model" in split:
            layers = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
            split = {"model.embedding": "cpu", "model.final_norm": "cpu", "model.head": "cpu", "attentions": "cpu"}
            split |= layers
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=split, offload_folder=str(tmp_path / "offload")
        )
        assert torch.equal(logits(found, random_ids()), own_logits(model, random_ids())), device_map
    assert found.model.layers[1].attention.qkv.weight.device.type == "meta"


def test_a_new_model_is_drawn_as_ours_is_from_the_seed_of_torch():
    torch.manual_seed(4)
    found = AutoModelForCausalLM.from_config(QSparseMoEConfig.of(config("tied")))
    torch.manual_seed(4)
    again = AutoModelForCausalLM.from_config(QSparseMoEConfig.of(config("tied")))
    other = AutoModelForCausalLM.from_config(QSparseMoEConfig.of(config("tied")))
    weights = found.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    assert not torch.equal(other.model.embedding.weight, found.model.embedding.weight)
    assert found.model.head.weight is found.model.embedding.weight
    up, down = weights["layers.1.moe.experts.w_up"], weights["layers.1.moe.experts.w_down"]
    assert up.std().item() == pytest.approx(0.2, rel=0.05)
    assert down.std().item() == pytest.approx(0.2 / 6**0.5, rel=0.05)
    assert (weights["final_norm.weight"] == 1).all()


def test_the_functions_of_another_device_replace_all_of_the_first():
    model = build("sparse")
    runtime = resolve_runtime(config("sparse", moe={"backend": "blas"}, sparsity={"backend": "native"}), "cpu")
    wanted = build("sparse", moe={"backend": "blas"}, sparsity={"backend": "native"})
    before = own_logits(model, random_ids())
    use_runtime(model, runtime)
    names = ("select_rows", "format_rows", "site_sums", "matmul", "permutation")
    for found, other in zip(model.modules(), wanted.modules(), strict=True):
        for name in names:
            assert getattr(found, name, None) is getattr(other, name, None), (type(found), name)
        if hasattr(found, "activation"):
            assert found.activation._fused is other.activation._fused
    assert isinstance(model.layers[0].attention.input_site.ranking, RankingSelector)
    torch.testing.assert_close(own_logits(model, random_ids()), before, rtol=1e-5, atol=2e-6)


def test_a_file_of_ours_and_one_of_transformers_have_the_same_tensors(sparse, tmp_path):
    QSparseMoEForCausalLM.of(sparse).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {f"model.{name}" for name in sparse.state_dict()}


def test_a_model_that_was_moved_to_another_kind_of_device_chooses_its_functions_again():
    model = build("sparse")
    wrapped, before = QSparseMoEForCausalLM.of(model), model.runtime
    logits(wrapped, random_ids())
    assert model.runtime is before
    # As after model.to("cuda") and back.
    wrapped._runtime_device = "cuda"
    assert torch.equal(logits(wrapped, random_ids()), own_logits(model, random_ids()))
    assert model.runtime is not before
    assert wrapped._runtime_device == "cpu"
