"""Calibration of a model: thresholds of every site from its activations, and a model that selects by them."""

import logging

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import ConfigError, TrainingDiverged
from qsparse_moe.model.thresholds import calibrate, sample_sites, with_calibrated_thresholds, with_thresholds
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan

torch.set_num_threads(1)
SPARSE = {
    "default": 0.5,
    "overrides": [{"site": "expert_hidden", "experts": 1, "sparsity": 0.75}, {"layers": 0, "sparsity": 0.25}],
}


def config(**sparsity):
    moe = {"num_experts": 3, "expert_hidden_size": 24, "num_shared_experts": 1, "num_dense_layers": 1}
    moe["activation"] = "swiglu"  # no natural zeros among the magnitudes
    return ModelConfig.model_validate(
        {"vocab_size": 40, "hidden_size": 32, "num_layers": 3, "moe": moe, "sparsity": sparsity}, strict=False
    )


def batches(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (count, 4, 32), generator=generator)
    return [Batch(part, part, torch.arange(32).expand(4, -1), None) for part in tokens]


def activations_of_sites(model, data):
    """The rows and experts that reach every site, by hooks of the test's own."""
    seen = {}
    for block in model.blocks():
        for name, site in block.sites().items():
            rows = seen.setdefault((block.layer, name), [])
            site.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(inputs))
    with torch.no_grad():
        for batch in data:
            model(batch.tokens_BS, positions_BS=batch.positions_BS)
    return seen


def test_each_threshold_selects_the_requested_fraction_on_the_tokens_of_its_expert():
    # backend=torch, because a fused pass does not call the modules whose inputs this test records.
    model = build_model(config(**SPARSE, backend="torch"), seed=1)
    plan = calibrate(model, batches())
    assert plan.values == model.sparsity_plan.values
    seen = activations_of_sites(model, batches())
    assert plan.thresholds.keys() == seen.keys() == plan.values.keys()
    checked = 0
    for place, calls in seen.items():
        for expert, (sparsity, threshold) in enumerate(zip(plan.values[place], plan.thresholds[place], strict=True)):
            if place[1] == "expert_input":  # one selection serves all experts here, so the rows name none
                continue
            rows = [x if len(c) == 1 or c[1] is None else x[c[1] == expert] for c in calls for x in c[:1]]
            magnitudes = torch.cat([x.flatten() for x in rows]).abs()
            kept = len(magnitudes) - round(sparsity * len(magnitudes))
            # Tokens that recur make ties with the threshold in front of the first layer; elsewhere there are none.
            above, reached = (magnitudes > threshold).sum(), (magnitudes >= threshold).sum()
            assert above <= kept < reached, (place, expert)
            assert above == kept or place == (0, "attention_input"), (place, expert)
            checked += 1
    assert checked == 3 * 2 + 2 + 2 * (3 + 2)


def test_a_model_that_uses_the_calibrated_file_selects_the_requested_fraction_at_every_site(tmp_path):
    plan = calibrate(build_model(config(**SPARSE), seed=1), batches())
    path = tmp_path / "plan.json"
    plan.save(path)
    assert SparsityPlan.load(path) == plan
    model = build_model(config(plan=str(path), selection="threshold"), seed=1)
    exact = build_model(config(**SPARSE), seed=1)
    assert model.sparsity_plan == plan
    batch = batches(1)[0]
    stats, want = (made(batch.tokens_BS, positions_BS=batch.positions_BS).stats for made in (model, exact))
    sites = [name.removesuffix("selected_LE") for name in want if name.endswith("/selected_LE")]
    assert len(sites) == 8
    for site in sites:
        share, requested = (
            sums[f"{site}selected_LE"].sum(-1) / sums[f"{site}rows_LE"].sum(-1) for sums in (stats, want)
        )
        torch.testing.assert_close(share, requested, rtol=0.08, atol=0)
    rows = stats["sparsity/expert_hidden/rows_LE"]
    assert not torch.equal(stats["sparsity/expert_hidden/selected_LE"], want["sparsity/expert_hidden/selected_LE"])
    assert (stats["sparsity/expert_hidden/selected_LE"] >= rows).all()  # at least one per row


