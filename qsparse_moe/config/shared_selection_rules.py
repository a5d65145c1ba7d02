"""Rules of the selection that the tokens of an expert share: what products at true size leave no place for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.problems import Problem
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import model_sites, site_format

_PRODUCTS = "model.sparsity.shared.products"


def gathers(config: ModelConfig) -> bool:
    """Return whether experts and dense layers multiply with the selected rows and columns of their weights only."""
    return config.sparsity.selection == "shared" and config.sparsity.shared.products == "gathered"


def _what_needs_whole_rows(config: ModelConfig) -> Iterator[Problem]:
    if not gathers(config):
        return
    settings = config.sparsity
    way_out = f"set it to none, or {_PRODUCTS} to masked"
    if settings.rescale != "none":
        yield Problem(
            f"model.sparsity.rescale ({settings.rescale}) must be none when model.sparsity.selection is shared and "
            f"{_PRODUCTS} is gathered, because the features that are not selected are not computed; {way_out}",
            ("model.sparsity.rescale", _PRODUCTS, "model.sparsity.selection"),
        )
    rounded = {site: site_format(settings, site) for site in model_sites(config)}
    for site, number_format in rounded.items():
        # Attention is masked in any case.
        if number_format != "none" and not site.startswith("attention"):
            yield Problem(
                f"the number format of {site} ({number_format}) must be none when model.sparsity.selection is shared "
                f"and {_PRODUCTS} is gathered, because its scale needs the whole row; {way_out}",
                ("model.sparsity.quantization", "model.sparsity.preset", _PRODUCTS, "model.sparsity.selection"),
            )
            return


def _no_blend(config: ModelConfig) -> Iterator[Problem]:
    if gathers(config) and config.sparsity.gradient == "blend":
        yield Problem(
            f"model.sparsity.gradient (blend) must be ste or masked when model.sparsity.selection is shared and "
            f"{_PRODUCTS} is gathered; choose one of them, or set {_PRODUCTS} to masked",
            ("model.sparsity.gradient", _PRODUCTS, "model.sparsity.selection"),
        )


SHARED_SELECTION_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (_what_needs_whole_rows, _no_blend)
