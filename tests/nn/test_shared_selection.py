"""Features that the tokens of an expert share: sets, running averages, and gathered products against masked ones."""

import re

import pytest
import torch

from qsparse_moe.config.rules import check_model
from qsparse_moe.config.schema import ModelConfig, SparsityConfig
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.model.transformer import build_model, measured_energies
from qsparse_moe.nn.gathered import take_features, take_weights
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.shared_sets import energies, feature_sets, shared_mask, updated_means

torch.set_num_threads(1)
TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))


def test_energies_are_sums_of_squares_over_the_rows_of_each_expert():
    rows = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -4.0]])
    energy_ED, rows_E = energies(rows, torch.tensor([2, 0, 2]), 3)
    assert energy_ED.tolist() == [[9.0, 0.0], [0.0, 0.0], [1.0, 20.0]]
    assert rows_E.tolist() == [1.0, 0.0, 2.0]
    together, count = energies(rows, None, 1)
    assert together.tolist() == [[10.0, 20.0]]
    assert count.tolist() == [3.0]


def test_sets_are_the_mask_as_indices_with_ties_to_the_lower_index():
    energy_ED = torch.tensor([[1.0, 5.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    sets = feature_sets(energy_ED, 3, 3)
    assert sets.index_EK.tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 2]]
    assert sets.used_EK is None
    counts = torch.tensor([1, 3, 2])
    unequal = feature_sets(energy_ED, counts, 3)
    found = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, unequal.index_EK, unequal.used_EK)
    assert torch.equal(found, shared_mask(energy_ED, counts))
    assert found.sum(1).tolist() == [1, 3, 2]


def test_running_averages_begin_with_a_measurement_and_skip_what_is_empty_or_not_finite():
    mean_ED = torch.tensor([[0.0, 0.0], [2.0, 4.0], [2.0, 4.0], [2.0, 4.0]])
    energy_ED = torch.tensor([[6.0, 2.0], [8.0, 0.0], [0.0, 0.0], [float("inf"), 1.0]], dtype=torch.float64)
    got = updated_means(mean_ED, energy_ED, torch.tensor([2.0, 2.0, 0.0, 1.0]), 0.75)
    assert got.tolist() == [[3.0, 1.0], [2.5, 3.0], [2.0, 4.0], [2.0, 4.0]]


def test_taken_features_and_weights_scatter_their_gradients_back():
    index_LK = torch.tensor([[0, 3], [1, 2], [2, 4]])
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_features(x, index_LK, [4, 0, 2]), x)
    torch.testing.assert_close(take_features(x, index_LK, [4, 0, 2])[4:], x[4:, [2, 4]])
    weights = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([[5, 0, 1], [2, 3, 4], [0, 1, 5]])
    for inputs, outputs in ((index_LK, None), (None, columns), (index_LK, columns)):
        assert torch.autograd.gradcheck(lambda w, i=inputs, o=outputs: take_weights(w, i, o), weights)
    both = take_weights(weights, index_LK, columns)
    torch.testing.assert_close(both[1], weights[1][[1, 2]][:, [2, 3, 4]])


def site_of(sparsities, **shared):
    settings = SparsityConfig.model_validate({"selection": "shared", "gradient": "masked", "shared": shared})
    site = SparseSite("expert_hidden", 4, settings, select_rows_torch, num_experts=len(sparsities))
    site.set_sparsity(sparsities)
    return site


