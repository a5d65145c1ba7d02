"""Recomputation: the same selections, ties included, and the memory that it saves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from qsparse_moe.config.schema import RECOMPUTE, ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.model.recompute import _stored, run_part
from qsparse_moe.model.transformer import build_model
from qsparse_moe.nn.hooks import SiteHook

ATTENTION = {"attention_input", "attention_output"}
EXPERTS = {"expert_input", "expert_hidden"}
RECOMPUTED = {
    "none": set(),
    "attention": ATTENTION,
    "feed_forward": EXPERTS | {"router"},
    "full": ATTENTION | EXPERTS | {"router"},
    "selective": ATTENTION | EXPERTS | {"router"},
}


def make(backend="torch", **changes):
    moe = MoEConfig(num_experts=4, expert_hidden_size=32)
    sparsity = SparsityConfig(default=0.5, backend=backend)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4} | changes
    return build_model(ModelConfig(moe=moe, sparsity=sparsity, **sizes), seed=0)


def tokens(rows=2, length=12):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(5))


def with_ties(model, nearness):
    """Magnitudes that are equal, or differ by the last bits, at every site; two experts that always tie."""
    generator = torch.Generator().manual_seed(1)

    def near(shape):
        return 1 + nearness * torch.randint(-2, 3, shape, generator=generator) * 2**-23

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(weight.sign() / 8 * near(weight.shape))
            if name.endswith("router.weight"):
                weight[1] = weight[0] * near(weight[0].shape)
    return model


def recorded_choices(model):
    """A log that fills with (layer, place, what was chosen) as the model runs, forward and again."""
    log = []
    for block in model.blocks():
        for name, site in block.sites().items():
            site.ranking.select_rows = recorder(log, (block.layer, name), site.ranking.select_rows)
        block.moe.router.register_forward_hook(
            lambda module, inputs, routing, layer=block.layer: log.append(((layer, "router"), routing.expert_ids_TA))
        )
    return log


def recorder(log, place, select_rows):
    def select(x, num_selected, with_mask):
        kept, mask = select_rows(x, num_selected, with_mask)
        log.append((place, kept.detach().clone()))
        return kept, mask

    return select


@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("nearness", [0.0, 1.0], ids=["ties", "near ties"])
def test_only_the_requested_parts_are_recomputed_and_their_selections_and_choices_are_the_same(mode, nearness):
    model = with_ties(make(), nearness)
    model.activation_checkpointing = mode
    log = recorded_choices(model)
    loss = model(tokens(), tokens()).loss
    first = list(log)
    loss.backward()
    again = log[len(first) :]
    places = [place for place, _ in first]
    assert len(set(places)) == len(places) == 10
    assert {name for (_, name), _ in again} == RECOMPUTED[mode]
    chosen = dict(first)
    assert len(again) == 2 * len(RECOMPUTED[mode])
    assert [place for place, value in again if not value.equal(chosen[place])] == []


def test_the_inputs_contain_ties():
    model = with_ties(make(), 0.0)
    seen = []
    model.layers[0].attention.input_site.hook = SiteHook(lambda x, experts, sparse: seen.append(x.abs()) or sparse)
    model(tokens())
    assert torch.equal(seen[0], seen[0][..., :1].expand_as(seen[0])), "all features of the first site are as large"
    logits = model.layers[0].moe.router(torch.randn(3, 32)).logits_TE
    assert torch.equal(logits[:, 0], logits[:, 1])


def live_bytes(model, ids):
    """Return the bytes that the forward pass of a training step leaves allocated, and its loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(ids, ids).loss
    return sum(event.self_cpu_memory_usage for event in profiler.events()), loss


def test_less_is_stored_the_more_is_recomputed():
    """Measured, of 5.6 MB: full 0.09, selective 0.52, feed_forward 0.56, attention 0.58."""
    model, ids = make(hidden_size=64, num_layers=4), tokens(8, 32)
    kept = {}
    for mode in RECOMPUTE:
        again = copy.deepcopy(model)
        again.activation_checkpointing = mode
        kept[mode], loss = live_bytes(again, ids)
        loss.backward()
    share = {mode: kept[mode] / kept["none"] for mode in RECOMPUTE}
    assert share["full"] < 0.2
    assert all(0.3 < share[mode] < 0.7 for mode in ("selective", "feed_forward", "attention")), share


class Products(TorchDispatchMode):
    """Counts the matrix products and attentions that are really computed."""

    calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += operator in _stored()
        return operator(*args, **(kwargs or {}))


def test_selective_recomputes_no_matrix_product():
    model, ids = make(), tokens()
    calls = {}
    for mode in ("none", "selective", "full"):
        again = copy.deepcopy(model)
        again.activation_checkpointing = mode
        loss = again(ids, ids).loss
        with Products() as products:
            loss.backward()
        calls[mode] = products.calls
    assert calls["none"] == calls["selective"] < calls["full"]
    stored = {str(operator) for operator in _stored()}
    assert stored >= {"aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten._grouped_mm.default"}
    # Products of oneDNN, where PyTorch is built with it.
    assert ("mkldnn._linear_pointwise.default" in stored) == hasattr(torch.ops.mkldnn, "_linear_pointwise")
    # Attention inside documents on a GPU.
    assert "torch_attn._varlen_attn.default" in stored


def test_without_gradients_nothing_is_computed_twice():
    calls = []
    with torch.no_grad():
        assert run_part("full", "full", lambda x: calls.append(x) or x, 1) == 1
    assert calls == [1]


def test_an_unknown_mode_is_an_internal_error():
    model = make()
    model.activation_checkpointing = True
    with pytest.raises(AssertionError):
        model(tokens())
