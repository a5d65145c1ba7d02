"""Plans for a budget: optimal and within it for every quantity; rivals and alternatives of equal cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from qsparse_moe.ablation.allocation.allocate import (
    allocate,
    allocate_for,
    estimated_curves,
    lower_hull,
    shifted,
    uniform_at,
)
from qsparse_moe.ablation.allocation.alternatives import (
    _mean_magnitudes,
    compare_alternatives,
    features_dropped,
    pooled_mask,
    pooled_selection,
)
from qsparse_moe.ablation.allocation.compare import compare, load_under_uniform, rival_plans
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.allocation.rivals import _greedy_layer, greedy_plan
from qsparse_moe.ablation.cells import cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import loss_by_document
from qsparse_moe.accounting.densities import Densities
from qsparse_moe.accounting.flops import forward_flops
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.moe.router import Routing
from qsparse_moe.nn.hooks import SiteHook
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of

EVEN = {0: (0.5,) * 4, 1: (0.5,) * 4}
SKEWED = {0: (0.9, 0.5, 0.4, 0.2), 1: (0.0, 1.0, 0.6, 0.4)}
QUANTITIES = ["sparsity", "parameters", "flops", "bytes"]


def costs_of(quantity, load=EVEN, **changed) -> Costs:
    return Costs(config(), load, quantity, context=10, batch=3, **changed)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75])
def test_costs_at_equal_load_are_those_of_the_accounting(sparsity):
    settings, plan = config(), SparsityPlan.uniform(config(), sparsity)
    assert costs_of("parameters").of(plan) == pytest.approx(count_parameters(settings, plan).needed)
    assert costs_of("sparsity").of(plan) == pytest.approx(sparsity)
    densities = Densities({place: tuple(1 - s for s in values) for place, values in plan.values.items()})
    traffic = total_traffic(weight_traffic(settings, 3, densities, bytes_per_weight=4.0))
    assert costs_of("bytes").of(plan) == pytest.approx(traffic.needed)
    flops = forward_flops(settings, 10, plan)
    # One selection at expert_input serves both experts of a token there; an allocation pays for each.
    shared = 2 * 2 * 16 if sparsity else 0
    assert costs_of("flops").of(plan) == pytest.approx(flops.needed + shared)


def test_the_hull_is_below_all_points_and_convex():
    points = [(0.0, 3.0), (1.0, 2.9), (2.0, 0.5), (3.0, 0.6), (4.0, 0.0), (4.0, 1.0)]
    assert lower_hull(points) == [(0.0, 3.0), (2.0, 0.5), (4.0, 0.0)]


def test_no_combination_of_points_of_the_curves_within_the_budget_has_a_lower_loss():
    settings, costs = config(), costs_of("parameters", SKEWED)
    plan = SparsityPlan.uniform(settings, 0.5)
    cells = [cell for cell in cells_of(plan) if cell.layer == 0][:6]
    levels, generator = (0.0, 0.5, 0.75), torch.Generator().manual_seed(0)
    slopes = torch.rand(len(cells), generator=generator)
    loss = {(c, s): float(slopes[i]) * s**2 for i, c in enumerate(cells) for s in levels}  # convex in S
    curves = {cell: [(s, loss[cell, s]) for s in levels] for cell in cells}
    by_choice = {
        choice: (
            costs.of(with_cells(plan, dict(zip(cells, choice, strict=True)))),
            sum(loss[p] for p in zip(cells, choice, strict=True)),
        )
        for choice in product(levels, repeat=len(cells))
    }
    for target in sorted(cost for cost, _ in by_choice.values())[40::150]:
        found = allocate(plan, curves, costs, target)
        assert costs.of(found) <= target + 1e-6
        assert {cell: sparsity_of(found, cell) for cell in cells_of(plan) if cell not in cells} == {
            cell: 0.5 for cell in cells_of(plan) if cell not in cells
        }
        # A cell that is taken part of the way lies on the chord: at most what any whole choice comes to.
        value = sum(_chord(curves[cell], costs, cell, sparsity_of(found, cell)) for cell in cells)
        assert value <= min(total for cost, total in by_choice.values() if cost <= target) + 0.05


def _chord(curve, costs, cell, sparsity):
    for (s0, l0), (s1, l1) in zip(curve, curve[1:], strict=False):
        if s0 <= sparsity <= s1:
            c0, c1 = costs.of_cell(cell, s0), costs.of_cell(cell, s1)
            return l0 if c0 == c1 else l0 + (l1 - l0) * (c0 - costs.of_cell(cell, sparsity)) / (c0 - c1)
    raise AssertionError(sparsity)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("load", [EVEN, SKEWED], ids=["even", "skewed"])
def test_plans_stay_within_the_budget_and_use_it_up(quantity, load):
    costs = costs_of(quantity, load)
    plan, dense = SparsityPlan.uniform(config(), 0.5), SparsityPlan.uniform(config(), 0.0)
    target = costs.of(SparsityPlan.uniform(config(), 0.6))
    curves = {cell: [(s, (1 + i % 5) * s * s) for s in (0.0, 0.3, 0.6, 0.9)] for i, cell in enumerate(cells_of(plan))}
    offsets = {cell: 0.1 * (i % 3) for i, cell in enumerate(cells_of(plan))}
    for found in (
        allocate(plan, curves, costs, target),
        uniform_at(plan, costs, target),
        shifted(plan, offsets, costs, target),
    ):
        spent, allowed = costs.total_at(costs.of(found)), costs.total_at(target)
        assert spent <= allowed * (1 + 1e-9)
        assert spent >= 0.9 * allowed  # K is a whole number of 16 features
    loose = costs.of(dense)
    assert set(sum(allocate(plan, curves, costs, loose).values.values(), ())) == {0.0}


def test_the_measured_load_is_the_fraction_of_tokens_per_expert_and_plans_meet_the_budget_under_it():
    model, rows = model_of(config(default=0.25)), rows_of()
    load = measured_load(model, rows)
    assert set(load) == {0, 1} and all(sum(shares) == pytest.approx(2.0) for shares in load.values())
    costs = load_under_uniform(model, rows, Costs(model.config, load, "sparsity"), 0.6)
    before = model.sparsity_plan
    plans = rival_plans(model, rows, costs, 0.6, num_random=2, rounds=2)
    assert model.sparsity_plan is before
    assert set(plans) == {"allocated", "uniform", "greedy by layer", "random 0", "random 1"}
    by_name = {one.name: one for one in compare(model, rows, plans, costs)}
    assert model.sparsity_plan is before
    for name, plan in plans.items():
        assert 0.6 <= costs.of(plan) < 0.66, name
        model.set_sparsity(plan)
        (batch,) = rows.batches
        stats = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS).stats
        sizes = {"attention_input": 3 * 16, "attention_output": 16, "expert_input": 32, "expert_hidden": 16}
        kept = sum(size * float(stats[f"sparsity/{site}/selected_LE"].sum()) for site, size in sizes.items())
        whole = sum(size * 16 * float(stats[f"sparsity/{site}/rows_LE"].sum()) for site, size in sizes.items())
        assert by_name[name].cost == pytest.approx(1 - kept / whole), name
    assert by_name["dense"].cost == 0.0 and by_name["uniform"].against_uniform == 0.0
    losses_C = loss_by_document(model, rows)  # the last plan is set
    assert by_name["random 1"].loss == pytest.approx(losses_C.sum() / rows.labels_C.sum())


def test_an_allocated_plan_is_no_worse_than_uniform_on_the_sequences_it_was_made_from():
    model, rows = model_of(config()), rows_of(num_sequences=6, length=16)
    costs = Costs(model.config, measured_load(model, rows), "sparsity")
    uniform = uniform_at(model.sparsity_plan, costs, 0.5)
    losses = []
    for plan in (uniform, allocate_for(model, rows, costs, 0.5, rounds=2)):
        model.set_sparsity(plan)
        losses.append(loss_by_document(model, rows).sum())
    assert losses[1] < losses[0]


def test_pooled_selection_takes_the_largest_weighted_features_of_all_experts_of_a_token():
    weights_TA, ids_TA = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]]), torch.tensor([[2, 0], [0, 1], [1, 2]])
    rows = sorted((int(e), t, a) for t, row in enumerate(ids_TA) for a, e in enumerate(row))
    x_NF = torch.randn(6, 4)
    mask_NF = pooled_mask(x_NF, Routing(weights_TA, ids_TA, weights_TA, weights_TA), 2)
    for token in range(3):
        own = [(n, a) for n, (_, t, a) in enumerate(rows) if t == token]
        sizes = {(n, f): float(weights_TA[token, a] * x_NF[n, f].abs()) for n, a in own for f in range(4)}
        largest = set(sorted(sizes, key=sizes.get)[-4:])
        assert {place for place in sizes if mask_NF[place]} == largest


def test_alternatives_leave_the_model_as_it_was_and_cost_no_more():
    model, rows = model_of(config(default=0.25)), rows_of()
    before, weights = model.sparsity_plan, {name: value.clone() for name, value in model.state_dict().items()}
    costs = Costs(model.config, measured_load(model, rows), "sparsity")
    plans = {"uniform": uniform_at(before, costs, 0.5)}
    found = compare_alternatives(model, rows, rows, plans, costs, 0.5)
    assert [one.name.split(",")[0] for one in found] == [
        "pooled over the experts of a token",
        "1 of 2 experts per token",
        "experts of 2 of 16 features",
    ]
    assert all(one.cost >= 0.5 - 1e-9 for one in found)
    # Of the 4 + 2 * 3 matrices of 16 x 16 that a token uses per layer, one expert leaves 4 + 3: 11 of 16 features in
    # front of each are the most within half of the former.
    assert found[1].name == "1 of 2 experts per token, S = 0.28"
    assert found[1].cost == pytest.approx(1 - 11 / 16 * 7 / 10)
    assert model.sparsity_plan is before and all(value.equal(weights[n]) for n, value in model.state_dict().items())
    assert all(site.hook is None for block in model.blocks() for site in block.sites().values())
    # With nothing to pool, drop or leave out each is the model itself.
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
    same = loss_by_document(model, rows)
    with pooled_selection(model):
        torch.testing.assert_close(loss_by_document(model, rows), same)
    with features_dropped(model, rows, 16):
        torch.testing.assert_close(loss_by_document(model, rows), same)


def test_alternatives_leave_the_default_sizes_of_dense_layers_and_shared_experts_as_they_are():
    model, rows = model_of(config({"num_dense_layers": 1, "num_shared_experts": 1})), rows_of()
    costs = Costs(model.config, measured_load(model, rows), "parameters")
    # The two experts of a token have three matrices of 16 x 16 each, in one layer: 11 of 16 features less.
    target = costs.of(model.sparsity_plan) - 11 * 2 * 3 * 16
    plans = {"uniform": uniform_at(model.sparsity_plan, costs, target)}
    found = compare_alternatives(model, rows, rows, plans, costs, target)
    assert [one.name.split(",")[0] for one in found][1:] == ["1 of 2 experts per token", "experts of 5 of 16 features"]


def test_alternatives_that_cannot_meet_the_budget_are_left_out_and_logged(caplog):
    model, rows = model_of(config()), rows_of()
    costs = replace(Costs(model.config, measured_load(model, rows), "sparsity"))
    plans = {"uniform": uniform_at(model.sparsity_plan, costs, 0.9)}
    with caplog.at_level("INFO", logger="qsparse_moe.ablation.allocation.alternatives"):
        found = compare_alternatives(model, rows, rows, plans, costs, 0.9)
    assert not any("features" in one.name for one in found)
    assert "smaller experts: the dense model exceeds the budget even with one feature per expert" in caplog.text


def test_every_round_moves_halfway_to_the_optimum_of_the_curves_around_the_previous_plan():
    model, rows = model_of(config()), rows_of(num_sequences=4)
    before = model.sparsity_plan
    costs = Costs(model.config, measured_load(model, rows), "sparsity")
    expected, furthest = uniform_at(before, costs, 0.5), 0.0
    for rounds in (1, 2):
        model.set_sparsity(expected)
        wished = allocate(expected, estimated_curves(model, rows), costs, 0.5)
        pairs = {c: (sparsity_of(expected, c), sparsity_of(wished, c)) for c in cells_of(before)}
        furthest = max(furthest, *(abs(a - b) for a, b in pairs.values()))
        expected = shifted(expected, {cell: 0.5 * a + 0.5 * b for cell, (a, b) in pairs.items()}, costs, 0.5)
        model.set_sparsity(before)
        assert allocate_for(model, rows, costs, 0.5, rounds=rounds).values == expected.values
    assert furthest > 0.3, "the curves ask for another plan than the one that they were made at"


def test_smaller_experts_retain_the_features_with_the_largest_mean_contribution_whatever_the_load():
    model, rows = model_of(config({"bias_update_rate": 0.001})), rows_of()
    for block in model.blocks():
        block.moe.router.expert_bias[0] += 0.3  # one expert has far more rows than the others
    (batch,) = rows.batches
    seen = {}
    for block in model.blocks():
        block.moe.experts.hidden_site.hook = SiteHook(
            lambda x, ids, sparse, b=block: seen.setdefault(b, (x, ids)) and sparse
        )
    with torch.no_grad():
        model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
    for block in model.blocks():
        block.moe.experts.hidden_site.hook = None
    loads, by_hand = set(), _mean_magnitudes(model, rows)
    weights = {block: block.moe.experts.w_down.detach().clone() for block in model.blocks()}
    left = {block: torch.zeros(4, 16, dtype=torch.bool) for block in model.blocks()}

    def watch(block, original, rows_NF, weights_EFD, counts):
        if weights_EFD is block.moe.experts.w_down:
            for expert, mine in enumerate(rows_NF.split(counts.as_list)):
                left[block][expert] = mine.any(0)
        return original(rows_NF, weights_EFD, counts)

    with features_dropped(model, rows, 5), torch.no_grad():
        for block in model.blocks():
            block.moe.experts.matmul = partial(watch, block, block.moe.experts.matmul)
        model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
    assert all(torch.equal(block.moe.experts.w_down, weight) for block, weight in weights.items())
    for block, (x_NF, ids_N) in seen.items():
        for expert in range(4):
            mine = x_NF[ids_N == expert]
            loads.add(len(mine))
            if not len(mine):
                continue
            mean_F = mine.abs().mean(0)
            torch.testing.assert_close(by_hand[block][expert], mean_F.float(), check_dtype=False)
            weight_FD = block.moe.experts.w_down[expert].detach()
            adds = [float(mean_F[f]) * float(weight_FD[f].square().sum() ** 0.5) for f in range(16)]
            largest = set(sorted(range(16), key=lambda f: adds[f])[-5:])
            assert set(left[block][expert].nonzero().flatten().tolist()) == largest
            only_one = [set(sorted(range(16), key=v.__getitem__)[-5:]) for v in (mean_F, weight_FD.norm(dim=-1))]
            assert only_one[0] != largest or only_one[1] != largest
    assert len(loads) > 2 and max(loads) > 2 * min(loads)


class KnownLayer:
    """A layer whose output is moved by each site's S times a factor, in a dimension of its own."""

    layer = 0

    def __init__(self, factors):
        self.factors, self.levels = factors, dict.fromkeys(factors, 0.0)

    def set_sparsity(self, plan):
        self.levels = {site: plan.sparsity(0, site) for site in self.factors}

    def __call__(self):
        moved = torch.tensor([[self.factors[site] * level for site, level in self.levels.items()]])
        return type("Output", (), {"hidden_BSD": moved})()


