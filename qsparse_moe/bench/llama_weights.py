"""A trained model as the tensors of llama.cpp, for the peer of the benchmark of plans.

llama.cpp reads a Mixtral model as its architecture ``llama`` and a Qwen3-MoE model as ``qwen3moe``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import head_size, num_kv_heads
from qsparse_moe.interop.families.expressible import find_expressing
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""The architecture of llama.cpp by the Hugging Face family of a model."""
NAMES_FILE = "names.json"
"""In the folder of ``write_llama_weights``: the name of the tensor in each file."""
_OF_LAYERS = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.output.weight": "attn_output.weight",
    "attention.query_norm.weight": "attn_q_norm.weight",
    "attention.key_norm.weight": "attn_k_norm.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "moe.router.weight": "ffn_gate_inp.weight",
    "moe.experts.w_gate": "ffn_gate_exps.weight",
    "moe.experts.w_up": "ffn_up_exps.weight",
    "moe.experts.w_down": "ffn_down_exps.weight",
}
_OUTER = {
    "embedding.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def llama_architecture(config: ModelConfig) -> tuple[str | None, str]:
    """Return the architecture of llama.cpp that computes the dense model, or None and the reason."""
    family = find_expressing(config, SparsityPlan.uniform(config, 0.0))
    if config.rope_scaling.type != "none":
        return None, f"model.rope_scaling.type ({config.rope_scaling.type}) is not written for llama.cpp"
    if family in ARCHITECTURES:
        return ARCHITECTURES[family], ""
    return None, (
        f"the model has the format of {family or 'no Hugging Face family'}, and only those of "
        f"{' and '.join(ARCHITECTURES)} are written for llama.cpp"
    )


def llama_tensors(model: Transformer, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name in llama.cpp, output-major, in the model's dtype; most are views.

    Args:
        model: one that ``llama_architecture`` accepts.
        architecture: its result.
    """
    for name, parameter in model.state_dict().items():
        if name in _OUTER:
            yield _OUTER[name], parameter
            continue
        _, layer, own = name.split(".", maxsplit=2)
        prefix = f"blk.{layer}."
        if own == "attention.qkv.weight":
            for letter, part in _queries_keys_values(model.config, parameter, architecture):
                yield f"{prefix}attn_{letter}.weight", part
        else:
            # The experts are input-major, all else is output-major.
            is_expert = own.startswith("moe.experts.")
            yield prefix + _OF_LAYERS[own], parameter.transpose(-1, -2) if is_expert else parameter


def _queries_keys_values(config: ModelConfig, joint: Tensor, architecture: str) -> Iterator[tuple[str, Tensor]]:
    heads = {"q": config.num_heads, "k": num_kv_heads(config), "v": num_kv_heads(config)}
    parts = joint.split([number * head_size(config) for number in heads.values()])
    for (letter, number), part in zip(heads.items(), parts, strict=True):
        # The architecture llama rotates neighbouring channels, and ours those half a head apart.
        is_paired = architecture == "llama" and letter != "v"
        yield letter, paired_rows(part, number) if is_paired else part


def paired_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Return the rows of a query or key matrix with the two channels of every rotation beside each other.

    ``weight`` is ``(H * C, D)``; row ``c`` and row ``c + C / 2`` of a head become rows ``2 c`` and ``2 c + 1``.
    """
    halves = weight.view(num_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


@torch.no_grad()
def write_llama_weights(model: Transformer, architecture: str, folder: Path) -> None:
    """Write every tensor as a file of numpy in fp32, one at a time, and the list of their names.

    The child process of llama.cpp reads them, which imports neither this package nor torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (name, tensor) in enumerate(llama_tensors(model, architecture)):
        np.save(folder / f"{number}.npy", tensor.float().contiguous().numpy())
        names.append(name)
    (folder / NAMES_FILE).write_text(json.dumps(names), encoding="utf-8")
