"""The runs with sharded experts: references in this process, then one launch of two ranks and one of four."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.byte_tokenizer import write_byte_tokenizer
from tests.interop.stored_models import VOCABULARY, save_qwen3_moe
from tests.support.launch import entry, run_plan
from tests.support.ranks import NOTHING_PERSISTS, run
from tests.support.runs import BALANCED_MODEL, CAPACITY_MODEL, LAYOUTS, MIXED_MODEL, OFFLOADED, tiny_config, write_text

STEPS, STOP_STEP = 3, 2
SHORTEST = 2
"""Number of tokens of the shortest sequence that the data can have."""

MODEL: dict[str, Any] = {
    "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "grouped", "num_shared_experts": 1},
    "sparsity": {
        "default": 0.5,
        "backend": "torch",
        "overrides": [
            {"site": "expert_hidden", "experts": [1, 2], "sparsity": 0.25},
            {"site": "expert_input", "experts": 3, "layers": 1, "sparsity": 0.0},
        ],
    },
}
"""Shared experts, and experts with different sparsities."""

ROUTINGS = {"starved": [1, 1, 2, 3], "one-expert": [2, 2, 2, 2]}
"""Where the rows of each expert go: expert 0 never gets a token; one expert gets all, so that half of the ranks or more
have no row."""
IMPORTED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 16,
    "norm_epsilon": 1e-6,
    "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "grouped", "activation": "swiglu"}
    | {"router": "softmax_topk"},
}
"""The model of a Hugging Face folder, which becomes sparse."""
FEWER: dict[str, Any] = {
    "num_layers": 3,
    "moe": MODEL["moe"] | {"experts_per_token": 3},
    "sparsity": {
        "default": 0.5,
        "backend": "torch",
        "experts_per_token": 2,
        "routing_overrides": [
            {"layers": 1, "experts_per_token": 3, "top_p": 0.6},
            {"layers": 2, "experts_per_token": 0},
        ],
    },
}
"""Two of three experts per token, as many as reach a share of the weight, and none, from layer to layer."""
SHARED: dict[str, Any] = {
    "moe": MODEL["moe"] | {"backend": "loop"},
    "sparsity": MODEL["sparsity"] | {"selection": "shared", "gradient": "masked", "shared": {"measure_interval": 2}},
}
"""Features that an expert's tokens share, as many as S of the expert says, multiplied at their true size."""
MODELS = {
    "fewer": FEWER,
    "shared": SHARED,
    "imported": IMPORTED,
    "balanced": BALANCED_MODEL,
    "capacity": CAPACITY_MODEL,
    "mixed": MIXED_MODEL,
    "initial": BALANCED_MODEL,
}
"""Other models, by kind of run."""
REFERENCES = {
    ("main", "fp32"): "torch-fp32-ep1",
    ("main", "bf16"): "torch-bf16-ep1",
    ("starved", "fp32"): "torch-fp32-ep1",
    ("one-expert", "fp32"): "torch-fp32-ep1",
    ("short", "fp32"): "torch-fp32-ep1",
    ("balanced", "fp32"): "torch-fp32-ep1",
    ("capacity", "fp32"): "torch-fp32-ep1-acc4",  # the capacity of an expert is counted per micro-batch
    ("mixed", "fp32"): "torch-fp32-ep1",
    ("fewer", "fp32"): "torch-fp32-ep1",
    ("shared", "fp32"): "torch-fp32-ep1",
    ("initial", "fp32"): "torch-fp32-ep1",
    ("imported", "fp32"): "torch-fp32-ep1",
    ("overflow", "fp16"): "torch-fp16-ep1-acc1",
}
"""Every kind of run on one rank. ``short``: four rows of two tokens each. ``initial``: starts from the weights of the
``balanced`` one; on four ranks, from those that two ranks with sharded experts wrote. ``imported``: from a Hugging Face
folder. ``overflow``: in the second step
the gradient of one rank's experts is not finite, so all ranks skip it."""

