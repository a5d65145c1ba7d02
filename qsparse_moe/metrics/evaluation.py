"""Results of an evaluation after training in TensorBoard: scalars, heat maps, and curves over a position."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import image

from qsparse_moe.metrics.heatmaps import HeatMap, Scale
from qsparse_moe.metrics.tensorboard import add_described

_POSITIONS = "positions"
"""Folder of the curves over a position; TensorBoard lists it as a run of its own."""


@dataclass(frozen=True)
class EvaluationFigures:
    """What one evaluation adds to TensorBoard, by the names of ``metrics.names``."""

    scalars: Mapping[str, float]
    maps: Mapping[str, tuple[Scale, np.ndarray]] = field(default_factory=dict)
    """Heat maps of layers by experts with their scales; nan where there is no value."""
    layers: Sequence[int] = ()
    """The layers that the rows of the maps show."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Values by position, which replaces the step."""


def write_evaluation(folder: Path, figures: EvaluationFigures, step: int) -> None:
    """Write ``figures`` of the model after ``step`` steps into ``folder``, as a run of its own.

    They replace what the folder holds of this step, so that a repeated evaluation appears once. Those of other steps
    stay, also later ones: a checkpoint may be evaluated after a newer one.
    """
    # A file per step, because an event file can be voided from a step on only.
    suffix = f".step-{step:08d}"
    for earlier in folder.glob(f"events.out.tfevents.*{suffix}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        described: set[str] = set()
        for name, value in figures.scalars.items():
            add_described(writer, "scalars", _scalar(name, value), step, described)
        for name, (scale, values_LE) in figures.maps.items():
            picture = HeatMap(scale, figures.layers, values_LE.shape[1]).draw(values_LE)
            add_described(writer, "images", image(name, picture, dataformats="HWC"), step, described)
    if not figures.curves:
        return
    # Positions are not steps, so a reader could not know which of an earlier file are void.
    shutil.rmtree(folder / _POSITIONS, ignore_errors=True)
    with SummaryWriter(str(folder / _POSITIONS)) as writer:
        described = set()
        for name, points in figures.curves.items():
            for position, value in points:
                add_described(writer, "scalars", _scalar(name, value), position, described)


def _scalar(name: str, value: float) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value)])
