"""Scaled rotary frequencies, against the definitions written out one frequency at a time."""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.rope import rotary_frequencies, rotation_at

THETA, SIZE = 500.0, 16


def config(**scaling):
    return ModelConfig.model_validate({"head_size": SIZE, "rope_theta": THETA, "rope_scaling": scaling})


PLAIN = [THETA ** (-2 * i / SIZE) for i in range(SIZE // 2)]


def llama3(frequency, *, factor, length, low, high):
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    share = (length / wavelength - low) / (high - low)
    return (1 - share) * frequency / factor + share * frequency


def test_without_scaling_the_frequencies_are_powers_of_the_base():
    torch.testing.assert_close(rotary_frequencies(config()), torch.tensor(PLAIN))


def test_linear_divides_every_frequency():
    found = rotary_frequencies(config(type="linear", factor=2.5))
    torch.testing.assert_close(found, torch.tensor(PLAIN) / 2.5)


def test_llama3_keeps_high_frequencies_divides_low_ones_and_blends_those_between():
    settings = {"factor": 8.0, "low_frequency_factor": 0.5, "high_frequency_factor": 3.0, "original_length": 100}
    found = rotary_frequencies(config(type="llama3", **settings))
    want = [llama3(frequency, factor=8.0, length=100, low=0.5, high=3.0) for frequency in PLAIN]
    torch.testing.assert_close(found, torch.tensor(want))
    ratios = (found / torch.tensor(PLAIN)).tolist()
    # All three cases occur.
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(1 / 8)
    assert sum(1 / 8 + 1e-3 < ratio < 1 - 1e-3 for ratio in ratios) >= 2


def test_the_angles_are_those_of_the_scaled_frequencies():
    scaled = config(type="linear", factor=4.0)
    cos, sin = rotation_at(torch.tensor([[0, 8, 12]]), scaled, torch.float64)
    plain_cos, plain_sin = rotation_at(torch.tensor([[0, 2, 3]]), config(), torch.float64)
    torch.testing.assert_close(cos, plain_cos)
    torch.testing.assert_close(sin, plain_sin)
