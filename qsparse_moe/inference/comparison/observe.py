"""Record what a comparison reads in one forward pass: logits, hidden states, and the experts of every token.

B sequences, S tokens per sequence, D width, V vocabulary, T = B * S tokens, A experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.data.batch import Batch
from qsparse_moe.model.block import Block
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.training.evaluate import model_forward


@dataclass
class Observation:
    """Logits of one model for one batch, and the values that it computes in each layer."""

    logits_BSV: Tensor
    hidden_BSD: list[Tensor] = field(default_factory=list)
    """Hidden states after each layer."""
    experts_TA: list[Tensor | None] = field(default_factory=list)
    """Experts of each token in each layer, the first choice first; None in a layer without a router."""
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    """Arguments of each layer, the hidden states before it first."""


@torch.no_grad()
def observe(model: Transformer, batch: Batch) -> Observation:
    """Return what ``model``, in evaluation mode, computes for ``batch``."""
    found = Observation(torch.empty(0))
    with ExitStack() as stack:
        for block in model.blocks():
            stack.enter_context(_recorded(block, found))
        found.logits_BSV = model_forward(model)(batch).logits_BSV
    return found


@torch.no_grad()
def observe_locally(model: Transformer, own: Observation, hidden_BSD: Sequence[Tensor]) -> Observation:
    """Return what each layer of ``model`` computes if it reads the hidden states of another model before that layer.

    Args:
        model: the model.
        own: its observation of the same batch.
        hidden_BSD: the hidden states before each layer that replace its own.
    """
    found = Observation(own.logits_BSV)
    for block, arguments, replaced_BSD in zip(model.blocks(), own.inputs, hidden_BSD, strict=True):
        with _recorded(block, found):
            block(replaced_BSD, *arguments[1:])
    return found


@contextmanager
def _recorded(block: Block, found: Observation) -> Iterator[None]:
    """Add what ``block`` reads, chooses, and returns in the forward passes inside to ``found``."""
    router = None if block.moe is None else block.moe.router

    def after(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
        found.inputs.append(arguments)
        found.hidden_BSD.append(output.hidden_BSD)
        if router is None:
            found.experts_TA.append(None)

    handle = block.register_forward_hook(after)
    if router is not None:
        assert router.hook is None, "the router has a hook already"
        router.hook = found.experts_TA.append
    try:
        yield
    finally:
        handle.remove()
        if router is not None:
            router.hook = None