def test_calibration_leaves_the_model_unchanged_and_is_deterministic():
    model = build_model(config(**SPARSE), seed=1)
    before, tokens = model.sparsity_plan, batches()[0].tokens_BS
    logits = model(tokens).logits_BSV
    first, second = calibrate(model, batches()), calibrate(model, batches())
    assert first == second
    assert model.sparsity_plan is before
    assert model.training
    sites = [site for block in model.blocks() for site in block.sites().values()]
    assert all(
        site.hook is None and site.is_uniform == (len(set(site.ranking.num_selected_E.tolist())) == 1) for site in sites
    )
    assert torch.equal(model(tokens).logits_BSV, logits)


def test_a_model_that_already_selects_by_thresholds_can_be_calibrated_for_another_s(tmp_path):
    ranked = build_model(config(default=0.5), seed=1)
    calibrate(ranked, batches()).save(tmp_path / "plan.json")
    model = build_model(config(plan=str(tmp_path / "plan.json"), selection="threshold"), seed=1)
    other = SparsityPlan.uniform(model.config, 0.75)
    assert calibrate(model, batches(), other) == calibrate(ranked, batches(), other)
    model.set_sparsity(calibrate(model, batches(), other))
    with pytest.raises(
        ConfigError, match=r"layer 0, attention_input has S above 0 and no threshold, which.*qsparse-moe calibrate"
    ):
        model.set_sparsity(other)
    model.set_sparsity(other.scaled(0.0))  # dense needs none


def test_packed_documents_are_sampled_as_in_training():
    model, (batch,) = build_model(config(**SPARSE), seed=1), batches(1)
    parts = batch.tokens_BS[:, :12], batch.tokens_BS[:, 12:]
    positions = 3 * torch.tensor([*range(12), *range(20)]).expand(4, -1)
    packed = Batch(batch.tokens_BS, batch.tokens_BS, positions, (torch.arange(32) >= 12).long().expand(4, -1))
    alone = [Batch(part, part, 3 * torch.arange(part.shape[1]).expand(4, -1), None) for part in parts]
    want, found = calibrate(model, alone), calibrate(model, [packed])
    for place, thresholds in want.thresholds.items():
        assert found.thresholds[place] == pytest.approx(thresholds, rel=1e-4), place
    for wrong in (packed._replace(documents_BS=None), packed._replace(positions_BS=batch.positions_BS)):
        other = calibrate(model, [wrong]).thresholds[0, "attention_output"]
        assert other != pytest.approx(want.thresholds[0, "attention_output"], rel=1e-4)


def test_a_small_sample_is_close_to_the_whole():
    model = build_model(config(**SPARSE), seed=1)
    whole, part = calibrate(model, batches()), calibrate(model, batches(), max_values=2048)
    assert whole != part
    for place, thresholds in whole.thresholds.items():
        assert part.thresholds[place] == pytest.approx(thresholds, rel=0.2), place


@pytest.mark.parametrize("max_values", [2**18, 640])
def test_samples_of_two_processes_merge_to_the_sample_of_all_batches(max_values):
    model, plan = build_model(config(**SPARSE), seed=1), SparsityPlan.from_config(config(**SPARSE))
    numbered = [(index * 4 * 32, batch) for index, batch in enumerate(batches(5))]
    whole = calibrate(model, batches(5), max_values=max_values)
    merged, other = (sample_sites(model, numbered[rank::2], plan, max_values=max_values) for rank in (0, 1))
    assert merged.keys() == plan.values.keys()
    assert with_calibrated_thresholds(plan, merged) != whole
    for place, samples in merged.items():
        for sample, more in zip(samples, other[place], strict=True):
            sample.merge(more)
    assert with_calibrated_thresholds(plan, merged) == whole
    assert sum(sample.num_seen for sample in merged[1, "expert_hidden"]) == 2 * 5 * 4 * 32
    assert sum(sample.num_seen for sample in merged[1, "attention_input"]) == 5 * 4 * 32


