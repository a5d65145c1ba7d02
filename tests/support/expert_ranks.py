"""Three plain processes that send rows to each other's experts, for tests/moe/test_dispatcher.py.

    python tests/support/expert_ranks.py FOLDER RANK

Every rank writes ``FOLDER/rankN.pt`` with what arrived at it and with its gradients. The inputs come from seeds, so the
test forms them again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.dispatcher import ExpertTokens, start_dispatch
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.runtime import resolve_runtime

P, E, A, D, F = 3, 6, 2, 16, 24

COUNTS: dict[str, list[list[int]]] = {
    "uneven": [[3, 0, 1, 2, 5, 1], [0, 4, 0, 0, 1, 2], [1, 1, 1, 1, 1, 1]],
    "one expert has all": [[0, 0, 0, 4, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 0, 7, 0, 0]],
    "one expert has none": [[2, 1, 0, 1, 3, 1], [1, 2, 0, 3, 1, 1], [1, 1, 0, 1, 2, 2]],
    "one rank has no rows": [[1, 2, 1, 0, 3, 1], [0, 0, 0, 0, 0, 0], [2, 0, 1, 1, 0, 4]],
    "one row in all": [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]],
    "no rows at all": [[0] * E] * P,
}
"""By case and rank: the rows for each expert."""

LAYERS: dict[str, dict[str, Any]] = {
    "loop": {"backend": "loop", "dtype": torch.float64},
    "loop, recomputed": {"backend": "loop", "dtype": torch.float64, "recomputed": True},
    "onednn": {"backend": "onednn", "dtype": torch.float32},
    "grouped": {"backend": "grouped", "dtype": torch.float32},
    "grouped, bf16": {"backend": "grouped", "dtype": torch.bfloat16},
}
TOKENS = [(2, 5), (1, 1), (3, 4)]
"""Sequences and their length by rank: one rank has one token."""
INPUT_SPARSITY, HIDDEN_SPARSITY = [0.0, 0.5, 0.25, 0.75, 0.5, 0.0], [0.9, 0.0, 0.5, 0.25, 0.75, 0.5]


def rows_of(case: str, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's rows and the gradients that come back to what arrives and to what returns."""
    generator = torch.Generator().manual_seed(1000 * list(COUNTS).index(case) + rank)
    arriving = sum(sum(counts[2 * rank : 2 * rank + 2]) for counts in COUNTS[case])
    shapes = [(sum(COUNTS[case][rank]), 3), (arriving, 3), (sum(COUNTS[case][rank]), 3)]
    rows, at_experts, at_home = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    return rows, at_experts, at_home


def expert_of(case: str, rank: int) -> Tensor:
    return torch.arange(E).repeat_interleave(torch.tensor(COUNTS[case][rank]))


def same_next(expert_N: Tensor) -> Tensor:
    """Return a flag per row, True where the next row belongs to the same expert."""
    return torch.cat((expert_N[1:] == expert_N[:-1], torch.zeros(min(1, len(expert_N)), dtype=torch.bool)))


def send(case: str, group: ExpertGroup) -> dict[str, Tensor]:
    rows, at_experts, at_home = rows_of(case, group.rank)
    rows.requires_grad_()
    expert_N = expert_of(case, group.rank)
    counts = torch.tensor(COUNTS[case][group.rank])
    dispatcher = start_dispatch(ExpertTokens(rows, counts, expert_N, same_next(expert_N)), group)
    received = dispatcher.receive()
    returned = dispatcher.combine(received.x_MD * (received.expert_M + 1)[:, None])
    torch.autograd.backward((received.x_MD, returned), (at_experts, at_home))
    return received._asdict() | {"returned": returned.detach(), "grad": rows.grad}


def make_layer(backend: str, dtype: torch.dtype, group: ExpertGroup = ALONE) -> MoELayer:
    """With shared experts and another sparsity in every expert."""
    moe = MoEConfig(
        num_experts=E, experts_per_token=A, expert_hidden_size=F, backend=backend, num_shared_experts=1
    )  # fmt: skip
    config = ModelConfig(hidden_size=D, num_heads=2, moe=moe, sparsity=SparsityConfig(backend="torch"))
    layer = MoELayer(config, resolve_runtime(config, "cpu", expert_group=group))
    initialize(layer, config, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)
    layer.input_site.set_sparsity(INPUT_SPARSITY)
    layer.experts.hidden_site.set_sparsity(HIDDEN_SPARSITY)
    return layer.to(dtype)


def tokens_of(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rank's tokens and the gradient of its output."""
    generator = torch.Generator().manual_seed(rank)
    shape = (*TOKENS[rank], D)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


def through(layer: MoELayer, rank: int, dtype: torch.dtype, *, recomputed: bool = False) -> dict[str, Any]:
    """Output, sums and every gradient of one rank's tokens; the layer's gradients begin at zero."""
    layer.zero_grad()
    x, upstream = tokens_of(rank, dtype)
    x.requires_grad_()
    output = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
    output.y_BSD.backward(upstream)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": output.y_BSD.detach(), "stats": output.stats, "grads": grads, "grad": x.grad}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), P), rank=rank, world_size=P)
    group = ExpertGroup(rank, P, dist.group.WORLD)
    found: dict[str, Any] = {"sent": {case: send(case, group) for case in COUNTS}, "layers": {}}
    for name, settings in LAYERS.items():
        backend, dtype = settings["backend"], settings["dtype"]
        layer = make_layer(backend, dtype, group)
        found["layers"][name] = through(layer, rank, dtype, recomputed="recomputed" in settings)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