TABLE = {
    2: ["torch-fp32-ep2-acc1", "torch-fp32-ep2-acc2", "zero0-fp32-ep2-acc1", "zero1-fp32-ep2-acc2"]
    + ["zero2-fp32-ep2-acc1", "zero2-fp32-ep2-acc2", "zero3-fp32-ep2-acc1", "zero3-fp32-ep2-acc2"]
    + [f"{engine}-bf16-ep2-acc2" for engine in ("torch", "zero0", "zero1", "zero3")]
    + ["zero1_cpu-fp32-ep2-acc2", "zero3_cpu-bf16-ep2-acc2"],
    4: ["zero0-fp32-ep2-acc2", "zero1-fp32-ep2-acc1", "zero2-fp32-ep2-acc2"]
    + [f"{engine}-fp32-ep4-acc1" for engine in ("zero0", "zero1", "zero2", "zero3")]
    + ["zero1-fp32-ep1-acc2"]
    + ["torch-fp32-ep2-acc1", "zero3-fp32-ep2-acc2", "zero1-bf16-ep2-acc1", "zero3-bf16-ep4-acc1"]
    + ["zero2_cpu-fp32-ep2-acc1"],
}
"""Layouts by the number of ranks: engine, precision, ranks that share the experts, micro-batches of a rank."""

VARIANTS: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {
    ("loop", 2): ("zero2-fp32-ep2-acc2", {"backend": "loop"}),
    ("onednn", 2): ("zero1-fp32-ep2-acc1", {"backend": "onednn"}),
    ("recomputed-torch", 2): ("torch-fp32-ep2-acc1", {"activation_checkpointing": "selective"}),
    ("recomputed-zero2", 2): ("zero2-fp32-ep2-acc1", {"activation_checkpointing": "feed_forward"}),
    ("recomputed-zero3", 2): ("zero3-fp32-ep2-acc2", {"activation_checkpointing": "full"}),
    ("nothing-persists", 2): ("zero3-fp32-ep2-acc2", {"fault": NOTHING_PERSISTS}),
    ("nothing-persists", 4): ("zero3-fp32-ep2-acc1", {"fault": NOTHING_PERSISTS}),
    ("nothing-persists-ep4", 4): ("zero3-bf16-ep4-acc1", {"fault": NOTHING_PERSISTS}),
}
"""Other settings with the same results, by label and number of ranks."""

OTHERS: dict[tuple[str, int], tuple[str, str]] = {
    ("starved-zero1", 2): ("starved", "zero1-fp32-ep2-acc2"),
    ("starved-zero3", 2): ("starved", "zero3-fp32-ep2-acc1"),
    ("one-expert-zero0", 2): ("one-expert", "zero0-fp32-ep2-acc1"),
    ("one-expert-zero2", 2): ("one-expert", "zero2-fp32-ep2-acc2"),
    ("one-expert-zero2", 4): ("one-expert", "zero2-fp32-ep4-acc1"),
    ("short-zero0", 4): ("short", "zero0-fp32-ep4-acc1"),
    ("balanced-zero2", 2): ("balanced", "zero2-fp32-ep2-acc1"),
    ("balanced-zero1", 4): ("balanced", "zero1-fp32-ep4-acc1"),
    ("capacity-zero1", 2): ("capacity", "zero1-fp32-ep2-acc2"),
    ("mixed-zero3", 2): ("mixed", "zero3-fp32-ep2-acc2"),
    ("fewer-zero1", 2): ("fewer", "zero1-fp32-ep2-acc2"),
    ("fewer-zero3", 2): ("fewer", "zero3-fp32-ep2-acc1"),
    ("shared-torch", 2): ("shared", "torch-fp32-ep2-acc2"),
    ("shared-zero2", 2): ("shared", "zero2-fp32-ep1-acc2"),
    ("shared-zero3", 2): ("shared", "zero3-fp32-ep2-acc1"),
    ("mixed-zero0", 4): ("mixed", "zero0-fp32-ep2-acc1"),
    **{(f"initial-zero{stage}", 2): ("initial", f"zero{stage}-fp32-ep2-acc1") for stage in (0, 2, 3)},
    ("initial-torch", 2): ("initial", "torch-fp32-ep2-acc1"),
    ("imported-zero2", 2): ("imported", "zero2-fp32-ep2-acc1"),
    ("imported-zero3", 2): ("imported", "zero3-fp32-ep2-acc1"),
    ("imported-zero3-all-experts", 2): ("imported", "zero3-fp32-ep1-acc2"),
    ("initial-zero1", 4): ("initial", "zero1-fp32-ep4-acc1"),
    ("initial-zero3", 4): ("initial", "zero3-fp32-ep2-acc1"),
    **{(f"overflow-zero{stage}", 2): ("overflow", f"zero{stage}-fp16-ep2-acc2") for stage in range(4)},
    ("overflow-zero2", 4): ("overflow", "zero2-fp16-ep4-acc1"),
}

