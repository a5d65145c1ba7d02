"""Experts of transformers with two sparse sites, run by a function in transformers' experts interface.

T tokens, A experts per token, N = T * A routed tokens, D width, F hidden width, E experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qsparse_moe.interop.drop_in import runtime
from qsparse_moe.kernels.onednn import torch_gemm
from qsparse_moe.moe.permutation import RoutedTokens, TokenCounts
from qsparse_moe.nn.gated_activation import SparseActivation
from qsparse_moe.nn.sparse_site import SparseSite

IMPLEMENTATION = "qsparse_moe"
"""The name of the function in transformers' experts interface."""
_ATTRIBUTE = "qsparse_experts"


class SparseExperts(nn.Module):
    """The sites of one module of experts, and its forward pass with them. It has no parameters.

    At S = 0 in both sites, transformers' own implementation runs, so that the result has the same bits as without the
    sites.
    """

    def __init__(self, input_site: SparseSite, hidden_site: SparseSite, model_config: Any) -> None:
        super().__init__()
        self.input_site = input_site
        self.hidden_site = hidden_site
        self.model_config = model_config
        """The configuration of the model, which names the implementation that runs at S = 0."""

    def run(self, experts: Any, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Return the output of the experts for every token, ``(T, D)``."""
        if self._selects_all:
            name, own = self.model_config._experts_implementation, type(experts).forward.__wrapped__
            return ALL_EXPERTS_FUNCTIONS.get_interface(name, own)(experts, x_TD, expert_ids_TA, weights_TA)
        if runtime.is_decoding(x_TD):
            return self._run_one_token(experts, x_TD, expert_ids_TA[0], weights_TA)
        permutation = runtime.permutation(x_TD.device.type)
        routed = permutation.sort(expert_ids_TA, experts.num_experts, None)
        # One selection serves all experts of a token if they select alike.
        alike = self.input_site.is_uniform
        x_ND = permutation.permute(self.input_site.select(x_TD).sparse if alike else x_TD, routed)
        if not alike:
            x_ND = self.input_site.select(x_ND, routed.expert_N).sparse
        y_ND = self._between_the_matrices(experts, x_ND, routed)
        return permutation.combine(y_ND, weights_TA, routed).to(x_TD.dtype)

    def _run_one_token(self, experts: Any, x_1D: Tensor, expert_A: Tensor, weights_1A: Tensor) -> Tensor:
        """Compute ``run`` for one token on a CPU without gradients: nothing has to be sorted or counted."""
        ids = expert_A.tolist()
        gate_up_A2F = _products(self._select_inputs(x_1D, expert_A), experts.gate_up_proj, ids)
        y_AD = _products(self._activate(experts, gate_up_A2F, expert_A), experts.down_proj, ids)
        # Added in at least fp32, as combine does.
        wide = torch.promote_types(y_AD.dtype, torch.float32)
        return (weights_1A.to(wide) @ y_AD.to(wide)).to(x_1D.dtype)

    def _select_inputs(self, x_1D: Tensor, expert_A: Tensor) -> Tensor:
        if self.input_site.is_uniform:
            return self.input_site.select(x_1D).sparse.expand(len(expert_A), -1)
        return self.input_site.select(x_1D.repeat_interleave(len(expert_A), 0), expert_A).sparse

    def _between_the_matrices(self, experts: Any, x_ND: Tensor, routed: RoutedTokens) -> Tensor:
        fused, down = experts.gate_up_proj, experts.down_proj
        sizes = experts.hidden_dim, experts.intermediate_dim
        matmul = runtime.expert_backend(x_ND.device.type, fused.dtype, *sizes).matmul
        counts = TokenCounts(routed.tokens_per_expert_E)
        # In the dtype of the weights, as transformers' own functions do: under autocast the two may differ.
        gate_up_N2F = matmul(x_ND.to(fused.dtype), fused.mT, counts)
        hidden_NF = self._activate(experts, gate_up_N2F, routed.expert_N)
        return matmul(hidden_NF.to(down.dtype), down.mT, counts)

    def _activate(self, experts: Any, gate_up_N2F: Tensor, expert_N: Tensor) -> Tensor:
        site = self.hidden_site
        if not isinstance(experts.act_fn, nn.SiLU | SiLUActivation):
            return site.select(experts._apply_gate(gate_up_N2F), expert_N).sparse
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        activation = SparseActivation("swiglu", site, runtime.site_runtime(gate_NF.device.type).fused_glu)
        return activation(gate_NF, up_NF, expert_N, with_stats=False)[0]

    @property
    def _selects_all(self) -> bool:
        # A hook reads the rows of a site, which transformers' own implementation does not show.
        return all(site.selector.selects_all and site.hook is None for site in (self.input_site, self.hidden_site))


def attach(experts: Any, sparse: SparseExperts) -> None:
    """Let ``experts`` run with the sites of ``sparse``, whatever implementation the model's configuration names."""
    # A configuration of its own: one that several models share, or that set_experts_implementation changes later, would
    # turn the sites on or off elsewhere.
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation_internal = IMPLEMENTATION
    experts.add_module(_ATTRIBUTE, sparse)


def detach(experts: Any) -> None:
    """Undo ``attach``; experts without sites stay as they are."""
    sparse = getattr(experts, _ATTRIBUTE, None)
    if sparse is not None:
        experts.config = sparse.model_config
        delattr(experts, _ATTRIBUTE)


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return getattr(experts, _ATTRIBUTE).run(experts, hidden_states, top_k_index, top_k_weights)


def _products(rows_NX: Tensor, weights_EYX: Tensor, ids: list[int]) -> Tensor:
    """Return ``(N, Y)``: each row times the matrix of its expert."""
    rows_NX = rows_NX.to(weights_EYX.dtype)
    out_NY = rows_NX.new_empty(len(ids), weights_EYX.shape[1])
    for row_1X, out_1Y, expert in zip(rows_NX.split(1), out_NY.split(1), ids, strict=True):
        torch_gemm(row_1X, weights_EYX[expert].T, out_1Y)
    return out_NY


# Registered when this module is imported, which unpickling a model with these sites does too.
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
