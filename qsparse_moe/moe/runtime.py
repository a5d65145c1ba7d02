"""What runs the experts and the selections of a model: chosen once, when it is built, and said out loud."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native
from qsparse_moe.kernels.fused_glu.op import FUSED_GLUS, FusedGLU
from qsparse_moe.kernels.site_sums.op import NATIVE, TORCH, SiteSums
from qsparse_moe.kernels.topk_select.op import SELECTIONS, Selection, SelectRows
from qsparse_moe.moe.backends.registry import BackendSpec, Matmul, fastest_first
from qsparse_moe.moe.dispatch import GATHERS, ONE_PASS_GATHERS, Permutation
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup

logger = logging.getLogger(__name__)
Named = TypeVar("Named", BackendSpec, Selection)


@dataclass(frozen=True)
class Runtime:
    """The functions that a model's modules call, and the names of the implementations behind them by setting."""

    permutation: Permutation
    """The backend's own, or gathers, whose way back is in one pass where the selection's implementation has it."""
    matmul: Matmul
    select_rows: SelectRows
    fused_glu: FusedGLU | None
    """Activation and selection in one pass, by the selection's implementation; None where that has no such pass."""
    site_sums: SiteSums
    """The sums of a site, by the selection's implementation or, where that has none, stock PyTorch."""
    names: dict[str, str]
    expert_group: ExpertGroup = ALONE
    """The ranks over which the experts are spread."""


def resolve_runtime(config: ModelConfig, device: torch.device | str, *, expert_group: ExpertGroup = ALONE) -> Runtime:
    """Choose the experts' backend and the selection's for ``device``.

    Raises:
        BackendUnavailable: one that was asked for by name cannot run here, with the reason.
    """
    device = torch.device(device)
    backends = fastest_first()
    experts = _choose("model.moe.backend", config.moe.backend, backends, lambda spec: spec.why_not(config, device))
    selection = _choose(
        "model.sparsity.backend", config.sparsity.backend, SELECTIONS, lambda spec: spec.why_not(device)
    )
    experts.load()
    is_native = selection.name == "native"
    if is_native:
        native.load()
    return Runtime(
        _permutation(experts, selection),
        experts.matmul,
        selection.select_rows,
        next((fused for fused in FUSED_GLUS if fused.name == selection.name), None),
        NATIVE if is_native else TORCH,
        {"model.moe.backend": experts.name, "model.sparsity.backend": selection.name},
        expert_group,
    )


def _permutation(experts: BackendSpec, selection: Selection) -> Permutation:
    own = experts.permutation
    return ONE_PASS_GATHERS.get(selection.name, GATHERS) if own is GATHERS else own


def _choose(setting: str, requested: str, specs: Sequence[Named], why_not: Callable[[Named], str | None]) -> Named:
    """The one asked for, or the first that runs here where ``auto`` was. A named one never falls back."""
    reasons: dict[str, str] = {}
    for spec in specs:
        if requested not in ("auto", spec.name):
            continue
        reason = why_not(spec)
        if reason is None:
            skipped = "".join(f"; not {name}: {why}" for name, why in reasons.items())
            logger.info("%s=%s runs as %s%s", setting, requested, spec.name, skipped)
            return spec
        reasons[spec.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(f"{setting} ({requested!r}) cannot run here: {why}; auto takes what can")
