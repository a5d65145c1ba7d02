"""Store matrices for the decode engines: input-major, padded, in one of four number formats.

Every matrix behind a sparse site is stored with one row per input feature, so that the row of a zero feature is never
read. Letters: E matrices of a stack, D input features (rows), O outputs (columns).
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from qsparse_moe.sparsity.quantize import quantize

WeightFormat = Literal["fp32", "bf16", "int8", "ternary"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

# Columns to whose multiple a row is padded, so that the loops of row_product.h have no remainder: 32 are their step, 64
# a line of int8 codes in integer_product.h, and 256 a block of ternary codes.
_COLUMN_GRAIN = {"fp32": 32, "bf16": 32, "int8": 64, "ternary": 256}
_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "ternary": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# 32-bit values in a vector of AVX-512, and codes of 2 bits in a 32-bit word.
_LANES = 16
# Without -128, so that the codes are symmetric around 0 as the scale max|row| / 127 assumes.
_INT8_LARGEST = 127


@dataclass(frozen=True)
class StoredWeights:
    """A matrix ``(D, O)``, or a stack of E of them, as rows of bytes."""

    data: Tensor
    """``(E * D, bytes per row)`` uint8; columns beyond O are zeros."""
    scales: Tensor
    """fp32: one per row ``(E * D,)`` for int8, one per matrix ``(E,)`` for ternary, else empty."""
    weight_format: WeightFormat
    num_rows: int
    """D."""
    num_columns: int
    """O."""
    bytes_before: int | None = None
    """Bytes of one matrix before rows and columns were left out; None: none were."""

    @property
    def num_matrices(self) -> int:
        """E."""
        return len(self.data) // self.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows and scales."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def whole_bytes(self) -> int:
        """Bytes of the rows of one matrix, with those that were left out."""
        return self.num_rows * self.data.shape[1] if self.bytes_before is None else self.bytes_before

    def keep(self, rows_EK: Tensor | None, columns_EK: Tensor | None) -> StoredWeights:
        """Return a copy with some rows and columns of every matrix; the codes and scales stay what they are.

        Args:
            rows_EK: int64, as many of each matrix; None: all.
            columns_EK: likewise.
        """
        codes_EDO = self._codes().unflatten(0, (-1, self.num_rows))
        scales = self.scales
        if rows_EK is not None:
            matrix_E1 = torch.arange(len(rows_EK))[:, None]
            codes_EDO = codes_EDO[matrix_E1, rows_EK]
            if self.weight_format == "int8":
                scales = scales.unflatten(0, (-1, self.num_rows))[matrix_E1, rows_EK].flatten()
        if columns_EK is not None:
            codes_EDO = codes_EDO.gather(2, columns_EK[:, None].expand(-1, codes_EDO.shape[1], -1))
        data = _packed(codes_EDO.flatten(0, 1), self.weight_format)
        _, num_rows, num_columns = codes_EDO.shape
        return StoredWeights(data, scales, self.weight_format, num_rows, num_columns, self.whole_bytes)

    def _codes(self) -> Tensor:
        """Return ``(E * D, O)`` in the dtype that is stored; ternary: codes 0, 1, 2."""
        if self.weight_format == "ternary":
            return _unpack_ternary(self.data)[:, : self.num_columns]
        return self.data.view(_DTYPES[self.weight_format])[:, : self.num_columns]

    def to(self, device: torch.device) -> StoredWeights:
        """Return the same stored weights in the memory of ``device``."""
        return replace(self, data=self.data.to(device), scales=self.scales.to(device))


def store(weights: Tensor, weight_format: WeightFormat) -> StoredWeights:
    """Return ``weights`` stored in a number format.

    * fp32, bf16: the values, rounded to it.
    * int8: codes in [-127, 127] and one scale per row, ``max|row| / 127``.
    * ternary: the codes of ``sparsity.quantize`` in 2 bits each, and one scale per matrix.

    Args:
        weights: ``(D, O)`` or ``(E, D, O)``, input-major.
        weight_format: the number format.

    Raises:
        ValueError: a value is not finite in a format with scales.
    """
    stack_EDO = weights.detach() if weights.dim() == 3 else weights.detach()[None]
    _, num_rows, num_columns = stack_EDO.shape
    rows_NO, scales = _encode(stack_EDO, weight_format)
    return StoredWeights(_packed(rows_NO, weight_format), scales, weight_format, num_rows, num_columns)


def _packed(rows_NO: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return values of ``_encode`` as padded rows of bytes."""
    num_columns, grain = rows_NO.shape[1], _COLUMN_GRAIN[weight_format]
    stored_columns = -(-num_columns // grain) * grain
    data = _huge_pages(len(rows_NO), stored_columns * _BITS[weight_format] // 8)
    if weight_format == "ternary":
        _pack_ternary(rows_NO, data)
    else:
        columns = data.view(rows_NO.dtype)
        columns[:, :num_columns] = rows_NO
        columns[:, num_columns:] = 0
    return data


def with_scales_per_output(weights_OD: Tensor) -> tuple[StoredWeights, Tensor]:
    """Return int8 codes of an output-major matrix as ``(D, O)`` rows whose scales are 1, and the scales ``(O,)``.

    The codes are those of ``store(weights_OD, "int8")``, whose scale belongs to an output: it multiplies the product.
    """
    by_output = store(weights_OD, "int8")
    num_outputs, num_features = weights_OD.shape
    grain = _COLUMN_GRAIN["int8"]
    # Zeros, because the kernels read the padding as well.
    data = torch.zeros(num_features, -(-num_outputs // grain) * grain, dtype=torch.int8)
    data[:, :num_outputs] = by_output.data.view(torch.int8)[:, :num_features].T
    codes = StoredWeights(data.view(torch.uint8), torch.ones(num_features), "int8", num_features, num_outputs)
    return codes, by_output.scales


def load_dense(stored: StoredWeights, which: int = 0) -> Tensor:
    """Return matrix ``which`` of the stack as ``(D, O)`` fp32: the values that the engine multiplies with."""
    rows = stored.data[which * stored.num_rows : (which + 1) * stored.num_rows]
    if stored.weight_format == "ternary":
        codes = _unpack_ternary(rows)[:, : stored.num_columns]
        return (codes.float() - 1) * stored.scales[which]
    values = rows.view(_DTYPES[stored.weight_format])[:, : stored.num_columns].float()
    if stored.weight_format == "int8":
        values *= stored.scales[which * stored.num_rows : (which + 1) * stored.num_rows, None]
    return values


def _encode(stack_EDO: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Return ``(E * D, O)`` in the dtype that is stored (ternary: codes 0, 1, 2 as uint8), and the scales."""
    no_scales = torch.empty(0, dtype=torch.float32)
    if weight_format == "fp32":
        return stack_EDO.flatten(0, 1).float(), no_scales
    if weight_format == "bf16":
        return stack_EDO.flatten(0, 1).bfloat16(), no_scales
    if not stack_EDO.isfinite().all():
        raise ValueError(f"weights must be finite to be stored as {weight_format}")
    if weight_format == "int8":
        rows_NO = stack_EDO.flatten(0, 1).float()
        scales_N = rows_NO.abs().amax(-1) / _INT8_LARGEST
        # Clamped, because a row of zeros has a scale of 0.
        codes_NO = (rows_NO / scales_N.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        return codes_NO.clamp_(-_INT8_LARGEST, _INT8_LARGEST).to(torch.int8), scales_N
    codes, scale = quantize(stack_EDO, "ternary")
    return (codes + 1).to(torch.uint8).flatten(0, 1), scale.flatten().float()


def _pack_ternary(codes_NO: Tensor, data: Tensor) -> None:
    """Write codes of 2 bits into ``data``: in a block of 256 columns, word w holds column 16 s + w at bit 2 s."""
    grain = _COLUMN_GRAIN["ternary"]
    padding = -codes_NO.shape[1] % grain
    # Padded with code 1, which encodes a weight of 0.
    codes_NO = torch.nn.functional.pad(codes_NO, (0, padding), value=1)
    fields = codes_NO.unflatten(1, (-1, _LANES, _LANES)).to(torch.int32)
    shifts = torch.arange(0, 2 * _LANES, 2, dtype=torch.int32)[:, None]
    # The bits do not overlap, so their sum is their union; int32 wraps round into the sign bit as it should.
    words = (fields << shifts).sum(2, dtype=torch.int32)
    data.view(torch.int32).copy_(words.flatten(1))


def _unpack_ternary(rows: Tensor) -> Tensor:
    words = rows.view(torch.int32).unflatten(1, (-1, 1, _LANES))
    shifts = torch.arange(0, 2 * _LANES, 2, dtype=torch.int32)[:, None]
    return ((words >> shifts) & 3).flatten(1)


def _huge_pages(num_rows: int, row_bytes: int) -> Tensor:
    """Return uninitialised rows in memory with huge pages, where the system supports them.

    Chosen rows lie on many different pages: with pages of 4 kB every second row costs a walk through the page table.
    """
    size = max(num_rows * row_bytes, 1)
    # Private, because Linux gives shared mappings small pages even with MADV_HUGEPAGE.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_rows * row_bytes).view(num_rows, row_bytes)
