"""The expert weights that a decoding step needs, measured on a trained model: the union over the tokens of the step.

A decoding step processes one token of each of B sequences, so the tokens used here are the last ones of different
sequences. The fraction of the experts' weights that B tokens read is averaged over random choices of B sequences and
compared with the formula for independent tokens (``accounting/traffic.py``).

B tokens per step, R sequences, S sequence length, A experts per token, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.router import UNUSED
from qsparse_moe.nn.hooks import site_hooks


@dataclass
class LayerNeeds:
    """The experts and features that the last token of each sequence needs in one MoE layer."""

    experts_RA: Tensor
    """``UNUSED`` for a choice that the token does not use; its features below have no meaning."""
    input_RAD: Tensor
    """Bool: whether each input feature of gate and up is nonzero."""
    gate_RAF: Tensor
    """Bool: whether the activation before the selection is nonzero: up is needed only there if gate comes first."""
    hidden_RAF: Tensor
    """Bool: whether each input feature of down is nonzero."""


@dataclass(frozen=True)
class MeasuredUnion:
    """Fractions of the routed experts' weights that a step of ``batch`` tokens reads: means over layers and draws.

    Each is relative to the weights of all E experts.
    """

    batch: int
    routed: float
    """Fraction of the experts that are chosen by at least one token."""
    input_rows: float
    """Fraction of the rows of gate and up."""
    up_elements: float
    """Fraction of the elements of up if gate is computed first. Equals ``input_rows`` if no activation is zero."""
    hidden_rows: float
    """Fraction of the rows of down."""


def measured_unions(
    model: Transformer, tokens_RS: Tensor, batches: Sequence[int], *, draws: int = 16, seed: int = 0
) -> list[MeasuredUnion]:
    """Return the union over B last tokens of the sequences ``(R, S)``, for every B in ``batches``.

    Args:
        model: is not changed.
        tokens_RS: sequences of text, processed in one forward pass.
        batches: values of B, each at most R.
        draws: number of random choices of B sequences.
        seed: seed of the random choices.
    """
    layers = layer_needs(model, tokens_RS)
    generator = torch.Generator().manual_seed(seed)
    num_experts = model.config.moe.num_experts
    found = []
    for batch in batches:
        assert 1 <= batch <= len(tokens_RS), (batch, len(tokens_RS))
        choices = [torch.randperm(len(tokens_RS), generator=generator)[:batch] for _ in range(draws)]
        shares = [_shares(needs, chosen_B, num_experts) for needs in layers for chosen_B in choices]
        found.append(MeasuredUnion(batch, *torch.stack(shares).mean(0).tolist()))
    return found


@torch.no_grad()
def layer_needs(model: Transformer, tokens_RS: Tensor) -> list[LayerNeeds]:
    """Return the needs of the last token of each sequence for every MoE layer, in order; the model is not changed."""
    recorders = [_Recorder(block.moe) for block in model.blocks() if block.moe is not None]
    hooks = {recorder.moe.input_site: recorder.record_input for recorder in recorders}
    hooks |= {recorder.moe.experts.hidden_site: recorder.record_hidden for recorder in recorders}
    was_training = model.training
    try:
        for recorder in recorders:
            recorder.moe.router.hook = recorder.record_choice
        with site_hooks(hooks):
            # In evaluation mode, as in generation: a capacity drops no token there, and routers have no noise.
            model.eval()(tokens_RS, with_stats=False)
    finally:
        model.train(was_training)
        for recorder in recorders:
            recorder.moe.router.hook = None
    return [recorder.needs(*tokens_RS.shape) for recorder in recorders]


class _Recorder:
    """Hooks that record the experts that one MoE layer chooses and the nonzero features at its two sites."""

    def __init__(self, moe: MoELayer) -> None:
        self.moe = moe
        self._experts_TA = self._input_ND = self._dense_NF = self._hidden_NF = torch.empty(0)

    def record_choice(self, expert_ids_TA: Tensor) -> None:
        """Record the experts of every token."""
        self._experts_TA = expert_ids_TA

    def record_input(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Record the nonzero features of the rows that gate and up read."""
        self._input_ND = sparse != 0
        return sparse

    def record_hidden(self, x: Tensor, expert_ids_N: Tensor | None, sparse: Tensor) -> Tensor:
        """Record the nonzero features before and after the selection in front of down."""
        self._dense_NF, self._hidden_NF = x != 0, sparse != 0
        return sparse

    def needs(self, num_sequences: int, length: int) -> LayerNeeds:
        """Return the needs of the last token of each of ``num_sequences`` sequences."""
        last_R = torch.arange(num_sequences, device=self._experts_TA.device) * length + length - 1
        # The routed tokens are sorted by expert, those of one expert by token (moe/permutation.py): the double argsort
        # finds the row of each choice.
        # The choices that their token does not use come first in this order and have no row: any row serves for them.
        unused = (self._experts_TA == UNUSED).sum()
        row_TA = self._experts_TA.flatten().argsort(stable=True).argsort().view_as(self._experts_TA) - unused
        rows_RA = row_TA[last_R].clamp(min=0)
        return LayerNeeds(
            self._experts_TA[last_R], self._input_ND[rows_RA], self._dense_NF[rows_RA], self._hidden_NF[rows_RA]
        )


def _shares(needs: LayerNeeds, chosen_B: Tensor, num_experts: int) -> Tensor:
    """Return ``(4,)``: the fractions of ``MeasuredUnion`` for one layer and one choice of sequences."""
    experts_N = needs.experts_RA[chosen_B].flatten()
    input_ND, gate_NF, hidden_NF = (
        part[chosen_B].flatten(0, 1).float() for part in (needs.input_RAD, needs.gate_RAF, needs.hidden_RAF)
    )
    routed = input_rows = up_elements = hidden_rows = 0.0
    # An expert that no token chose needs none of its weights, so it adds nothing to the sums.
    for expert in experts_N[experts_N != UNUSED].unique():
        mine = experts_N == expert
        routed += 1.0
        input_rows += input_ND[mine].amax(0).mean().item()
        hidden_rows += hidden_NF[mine].amax(0).mean().item()
        # Element (d, f) of up is needed if some token has both features; a matrix product counts such tokens.
        up_elements += (input_ND[mine].T @ gate_NF[mine] > 0).float().mean().item()
    return torch.tensor([routed, input_rows, up_elements, hidden_rows]) / num_experts
