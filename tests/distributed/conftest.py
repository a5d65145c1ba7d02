"""All runs of this folder in three launches: one rank, two ranks, and one rank that resumes runs of two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsparse_moe.config.schema import DataConfig
from tests.data.conversations import make_chats, save_chat_tokenizer, write_chats
from tests.support.launch import calibration, entry, run_plan
from tests.support.runs import (
    BALANCED_MODEL,
    CAPACITY_MODEL,
    LAYOUTS,
    LOSS_SCALE,
    MIXED_MODEL,
    OFFLOADED,
    STOP_STEP,
    tiny_config,
    write_text,
)

PRECISIONS = ("fp32", "bf16")
EVERY_LAYOUT = [f"{name}-{precision}" for precision in PRECISIONS for name in LAYOUTS]
FP16 = [f"{name}-fp16" for name in LAYOUTS]
OFFLOADS = ["zero1_cpu-fp32", "zero2_cpu-bf16", "zero2_cpu-fp16", "zero3_cpu-fp32", "zero3_cpu-bf16"]
TRAINED = {
    1: [*EVERY_LAYOUT, "torch-fp16", "zero3-fp16", "zero2_cpu-bf16", "zero3_cpu-fp32"],
    2: [*EVERY_LAYOUT, *FP16, *OFFLOADS],
}
"""Layouts by the number of ranks."""
RESUMED = {
    1: ["torch-fp32", "torch-bf16", "torch-fp16", "zero0-bf16", "zero1-fp32", "zero2-bf16", "zero3-fp32"],
    2: [*EVERY_LAYOUT, "zero0-fp16", "zero3-fp16", "zero2_cpu-bf16", "zero2_cpu-fp16", "zero3_cpu-fp32"],
}
"""Layouts that are stopped and resumed, by the number of ranks."""
LATE = {1: "torch-fp32", 2: "zero3-fp32"}
"""The layout that is also stopped in a step after which an evaluation is due, by the number of ranks."""
EVALUATED_STEP = 3

UNEVEN = {1: ["torch-fp32"], 2: ["torch-fp32", "zero2-fp32", "zero3-fp32"]}
"""Layouts that train on conversations, whose micro-batches differ in their numbers of targets, by the number of
ranks."""

MIXED = ["torch-fp32", "torch-bf16", "zero1-bf16", "zero2-fp32", "zero3-fp32"]
"""Layouts of the other model, in which half of the elements end inside a matrix: ZeRO-1 and 2 cut it there."""

FULL = ["torch-fp32", "zero3-fp32"]
"""Layouts of a third model, whose experts drop tokens beyond their capacity."""
BALANCED = ["torch-fp32", "zero1-fp32", "zero2-bf16", "zero3-fp32"]
"""Layouts of the model that balances over ranks and micro-batches, with one micro-batch per rank and step."""
CUT = ["torch-fp32", "zero3-fp32"]
"""Those of them that also split a rank's sequences into micro-batches."""
RECOMPUTED_PARTS = ("full", "selective", "feed_forward")
"""Settings of recomputation under ZeRO-3, which gathers weights layer by layer."""
RECOMPUTED = ("balanced-recomputed", "zero3-fp32")
BALANCED_RESUMED = {1: ("torch-fp32", 2), 2: ("zero3-fp32", 1)}
"""By the number of ranks: the layout that resumes a stopped run, and the ranks of the ``torch-fp32`` that wrote it."""

TRANSFERS = [
    ("torch-fp32", 1, "zero1-fp32", 2),
    ("zero3-fp32", 1, "zero2-fp32", 2),
    ("zero2-bf16", 1, "zero1-bf16", 2),
    ("zero3-fp32", 2, "torch-fp32", 1),
    ("torch-fp32", 2, "zero3-fp32", 1),
    ("zero2-fp32", 2, "zero0-fp32", 1),
    ("zero1-bf16", 2, "zero3-bf16", 1),
    ("zero0-bf16", 2, "zero2-bf16", 1),
    ("torch-fp16", 1, "zero2_cpu-fp16", 2),
    ("zero3-fp32", 1, "zero1_cpu-fp32", 2),
    ("zero3-fp16", 2, "torch-fp16", 1),
    ("zero2_cpu-bf16", 2, "zero3-bf16", 1),
    ("zero3_cpu-fp32", 2, "zero2-fp32", 1),
]
"""Runs that one layout wrote on one number of ranks and another layout resumes on another number."""

