"""The ways to multiply routed rows with stacked expert weights, and the one choice between them at build time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.moe.backends import grouped, loop, onednn

logger = logging.getLogger(__name__)

Matmul = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BackendSpec:
    """A named way to run the experts.

    ``matmul(rows_NX, weights_EXY, rows_per_expert_E) -> (N, Y)`` multiplies each expert's rows, which are contiguous
    and in expert order, with that expert's matrix. ``why_not(config, device)`` is None where it runs.
    """

    name: str
    matmul: Matmul
    why_not: Callable[[ModelConfig, torch.device], str | None]


BACKENDS: tuple[BackendSpec, ...] = (
    BackendSpec("onednn", onednn.matmul, onednn.why_not),
    BackendSpec("grouped", grouped.matmul, grouped.why_not),
    BackendSpec("loop", loop.matmul, loop.why_not),
)
"""Fastest first: ``auto`` takes the first that runs."""


def resolve_backend(
    config: ModelConfig, device: torch.device, *, specs: Sequence[BackendSpec] = BACKENDS
) -> BackendSpec:
    """The backend of ``config.moe.backend``. Only ``auto`` may choose; a named one runs or raises.

    Raises:
        BackendUnavailable: the named one, or all of them, cannot run this model here; with the reasons.
    """
    requested = config.moe.backend
    candidates = [spec for spec in specs if requested in ("auto", spec.name)]
    reasons = {}
    for spec in candidates:
        reason = spec.why_not(config, device)
        if reason is None:
            skipped = "".join(f"; not {name}: {why}" for name, why in reasons.items())
            logger.info("model.moe.backend %s: experts run with %s%s", requested, spec.name, skipped)
            return spec
        reasons[spec.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(f"model.moe.backend ({requested!r}) cannot run here: {why}; auto takes what can")
