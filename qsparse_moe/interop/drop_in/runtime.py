"""The implementations behind the sites and the sparse experts, chosen for the device of the tensors that arrive.

A model of transformers may be moved to another device after the sites were put in, so the choice is made at the first
call on a device, and logged.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.moe.backends.registry import BackendSpec, fastest_first
from qsparse_moe.moe.permutation import GATHERS, ONE_PASS_GATHERS, Permutation
from qsparse_moe.nn.runtime import SiteRuntime, resolve_site_runtime

logger = logging.getLogger(__name__)


@cache
def site_runtime(device_type: str) -> SiteRuntime:
    """Return the fastest implementation of the selection on a device."""
    return resolve_site_runtime(SparsityConfig(), torch.device(device_type))


def select_rows(x: Tensor, num_selected: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """Select with the implementation for the device of ``x``; see ``kernels.topk_select.op.TopKSelect``."""
    return site_runtime(x.device.type).select_rows(x, num_selected, with_mask)


def permutation(device_type: str) -> Permutation:
    """Return the permutation of routed tokens on a device."""
    return ONE_PASS_GATHERS.get(site_runtime(device_type).name, GATHERS)


@cache
def expert_backend(device_type: str, width: int, hidden: int) -> BackendSpec:
    """Return the fastest backend for experts of ``hidden`` features in a model of ``width`` on a device."""
    # The backends ask for nothing but these two sizes.
    config = ModelConfig(hidden_size=width, num_heads=1, moe=MoEConfig(expert_hidden_size=hidden))
    for spec in fastest_first():
        if spec.permutation is GATHERS and spec.why_not(config, torch.device(device_type)) is None:
            spec.load()
            logger.info("sparse experts of %d x %d on %s: using %s", width, hidden, device_type, spec.name)
            return spec
    raise AssertionError("the backend loop runs everywhere")
