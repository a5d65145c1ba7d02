"""Peak FLOP/s of devices for model FLOPs utilisation: from NVIDIA's data sheets, dense, without 2:4.

A device that is not in the table has no known peak: MFU is then absent, not guessed.
"""

from __future__ import annotations

# Longer names first, because "H100" is a part of "H100 PCIe" too.
BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("B200", 2250.0),
)
"""TFLOP/s of bf16 and fp16 by a part of the name that CUDA reports; the first match is used. The data sheets
also name twice these figures, for 2:4 sparsity."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the FLOP/s of one device in ``precision`` (``bf16``, ``fp16``, ``fp32``), or None if it is not known."""
    # fp32 has no single peak: it depends on whether TF32 is allowed.
    if precision not in ("bf16", "fp16"):
        return None
    return next((tflops * 1e12 for name, tflops in BF16_TFLOPS if name in device_name), None)
