"""The measured sparsity of a model of transformers: the share of zeros in the rows that its matrices read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import Site
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.drop_in.hosts import LayerSite
from qsparse_moe.interop.drop_in.model import sites_of
from qsparse_moe.nn.hooks import SiteCallback, site_hooks


class Zeros:
    """Counts of zeros in front of the matrices, per layer, site, and expert. Later passes are added to earlier ones."""

    def __init__(self, num_experts: dict[LayerSite, int]) -> None:
        self._zeros = {place: torch.zeros(count, dtype=torch.float64) for place, count in num_experts.items()}
        self._values = {place: torch.zeros(count, dtype=torch.float64) for place, count in num_experts.items()}

    def by_expert(self, layer: int, site: Site) -> list[float]:
        """Return the share of zeros per expert, one number at a site without experts; NaN if it read no row."""
        return (self._zeros[layer, site] / self._values[layer, site]).tolist()

    def by_layer(self) -> dict[LayerSite, float]:
        """Return the share of zeros per layer and site, over all rows that its matrices read."""
        return {place: float(self._zeros[place].sum() / self._values[place].sum()) for place in self._zeros}

    def by_site(self) -> dict[Site, float]:
        """Return the share of zeros per site, the mean over its layers."""
        layers: dict[Site, list[float]] = {}
        for (_, site), share in self.by_layer().items():
            layers.setdefault(site, []).append(share)
        return {site: sum(shares) / len(shares) for site, shares in layers.items()}

    def add(self, place: LayerSite, sparse: Tensor, expert_ids_N: Tensor | None) -> None:
        """Count the zeros of rows ``(*, D)`` that the matrices of a site read."""
        zeros_N = (sparse.detach() == 0).flatten(0, -2).sum(-1, dtype=torch.float64)
        ids_N = torch.zeros(len(zeros_N), dtype=torch.int64) if expert_ids_N is None else expert_ids_N.long().cpu()
        self._zeros[place].index_add_(0, ids_N, zeros_N.cpu())
        self._values[place].index_add_(0, ids_N, torch.full((len(ids_N),), sparse.shape[-1], dtype=torch.float64))


@contextmanager
def measure_zeros(model: nn.Module) -> Iterator[Zeros]:
    """Count the zeros that the matrices of a sparse model read in the forward passes inside the context.

    Natural zeros count too. At S = 0 the experts run through this package's own function while they are measured.

    Args:
        model: a model after ``sparsify``.

    Raises:
        ConfigError: the model is not sparse.
    """
    sites = sites_of(model)
    if not sites:
        raise ConfigError(f"measure_zeros: {type(model).__name__} is not sparse; call sparsify first")
    zeros = Zeros({place: site.num_experts for place, site in sites.items()})

    def counter(place: LayerSite) -> SiteCallback:
        def count(x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
            zeros.add(place, sparse, expert_ids_N)
            return sparse

        return count

    with site_hooks({site: counter(place) for place, site in sites.items()}):
        yield zeros
