"""Settings of the selection that the tokens of an expert share. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qsparse_moe.config.section import PositiveInt, Section


class SharedSelectionConfig(Section):
    """The sets of features that all tokens of an expert share if selection is shared; ignored otherwise."""

    sets: Literal["average", "step"] = "average"
    """Energies by which a set is chosen in training. average: the running averages of earlier steps, the same in every
    layout; step: those of the expert's tokens in the micro-batch, which depend on its size and on the number of ranks.
    Evaluation and generation always use the running averages, so that no token depends on later ones."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the old value in a running average when a new measurement is added."""
    # Measuring needs the energy of every hidden feature, and with it the whole products with gate and up.
    measure_interval: PositiveInt = 10
    """Number of steps from one measurement of the energies to the next. In the steps between, with sets average and
    gradient masked, the hidden features outside of the set are not computed."""
    products: Literal["gathered", "masked"] = "gathered"
    """Products with the weights of experts and dense layers. gathered: with the selected rows and columns only, at
    their true size; masked: with the whole matrices and zeros, the reference. Attention is always masked."""
