"""Memory that this process takes up, and the device that it runs on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """What CUDA calls the device; empty on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Bytes by name: ``peak_resident``, ``resident`` where the system tells it, CUDA's ``allocated`` and its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    memory = {"peak_resident": float(peak if sys.platform == "darwin" else peak * 1024)}
    pages = Path("/proc/self/statm")
    if pages.is_file():
        memory["resident"] = float(int(pages.read_text().split()[1]) * resource.getpagesize())
        # The kernel brings its peak up to date now and then only.
        memory["peak_resident"] = max(memory.values())
    if device.type == "cuda":
        memory["allocated"] = float(torch.cuda.memory_allocated(device))
        memory["peak_allocated"] = float(torch.cuda.max_memory_allocated(device))
    return memory
