"""The settings of the rotary frequencies for long sequences. Imports no torch."""

from __future__ import annotations

from typing import Literal

from qsparse_moe.config.section import PositiveFloat, Section, Width


class RopeScalingConfig(Section):
    """Scaled rotary frequencies, for sequences longer than those of the first training."""

    type: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none: the frequencies that rope_theta gives; linear: all of them divided by factor (arXiv 2306.15595); llama3:
    those with a wavelength above original_length / low_frequency_factor divided by factor, those with one below
    original_length / high_frequency_factor unchanged, and a weighted mean of both in between (Llama 3.1); yarn: also
    with beta_slow and beta_fast turns within original_length, blended along the channels, and with larger queries and
    keys (arXiv 2309.00071)."""
    factor: PositiveFloat = 1.0
    """Divisor of the frequencies: length of the sequences over that of the first training."""
    original_length: Width | None = None
    """Number of positions in the first training; for llama3 and yarn only, and then required."""
    low_frequency_factor: PositiveFloat = 1.0
    """Number of turns within original_length below which llama3 divides a frequency by the whole factor."""
    high_frequency_factor: PositiveFloat = 4.0
    """Number of turns within original_length above which llama3 leaves a frequency as it is; larger than
    low_frequency_factor."""
    beta_slow: PositiveFloat = 1.0
    """Number of turns within original_length below which yarn divides a frequency by the whole factor."""
    beta_fast: PositiveFloat = 32.0
    """Number of turns within original_length above which yarn leaves a frequency as it is; larger than beta_slow."""
    attention_factor: PositiveFloat | None = None
    """Factor by which yarn multiplies rotated queries and keys; null: 0.1 ln(factor) + 1."""
    score_factor: PositiveFloat = 1.0
    """Factor by which yarn multiplies the attention scores of latent attention; DeepSeek-V2 and V3 have
    (0.1 m ln(factor) + 1)^2 with their mscale_all_dim m."""