STOPPED = {1: ["torch-fp32-ep1"], 2: ["zero1-fp32-ep1-acc2", "zero2-fp32-ep2-acc2", "zero3-fp32-ep2-acc2"],
           4: ["zero2-fp32-ep4-acc1"]}  # fmt: skip
TRANSFERS = [
    ("torch-fp32-ep1", 1, "zero0-fp32-ep2-acc2", 2),
    ("torch-fp32-ep1", 1, "zero3-fp32-ep4-acc1", 4),
    ("zero1-fp32-ep1-acc2", 2, "zero3-fp32-ep2-acc1", 2),
    ("zero1-fp32-ep1-acc2", 2, "torch-fp32-ep2-acc1", 4),
    ("zero2-fp32-ep2-acc2", 2, "zero0-fp32-ep1-acc1", 2),
    ("zero2-fp32-ep2-acc2", 2, "zero2-fp32-ep2-acc2", 2),
    ("zero2-fp32-ep2-acc2", 2, "zero1-fp32-ep4-acc1", 4),
    ("zero3-fp32-ep2-acc2", 2, "zero2-fp32-ep2-acc1", 4),
    ("zero2-fp32-ep4-acc1", 4, "torch-fp32-ep1", 1),
]
"""Runs that one layout wrote on one number of ranks and another layout resumes on another number."""

FAULTS = {
    "expert-torch": ("torch-fp32-ep2-acc2", {"place": "expert", "layer": 0, "rank": 1}),
    "expert-zero0": ("zero0-fp32-ep2-acc2", {"place": "expert", "layer": 1, "rank": 1}),
    "expert-zero1": ("zero1-bf16-ep2-acc2", {"place": "expert", "layer": 1, "rank": 1}),
    "expert-zero2": ("zero2-fp32-ep2-acc2", {"place": "expert", "layer": 0, "rank": 1}),
    "expert-zero3": ("zero3-fp32-ep2-acc2", {"place": "expert", "layer": 1, "rank": 1}),
    "output-zero2": ("zero2-fp32-ep2-acc2", {"place": "output", "layer": 1, "rank": 1}),
}
"""On two ranks, in step ``FAULT_STEP``; see ``tests.support.ranks.broken``."""
FAULT_STEP = 2


