"""S and the number format of a site: what a preset, the default, and the setting of the site give, in this order."""

from __future__ import annotations

import pytest

from qsparse_moe.config.model_schema import QuantizationSitesConfig
from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.schema import QuantizationConfig, SitesConfig, SparsityConfig
from qsparse_moe.config.shapes import site_format, site_sparsity

SITES = (
    "attention_input", "attention_output", "expert_input", "expert_hidden", "shared_input", "shared_hidden",
    "dense_input", "dense_hidden",
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "sparsity", "formats"),
    [
        ("dense", [0.0] * 8, ["none"] * 8),
        ("paper", [0.3] * 8, ["none"] * 8),
        ("a4.8", [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ["int4", "int8"] * 4),
    ],
)
def test_values_of_the_published_placements(preset, sparsity, formats):
    settings = SparsityConfig(preset=preset)
    assert [site_sparsity(settings, site) for site in SITES] == sparsity
    assert [site_format(settings, site) for site in SITES] == formats


def test_every_preset_is_listed_above():
    assert list(PRESETS) == ["dense", "paper", "a4.8"]


@pytest.mark.parametrize(
    ("preset", "default", "own", "sparsity"),
    [
        (None, None, None, 0.0),
        ("paper", None, None, 0.3),
        ("paper", 0.6, None, 0.6),
        ("paper", 0.0, None, 0.0),
        ("paper", 0.6, 0.9, 0.9),
        ("paper", 0.6, 0.0, 0.0),
        ("paper", None, 0.0, 0.0),
        (None, 0.6, 0.0, 0.0),
        (None, None, 0.9, 0.9),
    ],
)
def test_s_of_a_site_is_its_own_else_the_default_else_that_of_the_preset(preset, default, own, sparsity):
    settings = SparsityConfig(preset=preset, default=default, sites=SitesConfig(expert_hidden=own))
    assert site_sparsity(settings, "expert_hidden") == sparsity
    others = SparsityConfig(preset=preset, default=default)
    assert site_sparsity(settings, "expert_input") == site_sparsity(others, "expert_hidden")


@pytest.mark.parametrize(
    ("preset", "activations", "own", "chosen"),
    [
        (None, None, None, "none"),
        ("a4.8", None, None, "int8"),
        ("a4.8", "int4", None, "int4"),
        ("a4.8", "none", None, "none"),
        ("a4.8", "none", "int4", "int4"),
        ("a4.8", "int4", "none", "none"),
        (None, None, "int4", "int4"),
    ],
)
def test_the_format_of_a_site_is_its_own_else_that_of_all_else_that_of_the_preset(preset, activations, own, chosen):
    formats = QuantizationConfig(activations=activations, sites=QuantizationSitesConfig(expert_hidden=own))
    assert site_format(SparsityConfig(preset=preset, quantization=formats), "expert_hidden") == chosen
