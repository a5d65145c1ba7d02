"""Compare the memory that generation needs with the memory that is free, before any of it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import latent_sizes
from qsparse_moe.errors import ArgumentError
from qsparse_moe.inference.kv_cache import cache_bytes

_CGROUP_FILES = (
    # Version 2 of control groups, then version 1; the limit and what is used of it.
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


class MemoryDtypes(NamedTuple):
    """The dtypes of what generation holds in memory beside the weights."""

    cache: torch.dtype
    """Of keys and values."""
    activations: torch.dtype
    """Of the activations of the prefill."""
    products: torch.dtype
    """Of the products of the prefill, for which activations of another dtype are copied."""


def check_memory(
    config: ModelConfig,
    *,
    batch: int,
    capacity: int,
    longest_prompt: int,
    dtypes: MemoryDtypes,
    device: torch.device,
    has_cache: bool = False,
) -> None:
    """Raise ConfigError if the cache and the prefill of a batch need more memory than ``device`` has free.

    Nothing is checked where the system does not report its free memory. With ``has_cache``, the memory of the cache has
    been taken before.
    """
    free = free_bytes(device)
    cache = 0 if has_cache else cache_bytes(config, batch=batch, capacity=capacity, dtype=dtypes.cache)
    # Prompts of different lengths are padded to the longest.
    prefill = prefill_bytes(config, num_tokens=batch * longest_prompt, dtypes=dtypes)
    if free is None or cache + prefill <= free:
        return
    raise ArgumentError(
        f"{{prompts}} ({batch} in one batch, with up to {capacity} tokens each) need about {_gib(cache + prefill)} of "
        f"memory, {_gib(cache)} of it for keys and values, and {device} has {_gib(free)} free; give fewer prompts at "
        "a time, or lower {max_length} or {max_tokens}"
    )


def prefill_bytes(config: ModelConfig, *, num_tokens: int, dtypes: MemoryDtypes) -> int:
    """Return a rough estimate of the bytes of activations that one layer needs for ``num_tokens`` tokens at once."""
    width, hidden, choices = config.hidden_size, config.moe.expert_hidden_size, config.moe.experts_per_token
    # A rough count of the tensors alive at once: eight of the width, and per expert its input, output and three hidden.
    per_token = (8 * width + _latent_values(config) + choices * (2 * width + 3 * hidden)) * dtypes.activations.itemsize
    if dtypes.products != dtypes.activations:
        # The input and the output of one product of the experts.
        per_token += choices * (width + hidden) * dtypes.products.itemsize
    # Of one layer, because without gradients the activations of a layer are freed before the next one.
    return num_tokens * per_token


def _latent_values(config: ModelConfig) -> int:
    """Return the number of values per token of latent attention, whose heads may be wider than the model together."""
    latent = latent_sizes(config)
    # Query, key, value and result of all heads, padded to one size, and the product that keys and values come from.
    padded = max(latent.query_head_size, latent.value_head_size) if latent else 0
    return config.num_heads * (4 * padded + latent.nope_head_size + latent.value_head_size) if latent else 0


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``; None where the system does not report them."""
    if device.type == "cuda":
        # Memory that the caching allocator has reserved counts as used for CUDA, yet can be allocated again.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    # In a container /proc/meminfo describes the whole machine, and the control group is what limits the process.
    known = [free for free in (_available_memory(Path("/proc/meminfo")), _cgroup_free()) if free is not None]
    return min(known, default=None)


def _available_memory(file: Path) -> int | None:
    if not file.is_file():  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _cgroup_free() -> int | None:
    """Return the bytes left below the limit of this process's control group; its file cache counts as used."""
    for limit_file, used_file in _CGROUP_FILES:
        if limit_file.is_file() and used_file.is_file():
            limit = limit_file.read_text().strip()
            # Version 1 has no "max": without a limit its file holds a huge number, which never is the smaller one.
            return None if limit == "max" else max(0, int(limit) - int(used_file.read_text()))
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
