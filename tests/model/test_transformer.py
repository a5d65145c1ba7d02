"""The Transformer: loss, documents, positions, checkpointing, initial values, sparsity at run time."""

import copy

import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.config.schema import ModelConfig, MoEConfig, RunConfig, SparsityConfig
from qsparse_moe.config.shapes import site_width
from qsparse_moe.data.tokenizer import with_vocabulary
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.rope import rotate, rotation_at
from qsparse_moe.model.transformer import build_model, cross_entropy, shifted_labels
from qsparse_moe.moe.losses import StepLoad
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.data.test_tokenizer import save_tokenizer

VOCAB = 40
RECOMPUTED = ("full", "selective", "attention", "feed_forward")


def make(seed=0, **changes):
    moe = {"num_experts": 4, "expert_hidden_size": 16} | changes.pop("moe", {})
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 3, "num_heads": 4} | changes
    return build_model(ModelConfig(moe=MoEConfig(**moe), **settings), seed=seed)


def tokens(rows=2, length=12):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


VARIANTS = {
    "plain": {},
    "grouped queries, qk-norm, tied": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True},
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
def test_every_parameter_has_a_gradient_and_the_loss_is_its_terms(changes):
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


def test_logits_do_not_see_the_future():
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    assert torch.equal(model(ids).logits_BSV[:, :7], model(changed).logits_BSV[:, :7])
    assert not torch.equal(model(ids).logits_BSV[:, 7:], model(changed).logits_BSV[:, 7:])


def test_a_packed_document_is_computed_as_if_it_stood_alone():
    model, ids = make(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(ids, positions_BS=positions, documents_BS=documents).logits_BSV
    alone = [model(part).logits_BSV for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits_BSV[:, 5:], alone[1], atol=1e-4)


def test_rotation_depends_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at_q, at_k):
        turned = [
            rotate(x, rotation_at(torch.tensor([[at]]), 8, 100.0, torch.float32)) for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(12, 10))
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_ignored_labels_do_not_count_and_all_ignored_is_zero():
    logits, labels = torch.randn(2, 3, VOCAB), torch.randint(0, VOCAB, (2, 3))
    labels[0, 1] = -100
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(cross_entropy(logits, labels), want)
    assert cross_entropy(logits, torch.full((2, 3), -100)) == 0


def test_labels_are_the_tokens_themselves_and_position_s_predicts_the_label_after_it():
    model = make(moe={"num_dense_layers": 3})
    ids = tokens()
    out = model(ids, ids)
    log_probs = out.logits_BSV.log_softmax(-1)
    want = [-log_probs[row, s, ids[row, s + 1]] for row in range(2) for s in range(11)]
    torch.testing.assert_close(out.loss, torch.stack(want).mean())
    shifted = torch.full_like(ids, -100)
    shifted[:, :-1] = ids[:, 1:]
    assert torch.equal(out.loss, model(ids, targets_BS=shifted).loss)
    # An ignored label takes away what the position before it predicts.
    labels = ids.clone()
    labels[0, 3] = -100
    del want[2]
    torch.testing.assert_close(model(ids, labels).loss, torch.stack(want).mean())


def test_the_last_label_of_a_document_is_not_predicted_from_another_one():
    ids, documents = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]])
    assert shifted_labels(ids, documents).tolist() == [[6, -100, 8, -100, -100]]
    assert shifted_labels(ids).tolist() == [[6, 7, 8, 9, -100]] and ids.tolist() == [[5, 6, 7, 8, 9]]
    model = make()
    out = model(ids, ids, documents_BS=documents)
    want = F.cross_entropy(out.logits_BSV[0, [0, 2]], torch.tensor([6, 8]))
    torch.testing.assert_close(out.losses["lm_loss"], want.detach())


def test_labels_and_targets_together_are_refused():
    ids = tokens()
    with pytest.raises(ValueError, match="labels_BS and targets_BS are both given.*must be None.*leave one"):
        make()(ids, ids, targets_BS=ids)


def test_the_loss_of_labels_is_that_of_transformers():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    ids = tokens()
    labels = ids.clone()
    labels[1, 4:7] = -100
    out = make()(ids, labels)
    want = loss_utils.ForCausalLMLoss(out.logits_BSV, labels, VOCAB)
    torch.testing.assert_close(out.losses["lm_loss"], want.detach())


