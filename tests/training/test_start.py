"""The start of an engine draws nothing that a checkpoint or initial weights would overwrite."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.model import init
from qsparse_moe.model.transformer import Transformer, build_empty
from qsparse_moe.training.engines.build import build_engine
from qsparse_moe.training.evaluate import load_run
from qsparse_moe.training.loop import train
from tests.training.engines.test_torch_engine import ALONE


@pytest.fixture
def drawn(monkeypatch):
    """The names of the parameters that are drawn."""
    names, fill = [], init.fill_normal

    def count(seed, name, start, out, **settings):
        names.append(name)
        fill(seed, name, start, out, **settings)

    monkeypatch.setattr(init, "fill_normal", count)
    return names


def test_neither_a_resumed_nor_a_continued_run_nor_a_loaded_model_draws_a_weight(make_config, drawn):
    run_dir = train(make_config(steps=2)).run_dir
    assert len(drawn) == len(set(drawn)) > 10, "a new run draws every matrix once"
    drawn.clear()
    train(make_config(steps=3, resume=True))
    train(make_config(name="continued", steps=1, init_from=str(run_dir)))
    load_run(run_dir)
    assert drawn == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_reads_the_ranges_that_it_keeps_once(make_config, precision):
    """Of a source that counts, without a model of the whole in fp32 beside it."""
    config = make_config(precision=precision)
    read = []

    class Source:
        def fill(self, name, start, out):
            read.append((name, start, len(out), out.dtype))
            out.fill_(len(read))

    engine = build_engine(config, build_empty(config.model), ALONE, Source())
    shapes = engine.shapes()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert read == [(name, 0, shape.numel(), dtype) for name, shape in shapes.items()]
    for number, name in enumerate(shapes, start=1):
        assert (engine.held(name, "weight") == number).all(), name


def test_a_model_on_the_meta_device_has_the_buffers_and_sites_of_one_that_is_built(make_config):
    """With K that differ between experts, and thresholds, which are no parameters and have no source."""
    config = make_config().model
    overrides = [{"site": "expert_hidden", "experts": [1, 2], "sparsity": 0.25}]
    settings = config.sparsity.model_dump() | {"overrides": overrides, "schedule": {}}
    model = config.model_dump() | {"sparsity": settings}
    model["moe"]["bias_update_rate"] = 0.01
    config = type(config).model_validate(model)
    empty, direct = build_empty(config), Transformer(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    want = dict(direct.named_buffers())
    assert {name: value.tolist() for name, value in empty.named_buffers()} == {
        name: value.tolist() for name, value in want.items()
    }
    assert any("num_selected" in name for name in want) and any("expert_bias" in name for name in want)


def test_an_empty_model_draws_no_values(make_config, monkeypatch):
    """To draw on the meta device PyTorch imports its compiler, which takes longer than everything else together."""
    drawn = []
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda *given, **named: drawn.append(given))
    assert all(parameter.is_meta for parameter in build_empty(make_config().model).parameters())
    assert drawn == []


def test_tied_parameters_and_tags_keep_their_identity_when_they_receive_memory(make_config):
    model = make_config().model
    tied = build_empty(type(model).model_validate(model.model_dump() | {"tie_embeddings": True}))
    weight = tied.embedding.weight
    weight.tag = "kept"
    init.materialize(tied, init.RandomWeights(tied.config, 0), device="cpu", dtype=torch.bfloat16)
    assert tied.head.weight is tied.embedding.weight is weight
    assert (weight.tag, weight.dtype, weight.device.type, weight.requires_grad) == ("kept", torch.bfloat16, "cpu", True)