def test_the_greedy_plan_takes_the_step_with_the_least_error_per_saving_until_the_layer_costs_as_much_as_uniform():
    wide = config(default=0.25)
    wide = wide.model_copy(update={"hidden_size": 20, "moe": wide.moe.model_copy(update={"expert_hidden_size": 20})})
    costs = Costs(wide, EVEN, "parameters")
    factors = {"attention_input": 4.0, "attention_output": 1.0, "expert_input": 9.0, "expert_hidden": 5.0}
    found = _greedy_layer(KnownLayer(factors), [()], SparsityPlan.uniform(wide, 0.2), costs, list)
    # Elements of 20 x 20 matrices behind each site; a step of 0.05 drops one of 20 features.
    sizes = {"attention_input": 3, "attention_output": 1, "expert_input": 4, "expert_hidden": 2}
    steps = dict.fromkeys(sizes, 0)
    while sum(sizes[site] * taken for site, taken in steps.items()) < 4 * sum(sizes.values()):
        price = {}
        for site in sizes:
            if steps[site] < 19:
                moved = sum((factors[s] * (steps[s] + (s == site))) ** 2 for s in sizes)
                price[site] = moved / sizes[site]
        steps[min(price, key=price.__getitem__)] += 1
    assert {site: round(level / 0.05) for (_, site), level in found.items()} == steps
    assert len(set(steps.values())) > 2


def test_the_greedy_plan_is_made_on_activations_of_the_dense_model_whatever_plan_the_model_has():
    model, rows = model_of(config()), rows_of()
    costs, seen = Costs(model.config, EVEN, "sparsity"), []
    uniform = uniform_at(model.sparsity_plan, costs, 0.2)
    last = list(model.blocks())[-1]
    last.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].detach().clone()))
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
    loss_by_document(model, rows)
    model.set_sparsity(before := SparsityPlan.uniform(model.config, 0.9))
    greedy_plan(model, rows, uniform, costs, 0.2)
    assert model.sparsity_plan is before
    torch.testing.assert_close(seen[1], seen[0])


def test_a_step_of_more_tokens_than_the_vocabulary_has_reads_the_embedding_once():
    settings, plan = config(), SparsityPlan.uniform(config(), 0.0)
    densities = Densities({place: (1.0,) * len(values) for place, values in plan.values.items()})
    everyone = dict.fromkeys(EVEN, (1.0,) * 4)
    many = Costs(settings, everyone, "bytes", batch=1000)
    traffic = total_traffic(weight_traffic(settings, 1000, densities, bytes_per_weight=4.0))
    assert many.of(plan) == pytest.approx(traffic.stored)
