"""Memory in use by this process, and the name of its device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device; empty on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return bytes by name: ``peak_resident``; ``resident`` on Linux; ``allocated`` and ``peak_allocated`` on CUDA."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    memory = {"peak_resident": float(peak if sys.platform == "darwin" else peak * 1024)}
    pages = Path("/proc/self/statm")
    if pages.is_file():
        memory["resident"] = float(int(pages.read_text().split()[1]) * resource.getpagesize())
        # The kernel updates its peak only now and then, so the current value may be above it.
        memory["peak_resident"] = max(memory.values())
    if device.type == "cuda":
        memory["allocated"] = float(torch.cuda.memory_allocated(device))
        memory["peak_allocated"] = float(torch.cuda.max_memory_allocated(device))
    return memory
