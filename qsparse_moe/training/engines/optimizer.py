"""AdamW with the usual parameter groups, and access to its state for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's two moments in torch's optimizer state."""


def build_adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over ``parameters`` with weight decay on matrices but not on vectors (the norms).

    Its learning rate is 0 until a step sets one. DeepSpeed's bf16 optimizer at ZeRO-0 takes a step with zero gradients
    when it is built, and with any other rate that step would decay the weights.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def start_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Create the state that AdamW would create in its first step, so that it can be read and set before that step."""
    optimizer.state[parameter] = {
        # Fused AdamW requires its counter on the parameter's device.
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
    }


def get_step(optimizer: torch.optim.Optimizer) -> int:
    """Return Adam's step counter, which is the same for every parameter."""
    counters = {int(state["step"]) for state in optimizer.state.values()}
    assert len(counters) == 1, f"parameters have taken different numbers of steps: {sorted(counters)}"
    return counters.pop()


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set Adam's step counter for every parameter."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
