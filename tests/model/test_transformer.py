"""The Transformer: gradients, causality, packed documents, initial values, precision, and building it."""

from __future__ import annotations

import copy

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, RunConfig, SparsityConfig
from qsparse_moe.data.tokenizer import with_vocabulary
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import build_model
from tests.data.test_tokenizer import save_tokenizer
from tests.model.small_model import VOCAB, make, tokens

VARIANTS = {
    "plain": {},
    "grouped queries, qk-norm, tied": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True},
    "norms over all heads and biases": {"num_kv_heads": 2, "qk_norm": "all_heads", "attention_bias": "all"},
    "wide heads": {"head_size": 16},
    "dense first layer and shared experts": {"moe": {"num_dense_layers": 1, "num_shared_experts": 1}},
    "dense only": {"moe": {"num_dense_layers": 3}},
    "every second layer": {"moe": {"moe_layer_interval": 2}},
    "every second layer after two dense ones": {
        "num_layers": 5,
        "moe": {"moe_layer_interval": 2, "num_dense_layers": 2},
    },
    "gated shared experts": {
        "moe": {"num_shared_experts": 1, "shared_expert_hidden_size": 24, "shared_expert_gate": True}
    },
    "many small experts": {"moe": {"num_experts": 32, "experts_per_token": 8, "expert_hidden_size": 4}},
    "capacity": {"moe": {"capacity_factor": 1.0}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_has_a_gradient_and_the_loss_is_the_sum_of_its_terms(changes):
    model = make(sparsity=SparsityConfig(default=0.5), **changes)
    out = model(tokens(), tokens())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    moe = model.config.moe
    want = out.losses["lm_loss"]
    if "load_balance_loss" in out.losses:
        want = want + moe.load_balance_coefficient * out.losses["load_balance_loss"]
        want = want + moe.router_z_coefficient * out.losses["router_z_loss"]
    torch.testing.assert_close(out.loss.detach(), want)


def test_logits_do_not_depend_on_later_tokens():
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    assert torch.equal(model(ids).logits_BSV[:, :7], model(changed).logits_BSV[:, :7])
    assert not torch.equal(model(ids).logits_BSV[:, 7:], model(changed).logits_BSV[:, 7:])


def test_a_packed_document_is_computed_as_if_it_were_alone():
    model, ids = make(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(ids, positions_BS=positions, documents_BS=documents).logits_BSV
    alone = [model(part).logits_BSV for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits_BSV[:, 5:], alone[1], atol=1e-4)


def test_initial_values_depend_on_the_seed_and_the_name_only():
    one, again, other = make(seed=3), make(seed=3), make(seed=4)
    deeper = make(seed=3, num_layers=4)
    assert torch.equal(one.embedding.weight, again.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    name = "layers.1.moe.experts.w_gate"
    assert torch.equal(one.get_parameter(name), deeper.get_parameter(name))
    assert one.get_parameter(name).std().item() == pytest.approx(0.02 * 0.987, rel=0.05)  # cut at three deviations
    assert one.get_parameter("layers.1.moe.experts.w_down").std().item() == pytest.approx(0.0197 / 6**0.5, rel=0.05)
    assert (one.final_norm.weight == 1).all()


def test_the_layer_hook_receives_the_output_of_every_layer_inside_the_graph():
    model, seen, grads = make(), [], []

    def layer_hook(layer, hidden):
        seen.append((layer, tuple(hidden.shape)))
        hidden.register_hook(lambda grad: grads.append(grad.abs().sum().item()))

    model(tokens(), tokens(), layer_hook=layer_hook).loss.backward()
    assert seen == [(0, (2, 12, 32)), (1, (2, 12, 32)), (2, (2, 12, 32))]
    assert len(grads) == 3
    assert min(grads) > 0


def test_losses_of_a_bf16_model_are_fp32_and_near_those_of_fp32():
    wide = make(sparsity=SparsityConfig(default=0.3))
    narrow = copy.deepcopy(wide).bfloat16()
    got, want = narrow(tokens(), tokens()), wide(tokens(), tokens())
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=0.01)


def test_a_model_section_without_a_vocabulary_size_is_built_for_bytes_and_that_of_a_run_for_its_tokenizer(tmp_path):
    section = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = build_model(ModelConfig(**section))
    assert model.embedding.weight.shape[0] == model.head.weight.shape[0] == 264
    assert model(torch.tensor([[0, 256]])).logits_BSV.shape == (1, 2, 264)
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(298))]
    save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = RunConfig(model=ModelConfig(**section), data={"tokenizer": str(tmp_path / "words")})
    assert build_model(with_vocabulary(config).model).embedding.weight.shape[0] == 304


def test_an_id_outside_the_embedding_is_named_with_the_way_out():
    with pytest.raises(ValueError) as caught:
        build_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2))(torch.tensor([[3, 264]]))
    assert str(caught.value) == (
        "tokens_BS holds ids from 3 to 264, and the model has 264 rows, for ids from 0 on; build it with the "
        "model.vocab_size of the tokenizer, which with_vocabulary(run_config).model has"
    )


def test_the_smallest_and_the_largest_id_are_named():
    with pytest.raises(ValueError, match=r"^tokens_BS holds ids from -2 to 7, and the model has 40 rows, for ids from"):
        make()(torch.tensor([[7, -2]]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_embedding_itself_and_any_other_has_values_of_its_own(tied):
    model = make(tie_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    assert torch.equal(model.head.weight, model.embedding.weight) == tied
    assert ("head.weight" in dict(model.named_parameters())) != tied
    ids = tokens()
    hidden = model.run_layers(model.embed(ids), None, with_stats=False)[0]
    logits = model.final_norm(hidden) @ (model.embedding if tied else model.head).weight.T
    torch.testing.assert_close(model(ids).logits_BSV, logits)


def test_a_model_is_built_in_the_requested_dtype_from_values_drawn_in_fp32():
    config = make().config
    wide, narrow = build_model(config, seed=3), build_model(config, seed=3, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for mine, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16())


@pytest.mark.parametrize("with_logits", [False, True])
def test_the_weight_of_the_loss_is_that_of_the_targets_alone(with_logits):
    model, ids = make(), tokens()
    plain = model(ids, ids, with_logits=with_logits)
    found = model(ids, ids, loss_weight=torch.tensor(0.25), with_logits=with_logits)
    lm_loss = plain.losses["lm_loss"]
    torch.testing.assert_close(found.loss, plain.loss - 0.75 * lm_loss)
    torch.testing.assert_close(found.losses["lm_loss"], 0.25 * lm_loss)
    assert torch.equal(found.losses["router_z_loss"], plain.losses["router_z_loss"])


def test_without_statistics_only_the_routed_tokens_are_counted():
    model, ids = make(moe={"num_dense_layers": 1, "num_shared_experts": 1}), tokens()
    found, whole = model(ids, with_stats=False).stats, model(ids).stats
    assert found.keys() == {"router/routed_LE"} < whole.keys()
    assert torch.equal(found["router/routed_LE"], whole["router/routed_LE"])
    assert found["router/routed_LE"].sum(-1).tolist() == [2 * 12 * 2] * 2


def test_hidden_ids_are_remembered_until_there_are_none():
    model = make()
    assert model.hidden_ids is None
    model.hide_ids([7, 3])
    assert model.hidden_ids.tolist() == [7, 3]
    model.hide_ids(())
    assert model.hidden_ids is None


def test_a_section_that_breaks_a_rule_is_not_built():
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads \(3\) must divide"):
        build_model(ModelConfig(num_kv_heads=3))
