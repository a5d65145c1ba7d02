"""A grid with a search, two lengths, and further seeds, and the folders that its runs leave."""

from __future__ import annotations

import itertools

from tests.ablation.grid_files import finished_run

SEARCH = """
base: base.yaml
seeds: [0, 1]
best_over: {axis: training.learning_rate, seeds: [5]}
continue_over_steps: true
settings: {training.learning_rate_schedule: constant}
variants: {a: , b: {model.sparsity.default: 0.5}}
axes:
  training.steps: [2, 4]
  training.learning_rate: [0.001, 0.002, 0.004]
comparisons:
  - {name: a below b, source: section 4, order: [a, b]}
"""
# a is best in the middle of the search, b at its end.
LOSS = {
    ("a", 0.001): 3.0,
    ("a", 0.002): 2.0,
    ("a", 0.004): 4.0,
    ("b", 0.001): 9.0,
    ("b", 0.002): 8.0,
    ("b", 0.004): 7.0,
}


def loss_of(run):
    # Longer runs are better by 1, and seeds differ by a hundredth of their number.
    return LOSS[run.entry, run.place["training.learning_rate"]] - run.place["training.steps"] / 2 + run.seed / 100


def stages(grid):
    """The runs of ``grid`` in its order: those of each search, and those of the further seeds after it."""
    keys = itertools.groupby(grid.runs, lambda run: (grid.cell(run), run.entry, run.only_best))
    return [list(stage) for _, stage in keys]


def evaluated(run, steps=None):
    """The line of metrics of an evaluation of ``run`` as ``loss_of`` has it."""
    steps = steps or run.config.training.steps
    return {"step": steps, "tokens": 64 * steps, "validation/loss": 1.0, "validation/bits_per_byte": loss_of(run)}


def fake_children(monkeypatch, grid):
    """Let each child of ``grid`` write the folder that training leaves; return the ids of the runs as they start."""
    started = []
    by_id = {run.id: run for run in grid.runs}

    def child(self, command, log, environment):
        run = by_id[log.name.removesuffix(".log")]
        started.append(run.id)
        finished_run(run, evaluations(grid, run))
        return 0

    monkeypatch.setattr("qsparse_moe.ablation.grid.run.Children.run", child)
    return started


def evaluations(grid, run):
    """The lines of metrics of a run with both lengths, up to that of ``run``."""
    short = next(one for one in grid.runs if one.config.training.name == run.config.training.name)
    return [evaluated(short)] + ([evaluated(run)] if run is not short else [])