FAULTS = {
    "output": ("zero1-fp32", {"place": "output", "layer": 1, "rank": 1}),
    "output-zero3": ("zero3-bf16", {"place": "output", "layer": 0, "rank": 1}),
    "output-torch": ("torch-fp32", {"place": "output", "layer": 1, "rank": 0}),
    "gradient": ("zero2-fp32", {"place": "gradient", "layer": 1, "rank": 1}),
    "parameter": ("zero1-bf16", {"place": "parameter", "layer": 1, "rank": 1}),
    "parameter-zero2": ("zero2-bf16", {"place": "parameter", "layer": 0, "rank": 1}),
    "parameter-torch": ("torch-fp32", {"place": "parameter", "layer": 1, "rank": 0}),
}
"""By label: the layout, and where something stops being finite (see ``tests.support.ranks.broken``)."""
FAULT_STEP = 3
SKIPPED = ["torch-fp32", "torch-bf16", "zero0-fp32", "zero1-fp32", "zero1-bf16", "zero2_cpu-fp32", "zero3-fp32"]
"""Layouts on two ranks that skip the step in which one of the ranks breaks."""

BAD_INPUT = {
    "settings": {"place": "settings", "rank": 1, "training": {"learning_rate": 1e-3, "seed": 3}},
    "full_disk": {"place": "full_disk", "rank": 1},
}
"""By label, on two ranks: what is wrong with one of them (see ``tests.support.ranks.broken``)."""

CALIBRATIONS = {"calibrated": (9, 2**18), "calibrated-thinned": (9, 1024), "calibrated-one-row": (1, 2**18)}
"""By label: training rows (five batches of one rank, or one) and the most magnitudes kept of one place."""


STREAM_STEPS = 20
"""Of the runs that read a stream, one of whose two files holds a record that is no JSON: the file of rank 1."""


class Runs:
    """The results by label and number of ranks, and the folder of the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def __call__(self, label: str, ranks: int) -> dict[str, Any]:
        """Return rank 0's result of a run that succeeded on every rank."""
        for outcome in self.outcomes[label, ranks]:
            assert outcome["error"] is None, outcome["traceback"]
        return self.outcomes[label, ranks][0]

    def folder_of(self, label: str, ranks: int) -> Path:
        """Return the run folder."""
        return self.folder / "runs" / name_of(label, ranks)


def name_of(label: str, ranks: int) -> str:
    return f"{label}-{ranks}"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Files whose tests use it are in ``SHARING_RUNS`` of ``tests/conftest.py``, so that one worker makes the runs."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    write_text(made.folder / "text")
    save_chat_tokenizer(made.folder / "words")
    write_chats(made.folder / "chats.jsonl", make_chats(300))
    plans = [
        (
            1,
            _layouts(made, 1)
            + _variants(made, 1)
            + _balanced(made, 1)
            + _uneven(made, 1)
            + _stopped_and_resumed(made, 1)
            + _calibrations(made),
        ),
        (
            2,
            _layouts(made, 2)
            + _variants(made, 2)
            + _balanced(made, 2)
            + _uneven(made, 2)
            + _balanced_resumed(made, 2)
            + _stopped_and_resumed(made, 2)
            + _faults(made)
            + _bad_input(made)
            + _streams(made)
            + _transfers(made, 2)
            + _calibrations(made),
        ),
        (1, _transfers(made, 1) + _balanced_resumed(made, 1)),
    ]
    for number, (ranks, plan) in enumerate(plans):
        for label, outcomes in run_plan(made.folder / f"launch{number}", plan, ranks=ranks).items():
            made.outcomes[label, ranks] = outcomes
    return made


