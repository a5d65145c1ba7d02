"""Published placements of sparsity and number formats, by the name in ``model.sparsity.preset``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qsparse_moe.config.schema import SITES, ActivationFormat, Site


@dataclass(frozen=True)
class Preset:
    """S and the number format of the activations by site; a site that is not listed is dense and not rounded."""

    sparsity: Mapping[Site, float] = field(default_factory=dict)
    formats: Mapping[Site, ActivationFormat] = field(default_factory=dict)


def _a4_8_format(site: Site) -> ActivationFormat:
    return "int4" if site.endswith("_input") else "int8"


PRESETS: dict[str, Preset] = {
    "dense": Preset(),
    # Keeping 70 % at every site matched the dense model (Q-Sparse, arXiv 2407.10969).
    "paper": Preset(sparsity=dict.fromkeys(SITES, 0.3)),
    # 4 bits where activations are nearly normal; 8 bits where they have outliers, with half of them selected at the
    # input of the attention's output projection, and all of them at that of down (BitNet a4.8, arXiv 2411.04965).
    "a4.8": Preset(sparsity={"attention_output": 0.5}, formats={site: _a4_8_format(site) for site in SITES}),
}
