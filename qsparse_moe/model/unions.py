"""Which weights real tokens need: routing and masks of a trained model, and their union over the tokens of a step.

A step of generation holds one token of each of B sequences, so the tokens here are the last ones of different rows. The
share of an expert's matrix that B tokens read is averaged over random choices of B among them, to be held against the
formula for independent tokens (``accounting/traffic.py``).

B tokens of a step, R rows, A experts a token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.hooks import site_hooks


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
        model: is left as it was.
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
    """Return what the last token of each row needs in every MoE layer, in order; the model is left as it was."""
    recorders = [_Recorder(block.moe) for block in model.blocks() if block.moe is not None]
    hooks = {recorder.moe.input_site: recorder.record_input for recorder in recorders}
    hooks |= {recorder.moe.experts.hidden_site: recorder.record_hidden for recorder in recorders}
    was_training = model.training
    try:
        for recorder in recorders:
            recorder.moe.router.hook = recorder.record_choice
        with site_hooks(hooks):
            model.eval()(tokens_RS, with_stats=False)
    finally:
        model.train(was_training)
        for recorder in recorders:
            recorder.moe.router.hook = None
    return [recorder.needs(*tokens_RS.shape) for recorder in recorders]


class _Recorder:
    """Records which experts one MoE layer chooses, and which features are not zero at its two sites."""

    def __init__(self, moe: MoELayer) -> None:
        self.moe = moe
        self._experts_TA = self._input_ND = self._dense_NF = self._hidden_NF = torch.empty(0)

    def record_choice(self, expert_ids_TA: Tensor) -> None:
        """Take the experts of the tokens."""
        self._experts_TA = expert_ids_TA

    def record_input(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Take the rows that gate and up read."""
        self._input_ND = sparse != 0
        return sparse

    def record_hidden(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Take the rows before and after the selection in front of down."""
        self._dense_NF, self._hidden_NF = x != 0, sparse != 0
        return sparse

    def needs(self, num_rows: int, length: int) -> LayerNeeds:
        """Return what the last token of each of ``num_rows`` rows needs."""
        last_R = torch.arange(num_rows, device=self._experts_TA.device) * length + length - 1
        # The routed tokens are sorted by expert, those of one expert by token (moe/permutation.py).
        row_TA = self._experts_TA.flatten().argsort(stable=True).argsort().view_as(self._experts_TA)
        rows_RA = row_TA[last_R]
        return LayerNeeds(
            self._experts_TA[last_R], self._input_ND[rows_RA], self._dense_NF[rows_RA], self._hidden_NF[rows_RA]
        )


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
