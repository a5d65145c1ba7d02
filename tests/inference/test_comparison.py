"""Differences between a sparse model and a reference: by hand, by a slow definition, and where there are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import IGNORED_LABEL, make_batch
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.comparison.continuations import compare_continuations
from qsparse_moe.inference.comparison.figures import change_maps
from qsparse_moe.inference.comparison.measure import Comparison, LayerChange, Prompts, choose_prompts, compare
from qsparse_moe.inference.comparison.sides import Side
from qsparse_moe.inference.comparison.sums import HiddenSums, OutputSums, RoutingChange, RoutingSums
from qsparse_moe.inference.load import LoadedModel
from qsparse_moe.inference.scoring import Score
from qsparse_moe.inference.sequences import Generation
from qsparse_moe.inference.weights import StoredFormats
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.inference.models import model
from tests.inference.test_generator import greedy

DOCUMENT = 256
NO_TEXT = Prompts(0, 1, 1)


def side(built, sparsity=0.0, *, name="", plan=None, length=32):
    built.hide_ids(range(257, 264))
    run = RunConfig.model_validate({"model": built.config.model_dump(), "data": {"sequence_length": length}})
    loaded = LoadedModel(run, built, ByteTokenizer(), 0, StoredFormats())
    return Side(loaded, plan or SparsityPlan.uniform(built.config, sparsity), name)


def batch_of(rows=3, length=20, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (rows, length + 1))
    tokens[:, 0] = tokens[1, 7] = DOCUMENT
    return make_batch(tokens, document_token=DOCUMENT, attend_across_documents=False)


@pytest.fixture(scope="module")
def built():
    """Two layers with experts after a dense one, and sparse sites everywhere."""
    return model(num_layers=3, moe={"num_dense_layers": 1, "num_experts": 4, "expert_hidden_size": 32})


def test_changed_choices_are_counted():
    reference = torch.tensor([[0, 1], [2, 3], [1, 0]])
    own = torch.tensor([[1, 0], [2, 1], [3, 2]])
    sums = RoutingSums(5)
    # In two batches, of which the second counts on.
    sums.add(reference[:1], own[:1])
    sums.add(reference[1:], own[1:])
    assert sums.change() == RoutingChange(
        choices_changed=3 / 6,
        tokens_changed=2 / 3,
        first_changed=2 / 3,
        reference_choices_E=(2, 2, 1, 1, 0),
        lost_E=(1, 1, 0, 1, 0),
        gained_E=(0, 1, 1, 1, 0),
    )


def test_divergence_is_that_of_the_model_from_the_reference():
    reference, own = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    sums = OutputSums()
    sums.add(reference, own, torch.tensor([1]))
    sums.add(reference, reference, torch.tensor([0]))
    found = sums.change()
    assert found.num_tokens == 2
    assert found.kl_divergence == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert found.top1_agreement == 0.5, "argmax of a tie is the first, which is not the model's"
    assert found.reference_loss == pytest.approx(math.log(2))
    assert found.loss == pytest.approx((-math.log(0.75) + math.log(2)) / 2)


def test_hidden_states_are_compared_token_by_token():
    sums = HiddenSums()
    sums.add(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    found = sums.change()
    assert found.error == pytest.approx((4 / 5 + 1) / 2)
    assert found.cosine == pytest.approx((9 / 15 + 1) / 2)


def generation(ids, log_probs=None, *, ended=False):
    reason = "stop_token" if ended else "max_tokens"
    return Generation("", tuple(ids), tuple(log_probs or [0.0] * len(ids)), reason)


def test_continuations_are_compared_up_to_the_end_of_the_shorter_one():
    reference = [
        generation([1, 2, 3, 4], [-1.0] * 4),
        generation([5, 6, 7, 8], [-2.0] * 4),
        generation([9], ended=True),
    ]
    own = [generation([1, 2, 3, 4]), generation([5, 0], ended=True), generation([9, 1, 1, 1])]
    scores = [
        Score((-1.0, -1.0, -3.0, -3.0), (True, True, False, True)),
        Score((-2.0, -4.0), (True, False)),
        Score((-1.0, -1.0, -1.0, -1.0), (True, False, False, False)),
    ]
    found = compare_continuations(reference, own, scores, new_tokens=4, end=DOCUMENT)
    # The third reference ends where the model goes on: its end is its second token.
    assert found.first_differences == (None, 1, 1)
    assert found.agreement_by_position == (1.0, 1 / 3, 1 / 2, 1.0)
    assert found.agreement == (3 + 1 + 1 + 1) / (3 + 3 + 2 + 1)
    assert (found.median_first_difference, found.never_parts) == (1, 1 / 3)
    assert [(one.begin, one.end, one.num_tokens) for one in found.drift] == [(0, 1, 3), (1, 2, 3), (2, 3, 2), (3, 4, 2)]
    assert [one.agreement for one in found.drift] == [1.0, 1 / 3, 0.0, 0.5]
    assert [one.log_probability for one in found.drift] == [-4 / 3, -2.0, -2.0, -2.0]
    assert found.drift_agreement == pytest.approx(5 / 10)
    assert found.drift_log_probability == pytest.approx(-(8 + 6 + 4) / 10)
    assert found.reference_log_probability == pytest.approx(-12 / 9)
    same = compare_continuations(own, own, scores, new_tokens=4, end=DOCUMENT)
    assert (same.median_first_difference, same.never_parts, same.agreement) == (None, 1.0, 1.0)


def test_positions_are_binned_where_there_are_many():
    texts = [generation(range(20), [-float(place) for place in range(20)])]
    scores = [Score(tuple(-2.0 * place for place in range(20)), (True,) * 20)]
    found = compare_continuations(texts, texts, scores, new_tokens=20, end=DOCUMENT)
    assert [(one.begin, one.end) for one in found.drift][:3] == [(0, 2), (2, 5), (5, 8)] and len(found.drift) == 8
    assert found.drift[1].log_probability == -6.0 and found.drift[1].own_log_probability == -3.0


def test_a_model_and_itself_do_not_differ(built):
    found = compare(side(built, 0.5), side(built, 0.5), [batch_of()], Prompts(3, 6, 10))
    assert found.outputs.kl_divergence == 0.0 and found.outputs.top1_agreement == 1.0
    assert found.outputs.loss == found.outputs.reference_loss
    for layer in found.layers:
        assert layer.hidden.error == layer.local_hidden.error == 0.0
        assert layer.hidden.cosine == pytest.approx(1.0, abs=1e-12)
    assert [layer.layer for layer in found.routed_layers] == [1, 2]
    for layer in found.routed_layers:
        assert layer.routing == layer.local_routing and layer.routing.choices_changed == 0.0
        assert layer.routing.first_changed == layer.routing.tokens_changed == 0.0
    texts = found.continuations
    assert texts.agreement == texts.never_parts == texts.drift_agreement == 1.0
    assert texts.drift_log_probability == pytest.approx(texts.reference_log_probability, abs=1e-5)
    assert built.sparsity_plan.mean == 0.5 and all(router.hook is None for router in built.routers())


def slow(built, plans, batch, *, replaced=None, layer=None):
    """Experts, hidden states, and logits of every plan; with ``replaced``, ``layer`` reads these hidden states."""
    found = []
    for plan in plans:
        built.set_sparsity(plan)
        experts, hidden, handles = [], [], []
        for router in built.routers():
            handles.append(router.register_forward_hook(lambda _m, _a, out, to=experts: to.append(out.expert_ids_TA)))
        if replaced is not None:
            block = list(built.blocks())[layer]
            handles.append(block.register_forward_pre_hook(lambda _m, args: (replaced, *args[1:])))
        with torch.no_grad():
            logits = built(
                batch.tokens_BS,
                positions_BS=batch.positions_BS,
                documents_BS=batch.documents_BS,
                with_stats=False,
                layer_hook=lambda _, states, to=hidden: to.append(states),
            ).logits_BSV
        for handle in handles:
            handle.remove()
        found.append((experts, hidden, logits))
    return found


def changed(reference, own, counts):
    """Fractions of choices, of tokens, and of first choices, token by token with sets."""
    choices = tokens = first = num = 0
    for index, (one, other) in enumerate(zip(reference.tolist(), own.tolist(), strict=True)):
        if counts[index]:
            choices += len(set(one) - set(other))
            tokens += set(one) != set(other)
            first += one[0] != other[0]
            num += 1
    return choices / (num * len(reference[0])), tokens / num, first / num


def test_a_whole_comparison_is_that_of_the_slow_definition(built):
    batches = [batch_of(), batch_of(2, seed=1)]
    # The padding of a batch, and labels that do not count.
    batches[1].targets_BS[1] = IGNORED_LABEL
    batches[0].targets_BS[0, :5] = IGNORED_LABEL
    reference, own = side(built, 0.0), side(built, 0.6)
    found = compare(reference, own, batches, NO_TEXT)
    assert found.continuations is None and found.outputs.num_tokens == 3 * 20 - 5 + 20
    counts = [(batch.targets_BS != IGNORED_LABEL).flatten() for batch in batches]
    both = [slow(built, (reference.plan, own.plan), batch) for batch in batches]
    for place, layer in enumerate(found.routed_layers):
        pairs = [torch.cat([one[which][0][place] for one in both]) for which in (0, 1)]
        wanted = changed(*pairs, torch.cat(counts))
        got = (layer.routing.choices_changed, layer.routing.tokens_changed, layer.routing.first_changed)
        assert got == pytest.approx(wanted) and wanted[0] > 0
    for place, layer in enumerate(found.layers):
        states = [torch.cat([one[which][1][place].flatten(0, 1) for one in both]) for which in (0, 1)]
        errors = [(b - a).norm() / a.norm() for a, b in zip(*states, strict=True)]
        chosen = [float(e) for e, count in zip(errors, torch.cat(counts), strict=True) if count]
        assert layer.hidden.error == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
    kl = agreeing = 0.0
    for (dense, sparse), count in zip(both, counts, strict=True):
        for p, q, is_counted in zip(dense[2].flatten(0, 1), sparse[2].flatten(0, 1), count, strict=True):
            if is_counted:
                p, q = p[:257].softmax(-1), q[:257].softmax(-1)
                kl += float((p * (p / q).log()).sum())
                agreeing += int(p.argmax() == q.argmax())
    assert found.outputs.kl_divergence == pytest.approx(kl / 75, rel=1e-4)
    assert found.outputs.top1_agreement == pytest.approx(agreeing / 75) and 0 < agreeing < 75


def test_local_changes_are_those_of_a_layer_that_reads_the_hidden_states_of_the_reference(built):
    batch, reference, own = batch_of(), side(built, 0.0), side(built, 0.6)
    found = compare(reference, own, [batch], NO_TEXT)
    dense = slow(built, (reference.plan,), batch)[0]
    for place, layer in enumerate(found.routed_layers):
        before = dense[1][layer.layer - 1]
        [local] = slow(built, (own.plan,), batch, replaced=before, layer=layer.layer)
        wanted = changed(dense[0][place], local[0][place], [True] * 60)
        assert layer.local_routing.choices_changed == pytest.approx(wanted[0])
        assert layer.local_routing.first_changed == pytest.approx(wanted[2])
        error = (local[1][layer.layer] - dense[1][layer.layer]).flatten(0, 1).norm(dim=-1)
        relative = (error / dense[1][layer.layer].flatten(0, 1).norm(dim=-1)).mean()
        assert layer.local_hidden.error == pytest.approx(float(relative), rel=1e-5)
    # Attention in front of the router is sparse, so some layer changes choices by itself.
    assert max(layer.local_routing.choices_changed for layer in found.routed_layers) > 0
    assert found.layers[0].hidden == found.layers[0].local_hidden, "nothing comes before the first layer"


def test_a_plan_that_changes_one_expert_changes_what_comes_after_it(built):
    dense = SparsityPlan.uniform(built.config, 0.0)
    one = dense.with_(sparsity=0.9, layer=1, site="expert_hidden", experts=[2])
    found = compare(side(built, plan=dense), side(built, plan=one), [batch_of()], NO_TEXT)
    before, changing, after = found.layers
    assert before.hidden.error == 0.0 and before.routing is None
    # The router of the layer reads what was there before, and every other layer is as it was.
    assert changing.routing.choices_changed == 0.0 and changing.hidden.error > 0.0
    assert changing.hidden == changing.local_hidden
    assert after.local_hidden.error == 0.0 and after.local_routing.choices_changed == 0.0
    assert after.routing.choices_changed > 0.0 and after.hidden.error > 0.0
    unused = dense.with_(sparsity=0.9, layer=1, site="expert_hidden", experts=[2])
    tokens = [token for token in range(60) if 2 not in slow(built, (dense,), batch_of())[0][0][0][token]]
    states = [run[1][1].flatten(0, 1)[tokens] for run in slow(built, (dense, unused), batch_of())]
    assert tokens and torch.equal(*states), "tokens without the expert are the same after the layer"


def test_maps_are_fractions_of_the_choices_of_the_reference():
    routing = RoutingChange(0.5, 0.5, 0.5, (4, 0, 2), (1, 0, 2), (2, 1, 0))
    layer = LayerChange(1, HiddenSums(), HiddenSums(), routing, routing)
    lost, gained = change_maps(Comparison(None, (layer,), None))
    assert np.array_equal(lost, [[0.25, np.nan, 1.0]], equal_nan=True)
    assert np.array_equal(gained, [[0.5, np.nan, 0.0]], equal_nan=True)


def test_continuations_are_greedy_and_judged_by_the_reference(built):
    reference, own = side(built, 0.0), side(built, 0.6)
    batch = batch_of()
    found = compare(reference, own, [batch], Prompts(2, 8, 6, batch_size=1)).continuations
    assert built.sparsity_plan == own.plan
    prompts = choose_prompts(own, [batch], Prompts(2, 8, 6))
    # Of three sequences the first and the second, whose eighth token begins a document.
    assert prompts == [batch.tokens_BS[0, :8].tolist(), [DOCUMENT]]
    differences, greedy_tokens, log_probs = [], [], []
    for prompt in prompts:
        own.use_plan()
        tokens, _ = greedy(built, prompt, 6)
        reference.use_plan()
        wanted, _ = greedy(built, prompt, 6)
        differences.append(
            next((i for i, pair in enumerate(zip(tokens, wanted, strict=True)) if len({*pair}) > 1), None)
        )
        with torch.no_grad():
            rows = built(torch.tensor([[*prompt, *tokens]]), with_stats=False).logits_BSV[0, len(prompt) - 1 : -1]
        greedy_tokens += [int(row.argmax()) == token for row, token in zip(rows, tokens, strict=True)]
        log_probs += [float(row.log_softmax(-1)[token]) for row, token in zip(rows, tokens, strict=True)]
        assert DOCUMENT not in tokens + wanted, "the definition here does not end at a document"
    assert found.first_differences == tuple(differences)
    assert found.drift_agreement == pytest.approx(sum(greedy_tokens) / 12)
    assert found.drift_log_probability == pytest.approx(sum(log_probs) / 12, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 32}, "model.hidden_size is 32 and 64"),
        ({"num_layers": 3}, "model.num_layers is 3 and 2"),
        ({"vocab_size": 512}, "model.vocab_size is 512 and 264"),
        ({"moe": {"num_experts": 8}}, "model.moe.num_experts is 8 and 4"),
        ({"moe": {"experts_per_token": 1}}, "model.moe.experts_per_token is 1 and 2"),
        ({"num_layers": 2, "moe": {"num_dense_layers": 1}}, r"the layers with experts is \[1\] and \[0, 1\]"),
    ],
)
def test_a_reference_of_other_shapes_is_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"other cannot be the reference of own.*{message}.*same vocabulary"):
        compare(side(model(**settings), name="other"), side(model(), name="own"), [batch_of()], NO_TEXT)


def test_prompts_that_do_not_fit_are_refused(built):
    own = side(built, 0.5)
    with pytest.raises(ConfigError, match=r"prompt_tokens \(30\) and new_tokens \(3\) must together be .* \(32\)"):
        choose_prompts(own, [batch_of()], Prompts(2, 30, 3))
    with pytest.raises(ConfigError, match=r"prompt_tokens \(24\) is longer than every held-out sequence"):
        choose_prompts(own, [batch_of()], Prompts(2, 24, 3))
