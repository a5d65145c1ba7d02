"""Hooks on sparse sites: the one way in which calibration, sensitivity, and measurements see what passes a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

SiteCallback = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""Called with the rows ``(*, D)``, the expert of each row (None at a site without experts), and the sparse rows.
Returns what the projection reads in their place."""


@dataclass(frozen=True)
class SiteHook:
    """A callback that is attached to a site."""

    callback: SiteCallback
    ranks: bool = False
    """Whether the site selects by exact top-K while the hook is attached, whatever its selection is."""

    def __call__(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Call the callback."""
        return self.callback(x, expert_ids_N, sparse)


class Hookable(Protocol):
    """A site to which a hook can be attached."""

    hook: SiteHook | None


Site = TypeVar("Site", bound=Hookable)


@contextmanager
def site_hooks(callbacks: Mapping[Site, SiteCallback], *, ranks: bool = False) -> Iterator[None]:
    """Attach a callback to each site for the time of the context.

    Args:
        callbacks: by site. A site can have one hook at a time.
        ranks: see ``SiteHook``.
    """
    assert all(site.hook is None for site in callbacks), "a site has a hook already"
    try:
        for site, callback in callbacks.items():
            site.hook = SiteHook(callback, ranks)
        yield
    finally:
        for site in callbacks:
            site.hook = None
