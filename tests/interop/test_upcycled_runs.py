"""A run with experts starts from a dense model: its first loss is that of the dense model, and the rest is refused."""

from __future__ import annotations

import json
import re

import pytest

from qsparse_moe import train
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.interop.upcycling import upcycled_for_run
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.evaluate import load_run
from tests.interop.hugging_face_models import build, save
from tests.support.runs import tiny_config, write_text

pytest.importorskip("transformers")

F = 36
EXPERTS = {
    "copies": {"num_experts": 5, "experts_per_token": 2, "expert_hidden_size": F, "router": "topk_softmax"},
    "slices": {
        "num_experts": 8,
        "experts_per_token": 4,
        "expert_hidden_size": F // 2,
        "router": "sigmoid_topk_renormalized",
        "router_scaling_factor": 2.0,
        "num_expert_groups": 2,
        "groups_per_token": 2,
        "bias_update_rate": 0.01,
    },
    "every second layer": {
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_hidden_size": F,
        "moe_layer_interval": 2,
        "dense_hidden_size": F,
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    write_text(root / "text")
    return save(build("llama"), root / "llama")


def make(folder, name, source, moe, **settings):
    """A run from ``source``, which has the model and the tokenizer of ``folder`` but these experts."""
    model = HuggingFaceWeights(folder).model.model_dump() | {"moe": moe}
    training = {"steps": 2, "engine": "torch", "learning_rate": 1e-3} | settings
    config = tiny_config(folder.parent, name, init_from=str(source), model=model, **training)
    data = config.data.model_copy(update={"tokenizer": str(folder)})
    metrics = config.metrics.model_copy(update={"tensorboard": False})
    return config.model_copy(update={"data": data, "metrics": metrics})


def losses(config):
    run_dir = train(config, [Recorder(config)]).run_dir
    return [row["train/lm_loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def dense_moe(folder):
    return HuggingFaceWeights(folder).model.moe.model_dump()


@pytest.fixture(scope="module")
def dense_run(llama):
    config = make(llama, "dense", llama, dense_moe(llama))
    return losses(config), run_folder(config)


@pytest.mark.parametrize("name", EXPERTS)
def test_the_first_loss_of_a_run_with_experts_is_that_of_the_dense_one(llama, dense_run, name):
    moe = {"activation": "swiglu", "backend": "loop"} | EXPERTS[name]
    config = make(llama, name.replace(" ", "-"), llama, moe)
    first, second = losses(config)
    assert first == pytest.approx(dense_run[0][0], rel=1e-6)
    assert second != pytest.approx(dense_run[0][1], rel=1e-6), "from then on they are different models"
    entry = json.loads((run_folder(config) / "manifest.json").read_text())["initial_weights"]
    assert entry["kind"] == "hugging_face"
    assert entry["changed_settings"]["model.moe.num_dense_layers"] == [3, 0]
    found = load_run(run_folder(config))[1]
    assert (found.router_bias_LE is not None) == (name == "slices")


def test_a_run_and_an_export_without_experts_can_be_the_source(llama, dense_run, tmp_path):
    _, run_dir = dense_run
    export_run(run_dir, tmp_path / "export")
    moe = {"activation": "swiglu", "backend": "loop"} | EXPERTS["copies"]
    again = losses(make(llama, "again", run_dir, dense_moe(llama), steps=1))
    for number, source in enumerate((run_dir, tmp_path / "export")):
        found = losses(make(llama, f"from-{number}", source, moe, steps=1))
        assert found == pytest.approx(again, rel=1e-6)


def test_weights_that_have_experts_and_runs_that_have_none_are_left_as_they_are(llama, tmp_path):
    source = open_weights(str(llama))
    assert upcycled_for_run(source, make(llama, "a", llama, dense_moe(llama))) is source
    mixtral = open_weights(str(save(build("mixtral"), tmp_path / "mixtral")))
    assert upcycled_for_run(mixtral, make(llama, "b", llama, EXPERTS["copies"])) is mixtral


def test_the_routers_follow_the_seed_of_the_run(llama):
    def router(seed):
        config = make(llama, "seeded", llama, EXPERTS["copies"], seed=seed)
        return upcycled_for_run(open_weights(str(llama)), config).tensor("layers.1.moe.router.weight")

    assert router(1).equal(router(1)) and not router(1).equal(router(2))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "copies",
            {"expert_hidden_size": 24},
            "model.moe.expert_hidden_size (24) must be the 36 hidden features of the dense layers, or a divisor of",
        ),
        ("slices", {"num_experts": 9, "num_expert_groups": 1, "groups_per_token": 1},
         "model.moe.num_experts (9) must be a multiple of 2 where experts start from the dense layers of"),
        ("slices", {"experts_per_token": 3}, "model.moe.experts_per_token (3) must be a multiple of 2 where"),
        ("slices", {"num_expert_groups": 8, "groups_per_token": 4, "group_score": "max"},
         "model.moe.num_expert_groups (8) must be such that a group has a multiple of 2 experts where"),
        ("copies", {"router": "softmax_topk"},
         'model.moe.router ("softmax_topk") must be one of softmax_topk_renormalized, topk_softmax, sigmoid_topk_ren'),
        ("copies", {"router_scaling_factor": 2.5}, "model.moe.router_scaling_factor (2.5) must be 1.0 where experts"),
        ("slices", {"router_scaling_factor": 1.0}, "model.moe.router_scaling_factor (1.0) must be 2.0 where experts"),
        ("copies", {"num_shared_experts": 1}, "model.moe.num_shared_experts (1) must be 0 where experts start from"),
        ("slices", {"router_noise": 0.1}, "model.moe.router_noise (0.1) must be 0 where experts start from the dense"),
    ],
)  # fmt: skip
def test_experts_with_other_first_logits_are_refused(llama, name, changes, message):
    config = make(llama, "refused", llama, {"activation": "swiglu"} | EXPERTS[name] | changes)
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as caught:
        train(config)
    assert str(llama) in str(caught.value)
    assert not run_folder(config).exists()
