"""The shipped recipes against the sizes that their originals are published with, and against transformers' models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from qsparse_moe.accounting.devices import find_device
from qsparse_moe.accounting.layout_plan import Machine, make_plan
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import check_world_size
from qsparse_moe.config.shapes import moe_layers

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"

# Billions of parameters, stored and active, as published: of the papers' abstracts and the models' pages.
PUBLISHED = {
    "mixtral-8x7b": ("46.7", "12.9"),
    "olmoe-1b-7b": ("6.9", "1.3"),
    "deepseek-v3-style": ("671", "37"),
    "qwen3-30b-a3b": ("30.5", "3.3"),
    "qwen1.5-moe-a2.7b": ("14.3", "2.7"),
}


# Of the Q-Sparse paper: width, layers, heads, width of the GLU, learning rate.
PAPER = {
    "300m": (1024, 24, 16, 2730, 6e-4),
    "700m": (1536, 24, 24, 4096, 2.5e-4),
    "1.3b": (2048, 24, 32, 5460, 2e-4),
    "7b": (4096, 32, 32, 11008, 1.5e-4),
}


@pytest.mark.parametrize("size", PAPER)
def test_a_mixture_of_the_paper_has_the_active_parameters_of_its_dense_model(size):
    dense, mixture = (load_config(RECIPES / f"q-sparse{kind}-{size}.yaml") for kind in ("", "-moe"))
    width, layers, heads, hidden, rate = PAPER[size]
    for config in (dense, mixture):
        assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (width, layers, heads)
        assert config.training.learning_rate == rate
        tokens = config.training.steps * config.training.global_batch_size * config.data.sequence_length
        assert tokens == pytest.approx(50e9, rel=0.01)
    assert dense.model.moe.dense_hidden_size == hidden and moe_layers(dense.model) == ()
    assert moe_layers(mixture.model) == tuple(range(layers))
    # The header says 1 %.
    counted = [count_parameters(config.model) for config in (dense, mixture)]
    assert counted[1].active / counted[0].active == pytest.approx(1, abs=0.01)
    assert counted[1].needed / counted[0].needed == pytest.approx(1, abs=0.03)
    assert counted[1].stored > 4 * counted[0].stored


NODES = {"one node": 1, "two nodes": 2, "eight nodes": 8, "64 nodes": 64}
CPU = re.compile(r"a CPU with (\d+) GB of memory")


def machine_of(line):
    """Return the machine that a header names: of GPUs with 80 GB the one whose nodes have less host memory."""
    words = line.partition(": ")[2].rstrip(".")
    if cpu := CPU.fullmatch(words):
        return Machine(replace(find_device("cpu"), memory=float(cpu[1]) * 1e9), 1)
    (nodes,) = (nodes for name, nodes in NODES.items() if words == f"{name} of 8 GPUs with 80 GB each")
    return Machine(find_device("a100-80gb"), 8 * nodes, nodes)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_fits_into_the_machine_of_its_header_and_the_command_names_the_file(path):
    lines = [line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    (named,) = (line for line in lines if line.startswith("Machine"))
    machine, config = machine_of(named), load_config(path)
    check_world_size(config, machine.ranks)
    plan = make_plan(config, machine)
    assert plan.fits, plan.verdict
    program = "deepspeed" if machine.ranks > 1 else "qsparse-moe train"
    assert any(line.startswith(program) and line.endswith(f"configs/recipes/{path.name}") for line in lines)


@pytest.mark.parametrize(("name", "ranks"), [("base", 8), ("small", 1)])
def test_the_sizes_fit_into_the_gpus_that_their_headers_name(name, ranks):
    assert make_plan(load_config(RECIPES.parent / f"{name}.yaml"), Machine(find_device("a100-80gb"), ranks)).fits


def percent_off(count: int, published: str) -> float:
    """Return the distance of ``count`` from the nearest number that rounds to ``published``."""
    value, unit = Decimal(published), Decimal(1).scaleb(Decimal(published).as_tuple().exponent)
    least, most = (float(value + sign * unit / 2) * 1e9 for sign in (-1, 1))
    nearest = min(max(count, least), most)
    return 100 * abs(count / nearest - 1)


def test_the_error_in_percent_is_counted_from_the_edge_of_the_rounding_interval():
    assert percent_off(46_650_000_001, "46.7") == percent_off(46_749_999_999, "46.7") == 0.0
    assert percent_off(36_135_000_000, "37") == pytest.approx(1.0)
    assert percent_off(3_383_500_000, "3.3") == pytest.approx(1.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_described_sizes_are_the_published_ones_to_one_percent(name, capsys):
    assert run(["describe", str(RECIPES / f"{name}.yaml"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["parameters_with_embedding"]
    stored, active = PUBLISHED[name]
    assert percent_off(counted["stored"], stored) <= 1.0
    assert percent_off(counted["active"], active) <= 1.0
    assert counted["kept"] < counted["active"]


def test_describing_671_billion_parameters_takes_less_than_a_second_and_no_torch():
    program = f"""
import sys, time
from qsparse_moe.accounting.description import describe_run
from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import check_world_size
from qsparse_moe.config.shapes import moe_layers
started = time.process_time()
counted = describe_run(load_config({str(RECIPES / "deepseek-v3-style.yaml")!r}))["parameters"]
assert counted["stored"] > 670e9
print(time.process_time() - started, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    seconds, has_torch = result.stdout.split()
    assert has_torch == "False"
    assert float(seconds) < 1.0


# The originals' published configurations, limited to what determines their sizes.
TRANSFORMERS = {
    "mixtral-8x7b": (
        "Mixtral",
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        },
    ),
    "olmoe-1b-7b": (
        "Olmoe",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    ),
    "qwen1.5-moe-a2.7b": (
        "Qwen2Moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 1408, "num_hidden_layers": 24,
            "shared_expert_intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": 60, "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    ),
    "deepseek-v3-style": ("DeepseekV3", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_parameter_of_the_transformers_model_is_counted(name):
    transformers = pytest.importorskip("transformers")
    architecture, settings = TRANSFORMERS[name]
    config = getattr(transformers, f"{architecture}Config")(**settings, tie_word_embeddings=False)
    with torch.device("meta"):
        peer = getattr(transformers, f"{architecture}ForCausalLM")(config)
    counted = count_parameters(load_config(RECIPES / f"{name}.yaml").model).stored
    assert counted == sum(parameter.numel() for parameter in peer.parameters())
