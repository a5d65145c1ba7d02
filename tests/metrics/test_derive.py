from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import qsparse_moe
from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.metrics.derive import derive_metrics, evaluation_metrics
from qsparse_moe.metrics.names import METRICS, is_layer_name, metric_of
from qsparse_moe.metrics.ratios import layer_ratios, load_ratios, scalar_ratios
from qsparse_moe.metrics.window import Window
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.stats import SITE_FIELDS, add_stats
from tests.metrics.reports import make_report, random_stats

MOE = MoEConfig(
    num_experts=4, experts_per_token=2, expert_hidden_size=16, num_shared_experts=1, num_dense_layers=1,
    capacity_factor=1.0,
)  # fmt: skip
SPARSE = SparsityConfig(default=0.5)
MODEL = ModelConfig(vocab_size=32, hidden_size=16, num_layers=3, num_heads=2, moe=MOE, sparsity=SPARSE)


def sums(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_load_metrics_of_one_layer_agree_with_values_by_hand():
    ratios = load_ratios(sums(6, 2, 0, 0)[None])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {"load_imbalance": 3.0, "load_entropy": entropy, "busiest_share": 0.75, "dead_experts": 2.0}
    for name, value in expected.items():
        assert ratios[f"router/{name}"].tolist() == [pytest.approx(value, abs=1e-15)], name


def test_overlap_counts_only_non_zeros_that_have_a_next_token_by_hand():
    site = "sparsity/expert_input"
    stats = {f"{site}/{name}_LE": torch.ones(2, 2, dtype=torch.float64) for name in SITE_FIELDS}
    stats[f"{site}/used_LED"] = torch.ones(2, 2, 8, dtype=torch.float64)
    stats |= {
        f"{site}/nonzero_LE": torch.stack((sums(10, 6), sums(9, 7))),
        f"{site}/pairs_nonzero_LE": torch.stack((sums(6, 2), sums(3, 5))),
        f"{site}/pairs_common_LE": torch.stack((sums(3, 1), sums(0, 1))),
    }
    assert layer_ratios(stats)[f"{site}/overlap"].tolist() == [4 / 8, 1 / 8]


def test_ratios_of_an_even_load():
    ratios = load_ratios(torch.full((2, 8), 5.0, dtype=torch.float64))
    assert ratios["router/load_imbalance"].tolist() == [1.0, 1.0]
    assert ratios["router/load_entropy"].tolist() == pytest.approx([math.log(8)] * 2)
    assert ratios["router/dead_experts"].tolist() == [0.0, 0.0]


def test_ratios_with_all_tokens_in_one_expert():
    ratios = load_ratios(sums(0, 0, 9)[None])
    assert [ratios[f"router/{name}"].item() for name in ("load_imbalance", "load_entropy", "dead_experts")] == [3, 0, 2]


def test_scalars_are_recorded_unchanged_under_their_groups():
    validation = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": 3.6}
    losses = {"loss": 3.09, "lm_loss": 3.0, "load_balance_loss": 1.2, "router_z_loss": 0.7}
    assert derive_metrics(make_report(losses=losses, validation=validation), MODEL) == {
        "train/loss": 3.09,
        "train/lm_loss": 3.0,
        "train/load_balance_loss": 1.2,
        "train/router_z_loss": 0.7,
        "train/grad_norm": 0.9,
        "train/learning_rate": 1e-3,
        "train/sparsity": 0.5,
        "validation/loss": 2.5,
        "validation/perplexity": 12.2,
        "validation/bits_per_byte": 3.6,
        "throughput/tokens_per_second": 2048.0,
        "throughput/step_seconds": 0.25,
        "throughput/data_seconds": 0.01,
        "throughput/forward_seconds": 0.08,
        "throughput/backward_seconds": 0.12,
        "throughput/update_seconds": 0.03,
        "throughput/communication_seconds": 0.02,
        "memory/resident": 1e9,
        "memory/peak_resident": 2e9,
    }


def test_gradient_norms_by_layer_are_recorded_beside_the_total_norm():
    metrics = derive_metrics(make_report(layer_grad_norms=(0.5, 0.25, 0.125)), MODEL)
    assert {name: value for name, value in metrics.items() if "grad_norm" in name} == {
        "train/grad_norm": 0.9,
        "train/grad_norm/layer_0": 0.5,
        "train/grad_norm/layer_1": 0.25,
        "train/grad_norm/layer_2": 0.125,
    }


def test_without_an_evaluation_there_is_no_validation_metric():
    assert not [name for name in derive_metrics(make_report(), MODEL) if name.startswith("validation/")]


def test_router_ratios_by_hand_under_the_numbers_of_their_layers():
    stats = random_stats(MODEL) | {
        "router/tokens_L": sums(4, 8),
        "router/choice_entropy_L": sums(2, 2),
        "router/first_weight_L": sums(3, 7),
        "router/routed_LE": torch.tensor([[3, 1, 2, 0], [2, 2, 2, 2]], dtype=torch.float64),
    }
    metrics = derive_metrics(make_report(stats=stats), MODEL)
    # Layer 0 is dense: the two sums belong to the layers 1 and 2. The mean is one of ratios, not a ratio of means.
    assert metrics["router/choice_entropy/layer_1"] == 0.5
    assert metrics["router/choice_entropy/layer_2"] == 0.25
    assert metrics["router/choice_entropy"] == 0.375
    assert metrics["router/first_weight"] == (3 / 4 + 7 / 8) / 2
    assert "router/choice_entropy/layer_0" not in metrics
    used = [metrics[f"router/experts_per_token{layer}"] for layer in ("/layer_1", "/layer_2", "")]
    assert used == [6 / 4, 8 / 8, 1.25]


def test_the_dropped_fraction_is_relative_to_the_routed_tokens():
    rows_LE = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]], dtype=torch.float64)
    dropped_LE = torch.tensor([[4, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    metrics = derive_metrics(make_report(stats={"router/routed_LE": rows_LE, "router/dropped_LE": dropped_LE}), MODEL)
    assert metrics["router/dropped_share/layer_1"] == 0.5
    assert metrics["router/dropped_share/layer_2"] == 0.0
    assert metrics["router/dropped_share"] == 0.25
    dropless = derive_metrics(make_report(stats={"router/routed_LE": rows_LE}), MODEL)
    assert "router/dropped_share" not in dropless and "router/load_imbalance" in dropless


def test_with_experts_in_every_second_layer_metrics_have_the_numbers_of_these_layers():
    model = MODEL.model_copy(
        update={"num_layers": 6, "moe": MoEConfig(num_dense_layers=2, moe_layer_interval=2, num_experts=4)}
    )
    metrics = derive_metrics(make_report(stats=random_stats(model)), model)

    def layers_of(name):
        return [int(other.rpartition("_")[2]) for other in metrics if other.startswith(f"{name}/layer_")]

    assert layers_of("router/load_imbalance") == layers_of("sparsity/expert_hidden/zeros") == [3, 5]
    assert layers_of("sparsity/dense_hidden/zeros") == [0, 1, 2, 4]
    assert layers_of("sparsity/attention_input/zeros") == [0, 1, 2, 3, 4, 5]


def test_sparsity_ratios_by_hand():
    fields = dict.fromkeys(SITE_FIELDS, 0) | {"rows": 2, "selected": 40, "nonzero": 25, "energy": 8, "kept_energy": 6}
    stats = {f"sparsity/dense_hidden/{name}_LE": sums(value)[None] for name, value in fields.items()}
    stats["sparsity/dense_hidden/used_LED"] = torch.ones(1, 1, 50, dtype=torch.bool)
    metrics = derive_metrics(make_report(stats=stats), MODEL)
    assert metrics["sparsity/dense_hidden/zeros_chosen"] == pytest.approx(0.6)
    assert metrics["sparsity/dense_hidden/zeros"] == pytest.approx(0.75)
    assert metrics["sparsity/dense_hidden/kept_energy"] == 0.75
    assert metrics["sparsity/dense_hidden/kept_energy/layer_0"] == 0.75


def test_the_threshold_is_the_mean_over_the_rows_and_every_ratio_is_of_its_own_layer():
    site = "sparsity/expert_hidden"
    fields = {"rows": (4, 1), "selected": (6, 1), "nonzero": (5, 1), "smallest": (2, 3), "energy": (8, 5)}
    stats = {f"{site}/{name}_LE": sums(*fields.get(name, (1, 1)))[:, None] for name in SITE_FIELDS}
    stats[f"{site}/used_LED"] = torch.ones(2, 1, 2, dtype=torch.bool)
    found = {name.rpartition("/")[2]: ratio_L.tolist() for name, ratio_L in layer_ratios(stats).items()}
    assert found["threshold"] == [2 / 4, 3 / 1]
    assert found["zeros_chosen"] == [1 - 6 / 8, 1 - 1 / 2] and found["zeros"] == [1 - 5 / 8, 1 - 1 / 2]
    assert found["kept_energy"] == [1 / 8, 1 / 5]


def test_the_loss_scale_and_the_skipped_steps_of_fp16_are_recorded_and_absent_otherwise():
    metrics = derive_metrics(make_report(loss_scale=1024.0, skipped_steps=3), MODEL)
    assert (metrics["train/loss_scale"], metrics["train/skipped_steps"]) == (1024.0, 3.0)
    plain = derive_metrics(make_report(), MODEL)
    assert "train/loss_scale" not in plain and "train/skipped_steps" not in plain


@pytest.mark.parametrize("validation", [None, {"loss": 2.5}])
def test_agreement_of_choices_has_the_numbers_of_the_layers_with_experts(validation):
    report = make_report(validation=validation, choice_agreement_L=torch.tensor([0.25, 1.0]))
    expected = {"router/choice_agreement": 0.625, "router/choice_agreement/layer_1": 0.25}
    expected |= {"router/choice_agreement/layer_2": 1.0} | ({} if validation is None else {"validation/loss": 2.5})
    assert evaluation_metrics(report, MODEL) == expected
    assert expected.items() <= derive_metrics(report, MODEL).items()


def test_ratio_with_denominator_zero_is_absent_and_not_in_the_mean():
    stats = random_stats(MODEL)
    stats["sparsity/expert_hidden/energy_LE"] = torch.stack((sums(0, 0), sums(4, 6)))
    stats["sparsity/expert_hidden/kept_energy_LE"] = torch.stack((sums(0, 0), sums(3, 6)))
    stats["sparsity/dense_hidden/energy_LE"] = sums(0)[None]
    stats["sparsity/dense_hidden/kept_energy_LE"] = sums(0)[None]
    metrics = derive_metrics(make_report(stats=stats), MODEL)
    assert metrics["sparsity/expert_hidden/kept_energy"] == 0.9
    assert "sparsity/expert_hidden/kept_energy/layer_1" not in metrics
    assert not [name for name in metrics if name.startswith("sparsity/dense_hidden/kept_energy")]


def test_ratios_of_added_sums_do_not_depend_on_the_split():
    halves = [random_stats(MODEL, seed=seed) for seed in (1, 2)]
    whole = add_stats(*halves)
    metrics = derive_metrics(make_report(stats=whole), MODEL)
    features = 16 * sum(half["sparsity/attention_input/rows_LE"][2] for half in halves)
    kept = sum(half["sparsity/attention_input/selected_LE"][2] for half in halves)
    assert metrics["sparsity/attention_input/zeros_chosen/layer_2"] == pytest.approx(float(1 - kept / features))


def test_metric_that_is_not_in_the_list_is_refused():
    with pytest.raises(AssertionError, match="names.METRICS does not define: \\['train/surprise'\\]"):
        derive_metrics(make_report(losses={"surprise": 1.0}), MODEL)


def test_stats_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="shorter|longer"):
        derive_metrics(make_report(stats=random_stats(MODEL)), MODEL.model_copy(update={"num_layers": 4}))


@pytest.fixture(scope="module")
def output():
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, 32, (2, 8), generator=generator)
    return build_model(MODEL, seed=1)(tokens_BS, tokens_BS)


def test_scalar_ratios_are_the_recorded_metrics(output):
    ratios = qsparse_moe.scalar_ratios(output.stats)
    metrics = derive_metrics(make_report(stats=output.stats), MODEL)
    from_stats = {name: value for name, value in metrics.items() if name.startswith(("router/", "sparsity/"))}
    assert ratios == {name: value for name, value in from_stats.items() if not is_layer_name(name)}
    assert {"router/load_imbalance", "router/choice_entropy", "router/dropped_share"} <= ratios.keys()
    assert ratios["sparsity/expert_input/zeros"] >= ratios["sparsity/expert_input/zeros_chosen"] == 0.5


def test_scalar_ratios_by_hand_leave_out_a_layer_without_a_value_and_a_ratio_without_a_layer():
    site = "sparsity/expert_hidden"
    stats = {f"{site}/{name}_LE": torch.zeros(2, 1, dtype=torch.float64) for name in SITE_FIELDS}
    stats |= {f"{site}/rows_LE": sums(4, 0)[:, None], f"{site}/nonzero_LE": sums(6, 0)[:, None]}
    stats[f"{site}/used_LED"] = torch.ones(2, 1, 2, dtype=torch.bool)
    ratios = scalar_ratios(stats | {"router/routed_LE": torch.stack((sums(6, 2), sums(4, 4)))})
    assert ratios[f"{site}/zeros"] == 1 - 6 / 8
    assert f"{site}/kept_energy" not in ratios
    assert ratios["router/load_imbalance"] == (1.5 + 1.0) / 2
    assert scalar_ratios({}) == {}


def test_model_returns_the_sums_of_every_router_and_sparsity_metric(output):
    bias_LE = torch.tensor([[0.0, 0.25, -0.5, 0.0], [0.0, 0.0, 0.125, 0.0]])
    window = Window(length=1)
    for _ in range(2):  # a drift needs a step before
        report = make_report(stats=output.stats, router_bias_LE=bias_LE, choice_agreement_L=torch.tensor([0.5, 1.0]))
        metrics = derive_metrics(report, MODEL, window)
    assert [metrics[f"router/bias_range{layer}"] for layer in ("", "/layer_1", "/layer_2")] == [0.4375, 0.75, 0.125]
    listed = {
        metric.name
        for metric in METRICS
        if metric.kind == "scalar" and metric.name.startswith(("router/", "sparsity/"))
    }
    assert {metric_of(name).name for name in metrics if not is_layer_name(name)} >= listed
    sites = {name.split("/")[1] for name in metrics if name.startswith("sparsity/")}
    assert len(sites) == 8
    assert metrics["sparsity/expert_input/zeros_chosen"] == 0.5
    assert metrics["sparsity/expert_hidden/zeros"] >= 0.5
    assert 0 < metrics["sparsity/attention_output/kept_energy"] < 1
    assert 0 < metrics["router/choice_entropy"] <= math.log(4)
    assert 0.5 <= metrics["router/first_weight"] <= 1


def test_a_model_without_balancing_biases_has_no_bias_range(output):
    names = derive_metrics(make_report(stats=output.stats), MODEL)
    assert not [name for name in names if name.startswith("router/bias_range")]


def test_losses_of_the_model_are_in_the_list(output):
    losses = {name: value.item() for name, value in output.losses.items()} | {"loss": output.loss.item()}
    metrics = derive_metrics(replace(make_report(), losses=losses), MODEL)
    assert metrics["train/loss"] > metrics["train/lm_loss"] > 0