@pytest.mark.parametrize("moe", [{}, {"capacity_factor": 0.5, "moe_layer_interval": 2}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("mode", RECOMPUTED)
def test_checkpointing_changes_neither_gradients_nor_sums(moe, mode):
    plain = make(sparsity=SparsityConfig(default=0.5), moe=moe)
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing = mode
    outputs = [model(tokens(), tokens()) for model in (plain, recomputed)]
    for out in outputs:
        out.loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
    for name, value in outputs[0].stats.items():
        assert torch.equal(value, outputs[1].stats[name]), name


NOISY = {"router_jitter": 0.3, "router_noise": 0.5, "router": "sigmoid_topk", "load_balance_scope": "global_batch"}


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_noise_of_the_router_is_the_same_in_recomputation(mode):
    plain = make(moe=NOISY)
    with torch.no_grad():
        for block in plain.blocks():
            block.moe.router.weight.mul_(20)  # else the noise alone decides
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing = mode
    outputs = []
    for model in (plain, recomputed):
        model.step_load = StepLoad(lambda rows: rows)
        torch.manual_seed(3)
        outputs.append(model(tokens(), tokens()))
        outputs[-1].loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert not torch.equal(plain(tokens(), tokens()).loss, outputs[0].loss), "the next draws are others"
    calm = [plain.eval()(tokens()).logits_BSV for _ in range(2)]
    assert torch.equal(*calm)


@pytest.mark.parametrize("mode", ["none", *RECOMPUTED])
def test_a_global_balance_loss_holds_all_rows_of_the_step_against_the_micro_batchs_probabilities(mode):
    model = make(moe={"load_balance_scope": "global_batch", "load_balance_coefficient": 1.0, "num_dense_layers": 1})
    model.activation_checkpointing = mode
    with torch.no_grad():
        for block in list(model.blocks())[1:]:
            block.moe.router.weight.mul_(50)  # with probabilities that are all alike every load has the same loss
    others = torch.rand(2, 1, 4, dtype=torch.float64) * 50  # rows of other ranks
    model.step_load = StepLoad(lambda rows: rows.add_(others))
    parts = [tokens(2)[:1], tokens(3)[2:], tokens(4)[3:]]
    seen = torch.zeros(2, 4, dtype=torch.float64)
    for part in parts:
        with torch.no_grad():
            model(tokens(5)[4:], tokens(5)[4:])  # no part of the step, as the next one is not
        model.eval()(tokens(5)[4:], tokens(5)[4:])
        model.train()
        want, rows = written_out_global_balance(model, part, seen, others[:, 0])
        out = model(part, part)
        torch.testing.assert_close(out.losses["load_balance_loss"], want.detach())
        router = model.layers[1].moe.router.weight
        rest = out.losses["lm_loss"] + model.config.moe.router_z_coefficient * out.losses["router_z_loss"]
        torch.testing.assert_close(out.loss.detach(), rest + want.detach())
        model.zero_grad()
        out.loss.backward()
        with_balance = router.grad.clone()
        model.zero_grad()
        alone = model.config.moe.model_copy(update={"load_balance_coefficient": 0.0})
        before, model.config = model.config, model.config.model_copy(update={"moe": alone})
        model.step_load, load = None, model.step_load
        model(part, part).loss.backward()
        model.config, model.step_load = before, load
        torch.testing.assert_close(
            with_balance - router.grad, torch.autograd.grad(want, router)[0], atol=1e-6, rtol=1e-4
        )
        seen = seen + rows + others[:, 0]
    model.step_load.reset()
    want, _ = written_out_global_balance(model, parts[0], torch.zeros(2, 4).double(), others[:, 0])
    torch.testing.assert_close(model(parts[0], parts[0]).losses["load_balance_loss"], want.detach())


def written_out_global_balance(model, part, seen, others):
    """E sum f P of the MoE layers, f from all rows of the step; and this micro-batch's own rows."""
    routings = []
    hooks = [
        block.moe.router.register_forward_hook(lambda module, inputs, output: routings.append(output))
        for block in model.blocks()
        if block.moe is not None
    ]
    load, model.step_load = model.step_load, None
    checkpointing, model.activation_checkpointing = model.activation_checkpointing, "none"
    model(part)
    model.step_load, model.activation_checkpointing = load, checkpointing
    for hook in hooks:
        hook.remove()
    losses, counted = [], []
    for layer, routing in enumerate(routings):
        rows = torch.bincount(routing.expert_ids_TA.flatten(), minlength=4).double()
        counted.append(rows)
        in_step = seen[layer] + others[layer] + rows
        share = in_step / in_step.sum()
        losses.append(4 * sum(share[e].float() * routing.probs_TE[:, e].mean() for e in range(4)))
    return sum(losses) / len(losses), torch.stack(counted)


def test_without_an_engine_a_global_batch_is_the_batch():
    one, other = make(moe={"load_balance_scope": "global_batch"}), make(moe={"load_balance_scope": "micro_batch"})
    for _ in range(2):
        assert torch.equal(one(tokens(), tokens()).loss, other(tokens(), tokens()).loss)


def test_biases_are_read_and_moved_layer_by_layer():
    assert make().router_bias_LE is None
    model = make(moe={"bias_update_rate": 0.5, "num_dense_layers": 1})
    assert model.router_bias_LE.tolist() == [[0.0] * 4] * 2
    model.update_router_bias(torch.tensor([[4.0, 0, 2, 2], [0, 0, 0, 8]]), 0.5)
    assert model.router_bias_LE.tolist() == [[-0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, -0.5]]
    assert "layers.1.moe.router.expert_bias" in model.state_dict()
    assert model.to(torch.bfloat16).router_bias_LE.dtype == torch.float32


def test_a_router_of_sparse_tokens_refuses_a_plan_that_treats_experts_differently():
    model = make(moe={"router_input": "sparse"})
    plan = SparsityPlan.uniform(model.config, 0.5)
    model.set_sparsity(plan)
    apart = dict(plan.values) | {(1, "expert_input"): (0.5, 0.5, 0.25, 0.5)}
    with pytest.raises(ConfigError, match=r"layer 1, expert_input has S = \[0\.5, 0\.5, 0\.25, 0\.5\].*router_input"):
        model.set_sparsity(SparsityPlan(apart))
    hidden = dict(plan.values) | {(1, "expert_hidden"): (0.5, 0.5, 0.25, 0.5)}
    model.set_sparsity(SparsityPlan(hidden))
    assert model(tokens(), tokens()).loss.isfinite()


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


def test_sparsity_changes_at_run_time_and_back_without_a_trace():
    model, ids = make(), tokens()
    dense = model(ids).logits_BSV
    keys = list(model.state_dict())
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.7))
    assert not torch.allclose(model(ids).logits_BSV, dense)
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
    assert torch.equal(model(ids).logits_BSV, dense)
    assert list(model.state_dict()) == keys
    with pytest.raises(ConfigError, match="the model needs"):
        model.set_sparsity(SparsityPlan.uniform(make(num_layers=2).config, 0.5))