class ExpertRuns:
    """The results by label and number of ranks, and the folder of the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[tuple[str, int], list[dict[str, Any]]] = {}
        write_text(folder / "text")
        self.hugging_face = save_hugging_face(folder / "hugging-face")
        self._alone([self._entry(f"{kind}-{p}", layout, 1, kind) for (kind, p), layout in REFERENCES.items()])
        self._alone(self._stopped(1))
        for ranks in (2, 4):
            plan = self._table(ranks) + self._stopped(ranks) + self._transfers(ranks)
            plan += self._faults() if ranks == 2 else []
            for label, outcomes in run_plan(folder / f"launch{ranks}", plan, ranks=ranks).items():
                self.outcomes[label, ranks] = outcomes
        self._alone(self._transfers(1))

    def __call__(self, label: str, ranks: int) -> dict[str, Any]:
        """Return rank 0's result of a run that succeeded on every rank."""
        for outcome in self.outcomes[label, ranks]:
            assert outcome["error"] is None, outcome["traceback"]
        return self.outcomes[label, ranks][0]

    def reference(self, kind: str, precision: str = "fp32") -> tuple[dict[str, Any], Path]:
        """Return the result of the plain engine on one rank, and its run folder."""
        label = f"{kind}-{precision}"
        return self(label, 1), self.folder_of(label, 1)

    def folder_of(self, label: str, ranks: int) -> Path:
        """Return the run folder."""
        return self.folder / "runs" / f"{label}-{ranks}"

    def _alone(self, plan: list[dict[str, Any]]) -> None:
        for item in plan:
            if item["copy_of"]:
                shutil.copytree(item["copy_of"], self.folder_of(item["label"], 1))
            settings = {key: item[key] for key in ("label", "config", "stop_after", "fault")}
            self.outcomes[item["label"], 1] = [run(**settings)]

    def _table(self, ranks: int) -> list[dict[str, Any]]:
        plan = [self._entry(layout, layout, ranks) for layout in TABLE[ranks]]
        plan += [self._entry(v, layout, ranks, **m) for (v, on), (layout, m) in VARIANTS.items() if on == ranks]
        return plan + [self._entry(e, layout, ranks, kind) for (e, on), (kind, layout) in OTHERS.items() if on == ranks]

    def _stopped(self, ranks: int) -> list[dict[str, Any]]:
        return [self._entry(f"{layout}-stopped", layout, ranks, stop_after=STOP_STEP) for layout in STOPPED[ranks]]

    def _transfers(self, ranks: int) -> list[dict[str, Any]]:
        return [
            self._entry(
                transfer_label(source, written_by, target),
                target,
                ranks,
                resume=True,
                copy_of=self.folder_of(f"{source}-stopped", written_by),
            )
            for source, written_by, target, resumed_by in TRANSFERS
            if resumed_by == ranks
        ]

    def _faults(self) -> list[dict[str, Any]]:
        return [
            self._entry(
                f"fault-{label}", layout, 2, checkpoint_interval=1, fault=fault | {"forward": 2 * (FAULT_STEP - 1) + 1}
            )
            for label, (layout, fault) in FAULTS.items()
        ]

    def _entry(self, label: str, layout: str, ranks: int, kind: str = "main", **more: Any) -> dict[str, Any]:
        engine, precision, experts_over, *accumulation = layout.split("-")
        rows = 4 if kind == "short" else 8
        model = MODELS.get(kind, MODEL)
        if "backend" in more:
            model = model | {"moe": model["moe"] | {"backend": more.pop("backend")}}
        of_entry = {key: more.pop(key) for key in ("fault", "stop_after", "copy_of") if key in more}
        if kind in ROUTINGS:
            of_entry["fault"] = {"place": "routing", "experts": ROUTINGS[kind]}
        if kind == "overflow":
            second = int(accumulation[0][3:]) + 1
            of_entry["fault"] = {"place": "expert", "layer": 1, "rank": min(1, ranks - 1), "forward": second}
            more["loss_scale"] = {"initial_power": 12, "hysteresis": 1}
        if kind == "initial":
            source = ("balanced-zero2", 2) if ranks == 4 else ("balanced-fp32", 1)
            more["init_from"] = str(self.folder_of(*source))
        if kind == "imported":
            more["init_from"] = str(self.hugging_face)
        training = (LAYOUTS | OFFLOADED)[engine] | {
            "steps": STEPS,
            "precision": precision,
            "expert_parallel_size": int(experts_over[2:]),
            "global_batch_size": rows,
            "micro_batch_size": rows // ranks // int(accumulation[0][3:]) if accumulation else rows,
            # A larger one, so that a weight whose gradient is all rounding does not take whole steps.
            "epsilon": 1e-4,
        }
        config = tiny_config(self.folder, f"{label}-{ranks}", model=model, **(training | more))
        settings = config.model_dump(mode="json")
        settings["metrics"]["layer_gradients"] = True
        if kind == "shared":
            # A step that is reported multiplies with whole matrices, so only the last one is.
            settings["metrics"]["interval"] = STEPS
        if kind == "short":
            settings["data"]["sequence_length"] = SHORTEST
        return entry(label, RunConfig.model_validate(settings), **of_entry)


def save_hugging_face(folder: Path) -> Path:
    """Return the folder of a Hugging Face model, with bytes as its tokens."""
    save_qwen3_moe(folder, num_layers=2, num_experts=4, hidden=24, width=40)
    write_byte_tokenizer(folder)
    return folder


def transfer_label(source: str, written_by: int, target: str) -> str:
    return f"{source}-of-{written_by}-to-{target}"
