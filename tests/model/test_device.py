"""The functions that a model calls after it was moved: all of them are those of the new runtime."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qsparse_moe.kernels.fused_glu.op import FUSED_GLUS
from qsparse_moe.model import device as device_module
from qsparse_moe.model.device import use_device, use_runtime
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.selectors import RankingSelector, ThresholdSelector
from qsparse_moe.nn.sparse_site import SparseSite
from tests.model.small_model import make


def built(selection):
    sparsity = {"default": 0.0, "selection": selection, "backend": "torch"}
    return make(sparsity=sparsity, moe={"num_dense_layers": 1, "num_shared_experts": 1, "backend": "loop"})


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_every_module_calls_the_functions_of_the_runtime_that_it_is_given(selection):
    model = built(selection)
    names = ("select_rows", "site_sums", "format_rows")
    others = {name: lambda *args, name=name: name for name in names}
    sites = dataclasses.replace(model.runtime.sites, fused_glu=FUSED_GLUS[0], **others)
    runtime = dataclasses.replace(model.runtime, sites=sites, permutation=object(), matmul=object())
    use_runtime(model, runtime)
    assert model.runtime is runtime
    found = {kind: [] for kind in (SparseSite, RankingSelector, ThresholdSelector, FeedForward, Experts, MoELayer)}
    for module in model.modules():
        for kind in found:
            if isinstance(module, kind):
                found[kind].append(module)
    counts = {kind.__name__: len(modules) for kind, modules in found.items()}
    # Three layers: one dense, two with experts and shared experts; two sites per attention and feed-forward.
    num_sites = 3 * 2 + 2 + 2 * 4
    assert counts == {
        "SparseSite": num_sites, "RankingSelector": num_sites, "FeedForward": 3, "Experts": 2, "MoELayer": 2,
        "ThresholdSelector": num_sites if selection == "threshold" else 0,
    }  # fmt: skip
    for site in found[SparseSite]:
        assert (site.site_sums, site.format_rows) == (others["site_sums"], others["format_rows"])
    for selector in found[RankingSelector]:
        assert (selector.select_rows, selector.format_rows) == (others["select_rows"], others["format_rows"])
    assert all(selector.format_rows is others["format_rows"] for selector in found[ThresholdSelector])
    assert all(part.activation._fused is FUSED_GLUS[0] for part in (*found[FeedForward], *found[Experts]))
    assert all(experts.matmul is runtime.matmul for experts in found[Experts])
    assert all(experts.matmul_pair is runtime.matmul_pair for experts in found[Experts])
    assert all(layer.permutation is runtime.permutation for layer in found[MoELayer])


def test_another_device_means_the_same_settings_and_the_same_group_of_ranks(monkeypatch):
    model, calls = built("topk"), []
    monkeypatch.setattr(device_module, "resolve_runtime", lambda *args, **named: calls.append((args, named)) or "made")
    monkeypatch.setattr(device_module, "use_runtime", lambda *args: calls.append(args))
    use_device(model, torch.device("cuda", 3))
    assert calls == [
        ((model.config, torch.device("cuda", 3)), {"expert_group": model.runtime.expert_group}),
        (model, "made"),
    ]
