"""Build the engine of every layout on the launcher's ranks, and write which weights it has and what was drawn.

deepspeed --num_gpus 2 tests/distributed/start_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from qsparse_moe.bench.start import measure_start
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model import init
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.start import start_engine
from tests.support.runs import LAYOUTS, MIXED_MODEL, OFFLOADED, tiny_config

LARGE: dict[str, Any] = {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "head_size": 64, "vocab_size": 512}
LARGE_EXPERTS = {"num_experts": 8, "expert_hidden_size": 256, "backend": "grouped"}
"""13.9 million parameters: 56 MB in fp32."""


def config_of(folder: Path, layout: str) -> RunConfig:
    """The run of a layout such as ``zero3-bf16-ep2``, of the mixed model, half of whose partitions end in a matrix."""
    engine, precision, experts = layout.split("-")
    settings = (LAYOUTS | OFFLOADED)[engine] | {"precision": precision, "expert_parallel_size": int(experts[2:])}
    moe = MIXED_MODEL["moe"] | {"backend": "grouped"}
    return tiny_config(folder, layout, model=MIXED_MODEL | {"moe": moe}, **settings)


def built(config: RunConfig, distributed: Distributed) -> dict[str, Any]:
    """The number of values that this rank has drawn, and the names of weights that differ from those of one rank."""
    want = build_model(config.model, seed=config.training.seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]
    drawn: list[int] = []
    fill = init.fill_normal

    def count(seed: int, name: str, start: int, out: torch.Tensor, *, std: float) -> None:
        drawn.append(len(out))
        fill(seed, name, start, out, std=std)

    with mock.patch.object(init, "fill_normal", count):
        engine = start_engine(config, distributed)
    differing = []
    for name, parameter in want.named_parameters():
        held = engine.held_range(name)
        values = parameter.detach().flatten()[held.start : held.stop].to(dtype).float()
        # A partition of ZeRO-3 may be padded.
        if not torch.equal(engine.held(name, "weight").flatten()[: len(held)], values):
            differing.append(name)
    engine.close()
    return {"drawn": sum(drawn), "differing": differing}


def main(folder: Path, layouts: list[str]) -> None:
    """Build all layouts, and the large model after them, when everything that is loaded once has its memory."""
    torch.set_num_threads(1)
    rank, outcome = os.environ.get("RANK", "0"), {}
    for layout in layouts:
        config = config_of(folder, layout)
        with open_distributed("cpu", timeout=120) as distributed:
            outcome[layout] = built(config, distributed)
    large = {"model": LARGE | {"moe": LARGE_EXPERTS}, **LAYOUTS["zero3"]}
    with open_distributed("cpu", timeout=120) as distributed:
        engine, outcome["memory"] = measure_start(tiny_config(folder, "large", **large), distributed)
        engine.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1].split(","))
