"""The figures of a run in one dictionary: each is that of its own function, in the run's precision and lengths."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting.activations import activation_memory
from qsparse_moe.accounting.densities import measured_densities
from qsparse_moe.accounting.description import BATCHES, describe_run
from qsparse_moe.accounting.flops import forward_flops, training_flops
from qsparse_moe.accounting.memory import state_memory
from qsparse_moe.accounting.parameters import count_by_part, count_parameters, count_with_embedding
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import RunConfig
from tests.accounting.test_parameters import MOE, model_config

LENGTH, STEPS, SEQUENCES = 48, 7, 6


def run(precision, **model):
    sparsity = {
        "default": 0.25,
        "overrides": [
            {"layers": [1], "site": "expert_hidden", "experts": [1], "sparsity": 0.75},
            {"layers": [2], "site": "expert_hidden", "experts": [2], "sparsity": 0.0},
        ],
    }
    settings = {"num_layers": 3, "sparsity": sparsity, "moe": MOE | {"num_dense_layers": 1}} | model
    training = {"steps": STEPS, "global_batch_size": SEQUENCES, "micro_batch_size": 2, "precision": precision}
    return RunConfig.model_validate(
        {"model": model_config(**settings).model_dump(), "training": training, "data": {"sequence_length": LENGTH}}
    )


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_bytes_are_those_of_the_precision_of_the_run(precision, width):
    config = run(precision, num_kv_heads=2)
    found = describe_run(config, ranks=4)
    assert [point["batch"] for point in found["bytes_read"]] == [2**power for power in range(11)] == list(BATCHES)
    stored = count_parameters(config.model).stored
    for point in found["bytes_read"]:
        traffic = total_traffic(weight_traffic(config.model, point["batch"], bytes_per_weight=float(width)))
        assert (point["stored"], point["routed"]) == (traffic.stored, traffic.routed)
        assert point["stored"] == stored * width
        assert list(point.values())[-1] == list(vars(traffic).values())[-1]
    first = list(found["bytes_read"][0].values())
    assert first[-1] < first[-2] < first[-3], "one token: selected, routed, stored"
    memory = found["memory"]
    assert memory["ranks"] == 4
    # Keys and values, 3 layers, 2 heads of 8 channels.
    assert memory["kv_cache_bytes_per_token"] == 2 * 3 * 2 * 8 * width
    activations = activation_memory(config)
    assert memory["activations"]["total"] == activations.total > 0
    assert list(memory["training_state_by_zero_stage"]) == ["0", "1", "2", "3"]
    for stage in range(4):
        state = state_memory(config, 4, stage)
        assert memory["training_state_by_zero_stage"][str(stage)] == vars(state) | {"total": state.total}


def test_tokens_and_context_are_those_of_the_sequences():
    config = run("fp32")
    found = describe_run(config)
    assert (found["tokens_per_step"], found["tokens"]) == (SEQUENCES * LENGTH, STEPS * SEQUENCES * LENGTH)
    for name, count in (("forward_flops_per_token", forward_flops), ("training_flops_per_token", training_flops)):
        assert found[name]["context"] == LENGTH
        counted = count(config.model, LENGTH)
        assert (found[name]["routed"], found[name]["selection"]) == (counted.routed, counted.selection)
    assert found["memory"]["ranks"] == 1 and found["measured"] is None


def test_a_site_has_the_smallest_and_the_largest_k_of_all_its_layers_and_experts():
    found = describe_run(run("fp32"))["sites"]
    # Width 24: K is 18 at S 0.25, 6 at 0.75 and 24 at 0, and neither the first nor the last expert is an extreme.
    assert found["expert_hidden"] == {"layers": 2, "width": 24, "least_kept": 6, "most_kept": 24}
    assert found["expert_input"] == {"layers": 2, "width": 32, "least_kept": 24, "most_kept": 24}
    assert found["attention_input"] == {"layers": 3, "width": 32, "least_kept": 24, "most_kept": 24}
    assert found["dense_input"]["layers"] == 1 and "shared_input" not in found


def test_a_logged_step_repeats_what_depends_on_zeros_with_its_own():
    config = run("fp32")
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden", "dense_input", "dense_hidden")
    row = {"step": 5} | {
        f"sparsity/{site}/zeros/layer_{layer}": 0.1 * (1 + layer) + 0.01 * place
        for place, site in enumerate(sites)
        for layer in range(3)
    }
    planned, found = describe_run(config), describe_run(config, row)
    assert found["measured"]["step"] == 5
    densities = measured_densities(config.model, row)
    counted = count_parameters(config.model, densities=densities)
    assert list(found["measured"]["parameters"].values()) == list(vars(counted).values())
    for part, of_part in count_by_part(config.model, densities=densities).items():
        assert list(found["measured"]["parameters_by_part"][part].values()) == list(vars(of_part).values())
    assert list(found["parameters_with_embedding"].values()) == list(vars(count_with_embedding(config.model)).values())
    assert {name: value for name, value in found.items() if name != "measured"} == {
        name: value for name, value in planned.items() if name != "measured"
    }
    assert found["measured"]["bytes_read"] != found["bytes_read"]
    # Layer by layer: the mean over the layers would give another number where the layers differ in size.
    by_hand = 1 - row["sparsity/attention_input/zeros/layer_2"]
    assert densities[2, "attention_input"] == (pytest.approx(by_hand),)
    assert densities[1, "expert_hidden"] == (pytest.approx(1 - row["sparsity/expert_hidden/zeros/layer_1"]),) * 4
