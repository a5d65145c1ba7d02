"""The list of backends: implementations of the product of routed tokens with stacked expert weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels.onednn import has_matrix_registers, is_faster_in_fp32
from qsparse_moe.moe.backends import blas, grouped, loop, megablocks, megablocks_package, native, onednn
from qsparse_moe.moe.permutation import GATHERS, Permutation, TokenCounts

Matmul = Callable[[Tensor, Tensor, TokenCounts], Tensor]
MatmulPair = Callable[[Tensor, Tensor, Tensor, TokenCounts], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BackendSpec:
    """A named backend of the experts.

    ``matmul(rows_NX, weights_EXY, counts) -> (N, Y)`` multiplies the rows of each expert, which are contiguous and
    sorted by expert, with that expert's matrix. ``why_not(config, device)`` returns the reason why the backend cannot
    run, or None. ``permutation`` brings the tokens into that order and back. ``load()`` imports or compiles what the
    backend needs, once, when a model is built. ``own_pair(rows_NX, first_EXY, second_EXY, counts)`` returns the
    products with two stacks, if the backend has one operation for both.
    """

    name: str
    matmul: Matmul
    why_not: Callable[[ModelConfig, torch.device], str | None]
    permutation: Permutation = GATHERS
    load: Callable[[], object] = lambda: None
    own_pair: MatmulPair | None = None

    @property
    def matmul_pair(self) -> MatmulPair:
        """The products of the same rows with two stacks of weights: ``own_pair``, or one ``matmul`` after the other."""
        return self.own_pair or (
            lambda rows_NX, first_EXY, second_EXY, counts: (
                self.matmul(rows_NX, first_EXY, counts),
                self.matmul(rows_NX, second_EXY, counts),
            )
        )


BACKENDS: tuple[BackendSpec, ...] = (
    BackendSpec("native", native.matmul, native.why_not, load=native.load, own_pair=native.matmul_pair),
    BackendSpec("onednn", onednn.matmul, onednn.why_not),
    # blas before grouped: forward and backward of one matrix took 257 ms against 283 on one thread of a Zen 3 (lab log
    # of 24 November 2026), and grouped has no fp64 and requires widths that are multiples of 8.
    BackendSpec("blas", blas.matmul, blas.why_not),
    BackendSpec("grouped", grouped.matmul, grouped.why_not),
    BackendSpec("megablocks", megablocks.matmul, megablocks.why_not, megablocks.PERMUTATION, megablocks_package.load),
    BackendSpec("loop", loop.matmul, loop.why_not),
)
"""All backends, fastest first on a GPU or on a CPU with AVX-512.

``auto`` never chooses ``megablocks``, because ``grouped`` runs wherever it does and comes first: which of the two is
faster on a GPU has not been measured here, and ``grouped`` needs no package that is no longer maintained.
"""


def fastest_first() -> tuple[BackendSpec, ...]:
    """Return ``BACKENDS`` in the order in which ``auto`` tries them.

    ``onednn`` comes last where MKL is faster, and ``native`` where it has not been measured.
    """
    late: set[str] = set() if is_faster_in_fp32() else {"onednn"}
    # Measured with AVX-512 only. Its sums do not use the matrix registers that some processors have for bf16.
    if not is_faster_in_fp32() or has_matrix_registers():
        late.add("native")
    return tuple(sorted(BACKENDS, key=lambda spec: spec.name in late))