def test_a_process_without_a_batch_has_an_empty_sample():
    model = build_model(config(**SPARSE), seed=1)
    samples = sample_sites(model, [], model.sparsity_plan)
    assert samples.keys() == model.sparsity_plan.values.keys()
    assert not any(sample.num_seen for of_place in samples.values() for sample in of_place)
    with pytest.raises(AssertionError, match="calibration received no batch"):
        with_calibrated_thresholds(model.sparsity_plan, samples)


def test_the_same_weights_select_by_thresholds_as_a_model_built_for_it(tmp_path):
    settings = {"preset": "a4.8", "rescale": "unit"} | SPARSE
    model = build_model(config(**settings), seed=1, dtype=torch.bfloat16)
    plan = calibrate(model, batches())
    plan.save(tmp_path / "plan.json")
    other = with_thresholds(model, plan)
    assert not other.training
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]
    formats = {name: site.number_format for name, site in model.layers[1].sites().items()}
    assert formats == {name: site.number_format for name, site in other.layers[1].sites().items()}
    assert set(formats.values()) == {"int4", "int8"}
    built = config(
        plan=str(tmp_path / "plan.json"),
        selection="threshold",
        rescale="unit",
        quantization={"sites": formats | {"dense_input": "int4", "dense_hidden": "int8"}},
    )
    want = build_model(built, seed=1, dtype=torch.bfloat16)
    tokens = batches(1)[0].tokens_BS
    with torch.no_grad():
        assert torch.equal(other(tokens).logits_BSV, want(tokens).logits_BSV)
        assert not torch.equal(other(tokens).logits_BSV, model(tokens).logits_BSV)


def test_a_plan_of_another_model_is_refused_and_the_model_left_as_it_was():
    model = build_model(config(**SPARSE), seed=1)
    other = ModelConfig(num_layers=2)
    with pytest.raises(ConfigError, match="make the plan from the configuration of this model"):
        calibrate(model, batches(), SparsityPlan.uniform(other, 0.5))
    assert model.training and all(site.hook is None for site in model.layers[0].sites().values())


def test_an_expert_without_a_token_takes_the_threshold_of_all_experts_and_is_named(caplog):
    model = build_model(config(**SPARSE), seed=1)
    with torch.no_grad():
        for block in model.blocks():
            if block.moe is not None:
                block.moe.router.weight.zero_()  # ties: the first two experts take every token
    with caplog.at_level(logging.WARNING):
        plan = calibrate(model, batches())
    assert "layer 1, expert_hidden: experts [2] received no token; they get the threshold of all rows" in caplog.text
    low, high = sorted(plan.thresholds[2, "expert_input"][:2])
    assert low <= plan.thresholds[2, "expert_input"][2] <= high


NOT_FINITE = (
    "^calibration: layer 1, attention_output: magnitudes must be finite, got NaN or infinity; calibrate a checkpoint "
    "from before the run diverged$"
)


def test_a_model_with_nan_cannot_be_calibrated():
    model = build_model(config(**SPARSE), seed=1)
    with torch.no_grad():
        model.layers[1].attention.qkv.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=NOT_FINITE):
        calibrate(model, batches())


def test_a_router_of_sparse_tokens_cannot_be_calibrated():
    even = config(default=0.5)
    moe = even.moe.model_copy(update={"router_input": "sparse"})
    model = build_model(even.model_copy(update={"moe": moe}), seed=1)
    with pytest.raises(ConfigError, match=r"calibrate: model\.moe\.router_input \(sparse\) must be dense.*set it to"):
        calibrate(model, batches())


def test_number_formats_and_the_rescale_of_a_run_stay_where_its_thresholds_select():
    model = build_model(config(preset="a4.8", rescale="preserve"))
    other = with_thresholds(model, calibrate(model, batches()))
    found = [
        {(block.layer, name): (site.number_format, site.settings.rescale) for name, site in block.sites().items()}
        for built in (model, other)
        for block in built.blocks()
    ]
    assert found[:3] == found[3:]
    assert {number_format for sites in found for number_format, _ in sites.values()} >= {"int4", "int8"}
