"""Figures of a fitted law: fitted against measured loss, residuals, loss against S, and contours of equal loss."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from qsparse_moe.ablation.law.forms import Design
from qsparse_moe.ablation.law.observations import Array, Observations, imagined
from qsparse_moe.ablation.law.optimum import GRID
from qsparse_moe.ablation.law.read import UNITS
from qsparse_moe.ablation.law.study import FittedForm, Study

_DPI = 130
_LEVELS = 12


def draw(done: Study, folder: Path) -> list[str]:
    """Write the figures of the best form into ``folder``; return their names. A form without S has only two."""
    best = done.fitted[done.best]
    figures = {"fit.png": _fit(done, best), "residuals.png": _residuals(done, best)}
    if best.optima:
        figures |= {"sparsity.png": _sparsity(done), "iso_loss.png": _iso_loss(done, best)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)
        # pyplot keeps every figure in memory until it is closed.
        plt.close(figure)
    return list(figures)


def _fit(done: Study, best: FittedForm) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    observations = done.runs.observations
    fitted = best.best.loss(observations)
    drawn = axes.scatter(fitted, observations.loss, c=observations.sparsity, s=14, cmap="viridis", vmin=0)
    ends = [min(fitted.min(), observations.loss.min()), max(fitted.max(), observations.loss.max())]
    axes.plot(ends, ends, color="0.4", linewidth=1)
    unit = UNITS[done.unit]
    axes.set(
        xlabel=f"fitted loss ({unit})",
        ylabel=f"measured validation loss ({unit})",
        title=f"Form {best.best.form.name}: {observations.num_runs} runs, RMS error {best.fit_error:.2%}",
    )
    figure.colorbar(drawn, label="activation sparsity S")
    return figure


def _residuals(done: Study, best: FittedForm) -> Figure:
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharey=True)
    observations = done.runs.observations
    percent = 100 * best.best.log_residuals(observations)
    against: list[tuple[str, Array, bool]] = [
        ("parameters N", observations.total, True),
        ("tokens D", observations.tokens, True),
        ("experts / experts per token, E/A", 1 / observations.expert_share, True),
        ("activation sparsity S", observations.sparsity, False),
    ]
    for axes, (label, values, by_ratio) in zip(panels.flat, against, strict=True):
        axes.axhline(0, color="0.4", linewidth=1)
        axes.scatter(values, percent, s=10, alpha=0.6)
        axes.set_xlabel(label)
        # Sizes and tokens of a grid grow by factors, so a logarithmic axis spaces them evenly.
        if by_ratio:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if label.startswith("experts"):
            # The few values of E/A are labelled themselves, because decades would show none of them.
            _ticks(axes, values)
    for axes in panels[:, 0]:
        axes.set_ylabel("ln(measured / fitted), %")
    figure.suptitle(f"Residuals of form {best.best.form.name}")
    return figure


def _sparsity(done: Study) -> Figure:
    """Draw the reducible loss against S at equal needed parameters, per form with S, at the median A/E of the runs."""
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(7, 6), layout="constrained", sharex=True, height_ratios=(5, 1), squeeze=True
    )
    observations = done.runs.observations
    share = _middle_share(observations)
    with_sparsity = {name: found for name, found in done.fitted.items() if found.optima}
    optima = [best.found.sparsity for found in with_sparsity.values() for best in found.optima]
    # A margin beyond the runs and beyond every optimum, so that each minimum is visible.
    end = max(observations.sparsity.max() + 0.15, *optima)
    grid = GRID[: np.searchsorted(GRID, end, side="right")]
    tokens = float(observations.tokens.max())
    models = imagined(needed=done.needed, expert_share=share, sparsity=grid, tokens=tokens)
    lowest = 0.0
    for position, (name, found) in enumerate(with_sparsity.items()):
        design = Design.of(found.best.form, models)
        curve = _percent(design.reducible(found.best.theta))
        # The lower limit of the axis follows the deepest minimum of all forms.
        lowest = min(lowest, float(curve.min()))
        (line,) = axes.plot(grid, curve, label=name, linewidth=2.4 if name == done.best else 1.2)
        resampled = np.array([_percent(design.reducible(other.theta)) for other in found.resamples])
        low, high = np.quantile(resampled, [(1 - done.choices.level) / 2, (1 + done.choices.level) / 2], axis=0)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        best = next(best for best in found.optima if best.expert_share in (None, share))
        below.plot(best.found.band, [position, position], color=line.get_color(), linewidth=1)
        below.plot(best.interval, [position, position], color=line.get_color(), linewidth=5, solid_capstyle="butt")
        below.plot(best.found.sparsity, position, "o", color=line.get_color(), markeredgecolor="white", markersize=7)
    axes.axhline(0, color="0.4", linewidth=1)
    for panel in (axes, below):
        panel.axvline(
            observations.sparsity.max(), color="0.6", linewidth=1, linestyle=":", label="largest S of the runs"
        )
    axes.set(
        xlim=(0, grid[-1]),
        # Cut at 30 %, because the steep rise at high S would flatten the region around the optimum.
        ylim=(2 * lowest - 2, 30),
        ylabel="change of the reducible loss against the dense model, %",
        title=f"{done.needed:,.0f} needed parameters, {tokens:,.0f} tokens, A/E = {share:g}",
    )
    axes.legend(loc="upper left")
    below.set(ylim=(len(with_sparsity) - 0.4, -0.6), xlabel="activation sparsity S")
    below.set_yticks(range(len(with_sparsity)), list(with_sparsity))
    below.set_title(
        f"S*: best fit; {done.choices.level:.0%} interval (thick); loss within {done.choices.tolerance:.1%} (thin)",
        fontsize=9,
    )
    return figure


def iso_levels(losses: Array) -> Array:
    """Return ascending contour levels that divide the area of the map, not the range of the loss, into equal parts.

    The loss is flat around the optimum and steep at high S, so that equal steps of the loss would leave
    the optimum blank.
    """
    levels = np.unique(np.quantile(losses, np.linspace(0, 1, _LEVELS + 1)))
    # A law in which neither S nor E/A has an effect is constant, and contourf needs levels that increase.
    return levels if np.ptp(levels) > 1e-6 * levels[-1] else levels.mean() * np.array([0.999, 1.0, 1.001])


def _percent(reducible: Array) -> Array:
    return 100 * (reducible / reducible[0] - 1)


def _iso_loss(done: Study, best: FittedForm) -> Figure:
    """Draw the loss of the best form over E/A and S, at equal needed parameters and the most tokens of the runs."""
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    observations = done.runs.observations
    # E/A grows by factors in a grid, as the logarithmic axis shows it.
    ratios = np.geomspace((1 / observations.expert_share).min(), (1 / observations.expert_share).max(), 60)
    # Up to the largest S of the runs only: contours beyond it would be extrapolation.
    grid = np.linspace(0, observations.sparsity.max(), 80)
    tokens = float(observations.tokens.max())
    losses = np.array(
        [best.best.loss(imagined(needed=done.needed, expert_share=1 / r, sparsity=grid, tokens=tokens)) for r in ratios]
    ).T
    levels = iso_levels(losses)
    # The levels are unevenly spaced, so a linear scale would give most of them nearly the same colour.
    filled = axes.contourf(ratios, grid, losses, levels=levels, norm=BoundaryNorm(levels, 256), cmap="viridis")
    lines = axes.contour(ratios, grid, losses, levels=levels, colors="white", linewidths=0.6)
    axes.clabel(lines, fontsize=7, fmt="%.3f")
    axes.plot(1 / observations.expert_share, observations.sparsity, "o", color="black", markersize=4, clip_on=False)
    axes.set_xscale("log")
    _ticks(axes, 1 / observations.expert_share)
    axes.set(
        xlabel="experts / experts per token, E/A",
        ylabel="activation sparsity S",
        title=f"{best.best.form.name}: {done.needed:,.0f} needed parameters, {tokens:,.0f} tokens; dots: runs",
    )
    figure.colorbar(filled, label=f"loss ({UNITS[done.unit]})", format="%.3f")
    return figure


def _ticks(axes: Axes, values: Array) -> None:
    ticks = np.unique(values)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _middle_share(observations: Observations) -> float:
    shares = np.unique(observations.expert_share)
    # This is a value of the runs; np.median may return a mean of two, at which no run exists.
    return float(shares[len(shares) // 2])
