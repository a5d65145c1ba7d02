"""Sparse rows as lists of their nonzero features, as the Triton kernels read them. L lists of M places each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FeatureLists:
    """The nonzero features of L sparse rows in ascending order, and their values."""

    features_LM: Tensor
    """int32; places beyond the length are never read."""
    values_LM: Tensor
    """fp32; places beyond the length are never read."""
    lengths_L: Tensor
    """int32."""

    @property
    def capacity(self) -> int:
        """M, the number of places of a list."""
        return self.features_LM.shape[1]
