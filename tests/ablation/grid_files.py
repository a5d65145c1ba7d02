"""Grid files of tiny runs, and the folders that such runs leave."""

from __future__ import annotations

import json

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.runs.folder import run_folder

BASE = """
model:
  {hidden_size: 16, num_layers: 1, num_heads: 2, moe: {num_experts: 2, experts_per_token: 2, expert_hidden_size: 16}}
data: {sequence_length: 32, sources: [{max_bytes: 200000}]}
training: {steps: 2, global_batch_size: 2, micro_batch_size: 2, engine: torch, device: cpu, evaluation_rows: 4}
metrics: {interval: 1, tensorboard: false, layer_gradients: true}
"""


GRID = """
base: base.yaml
seeds: [0, 3]
settings: {training.learning_rate: 2.0e-3}
variants:
  dense:
  half: {model.sparsity.default: 0.5}
"""


AXES = """
base: base.yaml
seeds: [0]
axes:
  size:
    small: {model.hidden_size: 16, model.num_layers: 1}
    large: {model.hidden_size: 32, model.num_layers: 2}
  model.moe.num_experts: [2, 4]
  model.sparsity.rescale: [none, unit]
extra_seeds:
  - {seeds: [1], points: [small-E4-*]}
"""


def finished_run(run, rows):
    """The folder of ``run`` as training leaves it, with these lines of metrics."""
    folder = run_folder(run.config)
    (folder / "checkpoints" / f"step-{run.config.training.steps:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
