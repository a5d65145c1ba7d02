"""Cost of a run: the accounting with the zeros that its logged steps measured, summed over the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.accounting.densities import Densities, measured_densities
from qsparse_moe.accounting.flops import training_flops
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.accounting.peaks import peak_flops
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.runs.report import RunContext, StepReport
from qsparse_moe.sparsity.plan import SparsityPlan

BATCHES = (1, 16)
"""Batch sizes of a generation step for which the bytes of weights are recorded."""
_NEEDED_SO_FAR = "efficiency/total_kept_training_flops"
_EXECUTED_SO_FAR = "efficiency/total_training_flops"


class Efficiency:
    """Computes the metrics ``efficiency/...`` and the utilisation of one run."""

    def __init__(self, context: RunContext, last_row: Mapping[str, Any] | None = None) -> None:
        """Continue the sum of ``last_row``, the last logged step before the start, unless a state is loaded."""
        self._config: RunConfig = context.config
        self._context = context
        model, length = self._config.model, self._config.data.sequence_length
        # The products of training are dense within the experts that routing chose, whatever S is.
        self._executed = training_flops(model, length).routed
        self._active = count_parameters(model).active
        plan = SparsityPlan.from_config(model)
        self._measures_experts = bool(plan.experts_per_token or plan.top_p)
        # Without a logged step before, those before it are taken for steps of the plan.
        before = self._executed * context.start_tokens
        self._executed_so_far = float((last_row or {}).get(_EXECUTED_SO_FAR) or before)
        # The steps between the last logged one and a checkpoint are added with the next logged step.
        self._tokens = int((last_row or {}).get("tokens", context.start_tokens))
        self._needed_so_far = float((last_row or {}).get(_NEEDED_SO_FAR) or 0.0)
        self._peak = self._find_peak()

    def __call__(self, report: StepReport, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of one logged step, computed from its other ``metrics``.

        Metrics that depend on the zeros are absent if the zeros of a site were not measured.
        """
        densities = measured_densities(self._config.model, metrics)
        if densities is not None and self._measures_experts:
            self._count_experts(report, densities)
        else:
            self._executed_so_far = float(self._executed) * report.tokens
        found = {
            "efficiency/active_parameters": float(self._active),
            "efficiency/training_flops_per_token": float(self._executed),
            _EXECUTED_SO_FAR: self._executed_so_far,
        }
        if densities is not None:
            found |= self._without_zeros(report, densities)
        # A peak that is not known is not guessed, so the metric is absent on a CPU without the setting.
        if self._peak is not None:
            flops_per_second = self._executed * report.tokens_per_second
            found["throughput/model_flops_utilisation"] = flops_per_second / (self._peak * self._context.world_size)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the sum, and how many tokens are in it; JSON-able."""
        return {
            "total_kept_training_flops": self._needed_so_far,
            "total_training_flops": self._executed_so_far,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._needed_so_far, self._tokens = state["total_kept_training_flops"], state["tokens"]
        # Checkpoints of earlier versions lack it, and no plan of theirs had experts per token.
        self._executed_so_far = state.get("total_training_flops", 0.0)

    def _count_experts(self, report: StepReport, densities: Densities) -> None:
        """Take the experts that the tokens of this step used for the steps since the previous logged one."""
        model, length = self._config.model, self._config.data.sequence_length
        self._executed = training_flops(model, length, densities=densities).routed
        self._active = count_parameters(model, densities=densities).active
        self._executed_so_far += self._executed * (report.tokens - self._tokens)

    def _without_zeros(self, report: StepReport, densities: Densities) -> dict[str, float]:
        """Return what would be left of the cost if every zero were skipped."""
        model, length = self._config.model, self._config.data.sequence_length
        needed = training_flops(model, length, densities=densities).needed
        # The zeros of a logged step are taken for the steps since the previous one, which measure none.
        self._needed_so_far += needed * (report.tokens - self._tokens)
        self._tokens = report.tokens
        # fp16 and bf16 both take two bytes.
        bytes_per_weight = 4.0 if self._config.training.precision == "fp32" else 2.0
        read = {
            f"efficiency/weight_bytes_{batch}": total_traffic(
                weight_traffic(model, batch, densities, bytes_per_weight=bytes_per_weight)
            ).needed
            for batch in BATCHES
        }
        return read | {
            "efficiency/kept_parameters": count_parameters(model, densities=densities).needed,
            "efficiency/kept_training_flops_per_token": needed,
            _NEEDED_SO_FAR: self._needed_so_far,
        }

    def _find_peak(self) -> float | None:
        # A setting first: the table of peaks knows few devices, and none of a CPU.
        given = self._config.metrics.peak_tflops
        if given is not None:
            return given * 1e12
        return peak_flops(self._context.device_name, self._config.training.precision)
