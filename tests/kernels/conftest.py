"""Make Triton's interpreter round fp32 to bf16 as a GPU does; by itself it truncates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qsparse_moe.kernels import tiles


@pytest.fixture(autouse=True, scope="session")
def interpreter_that_rounds_to_bf16() -> Iterator[None]:
    if not tiles.interpreted() or tiles.why_not(torch.device("cpu")):
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_rounding(self: object, handle: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (handle.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, handle, to)
        rounded = torch.from_numpy(handle.data).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_rounding)
        yield
