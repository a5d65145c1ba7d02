"""Hooks on sparse sites, by which calibration, sensitivity, and measurements receive the rows of a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

SiteCallback = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""Called with the rows ``(*, D)``, the expert of each row (None at a site without experts), and the sparse rows.
Returns the rows that the projection reads instead of the sparse rows."""


@dataclass(frozen=True)
class SiteHook:
    """A callback that is attached to a sparse site."""

    callback: SiteCallback
    ranks: bool = False
    """Whether the site selects by exact top-K while the hook is attached, regardless of its selection."""

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Call the callback."""
        return self.callback(x, expert_ids_N, sparse)


class Hookable(Protocol):
    """A sparse site to which a hook can be attached."""

    hook: SiteHook | None


Site = TypeVar("Site", bound=Hookable)


@contextmanager
def site_hooks(callbacks: Mapping[Site, SiteCallback], *, ranks: bool = False) -> Iterator[None]:
    """Attach a callback to each site for the duration of the context.

    Args:
        callbacks: the callback of each site. A site can have one hook at a time.
        ranks: as in ``SiteHook``.
    """
    # The second of two hooks would receive the replacement of the first instead of the selection.
    assert all(site.hook is None for site in callbacks), "a site has a hook already"
    try:
        for site, callback in callbacks.items():
            site.hook = SiteHook(callback, ranks)
        yield
    finally:
        # Also after an error: a hook that stays would change every later forward pass.
        for site in callbacks:
            site.hook = None
