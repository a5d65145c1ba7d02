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
    """The observations of several runs, each field ``(n,)``. Parameters exclude embedding and head."""

    total: Array
    """Number of parameters stored."""
    active: Array
    """Number of parameters that a token uses by routing."""
    needed: Array
    """Number of active parameters whose input is not zero."""
    experts: Array
    """E."""
    experts_per_token: Array
    """A."""
    granularity: Array
    """G of the fine-grained law: 4 times the model width, the usual width of a dense FFN, over the expert width."""
    sparsity: Array
    """Mean S of the plan: the fraction of activations zeroed."""
    tokens: Array
    """Number of training tokens when the loss was measured."""
    loss: Array
    """Validation loss, in the unit with which the observations were read."""
    backbone: Array
    """Layers times width squared: the size of a model independent of its experts."""
    run: NDArray[np.int64]
    """Index of the run. Observations of one run are not independent measurements."""
    configuration: NDArray[np.int64]
    """Index of the configuration. Runs of one configuration differ only in their seed."""

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def expert_share(self) -> Array:
        """A/E, the share of the experts that a token uses: 1 − s for the expert sparsity s = (E − A)/E."""
        return self.experts_per_token / self.experts

    @property
    def num_runs(self) -> int:
        """Number of runs with at least one observation."""
        return len(np.unique(self.run))

    @property
    def run_weights(self) -> Array:
        """One over the number of observations of the run, so that every run has the same weight."""
        _, index, counts = np.unique(self.run, return_inverse=True, return_counts=True)
        return 1.0 / counts[index]

    def where(self, chosen: NDArray[np.bool_]) -> Observations:
        """Return the observations at which ``chosen``, ``(n,)``, is true."""
        return replace(self, **{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def final(self) -> Observations:
        """Return the last observation of each run."""
        last = [np.flatnonzero(self.run == run)[self.tokens[self.run == run].argmax()] for run in np.unique(self.run)]
        return self.where(np.isin(np.arange(len(self)), last))


# The default of tokens serves forms without a term in both S and D, whose S* is the same at any length.
def imagined(*, needed: float, expert_share: float, sparsity: Array, tokens: float = 1e9) -> Observations:
    """Return hypothetical models with ``needed`` parameters per token at each S of ``sparsity``.

    All parameters count as sparse expert weights: a share A/E of them is active, and 1 − S of those is needed, so that
    more is stored as S rises. This extends the constraint of the Q-Sparse paper, ``N_a = N (1 − S)``, to experts.
    """
    ones = np.ones(len(sparsity))
    # No embedding, router, or norms: a law of N cannot distinguish them from expert weights.
    active = needed / (1.0 - sparsity)
    no_index = np.zeros(len(sparsity), dtype=np.int64)
    return Observations(
        total=active / expert_share,
        active=active,
        needed=needed * ones,
        experts=ones / expert_share,
        experts_per_token=ones,
        # No form with S depends on G, and the loss is what a law is asked for.
        granularity=np.nan * ones,
        sparsity=sparsity,
        tokens=tokens * ones,
        loss=np.nan * ones,
        backbone=np.nan * ones,
        run=no_index,
        configuration=no_index,
    )


def seed_spread(observations: Observations) -> float | None:
    """Return the standard deviation of the log loss over the seeds of a configuration, at equal tokens.

    It is pooled over configurations, and None if no configuration has two seeds. No law of the settings of a run can
    have a smaller error.
    """
    squares, degrees = 0.0, 0
    final = observations.final()
    # At equal tokens only: a longer run of the same configuration has a lower loss without any noise.
    for configuration, tokens in {(c, t) for c, t in zip(final.configuration, final.tokens, strict=True)}:
        logs = np.log(final.loss[(final.configuration == configuration) & (final.tokens == tokens)])
        squares += float(((logs - logs.mean()) ** 2).sum())
        # A configuration with one seed adds nothing to either sum.
        degrees += len(logs) - 1
    return float(np.sqrt(squares / degrees)) if degrees else None
