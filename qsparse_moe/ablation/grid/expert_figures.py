"""The figure of a grid that changes single experts: maps (layers x experts) of the loss against the first variant.

L layers, E experts, V variants including the first, R seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from qsparse_moe.ablation.cell_maps import CellMap, draw_maps, scale_over
from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.grid.variants import VariantResult, changed_cells, other_settings
from qsparse_moe.config.schema import Site
from qsparse_moe.data.packing import Array

LEVEL = 0.95


class _Expert(NamedTuple):
    """The single expert that a variant changes."""

    sites: tuple[Site, ...]
    sparsity: float
    layer: int
    expert: int


def expert_maps(variants: Sequence[VariantResult]) -> Figure | None:
    """Draw one map per site and S of the change of the loss; None if fewer than two variants change a single expert."""
    experts = _single_experts(variants)
    if len(experts) < 2:
        return None
    layers = tuple(sorted({one.layer for one in experts.values()}))
    num_experts = 1 + max(one.expert for one in experts.values())
    base = variants[0]
    change, half = differences([base, *(variants[index] for index in experts)])
    panels: dict[tuple[tuple[Site, ...], float], CellMap] = {}
    for one, value in zip(experts.values(), change, strict=True):
        shape, key = (len(layers), num_experts), (one.sites, one.sparsity)
        empty = CellMap(_title(*key), layers, np.full(shape, np.nan), np.zeros(shape, bool))
        panel = panels.setdefault(key, empty)
        index = layers.index(one.layer), one.expert
        panel.change_LE[index] = value
        panel.noise_LE[index] = half is not None and abs(value) <= half
    num_seeds = len(base.by_seed)
    note = f"mean of {num_seeds} seeds" if half is not None else "one seed: no spread known, no cell is marked"
    noise = None if half is None else f"noise: within ±{1000 * half:.2g}, the {LEVEL:.0%} interval over seeds"
    title = f"Validation loss with one expert changed, against {base.record['variant']}"
    maps = [panels[key] for key in sorted(panels)]
    missing = "not among the finished runs"
    return draw_maps(maps, scale_over(change.tolist()), title=title, missing=missing, noise=noise, note=note)


def differences(variants: Sequence[VariantResult]) -> tuple[Array, float | None]:
    """Return the mean change of every variant against the first, and the half-width of its confidence interval.

    The variance is that of the residuals of an analysis of variance with the seeds as blocks (Fisher 1935): the
    effect of a seed on all variants alike does not count, and all variants together estimate the remaining variance.
    The half-width is ``t sqrt(2 s^2 / R)`` with (V - 1) (R - 1) degrees of freedom. It is None if the variants share
    only one seed; the changes are then those of that seed.
    """
    # Seeds are the blocks of the analysis, and each block needs the loss of every variant.
    seeds = sorted(set.intersection(*(set(variant.by_seed) for variant in variants)))
    # With one seed there are no residuals, so the noise cannot be estimated.
    if len(seeds) < 2:
        losses = [one.by_seed[seeds[0]] if seeds else one.loss for one in variants]
        return np.asarray(losses[1:]) - losses[0], None
    losses_VR = np.array([[variant.by_seed[seed] for seed in seeds] for variant in variants])
    means_V = losses_VR.mean(1)
    residuals_VR = losses_VR - means_V[:, None] - losses_VR.mean(0) + losses_VR.mean()
    freedom = (len(variants) - 1) * (len(seeds) - 1)
    variance = float((residuals_VR**2).sum()) / freedom
    half = float(student_t.ppf((1 + LEVEL) / 2, freedom)) * (2 * variance / len(seeds)) ** 0.5
    return means_V[1:] - means_V[0], half


def _single_experts(variants: Sequence[VariantResult]) -> dict[int, _Expert]:
    """Return, by index, the variants that differ from the first only in the S of one expert."""
    found: dict[int, _Expert] = {}
    for index, variant in enumerate(variants[1:], 1):
        changed = changed_cells(variants[0], variant)
        if other_settings(variant) == other_settings(variants[0]) and (one := _one_expert(changed)) is not None:
            found[index] = one
    return found


def _one_expert(changed: Mapping[Cell, float]) -> _Expert | None:
    by_expert: dict[tuple[int, int | None], list[Site]] = defaultdict(list)
    for layer, site, expert in changed:
        by_expert[layer, expert].append(site)
    # Several experts, or several values of S, have no single cell.
    if len(by_expert) != 1 or len(set(changed.values())) != 1:
        return None
    ((layer, expert), sites) = next(iter(by_expert.items()))
    # A changed site without experts is no cell of this map.
    return None if expert is None else _Expert(tuple(sites), next(iter(changed.values())), layer, expert)


def _title(sites: Sequence[Site], sparsity: float) -> str:
    return f"{' and '.join(sites)}, S={sparsity:g}"
