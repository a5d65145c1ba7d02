"""Choice of the implementations behind the sparse sites of a model: made once when it is built, and logged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native
from qsparse_moe.kernels.fused_glu.op import FUSED_GLUS, FusedGLU
from qsparse_moe.kernels.int8_quantize.op import FormatRows, as_format_triton
from qsparse_moe.kernels.site_sums.op import NATIVE, TORCH, SiteSums
from qsparse_moe.kernels.topk_select.op import TOPK_SELECTS, SelectRows, TopKSelect
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import as_format

logger = logging.getLogger(__name__)


class Named(Protocol):
    """An implementation with the name that selects it in a setting."""

    @property
    def name(self) -> str:
        """The value of the setting."""


Implementation = TypeVar("Implementation", bound=Named)


@dataclass(frozen=True)
class SiteRuntime:
    """The functions that sparse sites and gated activations of a model call."""

    name: str
    """The implementation behind them: ``torch``, ``native`` or ``triton``."""
    select_rows: SelectRows
    fused_glu: FusedGLU | None
    """Activation and selection fused into one pass over memory; None if the implementation has no such pass."""
    site_sums: SiteSums
    """The statistics of a site, from the same implementation or, if it has none, from stock PyTorch."""
    format_rows: FormatRows
    """Rounds rows to a number format, by the same implementation or, if it has none, by stock PyTorch."""

    def make_site(self, site: Site, num_features: int, settings: SparsityConfig, *, num_experts: int = 1) -> SparseSite:
        """Return a sparse site that calls these functions."""
        return SparseSite(
            site,
            num_features,
            settings,
            self.select_rows,
            num_experts=num_experts,
            site_sums=self.site_sums,
            format_rows=self.format_rows,
        )


def resolve_site_runtime(settings: SparsityConfig, device: torch.device) -> SiteRuntime:
    """Choose the implementation of ``model.sparsity.backend`` for ``device``.

    Raises:
        BackendUnavailable: the implementation was requested by name and cannot run here; with the reason.
    """
    selection = choose("model.sparsity.backend", settings.backend, TOPK_SELECTS, lambda spec: spec.why_not(device))
    if selection.name == "native":
        selection = _compiled_or_next(selection, settings, device)
    is_native = selection.name == "native"
    return SiteRuntime(
        selection.name,
        selection.select_rows,
        # One setting names all implementations of the sites, so that the name in the log says which code ran.
        next((fused for fused in FUSED_GLUS if fused.name == selection.name), None),
        NATIVE if is_native else TORCH,
        # Stock PyTorch rounds bf16 rows to int8 in eight passes that move 56 bytes per element, the kernel in one that
        # moves 4 (counted from the operations; no time was measured).
        as_format_triton if selection.name == "triton" else as_format,
    )


def _compiled_or_next(selection: TopKSelect, settings: SparsityConfig, device: torch.device) -> TopKSelect:
    """Return ``selection`` after compiling its operators, or for ``auto`` the next one if they cannot be compiled."""
    # Compiled now, so that a failing compiler is reported before anything is trained.
    try:
        native.load()
    except BackendUnavailable as error:
        if settings.backend != "auto":
            raise
        logger.warning("model.sparsity.backend=auto: native cannot be built (%s); trying the next one", error)
        others = [spec for spec in TOPK_SELECTS if spec is not selection]
        return choose("model.sparsity.backend", "auto", others, lambda spec: spec.why_not(device))
    return selection


@contextlib.contextmanager
def choices_unlogged() -> Iterator[None]:
    """Do not log the choices that are made inside, for a model that is built to know its shapes only."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def choose(
    setting: str,
    requested: str,
    specs: Sequence[Implementation],
    why_not: Callable[[Implementation], str | None],
) -> Implementation:
    """Return the requested implementation, or for ``auto`` the first that can run here, and log the choice.

    Raises:
        BackendUnavailable: the requested one cannot run here, or none can; with the reason of each.
    """
    reasons: dict[str, str] = {}
    for spec in specs:
        # An implementation that was requested by name never falls back to another: a result would then come from other
        # code than its config says.
        if requested not in ("auto", spec.name):
            continue
        reason = why_not(spec)
        if reason is None:
            # The reasons of the faster ones, so that the log shows what would have to change to use them.
            skipped = "".join(f"; not {name}: {why}" for name, why in reasons.items())
            logger.info("%s=%s: using %s%s", setting, requested, spec.name, skipped)
            return spec
        reasons[spec.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(
        f"{setting} ({requested!r}) cannot run here: {why}. Set it to auto to use the fastest one that is available"
    )
