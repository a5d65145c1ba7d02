"""The peer of the decode benchmarks: llama.cpp on a model of the same shape, in a process of its own.

Its Python package may need other versions of what this package needs, so it may live in an environment of its own: the
child (``llama_peer_child.py``) imports nothing of this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import head_size, num_kv_heads, vocab_size
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels.row_product.stored import WeightFormat

Clock = Literal["wall", "processor"]
"""The time of day, or the processor time of all threads of the process that computes."""

PYTHON_VARIABLE = "QSPARSE_MOE_LLAMA_CPP_PYTHON"
"""Environment variable with the Python interpreter that has llama-cpp-python and gguf, if that is another one."""
WEIGHTS_FOLDER = Path("llama.cpp-models")
"""Where the weights for llama.cpp are written for a while, unless another folder is named."""
# Python searches the folder of a script first, so no module beside this one may have the name of a package that the
# child imports (docs/lab-log.md, 28 November).
_CHILD = Path(__file__).with_name("llama_peer_child.py")


def find_llama_cpp() -> tuple[str | None, str]:
    """Return the interpreter that has llama-cpp-python and gguf, or None and the reason, with the way out."""
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None:
        missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
        if not missing:
            return sys.executable, ""
        return None, (
            f"{' and '.join(missing)} not installed; pip install llama-cpp-python gguf, here or in an environment "
            f"whose interpreter {PYTHON_VARIABLE} names"
        )
    check = [python, "-c", "import llama_cpp, gguf"]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    if result.returncode:
        return None, f"{PYTHON_VARIABLE} ({python}) cannot import llama_cpp and gguf: {result.stderr.strip()[-200:]}"
    return python, ""


class LlamaFormats(NamedTuple):
    """The number formats of a model, in llama.cpp's words."""

    matrices: str
    """Of the matrices of the layers and of the embedding: BF16, Q8_0, Q4_0, TQ2_0."""
    output: str
    """Of the output matrix: one of these, or F32."""

    @property
    def label(self) -> str:
        """The name of the contender in results."""
        return f"llama.cpp {self.matrices}, output {self.output}"


_OF_THE_SAME_BITS: dict[WeightFormat, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("BF16",),
    # Also with half of the bits, because that is what many people run.
    "int8": ("Q8_0", "Q4_0"),
    "ternary": ("TQ2_0",),
}
_OUTPUTS: dict[WeightFormat, str] = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}


def formats_beside(weight_format: WeightFormat, head: WeightFormat) -> list[LlamaFormats]:
    """Return what llama.cpp is measured with beside our number formats: in one format, and with an output as ours.

    Args:
        weight_format: of our matrices.
        head: of our output head.
    """
    names = _OF_THE_SAME_BITS[weight_format]
    found = [LlamaFormats(name, name) for name in names]
    # The head is a large part of the bytes of a step, so the closest peer also has an output matrix in the format of
    # ours.
    return found + [LlamaFormats(name, _OUTPUTS[head]) for name in names[:1] if name != _OUTPUTS[head]]


class LlamaCpp:
    """llama.cpp with one file of weights: measures itself on request, and is otherwise idle."""

    def __init__(
        self,
        python: str,
        config: ModelConfig,
        formats: LlamaFormats,
        *,
        folder: Path,
        capacity: int,
        weights: Path | None = None,
        architecture: str = "llama",
    ) -> None:
        """Write weights of the shape of ``config`` into a file in ``folder`` and load them.

        Args:
            python: interpreter; see ``find_llama_cpp``.
            config: SwiGLU experts in every layer.
            formats: the number formats of the weights.
            folder: for the file, which ``close`` removes.
            capacity: tokens that its cache holds.
            weights: a folder of ``llama_weights.write_llama_weights``; None: random weights of the architecture llama.
            architecture: that of llama.cpp.

        Raises:
            BackendUnavailable: the child ends with an error.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{formats.matrices}-{formats.output}.gguf"
        shape = {
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": num_kv_heads(config),
            "head_size": head_size(config),
            "experts": config.moe.num_experts,
            "experts_per_token": config.moe.experts_per_token,
            "expert_hidden_size": config.moe.expert_hidden_size,
            "vocabulary": vocab_size(config),
            "std": config.init_std,
            "norm_epsilon": config.norm_epsilon,
            "rope_theta": config.rope_theta,
            "weights": None if weights is None else str(weights),
            "architecture": architecture,
            "format": formats.matrices,
            "output_format": formats.output,
            "file": str(self._file),
            "capacity": capacity,
            "threads": torch.get_num_threads(),
        }
        self._child = subprocess.Popen(
            [python, str(_CHILD), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # llama.cpp logs every tensor on standard error while it loads a file.
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self._answer()["version"]

    def decode_seconds(self, *, context: int, tokens: int) -> float:
        """Return the seconds of ``tokens`` steps of one sequence behind ``context`` tokens."""
        return float(self._ask({"do": "decode", "context": context, "tokens": tokens})["seconds"])

    def prefill_seconds(self, tokens: int) -> float:
        """Return the seconds of a prompt of ``tokens``, computed at once."""
        return float(self._ask({"do": "prefill", "tokens": tokens})["seconds"])

    def follow_seconds(self, tokens: Sequence[int], *, clock: Clock = "wall") -> float:
        """Return the seconds of a text, read token by token from its beginning."""
        return float(self._ask({"do": "follow", "tokens": list(tokens), "clock": clock})["seconds"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind every token of a text, ``(T, V)`` fp32."""
        file = self._file.with_suffix(".npy")
        try:
            self._ask({"do": "logits", "tokens": list(tokens), "file": str(file)})
            return torch.from_numpy(np.load(file))
        finally:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """End the child, whatever it is doing, and remove its weights."""
        # Killed, because it has nothing to save: a stopped process ends within seconds, and a request may take minutes.
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()
        self._file.unlink(missing_ok=True)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        # The line of a child that died is empty.
        answer = json.loads(line) if line.startswith("{") else {"error": "it ended without an answer"}
        if "error" in answer:
            self._child.kill()
            self._file.unlink(missing_ok=True)
            raise BackendUnavailable(
                f"llama.cpp ({self._file.stem}) failed: {answer['error']}; leave it out of --peers"
            )
        return dict(answer)