def test_experts_that_differ_in_sparsity_are_counted_by_their_own_k():
    model = make(
        sparsity=SparsityConfig.model_validate(
            {"overrides": [{"site": "expert_hidden", "experts": 1, "sparsity": 0.75}]}
        )
    )
    stats = model(tokens()).stats
    rows_LE = stats["router/rows_LE"]
    want_L = 16 * rows_LE.sum(1) - 12 * rows_LE[:, 1]
    assert torch.equal(stats["sparsity/expert_hidden/kept_LE"].sum(-1), want_L)


def test_the_probe_sees_every_layer_inside_the_graph():
    model, seen, grads = make(), [], []

    def layer_hook(layer, hidden):
        seen.append((layer, tuple(hidden.shape)))
        hidden.register_hook(lambda grad: grads.append(grad.abs().sum().item()))

    model(tokens(), tokens(), layer_hook=layer_hook).loss.backward()
    assert seen == [(0, (2, 12, 32)), (1, (2, 12, 32)), (2, (2, 12, 32))]
    assert len(grads) == 3
    assert min(grads) > 0


def test_bf16_keeps_losses_in_fp32_and_stays_near_fp32():
    wide = make(sparsity=SparsityConfig(default=0.3))
    narrow = copy.deepcopy(wide).bfloat16()
    got, want = narrow(tokens(), tokens()), wide(tokens(), tokens())
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=0.01)


def test_the_routers_losses_are_the_means_over_the_layers():
    model = make(num_layers=2, moe={"router_z_coefficient": 0.5, "load_balance_coefficient": 0.25})
    with torch.no_grad():
        for factor, block in zip((20.0, 60.0), model.blocks(), strict=True):
            block.moe.router.weight.mul_(factor)
    routings, hooks = [], []
    for router in model.routers():
        hooks.append(router.register_forward_hook(lambda module, inputs, output: routings.append(output)))
    out = model(tokens(), tokens())
    z_by_layer = [routing.logits_TE.logsumexp(-1).square().mean() for routing in routings]
    assert len(z_by_layer) == 2 and abs(z_by_layer[1] - z_by_layer[0]) > 0.1 * z_by_layer[0]
    torch.testing.assert_close(out.losses["router_z_loss"], sum(z_by_layer).detach() / 2)
    rest = out.losses["lm_loss"] + 0.25 * out.losses["load_balance_loss"]
    torch.testing.assert_close(out.loss.detach(), rest + 0.5 * sum(z_by_layer).detach() / 2)


