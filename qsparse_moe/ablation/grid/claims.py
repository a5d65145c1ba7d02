"""Claims about the variants of a grid, and the axis over which each variant is taken at its best. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from qsparse_moe.ablation.grid.strict import Seeds, Strict
from qsparse_moe.config.problems import show

STEPS = "training.steps"
"""The axis over which ``continue_over_steps`` trains the same run on."""


class Comparison(Strict):
    """A claim about the validation loss of variants, which the results of a grid decide or leave open."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the claim in the report."""
    source: Annotated[str, Field(min_length=1)]
    """The section of the paper that makes the claim."""
    order: Annotated[list[str], Field(min_length=2)] | None = None
    """Names of variants, the one with the lowest loss first; the claim is that each is below the next."""
    close: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Names of two variants whose losses differ by at most ``within``."""
    within: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The largest difference of ``close``, in bits per byte."""
    gap_shrinks_over: str | None = None
    """An axis, for an ``order`` of two variants: the claim is that their difference is smaller than at the first value
    of this axis."""
    gap_grows_over: str | None = None
    """The same for a difference that is larger than at the first value of this axis."""

    @property
    def variants(self) -> list[str]:
        """Names of the variants that the claim is about, in its order."""
        return self.order or self.close or []

    @property
    def gap_over(self) -> str | None:
        """The axis of a claim about a gap; None for other claims."""
        return self.gap_shrinks_over or self.gap_grows_over

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Neighbours of the order; the difference of a pair is the second minus the first."""
        return list(zip(self.variants, self.variants[1:], strict=False))


class BestOver(Strict):
    """The axis over which every variant is taken at its best value: that with the lowest mean over ``seeds``."""

    axis: str
    """Dotted path of the axis, which must be a list of at least two numbers."""
    seeds: Seeds
    """More seeds, which only the best value of each variant gets; the search uses the seeds of the grid."""


def broken_claims(comparisons: Sequence[Comparison], variants: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what is wrong with the claims of a grid file with these variants."""
    names = [claim.name for claim in comparisons]
    for position, claim in enumerate(comparisons):
        where = f"comparisons.{position} ({claim.name})"
        if claim.name in names[:position]:
            yield f"{where} has the name of an earlier comparison; rename one of them"
        if (claim.order is None) == (claim.close is None):
            yield f"{where} must have either order (lowest loss first) or close (two variants); give one of them"
        if (claim.close is None) != (claim.within is None):
            yield f"{where} must have close and within (bits per byte) together, or neither; add or remove one of them"
        for name in dict.fromkeys(claim.variants):
            if name not in (variants or {}):
                known = ", ".join(variants or {}) or "none, because the file has no variants"
                yield f"{where} names {show(name)}, which is no variant of this grid; its variants are {known}"
            if claim.variants.count(name) > 1:
                yield f"{where} names {show(name)} twice, and a variant cannot be compared with itself; keep it once"


def broken_gaps(
    comparisons: Sequence[Comparison], axes: Mapping[str, Any], best_over: BestOver | None
) -> Iterator[str]:
    """Yield what is wrong with the claims about gaps of a grid file with these axes."""
    known = [axis for axis in axes if best_over is None or axis != best_over.axis]
    for position, claim in enumerate(comparisons):
        where = f"comparisons.{position} ({claim.name})"
        if claim.gap_over is None:
            continue
        if claim.gap_shrinks_over and claim.gap_grows_over:
            yield f"{where} has both gap_shrinks_over and gap_grows_over; give one of them"
        if len(claim.order or ()) != 2:
            yield f"{where} is about a gap and needs an order of two variants, and it is {show(claim.order)}"
        if claim.gap_over not in known:
            yield (
                f"{where} is about a gap over {show(claim.gap_over)}, which is no axis of the cells of this grid; name "
                f"one of {', '.join(known) or 'its axes, of which it has none'}"
            )


def broken_best_over(best_over: BestOver | None, axes: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[str]:
    """Yield what is wrong with the axis and the seeds of a search."""
    if best_over is None:
        return
    axis = axes.get(best_over.axis)
    if axis is None:
        known = ", ".join(axes) or "none"
        yield f"best_over.axis ({best_over.axis}) is no axis of this grid; its axes are {known}. Name one, or add it"
    elif not isinstance(axis, list) or len(axis) < 2 or not all(type(value) in (int, float) for value in axis):
        yield (
            f"best_over.axis ({best_over.axis}) has the values {show(axis)}; a search needs a list of at least two "
            f"numbers, such as axes: {{{best_over.axis}: [0.001, 0.003]}}"
        )
    common = sorted(set(best_over.seeds) & set(seeds))
    if common or len(set(best_over.seeds)) < len(best_over.seeds):
        yield (
            f"best_over.seeds ({show(best_over.seeds)}) must be different and not among the seeds of the search "
            f"({show(list(seeds))}); remove those that occur twice"
        )


def broken_lengths(continued: bool, axes: Mapping[str, Any], compare_dense: int | None) -> Iterator[str]:
    """Yield why the runs of a grid cannot be trained on from each length to the next, if it asks for that."""
    if not continued:
        return
    lengths = axes.get(STEPS)
    # In ascending order, because the order of the file is the order of training.
    known = lengths if isinstance(lengths, list) and all(type(value) is int for value in lengths) else []
    if not known or sorted(set(known)) != known:
        yield (
            f"continue_over_steps (true) needs the axis {STEPS} with an ascending list of lengths, and it is "
            f"{show(lengths)}; write axes: {{{STEPS}: [100, 200]}}"
        )
    if compare_dense is not None:
        yield (
            f"continue_over_steps (true) keeps only the last checkpoints of a run, and compare_dense ({compare_dense}) "
            "needs that of every length; remove one of them"
        )
