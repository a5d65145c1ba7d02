"""The loss of logits that are computed part by part: the same as that of all at once, with a third of the memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsparse_moe import build_model, train
from qsparse_moe.model import output_head
from qsparse_moe.model.output_head import IGNORED_LABEL, OutputHead, part_size, summed_loss
from tests.support.runs import MIXED_MODEL, tiny_config, write_text


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, those from before it not included."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.now -= self.alive.pop(key, 0)


def problem(*, tokens=37, width=12, vocabulary=50, dtype=torch.float32, ignored=5):
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(width, vocabulary)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[:ignored]] = IGNORED_LABEL
    return head.to(dtype), x, targets


def gradients(loss, *tensors, scale=0.37):
    found = torch.autograd.grad(loss * scale, tensors)
    return found


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(output_head, "_FEW_LOGITS", 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ignored"), [(37, 5), (36, 0), (5, 1), (1, 0), (8, 8)])
def test_the_loss_and_both_gradients_are_those_of_all_logits_at_once(parts, dtype, tokens, ignored):
    head, x, targets = problem(tokens=tokens, ignored=ignored, dtype=dtype)
    whole = summed_loss(head(x), targets)
    in_parts = head(x, targets)
    assert in_parts.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(in_parts, whole, rtol=1e-6, atol=1e-6)
    want = gradients(whole, x, head.weight)
    # One part more is rounded once more, in the type of the weights.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(gradients(in_parts, x, head.weight), want, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(parts, frozen, monkeypatch):
    head, x, targets = problem()
    want = dict(zip(("x", "weight"), gradients(summed_loss(head(x), targets), x, head.weight, scale=1.0), strict=True))
    x.requires_grad_(frozen == "weight")
    head.weight.requires_grad_(frozen == "x")
    calls = []
    original = output_head.linear
    monkeypatch.setattr(output_head, "linear", lambda *a: calls.append(1) or original(*a))
    loss = head(x, targets)
    assert len(calls) == 4 * (1 if frozen == "both" else 2)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    left = {"x": x.grad, "weight": head.weight.grad}
    assert left.pop(frozen) is None
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, want[name], rtol=2e-6, atol=2e-6)


def test_an_ignored_position_may_have_infinite_logits():
    logits = torch.tensor([[1.0, 2.0, 0.5], [torch.inf, 0.0, -torch.inf], [torch.nan, 1.0, 1.0], [0.0, -1.0, 3.0]])
    targets = torch.tensor([2, IGNORED_LABEL, IGNORED_LABEL, 0])
    counted = [0, 3]
    chances = logits[counted].softmax(-1)
    found = logits.clone()
    loss = output_head._loss_and_gradient(found, targets, with_gradient=True)
    torch.testing.assert_close(loss, -chances[[0, 1], targets[counted]].log().sum())
    torch.testing.assert_close(found[counted], chances - torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert torch.equal(found[1:3], torch.zeros(2, 3))


def test_a_part_is_a_quarter_of_many_logits():
    assert part_size(2047, 4096, torch.float32) == 2047
    assert part_size(2048, 4096, torch.float32) == 512
    assert part_size(2049, 4096, torch.bfloat16) == 513
    assert part_size(2048, 4096, torch.float16) == 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_at_most_four_bytes_per_logit(parts, dtype):
    # Wide enough that the gradient of the weight is small beside the logits.
    head, x, targets = problem(tokens=4096, width=8, vocabulary=4096, dtype=dtype)
    with Peak() as whole:
        summed_loss(head(x), targets).backward()
    x.grad = head.weight.grad = None
    with Peak() as in_parts:
        head(x, targets).backward()
    logits = 4096 * 4096
    assert whole.peak / logits >= (8 if dtype == torch.float32 else 10)
    assert in_parts.peak / logits <= 4, in_parts.peak / logits
    assert in_parts.now < logits / 8


@pytest.mark.parametrize("model", [{}, MIXED_MODEL])
def test_a_model_without_logits_has_the_same_loss_and_gradients(parts, model, tmp_path):
    config = tiny_config(tmp_path, "model", model=model).model
    built = build_model(config, seed=3).train()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(257, (3, 24), generator=generator)
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(3, 24, generator=generator) < 0.2, IGNORED_LABEL)
    with_logits = built(tokens, targets_BS=targets)
    without = built(tokens, targets_BS=targets, with_logits=False)
    assert without.logits_BSV.numel() == 0
    assert without.losses.keys() == with_logits.losses.keys()
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-6, atol=0)
    parameters = list(built.parameters())
    want = torch.autograd.grad(with_logits.loss, parameters)
    for ours, theirs in zip(torch.autograd.grad(without.loss, parameters), want, strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_deepspeed_trains_in_parts_as_the_plain_engine_does_at_once(tmp_path, monkeypatch, zero_stage):
    """In ZeRO-3 the weight of the head is there only while its module runs."""
    write_text(tmp_path / "text")
    losses = {}
    for name, settings in {
        "at-once": {"engine": "torch"},
        "in-parts": {"engine": "deepspeed", "deepspeed": {"zero_stage": zero_stage}},
    }.items():
        monkeypatch.setattr(output_head, "_FEW_LOGITS", 2**23 if name == "at-once" else 0)
        config = tiny_config(tmp_path, name, steps=3, **settings)
        losses[name] = []
        train(config, [lambda report, to=losses[name]: to.append(report.losses["lm_loss"])])
    assert losses["in-parts"] == pytest.approx(losses["at-once"], rel=2e-6)
