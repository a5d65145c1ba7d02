"""Devices by name, and the description of others."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting.devices import KNOWN, find_device
from qsparse_moe.accounting.peaks import BF16_TFLOPS
from qsparse_moe.errors import ConfigError
from tests.support.messages import assert_one_message

DESCRIBED = "memory=80e9,bf16=989e12,bandwidth=3.35e12,link=450e9"


def test_the_table_agrees_with_the_peaks_that_utilisation_is_reported_by():
    peaks = dict(BF16_TFLOPS)
    assert {name: KNOWN[name].bf16 / 1e12 for name in ("h100-80gb", "h200-141gb", "a100-40gb", "a100-80gb")} == {
        "h100-80gb": peaks["H100"],
        "h200-141gb": peaks["H200"],
        "a100-40gb": peaks["A100"],
        "a100-80gb": peaks["A100"],
    }
    assert {"l40s", "rtx-4090", "mi300x", "cpu"} < set(KNOWN)
    assert all(device.source and device.memory > device.reserve for device in KNOWN.values())


def test_a_device_is_described_by_numbers_or_by_a_file(tmp_path):
    described = find_device(f"{DESCRIBED},network=25e9")
    assert (described.memory, described.bf16, described.bandwidth, described.link) == (80e9, 989e12, 3.35e12, 450e9)
    assert described.network == 25e9
    assert described.fp32 == 989e12 / 16
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmemory: 48e9\nbf16: 100e12\nfp32: 50e12\nbandwidth: 1e12\nlink: 32e9\n")
    mine = find_device(str(file))
    assert (mine.name, mine.memory, mine.peak_flops("fp32"), mine.peak_flops("bf16")) == ("mine", 48e9, 50e12, 100e12)
    assert find_device("a100-80gb", network=1e9).network == 1e9
    assert find_device("a100-80gb").network == 25e9


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "h300",
            ["--gpu (h300) is not a known device", "h100-80gb", "cpu", "Describe another", DESCRIBED, "YAML file"],
        ),
        ("memory=80e9", ["--gpu (memory=80e9)", "lacks bf16, bandwidth, link", DESCRIBED]),
        (f"{DESCRIBED},cores=3", ["--gpu (memory", "has no key cores", "network"]),
        (DESCRIBED.replace("80e9", "much"), ["--gpu (memory=much", "memory (much) must be a positive number"]),
        (DESCRIBED.replace("80e9", "-1"), ["--gpu (memory=-1", "memory (-1) must be a positive number"]),
    ],
)
def test_a_message_says_how_to_describe_a_device(text, parts):
    with pytest.raises(ConfigError) as caught:
        find_device(text)
    assert_one_message([str(caught.value)], parts)


def test_a_file_without_figures_is_refused(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"--gpu \(.*list.yaml\) must be a YAML file with figures by name"):
        find_device(str(file))
