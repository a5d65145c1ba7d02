"""A peer of the MoE layer: MegaBlocks' dMoE with grouped products, with the same shape and weights.

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

# The value is the order of the norm by which MegaBlocks divides the A weights: the norm of order 1 is their sum.
_ROUTERS = {"softmax_topk": None, "softmax_topk_renormalized": 1}
# drelu is missing, because MegaBlocks applies its function to the gate only and drelu has a ReLU on up as well.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "relu2glu": lambda x: x.relu().square(),
    "reglu": F.relu,
    "relu2": lambda x: x.relu().square(),
}
# Features of our layer that dMoE lacks, with the value that switches each off.
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
    """Build ``megablocks.layers.dmoe.dMoE`` with ``mlp_impl="grouped"``, random weights, and without Q-Sparse.

    The layer maps ``(B, S, D)`` to ``(B, S, D)``, waits for the device once per call, routes in ``dtype``, and computes
    no balance loss.

    Raises:
        BackendUnavailable: MegaBlocks or grouped_gemm is not installed.
        ConfigError: dMoE does not support the router, the activation, or the shape.
    """
    reason = megablocks_package.missing()
    if reason is not None:
        raise BackendUnavailable(f"bench: the peer dMoE: {reason}")
    _check(config)
    package = megablocks_package.load()
    if not package.grouped_gemm_util.grouped_gemm_is_available():
        raise BackendUnavailable(
            "bench: the peer dMoE needs grouped_gemm, which cannot be imported; on a machine with a GPU, "
            f"build it with GROUPED_GEMM=1 {megablocks_package.INSTALL}"
        )
    arguments = package.Arguments(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe.expert_hidden_size,
        moe_num_experts=config.moe.num_experts,
        moe_top_k=config.moe.experts_per_token,
        moe_normalize_expert_weights=_ROUTERS[config.moe.router],
        activation_fn=_ACTIVATIONS[config.moe.activation],
        mlp_type="glu" if has_gate(config) else "mlp",
        # The default, block-sparse products, refuses Triton 3.2 and newer (MegaBlocks' issue 168).
        mlp_impl="grouped",
        # The experts of our layer have no biases.
        bias=False,
        return_bias=False,
        # With a weight above 0, every training step appends to a module-level list, which would keep its tensors alive.
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
    """Copy the weights of a MoE layer into ``dmoe``, whose matrices w1, v1, and w2 are ``(E * F, D)``."""
    layer: Any = dmoe
    mlp = layer.experts.mlp
    layer.router.layer.weight.copy_(router_ED)
    # MegaBlocks applies the activation to w1, so w1 is the gate where there is one.
    if w_gate_EDF is None:
        mlp.w1.copy_(rows_of(w_up_EDF))
    else:
        mlp.w1.copy_(rows_of(w_gate_EDF))
        mlp.v1.copy_(rows_of(w_up_EDF))
    mlp.w2.copy_(w_down_EFD.flatten(0, 1))


def rows_of(w_EDF: Tensor) -> Tensor:
    """Return an input matrix in the layout of MegaBlocks, ``(E * F, D)``."""
    return w_EDF.transpose(1, 2).flatten(0, 1)


def _check(config: ModelConfig) -> None:
    moe = config.moe
    choices = (("router", moe.router, _ROUTERS), ("activation", moe.activation, _ACTIVATIONS))
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(
                f"bench: the peer dMoE does not support model.moe.{name}={value}; choose from {', '.join(known)}"
            )
    for name, without in _WITHOUT.items():
        if getattr(moe, name) != without:
            raise ConfigError(
                f"bench: the peer dMoE does not support model.moe.{name} ({show(getattr(moe, name))}); "
                f"set it to {show(without)}"
            )
    if moe.num_experts * moe.expert_hidden_size < _LEAST_FEATURES:
        raise ConfigError(
            f"bench: the peer dMoE needs at least {_LEAST_FEATURES} features over all experts; "
            f"model.moe.num_experts ({moe.num_experts}) times model.moe.expert_hidden_size ({moe.expert_hidden_size}) "
            f"is {moe.num_experts * moe.expert_hidden_size}"
        )
