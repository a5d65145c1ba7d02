"""The implementations behind the sites and the sparse experts, chosen for the device of their input.

A model of transformers may be moved to another device after the sites were put in, so the choice is made at the first
call on a device, and logged.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.kernels.onednn import needs_fp32
from qsparse_moe.moe.backends import grouped
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
def expert_backend(device_type: str, dtype: torch.dtype, width: int, hidden: int) -> BackendSpec:
    """Return the backend for experts of ``hidden`` features and weights of ``dtype`` in a model of ``width``."""
    # The backends ask for nothing but these two sizes.
    config = ModelConfig(hidden_size=width, num_heads=1, moe=MoEConfig(expert_hidden_size=hidden))
    # grouped is the product of the model without sites. A step of 512 tokens with 16 experts took 1.01 times that of
    # the model with it and 1.11 with onednn, which copies the gradients of the weights (one thread of a Zen 4, lab log
    # of 28 November 2026). It has no fp64, and without instructions for bf16 it is slow.
    first = not needs_fp32(dtype, torch.device(device_type)) and dtype != torch.float64
    for spec in sorted(fastest_first(), key=lambda spec: not (first and spec.matmul is grouped.matmul)):
        # native would be compiled for the few products that grouped cannot compute.
        if spec.name == "native":
            continue
        if spec.permutation is GATHERS and spec.why_not(config, torch.device(device_type)) is None:
            spec.load()
            logger.info("sparse experts of %d x %d on %s: using %s", width, hidden, device_type, spec.name)
            return spec
    raise AssertionError("the backend loop runs everywhere")


def is_decoding(x_TD: Tensor) -> bool:
    """Return whether ``x`` is a single token on a CPU without gradients, as in a step of generation."""
    # The experts of one token differ, so a product per routed token reads no matrix twice, and the token need not be
    # sorted by expert.
    return len(x_TD) == 1 and x_TD.device.type == "cpu" and not torch.is_grad_enabled()
