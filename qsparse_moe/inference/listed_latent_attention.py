"""One decode step of latent attention for the engines that read listed rows; see ``listed_model``.

B sequences (one token each), D width, H heads, P slots of the cache, L rank, R rotated channels, V channels of a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparse_moe.model.latent_attention import LatentAttention
from qsparse_moe.model.rope import Rotation, rotate

Product = Callable[[Tensor], Tensor]
"""Selects the features of rows at a site and multiplies them with the matrix behind it, whose other rows it leaves
out."""


class Fp32Norm:
    """The norm of the training model with its weight in fp32, as its input is."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        self._weight, self._epsilon = norm.weight.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normed ``x``, fp32."""
        return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)


class ListedLatentAttention:
    """Both sparse sites by listed rows; the inner matrices, which have no site, are those of the model, read whole."""

    def __init__(self, attention: LatentAttention, *, down: Product, output: Product) -> None:
        self._part, self._down, self._output = attention, down, output
        norm = attention.query_latent_norm
        self._query_norm = None if norm is None else Fp32Norm(norm)
        self._latent_norm = Fp32Norm(attention.latent_norm)

    def __call__(
        self,
        x_BD: Tensor,
        rotation: Rotation,
        slots_B: Tensor,
        is_visible_BP: Tensor,
        key_B1PX: Tensor,
        value_B1P0: Tensor,
    ) -> Tensor:
        """Return the attention output ``(B, D)`` and store the latent vectors and rotated keys in their slots."""
        part = self._part
        query_BX, latent_BL, rotated_BR = self._down(x_BD).split(part.split, dim=-1)
        if part.query_up is not None and self._query_norm is not None:
            query_BX = part.query_up(self._query_norm(query_BX))
        # One token per sequence: the dim of the tokens, S in training, is 1.
        query_BH1X = part.heads_of_queries(query_BX[:, None], rotation)
        rotated_BR = rotate(rotated_BR[:, None, None], rotation)[:, 0, 0]
        sequences_B = torch.arange(len(x_BD), device=x_BD.device)
        key_B1PX[sequences_B, 0, slots_B] = torch.cat((self._latent_norm(latent_BL), rotated_BR), dim=-1)
        mixed_BH1V = part.attend_to_latents(query_BH1X, key_B1PX, is_visible_BP[:, None, None])
        return self._output(mixed_BH1V.flatten(1))
