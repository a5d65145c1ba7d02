"""Which weights real tokens need: routing and masks of a trained model, and their union over the tokens of a step.

A step of generation holds one token of each of B sequences, so the tokens here are the last ones of different rows. The
share of an expert's matrix that B tokens read is averaged over random choices of B among them, to be held against the
formula for independent tokens (``accounting/traffic.py``).

B tokens of a step, R rows, A experts a token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.sparse_site import Selected


@dataclass
class LayerNeeds:
    """What the last token of each row needs in one MoE layer."""

    experts_RA: Tensor
    input_RAD: Tensor
    """bool: which features in front of gate and up are not zero."""
    gate_RAF: Tensor
    """bool: where the activation is not zero before the selection: where up is needed if the gate comes first."""
    hidden_RAF: Tensor
    """bool: which features in front of down are not zero."""


@dataclass(frozen=True)
class MeasuredUnion:
    """Shares of the routed experts' weights that a step of ``batch`` tokens reads, means over layers and draws."""

    batch: int
    routed: float
    """Of experts that some token chose, all."""
    input_rows: float
    """Rows of gate and up."""
    up_elements: float
    """Elements of up, the gate being computed first; its rows where nothing is zero before the selection."""
    hidden_rows: float
    """Rows of down."""


def measured_unions(
    model: Transformer, tokens_RS: Tensor, batches: Sequence[int], *, draws: int = 16, seed: int = 0
) -> list[MeasuredUnion]:
    """The unions over B of the last tokens of the rows ``(R, S)``, for every B of ``batches`` up to R.

    Args:
        model: whose sparse sites run one after the other (``model.sparsity.backend`` torch), so that they can be seen.
        tokens_RS: rows of text, one forward pass.
        batches: each B is at most R.
        draws: random choices of B rows.
        seed: of the draws.
    """
    layers = layer_needs(model, tokens_RS)
    generator = torch.Generator().manual_seed(seed)
    num_experts = model.config.moe.num_experts
    found = []
    for batch in batches:
        assert 1 <= batch <= len(tokens_RS), (batch, len(tokens_RS))
        chosen = [torch.randperm(len(tokens_RS), generator=generator)[:batch] for _ in range(draws)]
        shares = [_shares(needs, rows, num_experts) for needs in layers for rows in chosen]
        found.append(MeasuredUnion(batch, *torch.stack(shares).mean(0).tolist()))
    return found


@torch.no_grad()
def layer_needs(model: Transformer, tokens_RS: Tensor) -> list[LayerNeeds]:
    """What the last token of each row needs in every MoE layer, in order; the model is left as it was."""
    assert model.runtime.sites.fused_glu is None, "a fused pass calls no hook: build with sparsity.backend torch"
    moe_layers = [block.moe for block in model.blocks() if block.moe is not None]
    watches = [_Watch(moe) for moe in moe_layers]
    was_training = model.training
    try:
        model.eval()(tokens_RS, with_stats=False)
    finally:
        model.train(was_training)
        for watch in watches:
            watch.remove()
    return [watch.needs(*tokens_RS.shape) for watch in watches]


@dataclass
class _Watch:
    """Hooks on the parts of one MoE layer that show what passes."""

    moe: MoELayer
    experts_TA: Tensor | None = None
    input_XD: Tensor | None = None
    dense_NF: Tensor | None = None
    hidden_NF: Tensor | None = None
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handles = [
            self.moe.router.register_forward_hook(self._see_router),
            self.moe.experts.hidden_site.register_forward_hook(self._see_hidden),
        ]
        # The layer calls this half of the site's forward by itself where one selection serves all experts of a token.
        choose = self.moe.input_site.choose

        def seen(x: Tensor, expert_ids_N: Tensor | None = None) -> Selected:
            selected = choose(x, expert_ids_N)
            self.input_XD = selected.sparse != 0
            return selected

        self.moe.input_site.__dict__["choose"] = seen

    def _see_router(self, module: torch.nn.Module, inputs: object, routing: tuple[Tensor, ...]) -> None:
        self.experts_TA = routing[1]

    def _see_hidden(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, object]) -> None:
        self.dense_NF, self.hidden_NF = inputs[0] != 0, output[0] != 0

    def needs(self, num_rows: int, length: int) -> LayerNeeds:
        """Of the last token of each of ``num_rows`` rows."""
        assert self.experts_TA is not None and self.input_XD is not None
        assert self.dense_NF is not None and self.hidden_NF is not None
        last_R = torch.arange(num_rows) * length + length - 1
        # The rows are sorted by expert, within an expert by token (moe/dispatch.py).
        row_TA = self.experts_TA.flatten().argsort(stable=True).argsort().view_as(self.experts_TA)
        rows_RA = row_TA[last_R]
        # One selection a token, or one a routed row where the experts differ in K.
        input_row_RA = rows_RA if len(self.input_XD) == row_TA.numel() else last_R[:, None].expand_as(rows_RA)
        input_RAD = self.input_XD[input_row_RA]
        return LayerNeeds(self.experts_TA[last_R], input_RAD, self.dense_NF[rows_RA], self.hidden_NF[rows_RA])

    def remove(self) -> None:
        """Take the hooks away."""
        del self.moe.input_site.__dict__["choose"]
        for handle in self.handles:
            handle.remove()


def _shares(needs: LayerNeeds, rows_B: Tensor, num_experts: int) -> Tensor:
    """``(4,)`` the fields of ``MeasuredUnion`` behind ``batch``, for one layer and one choice of rows."""
    experts_N = needs.experts_RA[rows_B].flatten()
    input_ND, gate_NF, hidden_NF = (
        part[rows_B].flatten(0, 1).float() for part in (needs.input_RAD, needs.gate_RAF, needs.hidden_RAF)
    )
    routed = input_rows = up_elements = hidden_rows = 0.0
    for expert in experts_N.unique():
        mine = experts_N == expert
        routed += 1.0
        input_rows += input_ND[mine].amax(0).mean().item()
        hidden_rows += hidden_NF[mine].amax(0).mean().item()
        # An element (d, f) of up is needed if some token has both; a product of matrices counts those tokens.
        up_elements += (input_ND[mine].T @ gate_NF[mine] > 0).float().mean().item()
    return torch.tensor([routed, input_rows, up_elements, hidden_rows]) / num_experts
