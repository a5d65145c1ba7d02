"""An optional profile of a few steps: a trace of CPU and GPU activity that Perfetto opens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qsparse_moe.config.schema import MetricsConfig
from qsparse_moe.errors import ConfigError

logger = logging.getLogger(__name__)

_ROWS = 40
"""Number of operators in the table."""


class StepProfiler:
    """Profiles the steps selected by ``metrics.profile_from`` and ``metrics.profile_steps``, on one rank.

    It has no cost in other steps.
    """

    def __init__(
        self, config: MetricsConfig, folder: Path, *, start_step: int, device: torch.device, records: bool
    ) -> None:
        """Args: ``start_step`` is the number of completed steps; ``records`` is whether to profile this rank.

        Raises:
            ConfigError: a resumed run is past the steps to profile, and no earlier part of it has profiled them.
        """
        self._first = config.profile_from
        self._last = config.profile_from + config.profile_steps - 1
        self._device = device
        self._trace = folder / "profile" / f"steps-{self._first}-{self._last}.json.gz"
        self._profile: profile | None = None
        # Written by an earlier part of the run.
        done = self._trace.exists()
        self._records = records and config.profile_steps > 0 and not done
        if config.profile_steps and not done and start_step >= self._first:
            raise ConfigError(
                f"metrics.profile_from ({self._first}) must be greater than the step from which the run continues "
                f"({start_step}); profile from step {start_step + 1} or later, or set metrics.profile_steps to 0"
            )

    @property
    def is_on(self) -> bool:
        """True while a step is profiled."""
        return self._profile is not None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile step ``number``, counted from 1, if it is selected."""
        if not self._records or not self._first <= number <= self._last:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=self._activities(), record_shapes=True)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace and a table of operators by self time, if anything was recorded."""
        if self._profile is None:
            return
        # Cleared first: if stopping or writing fails, the call at the end of the run must not repeat it.
        finished, self._profile = self._profile, None
        finished.stop()
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._trace))
        # By the time of the device that does the work; on a GPU the CPU's time is mostly that of launching kernels.
        device = "cuda" if self._device.type == "cuda" else "cpu"
        table = finished.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=_ROWS)
        self._trace.with_name(self._trace.name.removesuffix(".json.gz") + ".txt").write_text(table, encoding="utf-8")
        logger.info("profile of steps %d to %d: %s", self._first, self._last, self._trace)

    def _activities(self) -> list[ProfilerActivity]:
        on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        return [ProfilerActivity.CPU, *on_gpu]
