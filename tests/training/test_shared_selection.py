"""Runs whose experts share features over their tokens: any split of a step, masked products, and a resumed run."""

import os
import signal

import pytest
import torch

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from qsparse_moe.training.evaluate import load_run
from qsparse_moe.training.loop import train
from tests.support.runs import tiny_config

STOP_STEP = 3
SITES = ("attention_input", "attention_output", "expert_input", "expert_hidden", "shared_input", "shared_hidden")


@pytest.fixture(scope="module")
def runs(text_folder):
    folder = text_folder
    finished = {}

    def config(name, products, selection, **training):
        model = {
            "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "num_shared_experts": 1},
            "sparsity": {
                "default": 0.5,
                "backend": "torch",
                "selection": selection,
                "gradient": "masked",
                "shared": {"measure_interval": 2, "products": products},
                "schedule": {"warmup_steps": 1},
            },
        }
        settings = tiny_config(folder, f"shared-{name}", model=model, engine="torch", **training)
        # A step that is reported has masked products, so few are.
        return settings.model_copy(update={"metrics": settings.metrics.model_copy(update={"interval": STOP_STEP})})

    def run(name, products="gathered", listeners=(), selection="shared", **training):
        key = name, training.get("resume", False)
        if key not in finished:
            result = train(config(name, products, selection, **training), listeners)
            checkpoint = Checkpoint(list_checkpoints(folder / "runs" / f"shared-{name}")[-1])
            finished[key] = result, {n: checkpoint.buffer(n) for n in checkpoint.buffer_shapes}
        return finished[key]

    return run


def assert_same(one, other, tolerance):
    assert one[0].validation == pytest.approx(other[0].validation, rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, energy_ED in one[1].items():
        torch.testing.assert_close(energy_ED, other[1][name], rtol=20 * tolerance, atol=1e-6)


def test_every_site_has_averages_of_its_own_in_the_checkpoint(runs):
    _, energies = runs("micro-2")
    assert {name.split(".")[-3] for name in energies} == {"input_site", "hidden_site", "output_site"}
    assert len(energies) == 2 * len(SITES)
    for energy_ED in energies.values():
        assert (energy_ED.sum(-1) > 0).all() and energy_ED.dtype == torch.float32


@pytest.mark.parametrize("other", ["micro-8", "masked"])
def test_the_split_of_a_step_and_masked_products_change_nothing_but_rounding(runs, other):
    settings = {"micro-8": {"micro_batch_size": 8}, "masked": {"products": "masked"}}[other]
    assert_same(runs("micro-2"), runs(other, **settings), 1e-5)


def test_a_resumed_run_measures_in_the_same_steps_and_has_the_same_averages(runs):
    def stop(report):
        if report.step == STOP_STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    runs("stopped", listeners=[stop])
    resumed = runs("stopped", resume=True)
    assert resumed[0].stopped_by is None
    assert_same(resumed, runs("micro-2"), 0)


def test_weights_of_another_selection_start_without_averages_and_topk_leaves_them_unread(runs):
    plain, _ = runs("plain", selection="topk", steps=1)
    started, energies = runs("started", init_from=str(plain.run_dir), steps=2)
    assert len(energies) == 2 * len(SITES) and all(energy_ED.any() for energy_ED in energies.values())
    _, model, _ = load_run(started.run_dir, overrides=["model.sparsity.selection=topk"])
    assert not [name for name in model.state_dict() if "mean_energy" in name]
    tokens = torch.arange(12)[None]
    _, shared, _ = load_run(started.run_dir)
    assert not torch.equal(model(tokens).logits_BSV, shared(tokens).logits_BSV)
