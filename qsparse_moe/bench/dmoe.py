"""A peer of the MoE layer: MegaBlocks' dMoE with grouped products, of the same shape and with the same weights.

E experts, D width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import has_gate
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.moe.backends import megablocks_package

_ROUTERS = {"softmax_topk": None, "softmax_topk_renormalized": 1}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "relu2glu": lambda x: x.relu().square(),
    "reglu": F.relu,
    "relu2": lambda x: x.relu().square(),
}
# What ours may have beside and it has not, by the value at which ours does without too.
_WITHOUT: dict[str, object] = {
    "num_shared_experts": 0,
    "router_input": "dense",
    "router_scaling_factor": 1.0,
    "router_noise": 0.0,
    "router_jitter": 0.0,
    "num_expert_groups": 1,
    "force_uniform_routing": False,
    "bias_update_rate": 0.0,
    "capacity_factor": None,
}
# Its constructor takes the logarithm of the number of blocks of 128 features.
_LEAST_FEATURES = 128


def build_dmoe(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """``megablocks.layers.dmoe.dMoE`` with ``mlp_impl="grouped"``; random weights, without Q-Sparse.

    It maps ``(B, S, D)`` to ``(B, S, D)``, waits for the device once a call, routes in ``dtype`` and forms no balance
    loss.

    Raises:
        BackendUnavailable: MegaBlocks or grouped_gemm is not installed.
        ConfigError: it has no such router, activation or shape.
    """
    reason = megablocks_package.missing()
    if reason is not None:
        raise BackendUnavailable(f"bench: the peer dMoE: {reason}")
    _check(config)
    package = megablocks_package.load()
    if not package.grouped_gemm_util.grouped_gemm_is_available():
        raise BackendUnavailable(
            "bench: the peer dMoE needs grouped_gemm, which cannot be imported; on a machine with a GPU "
            f"GROUPED_GEMM=1 {megablocks_package.INSTALL} builds it"
        )
    arguments = package.Arguments(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe.expert_hidden_size,
        moe_num_experts=config.moe.num_experts,
        moe_top_k=config.moe.experts_per_token,
        moe_normalize_expert_weights=_ROUTERS[config.moe.router],
        activation_fn=_ACTIVATIONS[config.moe.activation],
        mlp_type="glu" if has_gate(config) else "mlp",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        # Otherwise every training step adds to a list that nobody here empties.
        moe_loss_weight=0.0,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        device=device,
    )
    return package.dMoE(arguments).to(dtype)


@torch.no_grad()
def copy_weights(
    dmoe: nn.Module, router_ED: Tensor, w_gate_EDF: Tensor | None, w_up_EDF: Tensor, w_down_EFD: Tensor
) -> None:
    """Give ``dmoe`` the weights of a MoE layer; its own are (E * F, D), and named w1, v1 and w2."""
    theirs: Any = dmoe
    mlp = theirs.experts.mlp
    theirs.router.layer.weight.copy_(router_ED)
    if w_gate_EDF is None:
        mlp.w1.copy_(rows_of(w_up_EDF))
    else:
        mlp.w1.copy_(rows_of(w_gate_EDF))
        mlp.v1.copy_(rows_of(w_up_EDF))
    mlp.w2.copy_(w_down_EFD.flatten(0, 1))


def rows_of(w_EDF: Tensor) -> Tensor:
    """``(E * F, D)``: a matrix that reads the width, as MegaBlocks stores it."""
    return w_EDF.transpose(1, 2).flatten(0, 1)


def _check(config: ModelConfig) -> None:
    moe = config.moe
    choices = (("router", moe.router, _ROUTERS), ("activation", moe.activation, _ACTIVATIONS))
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(
                f"bench: the peer dMoE has no model.moe.{name}={value}; those that it has are {', '.join(known)}"
            )
    for name, without in _WITHOUT.items():
        if getattr(moe, name) != without:
            raise ConfigError(
                f"bench: the peer dMoE is built without model.moe.{name} ({show(getattr(moe, name))}); "
                f"set it to {show(without)}"
            )
    if moe.num_experts * moe.expert_hidden_size < _LEAST_FEATURES:
        raise ConfigError(
            f"bench: the peer dMoE needs at least {_LEAST_FEATURES} features in all experts together; "
            f"model.moe.num_experts ({moe.num_experts}) times model.moe.expert_hidden_size ({moe.expert_hidden_size}) "
            f"is {moe.num_experts * moe.expert_hidden_size}"
        )
