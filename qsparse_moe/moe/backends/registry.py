"""The ways to multiply routed rows with stacked expert weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels.onednn import is_faster_in_fp32
from qsparse_moe.moe.backends import blas, grouped, loop, megablocks, megablocks_package, onednn
from qsparse_moe.moe.permutation import GATHERS, Permutation, RowCounts

Matmul = Callable[[Tensor, Tensor, RowCounts], Tensor]


@dataclass(frozen=True)
class BackendSpec:
    """A named way to run the experts.

    ``matmul(rows_NX, weights_EXY, counts) -> (N, Y)`` multiplies each expert's rows, which are contiguous and in expert
    order, with that expert's matrix. ``why_not(config, device)`` is None where it runs. ``permutation`` brings the
    tokens into that order and back; ``load()`` imports or compiles what the two need, once, when a model is built.
    """

    name: str
    matmul: Matmul
    why_not: Callable[[ModelConfig, torch.device], str | None]
    permutation: Permutation = GATHERS
    load: Callable[[], object] = lambda: None


BACKENDS: tuple[BackendSpec, ...] = (
    BackendSpec("onednn", onednn.matmul, onednn.why_not),
    BackendSpec("blas", blas.matmul, blas.why_not),
    BackendSpec("grouped", grouped.matmul, grouped.why_not),
    BackendSpec("megablocks", megablocks.matmul, megablocks.why_not, megablocks.PERMUTATION, megablocks_package.load),
    BackendSpec("loop", loop.matmul, loop.why_not),
)
"""Fastest first where there is a GPU, or a CPU with AVX-512.

``megablocks`` runs nowhere where ``grouped`` does not, so ``auto`` never takes it: which of the two permutations is
faster on a GPU has not been measured here, and one needs no package that its authors have left behind.
"""


def fastest_first() -> tuple[BackendSpec, ...]:
    """``BACKENDS`` in the order in which ``auto`` tries them: ``onednn`` last on a CPU where MKL is the faster."""
    return BACKENDS if is_faster_in_fp32() else tuple(sorted(BACKENDS, key=lambda spec: spec.name == "onednn"))
