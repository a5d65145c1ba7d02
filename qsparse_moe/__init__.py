"""Sparse experts with sparse activations: train, ablate, measure, and run MoE + Q-Sparse language models.

The public names are resolved on first use (PEP 562), so that ``import qsparse_moe`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qsparse_moe.version import __version__

if TYPE_CHECKING:
    from qsparse_moe.config.load import load_config
    from qsparse_moe.config.schema import RunConfig
    from qsparse_moe.inference.generator import Generator
    from qsparse_moe.inference.sampling import Sampling
    from qsparse_moe.interop.drop_in.model import densify, sparsify
    from qsparse_moe.interop.training import train
    from qsparse_moe.metrics.experts import expert_ratios
    from qsparse_moe.metrics.ratios import scalar_ratios
    from qsparse_moe.model.output import ModelOutput
    from qsparse_moe.model.transformer import Transformer, build_model
    from qsparse_moe.moe.layer import MoELayer
    from qsparse_moe.moe.router import Router
    from qsparse_moe.sparsity.plan import SparsityPlan
    from qsparse_moe.sparsity.quantize import fake_quantize
    from qsparse_moe.sparsity.topk import topk_mask, topk_sparsify

__all__ = [
    "Generator",
    "ModelOutput",
    "MoELayer",
    "Router",
    "RunConfig",
    "Sampling",
    "SparsityPlan",
    "Transformer",
    "__version__",
    "build_model",
    "densify",
    "expert_ratios",
    "fake_quantize",
    "load_config",
    "scalar_ratios",
    "sparsify",
    "topk_mask",
    "topk_sparsify",
    "train",
]

# The same names as in the imports above, which only type checkers read.
_MODULE_OF = {
    "Generator": "inference.generator",
    "ModelOutput": "model.output",
    "MoELayer": "moe.layer",
    "Router": "moe.router",
    "RunConfig": "config.schema",
    "Sampling": "inference.sampling",
    "SparsityPlan": "sparsity.plan",
    "Transformer": "model.transformer",
    "build_model": "model.transformer",
    "densify": "interop.drop_in.model",
    "expert_ratios": "metrics.experts",
    "fake_quantize": "sparsity.quantize",
    "load_config": "config.load",
    "scalar_ratios": "metrics.ratios",
    "sparsify": "interop.drop_in.model",
    "topk_mask": "sparsity.topk",
    "topk_sparsify": "sparsity.topk",
    "train": "interop.training",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    # Stored in the module, so that Python calls this function once per name.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
