"""The observations that a law is fitted to: validation losses, each with the sizes, sparsities, and tokens of its run.

n observations, R runs. A run contributes one observation per evaluation of its curve. The weights of a run's
observations add up to 1, so that a long curve does not count more than a short one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observations:
    """The observations of some runs, each field ``(n,)``. Parameters are weight matrices without embedding and head."""

    total: Array
    """Parameters stored."""
    active: Array
    """Parameters that a token uses by routing."""
    kept: Array
    """Those of the active ones whose input Q-Sparse keeps."""
    experts: Array
    """E."""
    experts_per_token: Array
    """A."""
    granularity: Array
    """4 times the model width over the expert width: G of the fine-grained law, of a dense FFN of the usual width."""
    sparsity: Array
    """Mean S of the plan: the fraction of activations zeroed."""
    tokens: Array
    """Seen in training when the loss was measured."""
    loss: Array
    """Validation loss; in which unit, whoever made the observations knows."""
    backbone: Array
    """Layers times width squared: the size of a model whatever its experts are."""
    run: NDArray[np.int64]
    """Index of the run: observations of one run are no independent measurements."""
    configuration: NDArray[np.int64]
    """Index of what the run was a seed of: runs of one configuration differ by chance alone."""

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def expert_share(self) -> Array:
        """A/E, the part of the experts that a token uses: 1 − s of the expert sparsity s = (E − A)/E."""
        return self.experts_per_token / self.experts

    @property
    def num_runs(self) -> int:
        """Runs that have a point here."""
        return len(np.unique(self.run))

    @property
    def run_weights(self) -> Array:
        """One over the number of observations of the run, so that every run counts as one."""
        _, place, counts = np.unique(self.run, return_inverse=True, return_counts=True)
        return 1.0 / counts[place]

    def where(self, chosen: NDArray[np.bool_]) -> Observations:
        """The observations at which ``chosen``, ``(n,)``, is true."""
        return replace(self, **{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def final(self) -> Observations:
        """The last point of each run."""
        last = [np.flatnonzero(self.run == run)[self.tokens[self.run == run].argmax()] for run in np.unique(self.run)]
        return self.where(np.isin(np.arange(len(self)), last))


def imagined(*, kept: float, expert_share: float, sparsity: Array, tokens: float = 1e9) -> Observations:
    """Models of ``kept`` parameters a token each, at the S of ``sparsity``; no run measured them.

    All parameters are taken as sparse and as the experts': a share A/E of them is active and 1 − S of those is kept,
    so that more is stored as S rises. It is what the Q-Sparse paper fixes, ``N_a = N (1 − S)``, with experts.
    """
    ones = np.ones(len(sparsity))
    active = kept / (1.0 - sparsity)
    nothing = np.zeros(len(sparsity), dtype=np.int64)
    return Observations(
        total=active / expert_share,
        active=active,
        kept=kept * ones,
        experts=ones / expert_share,
        experts_per_token=ones,
        granularity=np.nan * ones,
        sparsity=sparsity,
        tokens=tokens * ones,
        loss=np.nan * ones,
        backbone=np.nan * ones,
        run=nothing,
        configuration=nothing,
    )


def seed_spread(observations: Observations) -> float | None:
    """Standard deviation of the log loss over runs of one configuration at equal tokens; None where none is repeated.

    No law in the settings of a run can come closer to the observations than this.
    """
    squares, degrees = 0.0, 0
    final = observations.final()
    for configuration, tokens in {(c, t) for c, t in zip(final.configuration, final.tokens, strict=True)}:
        logs = np.log(final.loss[(final.configuration == configuration) & (final.tokens == tokens)])
        squares += float(((logs - logs.mean()) ** 2).sum())
        degrees += len(logs) - 1
    return float(np.sqrt(squares / degrees)) if degrees else None
