"""MegaBlocks' own layer beside ours: the same weights, the same outputs and gradients; and what it cannot do.

On a CPU its grouped products, which need CUDA, are stood in for; on a GPU they are its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.bench.dmoe import build_dmoe, copy_weights, rows_of
from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.kernels import tiles
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.backends import megablocks_package
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.runtime import resolve_runtime

B, S, D, F, E, A = 2, 3, 16, 32, 8, 2


def config(**changed):
    moe = {"num_experts": E, "experts_per_token": A, "expert_hidden_size": F, "backend": "megablocks"} | changed
    sparsity = SparsityConfig(backend="torch")
    return ModelConfig(hidden_size=D, num_heads=2, moe=MoEConfig(**moe), sparsity=sparsity)


def gmm_in_torch(rows, weights, batch_sizes, trans_b=False):
    """Compute what ``grouped_gemm.ops.gmm`` computes: each group of rows times its own matrix."""
    parts = zip(rows.split(batch_sizes.tolist()), weights, strict=True)
    return torch.cat([part @ (weight.T if trans_b else weight) for part, weight in parts])


@pytest.fixture
def grouped_gemm_stood_in(monkeypatch):
    reason = tiles.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    found = megablocks_package.load().grouped_gemm_util
    monkeypatch.setattr(found, "_grouped_gemm_is_available", True)
    monkeypatch.setattr(found, "ops", SimpleNamespace(gmm=gmm_in_torch))


def layers(settings, dtype, device):
    """Ours and theirs with the same weights."""
    ours = MoELayer(settings, resolve_runtime(settings, device)).to(device)
    initialize(ours, settings, seed=1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(20)
    ours = ours.to(dtype)
    theirs = build_dmoe(settings, dtype, torch.device(device))
    copy_weights(theirs, ours.router.weight, ours.experts.w_gate, ours.experts.w_up, ours.experts.w_down)
    return ours, theirs


def outputs_and_grads(settings, dtype, device):
    """Ours and theirs as parts by name, all in MegaBlocks' own layout."""
    torch.manual_seed(0)
    ours, theirs = layers(settings, dtype, device)
    x, upstream = torch.randn(2, B, S, D, device=device).to(dtype)
    matrices = [name for name in ("w_gate", "w_up", "w_down") if getattr(ours.experts, name) is not None]
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf).y_BSD if layer is ours else layer(leaf)
        y.backward(upstream)
        results.append({"y": y.detach(), "x": leaf.grad})
    mine, other = results
    mine |= {"router": ours.router.weight.grad}
    mine |= {name: getattr(ours.experts, name).grad for name in matrices}
    mine = {name: rows_of(g) if name in ("w_gate", "w_up") else g for name, g in mine.items()}
    mine["w_down"] = mine["w_down"].flatten(0, 1)
    mlp = theirs.experts.mlp
    stored = (mlp.w1, mlp.v1, mlp.w2) if "w_gate" in matrices else (mlp.w1, mlp.w2)
    other |= {"router": theirs.router.layer.weight.grad}
    other |= {name: weight.grad for name, weight in zip(matrices, stored, strict=True)}
    return mine, other


@pytest.mark.usefixtures("grouped_gemm_stood_in")
@pytest.mark.parametrize("activation", ["swiglu", "relu2glu", "reglu", "relu2"])
@pytest.mark.parametrize("router", ["softmax_topk", "softmax_topk_renormalized"])
def test_same_weights_give_the_same_outputs_and_every_gradient(activation, router):
    mine, theirs = outputs_and_grads(config(activation=activation, router=router), torch.float32, "cpu")
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].abs().max() > 0, name
        torch.testing.assert_close(mine[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
def test_same_weights_give_the_same_outputs_and_gradients_on_a_gpu():
    if not megablocks_package.load().grouped_gemm_util.grouped_gemm_is_available():
        pytest.skip("grouped_gemm is not installed; GROUPED_GEMM=1 bash launch/megablocks.sh builds it")
    mine, theirs = outputs_and_grads(config(activation="swiglu"), torch.bfloat16, "cuda")
    for name in mine:
        # Its router is in bf16 and ours in fp32: weights and logits differ by some roundings.
        error = (mine[name] - theirs[name]).double().norm() / theirs[name].double().norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.usefixtures("grouped_gemm_stood_in")
def test_the_layer_leaves_no_balance_loss_in_the_library():
    theirs = build_dmoe(config(), torch.float32, torch.device("cpu"))
    theirs(torch.randn(B, S, D))
    assert theirs.training
    assert megablocks_package.load().layers.moe.get_load_balancing_loss() == []


@pytest.mark.usefixtures("grouped_gemm_stood_in")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"router": "topk_softmax"},
            "does not support model.moe.router=topk_softmax; choose from softmax_topk, softmax_topk_renormalized",
        ),
        ({"activation": "drelu"}, "does not support model.moe.activation=drelu; choose from swiglu, relu2glu"),
        (
            {"router_scaling_factor": 2.5},
            r"does not support model.moe.router_scaling_factor \(2.5\); set it to 1.0",
        ),
        ({"capacity_factor": 1.25}, r"does not support model.moe.capacity_factor \(1.25\); set it to null"),
        ({"expert_hidden_size": 8}, r"at least 128 features.*num_experts \(8\) times .*hidden_size \(8\) is 64"),
    ],
)
def test_unsupported_settings_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        build_dmoe(config(**changed), torch.float32, torch.device("cpu"))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(megablocks_package, "missing", lambda: "megablocks is not installed; do this")
    with pytest.raises(BackendUnavailable, match="bench: the peer dMoE: megablocks is not installed; do this"):
        build_dmoe(config(), torch.bfloat16, torch.device("cuda"))


def test_a_missing_grouped_gemm_is_named_with_the_command_that_builds_it(monkeypatch):
    monkeypatch.setattr(megablocks_package.load().grouped_gemm_util, "_grouped_gemm_is_available", False)
    with pytest.raises(BackendUnavailable, match="needs grouped_gemm.*GROUPED_GEMM=1 bash launch/megablocks.sh"):
        build_dmoe(config(), torch.bfloat16, torch.device("cuda"))
