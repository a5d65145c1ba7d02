"""Choice of the implementations behind a model, including its experts: made once when the model is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.moe.backends.registry import BackendSpec, Matmul, MatmulPair, fastest_first
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.moe.permutation import GATHERS, ONE_PASS_GATHERS, Permutation
from qsparse_moe.nn.runtime import SiteRuntime, choose, resolve_site_runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """The functions that the modules of a model call, and the names of their implementations by setting."""

    sites: SiteRuntime
    permutation: Permutation
    """The permutation of the backend, or gathers, which combine in one pass if the implementation of the sites can."""
    matmul: Matmul
    """The grouped matrix product of the experts' backend."""
    matmul_pair: MatmulPair
    """Two grouped products of the same rows."""
    names: dict[str, str]
    expert_group: ExpertGroup = ALONE
    """The ranks that share the experts of every layer."""


def resolve_runtime(config: ModelConfig, device: torch.device | str, *, expert_group: ExpertGroup = ALONE) -> Runtime:
    """Choose the experts' backend and the implementation of the sparse sites for ``device``.

    Raises:
        BackendUnavailable: an implementation was requested by name and cannot run here; with the reason.
    """
    device = torch.device(device)
    experts = _loaded_backend(config, device, fastest_first())
    sites = resolve_site_runtime(config.sparsity, device)
    return Runtime(
        sites,
        _permutation(experts, sites.name),
        experts.matmul,
        experts.matmul_pair,
        {"model.moe.backend": experts.name, "model.sparsity.backend": sites.name},
        expert_group,
    )


def _loaded_backend(config: ModelConfig, device: torch.device, backends: Sequence[BackendSpec]) -> BackendSpec:
    """Return the backend of ``model.moe.backend`` after loading it, or for ``auto`` the next one if that fails."""
    requested = config.moe.backend
    spec = choose("model.moe.backend", requested, backends, lambda spec: spec.why_not(config, device))
    # Loaded now, so that a package that cannot be imported is reported before anything is trained.
    try:
        spec.load()
    except BackendUnavailable as error:
        if requested != "auto":
            raise
        logger.warning("model.moe.backend=auto: %s cannot be loaded (%s); trying the next one", spec.name, error)
        return _loaded_backend(config, device, [other for other in backends if other is not spec])
    return spec


def _permutation(experts: BackendSpec, site_implementation: str) -> Permutation:
    # A permutation of the backend's own has the layout that its kernels read; gathers fit every other backend.
    own = experts.permutation
    return ONE_PASS_GATHERS.get(site_implementation, GATHERS) if own is GATHERS else own