def test_a_site_selects_by_the_averages_or_by_the_rows_of_the_step():
    rows, experts = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]), torch.tensor([0, 1])
    averages = site_of([0.5, 0.75])
    averages.shared.mean_energy_ED.copy_(torch.tensor([[9.0, 1.0, 8.0, 1.0], [0.0, 0.0, 0.0, 1.0]]))
    assert averages(rows, experts, with_stats=False)[0].tolist() == [[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    step = site_of([0.5, 0.75], sets="step")
    step.shared.mean_energy_ED.copy_(averages.shared.mean_energy_ED)
    assert step(rows, experts, with_stats=False)[0].tolist() == [[0.0, 0.0, 3.0, 4.0], [4.0, 0.0, 0.0, 0.0]]
    # A token's set may not depend on later tokens, so evaluation uses the averages.
    assert step.eval()(rows, experts, with_stats=False)[0].tolist() == [[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


def test_without_a_measurement_training_is_dense_and_evaluation_is_refused():
    site, rows = site_of([0.5]), torch.randn(3, 4)
    assert site(rows, torch.zeros(3, dtype=torch.int64), with_stats=False)[0] is rows
    message = (
        "model.sparsity.selection (shared) selects by running averages, and expert_hidden has none: its weights come "
        "from a run with another selection; train with it for at least one step by qsparse-moe train, or choose topk"
    )
    site.shared.measures = False
    for mode in (site.train(), site.eval()):
        with pytest.raises(ConfigError, match=re.escape(message)):
            mode(rows, torch.zeros(3, dtype=torch.int64), with_stats=False)


def test_averages_stay_in_fp32_when_the_model_is_cast():
    site = site_of([0.5])
    site.shared.mean_energy_ED.fill_(1 + 2**-20)
    site.bfloat16()
    assert site.shared.mean_energy_ED.tolist() == [[1 + 2**-20] * 4]


def config(backend="loop", **sparsity):
    shared = {"products": sparsity.pop("products", "gathered"), "sets": sparsity.pop("sets", "average")}
    return ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 256,
            "init_std": 0.3,
            "moe": {
                "num_experts": 3,
                "experts_per_token": 2,
                "expert_hidden_size": 32,
                "num_dense_layers": 1,
                "num_shared_experts": 1,
                "backend": backend,
            },
            "sparsity": {"default": 0.5, "selection": "shared", "backend": "torch", "shared": shared} | sparsity,
        }
    )


def measured_model(settings, dtype=torch.float32):
    """A model whose averages are those of one pass, and whose next pass measures nothing."""
    model = build_model(settings, seed=1, dtype=dtype)
    model.update_shared_sets(measured_energies(model(TOKENS, with_stats=False).stats))
    model.measure_energies(False)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    output = model(TOKENS, TOKENS, with_stats=False)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


PER_EXPERT = [
    {"site": "expert_hidden", "experts": 1, "sparsity": 0.75},
    {"site": "expert_input", "experts": 0, "sparsity": 0.25},
]


@pytest.mark.parametrize("backend", ["loop", "blas", "onednn", "native", "grouped"])
@pytest.mark.parametrize("gradient", ["masked", "ste"])
@pytest.mark.parametrize("overrides", [[], PER_EXPERT], ids=["one K", "K per expert"])
@pytest.mark.parametrize("sets", ["average", "step"])
def test_gathered_products_agree_with_masked_ones_in_the_loss_and_every_gradient(backend, gradient, overrides, sets):
    settings = {"gradient": gradient, "overrides": overrides, "sets": sets}
    gathered = measured_model(config(backend, **settings))
    masked, exact = (
        measured_model(config(**settings, products="masked"), dtype) for dtype in (torch.float32, torch.float64)
    )
    found, plain, wanted = (loss_and_gradients(model) for model in (gathered, masked, exact))
    for name, want in wanted.items():
        rounding = (plain[name].double() - want).abs().max()
        error = (found[name].double() - want).abs().max()
        allowed = 4 * rounding + 8 * torch.finfo(torch.float32).eps * want.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e} > allowed {allowed:.2e}"
    # The features that are not selected: only the straight-through estimator gives the columns of gate a gradient.
    columns = found["layers.1.moe.experts.w_gate"][2].abs().sum(0) > 0
    assert columns.all() == (gradient == "ste")


def refused(message, model):
    # As a user meets it: one message with every broken rule.
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_model(model)


def test_what_gathered_products_cannot_do_is_refused_before_anything_is_built():
    start = "when model.sparsity.selection is shared and model.sparsity.shared.products is gathered"
    refused(f"model.sparsity.rescale (unit) must be none {start}, because the features", config(rescale="unit"))
    refused(f"model.sparsity.gradient (blend) must be ste or masked {start}; choose one", config(gradient="blend"))
    refused(
        f"the number format of expert_input (int8) must be none {start}, because its scale needs the whole row; set it "
        "to none, or model.sparsity.shared.products to masked",
        config(quantization={"activations": "int8"}),
    )
    check_model(config(rescale="unit", quantization={"activations": "int8"}, products="masked"))
    sparse = config().moe.model_copy(update={"router_input": "sparse"})
    refused(
        "model.sparsity.selection (shared) has one set of features per expert; set router_input to dense",
        config().model_copy(update={"moe": sparse}),
    )


def test_backends_name_the_numbers_of_features_that_they_cannot_multiply():
    shared = "the number of features that model.sparsity shares at expert_hidden"
    odd = {"overrides": [{"site": "expert_hidden", "sparsity": 0.6}]}
    for backend, rule in (
        ("native", f"{shared} (13) must be even"),
        ("grouped", f"{shared} (13) must be a multiple of 8"),
    ):
        with pytest.raises(BackendUnavailable, match=re.escape(rule)):
            build_model(config(backend, **odd))
        ramp = {"schedule": {"shape": "linear", "ramp_steps": 4}}
        with pytest.raises(
            BackendUnavailable, match=r"schedule\.ramp_steps \(4\) changes the number of shared features"
        ):
            build_model(config(backend, **ramp))
    build_model(config("grouped", **odd, products="masked"))
