"""Devices by name: memory, peak rates, and links, from their makers' data sheets; others are described by the user."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qsparse_moe.config.yaml_text import parse_yaml
from qsparse_moe.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One device of a machine, which one rank uses. Rates are peaks, in one direction where there are two."""

    name: str
    memory: float
    """Bytes of its memory."""
    bf16: float
    """FLOP/s of dense products in bf16 and fp16."""
    fp32: float
    """FLOP/s in fp32, without TF32."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second that it sends to the other devices of its node."""
    network: float
    """Bytes per second that it sends to other nodes."""
    host_memory: float
    """Bytes of host memory per device of a node."""
    host_link: float = 25e9
    """Bytes per second between it and the host memory."""
    reserve: float = 3e9
    """Bytes that PyTorch's allocator does not hand out: the context of the driver, the buffers of NCCL, workspaces of
    libraries, and fragmentation. It is an estimate."""
    source: str = "described by the user"
    """Where the figures are published."""

    @property
    def is_host(self) -> bool:
        """Whether its memory is that of the host."""
        return self.name == "cpu"

    def peak_flops(self, precision: str) -> float:
        """Return its peak in the precision of a run."""
        return self.fp32 if precision == "fp32" else self.bf16


# Memory is that of the data sheet, which is a little less than the driver reports. Links are half of the published sum
# of both directions. Networks and host memories are those of the makers' own nodes of 8 (DGX H100: 8 x 400 Gbit/s and
# 2 TB; DGX A100: 8 x 200 Gbit/s and 1 TB), of an ordinary server for L40S, and of a workstation for RTX 4090.
_KNOWN = (
    Device("h100-80gb", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 250e9, 55e9, source="NVIDIA H100 SXM data sheet"),
    Device("h200-141gb", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 250e9, 55e9, source="NVIDIA H200 SXM data sheet"),
    Device("a100-40gb", 40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, 125e9, source="NVIDIA A100 SXM data sheet"),
    Device("a100-80gb", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 125e9, source="NVIDIA A100 SXM data sheet"),
    Device("l40s", 48e9, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9, 64e9, source="NVIDIA L40S data sheet"),
    Device("rtx-4090", 24e9, 165e12, 82.6e12, 1.008e12, 32e9, 1.25e9, 64e9, source="NVIDIA Ada architecture paper"),
    Device("mi300x", 192e9, 1307e12, 163e12, 5.3e12, 448e9, 50e9, 250e9, 55e9, source="AMD MI300X data sheet"),
    # One rank of an ordinary server: two cores with 256-bit vectors. Its memory is that of the host. The reserve is
    # what a process had beyond its tensors after 30 steps of a model of 4 M parameters (docs/lab-log.md, 2026-11-29).
    Device("cpu", 16e9, 60e9, 60e9, 20e9, 10e9, 1.25e9, 16e9, 20e9, 1.6e9, source="an ordinary server, two cores"),
)
KNOWN = {device.name: device for device in _KNOWN}
"""The devices that have a name."""
_REQUIRED = ("memory", "bf16", "bandwidth", "link")
_NUMBERS = tuple(field.name for field in fields(Device) if field.name not in ("name", "source"))
_EXAMPLE = "memory=80e9,bf16=989e12,bandwidth=3.35e12,link=450e9"


def find_device(text: str, *, network: float | None = None) -> Device:
    """Return the device that ``--gpu`` names or describes: a name, ``KEY=NUMBER,...``, or a YAML file of such keys.

    Args:
        text: the option.
        network: bytes per second that it sends to other nodes; None: as it is known or described.

    Raises:
        ConfigError: it is not known, or its description lacks a figure or has one that is not a positive number.
    """
    device = _find_device(text)
    return device if network is None else replace(device, network=network)


def _find_device(text: str) -> Device:
    if text in KNOWN:
        return KNOWN[text]
    if "=" in text:
        pairs = [part.partition("=") for part in text.split(",")]
        return _described(text, {key.strip(): value.strip() for key, _, value in pairs})
    path = Path(text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        found, problems = parse_yaml(path.read_text(encoding="utf-8"), text)
        if problems or not isinstance(found, dict):
            raise ConfigError(f"--gpu ({text}) must be a YAML file with figures by name; {_way_out()}")
        return _described(text, {str(key): value for key, value in found.items()})
    raise ConfigError(f"--gpu ({text}) is not a known device; the known ones are {', '.join(KNOWN)}. {_way_out()}")


def _way_out() -> str:
    optional = ", ".join(name for name in _NUMBERS if name not in _REQUIRED)
    return (
        f"Describe another by its bytes and rates, as --gpu {_EXAMPLE}, or name a YAML file with these keys; "
        f"{optional} are optional"
    )


def _described(text: str, given: Mapping[str, object]) -> Device:
    unknown = [key for key in given if key not in (*_NUMBERS, "name")]
    missing = [key for key in _REQUIRED if key not in given]
    if unknown or missing:
        wrong = f"has no key {unknown[0]}" if unknown else f"lacks {', '.join(missing)}"
        raise ConfigError(f"--gpu ({text}): the description of a device {wrong}; {_way_out()}")
    numbers: dict[str, Any] = {key: _positive(text, key, value) for key, value in given.items() if key != "name"}
    # What is left out is that of a device of the same class, except that fp32 is what most devices have of bf16.
    like = replace(KNOWN["a100-80gb"], fp32=numbers["bf16"] / 16, source="described by the user")
    return replace(like, name=str(given.get("name", "described")), **numbers)


def _positive(text: str, key: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"--gpu ({text}): {key} ({value}) must be a positive number, such as in {_EXAMPLE}")
    return number