def test_every_site_of_every_layer_blends_its_gradient():
    model = make(moe={"num_dense_layers": 1, "num_shared_experts": 1}, sparsity=SparsityConfig(default=0.5))
    model.set_ste_share(0.25)
    sites = {f"layers.{n}.{name}": site for n, b in enumerate(model.blocks()) for name, site in b.sites().items()}
    in_the_model = [module for module in model.modules() if isinstance(module, SparseSite)]
    assert {id(site) for site in in_the_model} == {id(site) for site in sites.values()} and len(sites) >= 12
    assert {name: site.ste_share for name, site in sites.items()} == dict.fromkeys(sites, 0.25)


def test_queries_and_keys_are_normed_before_they_are_turned():
    """By hand; weights of the norms that differ between the two channels of a pair do not commute with its rotation."""
    attention = make(qk_norm=True, num_layers=1).layers[0].attention
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in (attention.query_norm, attention.key_norm):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 2 + 0.1)
        attention.qkv.weight.copy_(torch.randn(attention.qkv.weight.shape, generator=generator))
    x = torch.randn(1, 6, 32, generator=generator)
    rotation = rotation_at(torch.arange(6)[None], 8, 10000.0, torch.float32)
    query, key, value = (attention.qkv(x).view(1, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)).unbind(0)

    def normed_and_turned(heads, norm):
        scaled = heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        cos, sin = rotation
        first, second = scaled[..., :4], scaled[..., 4:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    query, key = normed_and_turned(query, attention.query_norm), normed_and_turned(key, attention.key_norm)
    scores = (query @ key.mT / 8**0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(1, 6, 32)
    got, _, _ = attention(x, rotation, None, with_stats=False)
    torch.testing.assert_close(got, mixed @ attention.output.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_far_positions_are_right_in_every_dtype(dtype):
    """bf16 has no 1,001, nor the frequencies: angles are formed in fp32, and only their cosines are rounded."""
    rotation = rotation_at(torch.tensor([[1001, 4093]]), 8, 10000.0, dtype)
    angles = [[position * 10000.0 ** (-2 * i / 8) for i in range(4)] for position in (1001, 4093)]
    wide = torch.tensor(angles, dtype=torch.float64)[None, None]
    for got, want in zip(rotation, (wide.cos(), wide.sin()), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=2**-8 if dtype == torch.bfloat16 else 5e-4)


def test_the_sums_of_every_site_are_its_own():
    """Every site keeps another K, so that the sums of two sites that were swapped would differ."""
    kept = {
        "attention_input": 15, "attention_output": 14, "dense_input": 13, "dense_hidden": 12, "expert_input": 11,
        "expert_hidden": 10, "shared_input": 9, "shared_hidden": 8,
    }  # fmt: skip
    moe = {"num_experts": 4, "expert_hidden_size": 24, "num_dense_layers": 1, "num_shared_experts": 1}
    shape = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 32,
        "moe": moe | {"activation": "swiglu"},
    }
    config = ModelConfig.model_validate(shape)
    sites = {site: 1 - kept[site] / site_width(config, site) for site in kept}
    config = ModelConfig.model_validate(shape | {"sparsity": {"sites": sites}})
    output = build_model(config)(torch.randint(0, 32, (2, 6)))
    widths, found = {}, {}
    for site in kept:
        sums = {name: output.stats[f"sparsity/{site}/{name}_LE"].sum().item() for name in ("rows", "kept", "nonzero")}
        found[site] = sums["kept"] / sums["rows"]
        assert sums["nonzero"] == sums["kept"], "SwiGLU leaves no zeros"
        widths[site] = output.stats[f"sparsity/{site}/used_LED"].shape[-1]
    assert found == kept
    assert widths == dict.fromkeys(kept, 16) | {"dense_hidden": 48, "expert_hidden": 24, "shared_hidden": 24}


def test_a_model_section_without_a_vocabulary_is_one_of_bytes_and_a_runs_has_its_tokenizers(tmp_path):
    section = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = build_model(ModelConfig(**section))
    assert model.embedding.weight.shape[0] == model.head.weight.shape[0] == 264
    assert model(torch.tensor([[0, 256]])).logits_BSV.shape == (1, 2, 264)
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(298))]
    save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = RunConfig(model=ModelConfig(**section), data={"tokenizer": str(tmp_path / "words")})
    assert build_model(with_vocabulary(config).model).embedding.weight.shape[0] == 304


def test_an_id_without_a_row_is_named_with_the_way_out():
    with pytest.raises(ValueError) as caught:
        build_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2))(torch.tensor([[3, 264]]))
    assert str(caught.value) == (
        "tokens_BS holds ids from 3 to 264, and the model has 264 rows, for ids from 0 on; build it with the "
        "model.vocab_size of the tokenizer, which with_vocabulary(run_config).model has"
    )


def test_a_section_that_breaks_a_rule_is_not_built():
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads \(3\) must divide"):
        build_model(ModelConfig(num_kv_heads=3))
