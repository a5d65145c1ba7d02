"""Move a model to the functions of another device: those behind its sparse sites, activations, and experts."""

from __future__ import annotations

import torch

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.runtime import Runtime, resolve_runtime
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.selectors import RankingSelector, ThresholdSelector
from qsparse_moe.nn.sparse_site import SparseSite


def use_device(model: Transformer, device: torch.device) -> None:
    """Choose the implementations of a model again, for ``device``, to which its weights were moved after it was built.

    Raises:
        BackendUnavailable: an implementation was requested by name and cannot run there; with the reason.
    """
    use_runtime(model, resolve_runtime(model.config, device, expert_group=model.runtime.expert_group))


def use_runtime(model: Transformer, runtime: Runtime) -> None:
    """Call the functions of ``runtime`` from the next forward on."""
    model.runtime, sites = runtime, runtime.sites
    for module in model.modules():
        match module:
            case SparseSite():
                module.site_sums, module.format_rows = sites.site_sums, sites.format_rows
            case RankingSelector():
                module.select_rows, module.format_rows = sites.select_rows, sites.format_rows
            case ThresholdSelector():
                module.format_rows = sites.format_rows
            case FeedForward():
                module.activation.use_fused(sites.fused_glu)
            case Experts():
                module.activation.use_fused(sites.fused_glu)
                module.matmul, module.matmul_pair = runtime.matmul, runtime.matmul_pair
            case MoELayer():
                module.permutation = runtime.permutation
