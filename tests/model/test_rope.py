"""Scaled rotary frequencies, against the definitions written out one frequency at a time."""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.rope import rotary_frequencies, rotation_at, rotation_factor

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


def yarn(index, *, factor, length, slow, fast):
    """Section 3.2 and appendix A.2 of arXiv 2309.00071, with the whole channels of the authors' code."""

    def channel(turns):
        return SIZE * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    first, last = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), SIZE - 1)
    divided = min(1.0, max(0.0, (index - first) / (last - first)))
    return PLAIN[index] * (divided / factor + 1 - divided)


@pytest.mark.parametrize("length", [300, 7, 10**6])
def test_yarn_keeps_the_first_channels_divides_the_last_and_blends_those_between(length):
    settings = {"factor": 8.0, "beta_slow": 0.5, "beta_fast": 20.0, "original_length": length}
    found = rotary_frequencies(config(type="yarn", **settings))
    want = [yarn(index, factor=8.0, length=length, slow=0.5, fast=20.0) for index in range(SIZE // 2)]
    torch.testing.assert_close(found, torch.tensor(want))
    if length == 300:
        ratios = (found / torch.tensor(PLAIN)).tolist()
        assert ratios[0] == 1 and ratios[-1] == pytest.approx(1 / 8)
        assert sum(1 / 8 + 1e-3 < ratio < 1 - 1e-3 for ratio in ratios) >= 2


def test_yarn_of_one_channel_divides_all_after_it():
    # Both ends of the blend are channel 2.
    length = 2 * math.pi * THETA ** (2 * 2 / SIZE)
    settings = {"factor": 4.0, "beta_slow": 0.999999, "beta_fast": 1.0000001, "original_length": round(length)}
    found = rotary_frequencies(config(type="yarn", **settings)) / torch.tensor(PLAIN)
    assert found.tolist() == pytest.approx([1, 1, 1] + [1 / 4] * 5)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"factor": 8.0}, 0.1 * math.log(8) + 1),
        ({"factor": 0.5}, 1.0),
        ({"factor": 8.0, "attention_factor": 0.7}, 0.7),
    ],
)
def test_yarn_multiplies_cosines_and_sines(settings, want):
    scaled = config(type="yarn", original_length=64, **settings)
    assert rotation_factor(scaled) == pytest.approx(want)
    cos, sin = rotation_at(torch.tensor([[0, 5]]), scaled, torch.float64)
    angles = 5 * rotary_frequencies(scaled)
    torch.testing.assert_close(cos[0, 0, 0], torch.full((SIZE // 2,), want, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(cos[0, 0, 1], want * angles.cos().double())
    torch.testing.assert_close(sin[0, 0, 1], want * angles.sin().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_of_far_positions_are_rounded_only_after_the_cosine(dtype):
    scaled = config(type="yarn", original_length=64, factor=8.0)
    positions = torch.tensor([[3001, 4097], [257, 70001]])
    cos, sin = rotation_at(positions, scaled, dtype)
    assert cos.shape == sin.shape == (2, 1, 2, SIZE // 2) and cos.dtype == sin.dtype == dtype
    angles = positions[:, None, :, None].float() * rotary_frequencies(scaled)
    factor = 0.1 * math.log(8) + 1
    assert torch.equal(cos, (angles.cos() * factor).to(dtype))
    assert torch.equal(sin, (angles.sin() * factor).to(dtype))


def test_the_angles_are_those_of_the_scaled_frequencies():
    scaled = config(type="linear", factor=4.0)
    cos, sin = rotation_at(torch.tensor([[0, 8, 12]]), scaled, torch.float64)
    plain_cos, plain_sin = rotation_at(torch.tensor([[0, 2, 3]]), config(), torch.float64)
    torch.testing.assert_close(cos, plain_cos)
    torch.testing.assert_close(sin, plain_sin)
