"""MoE feed-forward layers of other libraries, and a dense chain with the same products, with given weights.

T tokens, D width, E experts, A experts per token, F expert width, N = T * A routed tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparse_moe.bench.dmoe import build_dmoe, copy_weights
from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.errors import BackendUnavailable


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer and of its input."""

    tokens: int
    hidden_size: int
    expert_hidden_size: int
    num_experts: int
    experts_per_token: int

    @property
    def rows(self) -> int:
        """Number of routed tokens, N."""
        return self.tokens * self.experts_per_token

    @property
    def flops(self) -> int:
        """FLOPs of the experts' products: three matrices, each with one product forward and two backward."""
        return 3 * 3 * 2 * self.rows * self.hidden_size * self.expert_hidden_size


class LayerWeights(NamedTuple):
    """The weights that all routing contenders share."""

    router_ED: Tensor
    w_gate_EDF: Tensor
    w_up_EDF: Tensor
    w_down_EFD: Tensor


class Contender(NamedTuple):
    """A layer to time: ``forward(x)`` returns the output, followed by the losses that the layer itself computes."""

    x: Tensor
    forward: Callable[[Tensor], Sequence[Tensor]]
    parameters: tuple[Tensor, ...]


Build = Callable[[LayerShape, LayerWeights, Tensor], Contender]
"""A function that builds a contender for ``(T, D)`` tokens, or raises BackendUnavailable with the reason."""


def layer_config(shape: LayerShape, backend: str = "auto") -> ModelConfig:
    """Return the settings of our layer in a shape, with SwiGLU."""
    moe = {
        "num_experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
        "expert_hidden_size": shape.expert_hidden_size,
        "activation": "swiglu",
        "backend": backend,
    }
    # The layer has no attention, but its config must be valid, and one head divides every even width.
    return ModelConfig(hidden_size=shape.hidden_size, num_heads=1, moe=MoEConfig.model_validate(moe))


def build_dense_chain(shape: LayerShape, weights: LayerWeights, x_TD: Tensor) -> Contender:
    """Build gate, up, SwiGLU, and down of the first expert over all N rows in plain PyTorch: three large products."""
    w_gate_DF, w_up_DF, w_down_FD = (leaf(stack[0]) for stack in weights[1:])

    def forward(x_ND: Tensor) -> tuple[Tensor]:
        return (F.silu(x_ND @ w_gate_DF).mul(x_ND @ w_up_DF) @ w_down_FD,)

    return Contender(x_TD.repeat(shape.experts_per_token, 1), forward, (w_gate_DF, w_up_DF, w_down_FD))


class _Expert(nn.Module):
    """An expert for DeepSpeed's layer, which copies this module E times."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, shape.expert_hidden_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.expert_hidden_size, bias=False)
        self.down = nn.Linear(shape.expert_hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def build_deepspeed(shape: LayerShape, weights: LayerWeights, x_TD: Tensor) -> Contender:
    """Build ``deepspeed.moe.layer.MoE`` without token dropping, which pads every expert to the busiest one."""
    _require("deepspeed")
    # DeepSpeed prints to standard output, which is reserved for the JSON result.
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.moe.layer import MoE

        layer = MoE(
            shape.hidden_size,
            _Expert(shape),
            num_experts=shape.num_experts,
            k=shape.experts_per_token,
            # Nothing is dropped or drawn at random, as in the other layers.
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(x_TD)
    inner: Any = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(weights.router_ED)
        for number, expert in enumerate(inner.experts.deepspeed_experts):
            for linear, stack in zip((expert.gate, expert.up, expert.down), weights[1:], strict=True):
                # nn.Linear stores its matrix as outputs by inputs.
                linear.weight.copy_(stack[number].T)
    # The third value, the number of tokens per expert, has no gradient.
    return Contender(x_TD[None], lambda x_1TD: layer(x_1TD)[:2], tuple(layer.parameters()))


def build_transformers(shape: LayerShape, weights: LayerWeights, x_TD: Tensor) -> Contender:
    """Build ``MixtralSparseMoeBlock`` with ``grouped_mm`` experts, which leaves the balance loss to the model."""
    _require("transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    settings = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_hidden_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        experts_implementation="grouped_mm",
    )
    layer = MixtralSparseMoeBlock(settings).to(x_TD)
    with torch.no_grad():
        layer.gate.weight.copy_(weights.router_ED)
        # transformers stores both matrices in one tensor, transposed.
        gate_up_EDX = torch.cat((weights.w_gate_EDF, weights.w_up_EDF), -1)
        layer.experts.gate_up_proj.copy_(gate_up_EDX.transpose(1, 2))
        layer.experts.down_proj.copy_(weights.w_down_EFD.transpose(1, 2))
    return Contender(x_TD[None], lambda x_1TD: (layer(x_1TD),), tuple(layer.parameters()))


def build_megablocks(shape: LayerShape, weights: LayerWeights, x_TD: Tensor) -> Contender:
    """Build MegaBlocks' dMoE with grouped products, which computes no balance loss."""
    if x_TD.device.type != "cuda":
        raise BackendUnavailable(f"its grouped products need a CUDA device, the device is {x_TD.device.type}")
    layer = build_dmoe(layer_config(shape), x_TD.dtype, x_TD.device)
    copy_weights(layer, *weights)
    return Contender(x_TD[None], lambda x_1TD: (layer(x_1TD),), tuple(layer.parameters()))


def leaf(x: Tensor) -> Tensor:
    """Return a copy that is a leaf of the graph."""
    return x.detach().clone().requires_grad_()


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise BackendUnavailable(f"{package} is not installed")


PEERS: dict[str, Build] = {
    "dense": build_dense_chain,
    "DeepSpeed": build_deepspeed,
    "transformers": build_transformers,
    "MegaBlocks": build_megablocks,
}
"""The peers by their name in results: a dense feed-forward over all N rows, then MoE layers."""
