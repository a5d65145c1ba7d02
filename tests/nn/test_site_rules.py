"""What a site does at S = 0, under a gradient between two estimators, and what it is called inside a model."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import fake_quantize
from tests.model.small_model import make, tokens

D = 24


def site(**settings):
    return SparseSite("expert_hidden", D, SparsityConfig.model_validate(settings), select_rows_torch)


@pytest.mark.parametrize("rescale", ["none", "unit", "preserve"])
@pytest.mark.parametrize("number_format", ["none", "int8"])
def test_a_row_at_s_0_is_rounded_and_not_rescaled(rescale, number_format):
    made = site(rescale=rescale, quantization={"activations": number_format})
    made.set_sparsity([0.0])
    x = 3 * torch.randn(5, D)
    want = x if number_format == "none" else fake_quantize(x, number_format)
    assert torch.equal(made(x, with_stats=True)[0], want)


def test_only_the_two_estimators_themselves_are_fused():
    made = site(gradient="blend", blend={"start": 0.5, "end": 1.0, "ramp_steps": 4})
    made.set_sparsity([0.5])
    fused = {}
    for share in (0.0, 0.25, 0.999, 1.0):
        made.ste_share = share
        fused[share] = made.can_fuse
    assert fused == {0.0: True, 0.25: False, 0.999: False, 1.0: True}
    assert site(gradient="masked").ste_share == 0.0 and site(gradient="ste").ste_share == 1.0
    assert site(gradient="blend", blend={"start": 0.5, "end": 1.0, "ramp_steps": 4}).ste_share == 0.5


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["attention_input", "attention_output", "expert_input", "dense_hidden"])
def test_a_nan_is_found_in_the_layer_and_at_the_site_where_it_arose(layer, name):
    model = make(sparsity={"debug": True, "backend": "torch"}, moe={"num_dense_layers": 1, "backend": "loop"})
    block = list(model.blocks())[layer]
    if name not in block.sites():
        name = {"expert_input": "dense_input", "dense_hidden": "expert_hidden"}[name]
    source = {
        "attention_input": block.attention_norm.weight,
        "attention_output": block.attention.qkv.weight,
        "expert_input": block.feed_forward_norm.weight,
        "dense_input": block.feed_forward_norm.weight,
        "dense_hidden": None if block.dense is None else block.dense.w_up,
        "expert_hidden": None if block.moe is None else block.moe.experts.w_up,
    }[name]
    with torch.no_grad():
        source.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=rf"^layer {layer}, {name}: NaN in "):
        model(tokens())
