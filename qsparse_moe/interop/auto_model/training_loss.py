"""The loss of a batch with padding: the router losses count the tokens of the sequences only.

B batch, S sequence, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from qsparse_moe.model.block import BlockOutput
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.losses import balance_terms, router_z_loss
from qsparse_moe.moe.router import Routing


@contextmanager
def recorded_routings(model: Transformer, wanted: bool) -> Iterator[list[Routing]]:
    """Record the routing of every MoE layer, in order, in forward passes inside the context; nothing unless wanted."""
    routings: list[Routing] = []
    routers = model.routers() if wanted else []
    handles = [router.register_forward_hook(lambda _, __, out: routings.append(out)) for router in routers]
    try:
        yield routings
    finally:
        # Before the backward, whose recomputation would record every layer once more.
        for handle in handles:
            handle.remove()


def without_padding(
    outputs: Sequence[BlockOutput], routings: Sequence[Routing], counted_BS: Tensor, scope: str
) -> list[BlockOutput]:
    """Return the outputs of all layers with the terms of the router losses over the tokens that are no padding.

    Args:
        outputs: one per layer, from a forward pass over all tokens.
        routings: one per MoE layer.
        counted_BS: true where a token is no padding.
        scope: ``model.moe.load_balance_scope``.
    """
    groups = len(counted_BS) if scope == "sequence" else 1
    counted_T, remaining = counted_BS.flatten(), iter(routings)
    changed = []
    for output in outputs:
        if output.balance is None:
            changed.append(output)
            continue
        routing = next(remaining)
        balance = balance_terms(routing.probs_TE, routing.expert_ids_TA, groups, counted_T, routing.used_TA)
        z_loss = router_z_loss(routing.logits_TE, counted_T)
        changed.append(output._replace(balance=balance, router_z_loss=z_loss))
    return changed
