"""A copy in host memory of the state that a rank saves, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint.tensor_file import TensorSource


class Snapshot:
    """A buffer of host memory that is allocated once and used for every checkpoint of a run.

    Its size is that of the fp32 weights and Adam's two moments that the rank saves: 12 bytes per parameter, divided by
    the number of ranks. On CUDA the memory is pinned. Elsewhere a thread writes zeros into it while the first steps
    run: the system provides each page when it is first written, which would take longer than the first copy itself.
    """

    def __init__(self, num_elements: int, device: torch.device) -> None:
        """Allocate a buffer for copies of ``num_elements`` fp32 values on ``device``.

        Raises:
            CheckpointError: there is not enough memory.
        """
        self._device = device
        try:
            # A device copies to pinned memory twice as fast or better.
            self._buffer = torch.empty(num_elements, pin_memory=device.type == "cuda")
        except RuntimeError as error:  # As torch reports that it cannot allocate.
            raise CheckpointError(
                f"training.checkpoint_async (true) needs {4 * num_elements / 1e9:.3g} GB of host memory for a copy of "
                f"this rank's state, which cannot be allocated ({str(error).splitlines()[0]}). Set "
                "training.checkpoint_async=false, which writes without a copy while training waits, or use more ranks"
            ) from error
        self._zeroing: threading.Thread | None = None
        if device.type != "cuda":
            self._zeroing = threading.Thread(target=self._buffer.zero_, name="snapshot", daemon=True)
            self._zeroing.start()

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """Copy fp32 tensors and return the copies, which are valid until the next call."""
        if self._zeroing is not None:
            self._zeroing.join()
        copies, end = {}, 0
        for name, source in tensors.items():
            start, end = end, end + math.prod(source.shape)
            part = self._buffer[start:end].view(source.shape)
            part.copy_(source.read(), non_blocking=True)
            copies[name] = TensorSource.of(part)
        assert end == len(self._buffer), f"the state has {end} values, and the buffer {len(self._buffer)}"
        if self._device.type == "cuda":
            # The next step overwrites the state.
            torch.cuda.synchronize(self._device)
        return copies