def _entry(
    made: Runs,
    label: str,
    layout: str,
    ranks: int,
    *,
    training: dict[str, Any],
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    layer_gradients: bool = True,
    **more: Any,
) -> dict[str, Any]:
    engine, precision = layout.split("-")
    # Evaluated in the middle too: ZeRO-3 follows the order of modules, and an evaluation comes in between.
    settings = (LAYOUTS | OFFLOADED)[engine] | {"precision": precision} | training
    settings["evaluation_interval"] = EVALUATED_STEP
    if precision == "fp16":
        settings["loss_scale"] = LOSS_SCALE
    config = tiny_config(made.folder, name_of(label, ranks), model=model, **settings)
    # A window that is full in the step after the stop.
    changes = {"layer_gradients": layer_gradients, "dead_expert_window": STOP_STEP + 1}
    metrics = config.metrics.model_copy(update=changes)
    settings_of_data = DataConfig.model_validate(config.data.model_dump() | (data or {}))
    return entry(label, config.model_copy(update={"metrics": metrics, "data": settings_of_data}), **more)


def _layouts(made: Runs, ranks: int) -> list[dict[str, Any]]:
    return [_entry(made, layout, layout, ranks, training={}) for layout in TRAINED[ranks]]


def _variants(made: Runs, ranks: int) -> list[dict[str, Any]]:
    """Other ways to do the same: larger micro-batches, and recomputation in the backward; and two other models."""
    larger = {"micro_batch_size": 4}
    return [
        _entry(made, "torch-larger", "torch-fp32", ranks, training=larger),
        _entry(made, "zero2-larger", "zero2-fp32", ranks, training=larger),
        _entry(made, "torch-full", "torch-fp32", ranks, training={"activation_checkpointing": "full"}),
        *(
            _entry(made, f"zero3-{mode}", "zero3-fp32", ranks, training={"activation_checkpointing": mode})
            for mode in RECOMPUTED_PARTS
        ),
        *(_entry(made, f"mixed-{layout}", layout, ranks, training={}, model=MIXED_MODEL) for layout in MIXED),
        *(_entry(made, f"capacity-{layout}", layout, ranks, training={}, model=CAPACITY_MODEL) for layout in FULL),
    ]


