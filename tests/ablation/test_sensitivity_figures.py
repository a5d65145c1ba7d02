"""The maps of sensitivities, and the table of the costliest cells."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.sensitivity.figures import sensitivity_drawings
from qsparse_moe.ablation.sensitivity.measure import CellChange, measure
from qsparse_moe.ablation.sensitivity.report import costliest_rows
from tests.ablation.small_models import config, model_of, rows_of


def test_maps_of_all_sites_share_one_scale_have_a_bar_with_the_unit_and_hatch_cells_whose_interval_contains_0():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=6)
    found = measure(model, rows, (0.25, 0.5, 0.75), draws=50)
    figures = {name: drawing.figure for name, drawing in sensitivity_drawings(found).items() if name.startswith("map-")}
    assert len(figures) == 4
    ends, hatched = set(), {}
    for name, figure in figures.items():
        *panels, bar = figure.axes
        assert [axis.get_title() for axis in panels] == [
            "S=0.5",
            "S=0.75",
        ] and "1/1000 nats per token" in bar.get_ylabel()
        ends |= {(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in panels}
        for axis, value in zip(panels, (0.5, 0.75), strict=True):
            for patch in axis.patches:
                place = round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)
                hatched.setdefault((name.removeprefix("map-"), value), set()).add(place)
    ((low, high),) = ends
    assert -low == high == pytest.approx(1000 * max(abs(point.exact) for point in found.changes))
    noise = {}
    for point in found.changes:
        if point.exact_interval[0] <= 0 <= point.exact_interval[1]:
            noise.setdefault((point.cell.site, point.sparsity), set()).add((point.cell.layer, point.cell.expert or 0))
    assert hatched == noise and 0 < sum(map(len, noise.values())) < len(found.changes)


def test_a_map_of_estimates_marks_noise_by_the_intervals_of_the_estimates():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=6)
    found = measure(model, rows, (0.75,), exact=False, draws=50)
    axis = sensitivity_drawings(found)["map-expert_hidden"].figure.axes[0]
    own = [point for point in found.changes if point.cell.site == "expert_hidden"]
    assert len(axis.patches) == sum(p.estimate_interval[0] <= 0 <= p.estimate_interval[1] for p in own)
    values = np.asarray(axis.images[0].get_array())
    for point in own:
        assert values[point.cell.layer, point.cell.expert] == pytest.approx(1000 * point.estimate)


def test_an_interval_that_ends_at_0_decides_nothing_and_every_cell_is_listed_at_its_costliest_s():
    cells = [Cell(layer, "expert_hidden", None) for layer in range(12)]

    def change(cell, sparsity, exact, interval):
        return CellChange(cell, sparsity, 2 * exact, interval, exact, exact, interval, None)

    edges = [change(cells[0], 0.5, 0.1, ends) for ends in ((0.0, 0.2), (-0.2, 0.0), (0.01, 0.2), (-0.2, -0.01))]
    assert [one.is_decided for one in edges] == [False, False, True, True]
    changes = [change(cell, s, s * (1 + layer), (0.0, 1.0)) for layer, cell in enumerate(cells) for s in (0.75, 0.5)]
    rows = costliest_rows(SimpleNamespace(changes=changes))
    assert [(row[0], row[1]) for row in rows] == [(cell.name, "0.75") for cell in cells[:1:-1]]
    assert rows[0][2:] == ("+18.0000 (+0.0000 to +1.0000)", "+9.0000 (+0.0000 to +1.0000)")