def _balanced(made: Runs, ranks: int) -> list[dict[str, Any]]:
    """The model that balances over the global batch: whole micro-batches, cut ones, recomputed, and stopped."""
    whole = {"micro_batch_size": 8 // ranks}

    def make(label: str, layout: str, training: dict[str, Any], **more: Any) -> dict[str, Any]:
        return _entry(made, label, layout, ranks, training=training, model=BALANCED_MODEL, **more)

    label, layout = RECOMPUTED
    return [
        *(make(f"balanced-{name}", name, whole) for name in BALANCED),
        *(make(f"balanced-{name}-cut", name, {"micro_batch_size": 2}) for name in CUT),
        make(label, layout, whole | {"activation_checkpointing": "full"}),
        make("balanced-stopped", "torch-fp32", whole, stop_after=STOP_STEP),
    ]


def _uneven(made: Runs, ranks: int) -> list[dict[str, Any]]:
    """Conversations, in micro-batches of two sequences, and of all sequences of a rank where there is one."""
    source = {"kind": "jsonl", "path": str(made.folder / "chats.jsonl"), "format": "chat"}
    data = {"sources": [source], "tokenizer": str(made.folder / "words")}
    made_of = {"data": data, "ranks": ranks}
    whole = [_entry(made, "uneven-whole", "torch-fp32", training={"micro_batch_size": 8}, **made_of)]
    entries = [_entry(made, f"uneven-{layout}", layout, training={}, **made_of) for layout in UNEVEN[ranks]]
    return entries + (whole if ranks == 1 else [])


def _balanced_resumed(made: Runs, ranks: int) -> list[dict[str, Any]]:
    layout, written_by = BALANCED_RESUMED[ranks]
    training = {"resume": True, "micro_batch_size": 8 // ranks}
    copy_of = made.folder_of("balanced-stopped", written_by)
    return [_entry(made, "balanced-resumed", layout, ranks, training=training, model=BALANCED_MODEL, copy_of=copy_of)]


def _stopped_and_resumed(made: Runs, ranks: int) -> list[dict[str, Any]]:
    plan = []
    parts = [(layout, layout, STOP_STEP) for layout in RESUMED[ranks]] + [("late", LATE[ranks], EVALUATED_STEP)]
    for label, layout, step in parts:
        stopped = f"{label}-stopped"
        plan += [
            _entry(made, stopped, layout, ranks, training={}, stop_after=step),
            _entry(
                made,
                f"{label}-resumed",
                layout,
                ranks,
                training={"resume": True},
                # Later steps must be the same where the gradient is not read.
                layer_gradients=False,
                copy_of=made.folder_of(stopped, ranks),
            ),
        ]
    return plan


def transfer_label(source: str, written_by: int, target: str) -> str:
    return f"{source}-of-{written_by}-to-{target}"


def _transfers(made: Runs, ranks: int) -> list[dict[str, Any]]:
    return [
        _entry(
            made,
            transfer_label(source, written_by, target),
            target,
            ranks,
            training={"resume": True},
            copy_of=made.folder_of(f"{source}-stopped", written_by),
        )
        for source, written_by, target, resumed_by in TRANSFERS
        if resumed_by == ranks
    ]


def _calibrations(made: Runs) -> list[dict[str, Any]]:
    """Use the run of one rank in every case, so that two ranks have the same weights."""
    run_dir = made.folder_of("torch-fp32", 1)
    return [
        calibration(label, run_dir, num_sequences=num_sequences, max_values=max_values)
        for label, (num_sequences, max_values) in CALIBRATIONS.items()
    ]


def _faults(made: Runs) -> list[dict[str, Any]]:
    """Runs on two ranks that break in step ``FAULT_STEP``, in the first of the rank's two micro-batches."""
    plan = []
    for label, (layout, fault) in FAULTS.items():
        spoiled = fault | {"forward": 2 * (FAULT_STEP - 1) + 1}
        training = {"checkpoint_interval": 1, "keep_last": 5}
        plan.append(_entry(made, f"fault-{label}", layout, 2, training=training, fault=spoiled))
    output = {"place": "output", "layer": 1, "rank": 1, "forward": 2 * (FAULT_STEP - 1) + 1}
    skipping = {"skip_steps": {"limit": 1, "window": 4}}
    plan += [_entry(made, f"skipped-{layout}", layout, 2, training=skipping, fault=output) for layout in SKIPPED]
    return plan


def _bad_input(made: Runs) -> list[dict[str, Any]]:
    training = {"checkpoint_interval": 1, "keep_last": 9, "steps": 50}
    return [
        _entry(made, f"bad-{label}", "zero2-fp32", 2, training=training, fault=fault)
        for label, fault in BAD_INPUT.items()
    ]


def _streams(made: Runs) -> list[dict[str, Any]]:
    """A stream that skips a bad record, one that ends at it, and the latter resumed with the record allowed."""
    folder = made.folder / "stream"
    folder.mkdir()
    for rank in range(2):
        lines = [json.dumps({"text": f"document {rank} {index} " * 12}) for index in range(45)]
        if rank == 1:
            lines.insert(20, "{oops")
        (folder / f"part-{rank}.jsonl").write_text("\n".join(lines) + "\n")
    source = {"kind": "jsonl", "path": str(folder / "part-*.jsonl")}
    data = {"mode": "streaming", "shuffle": False, "validation_fraction": 0.8, "sources": [source]}

    def make(label: str, *, max_bad_records: int, training: dict[str, Any], **more: Any) -> dict[str, Any]:
        settings = training | {"steps": STREAM_STEPS}
        made_entry = _entry(made, f"stream-{label}", "zero2-fp32", 2, training=settings, **more)
        made_entry["config"]["data"] |= data | {"max_bad_records": max_bad_records}
        return made_entry

    broken = made.folder_of("stream-broken", 2)
    return [
        make("whole", max_bad_records=9, training={}),
        make("broken", max_bad_records=0, training={}),
        make("resumed", max_bad_records=9, training={"resume": True}, copy_of=broken),
    ]
