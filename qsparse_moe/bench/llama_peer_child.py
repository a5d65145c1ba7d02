"""The child process of the decode benchmark: llama.cpp with random weights, answering one JSON line per request.

It runs in an environment of its own and imports llama_cpp, gguf and numpy, nothing of this package. D width, F hidden
width of an expert, E experts, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import gguf
import llama_cpp
import numpy as np

_FILE_TYPES = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "TQ2_0": "MOSTLY_TQ2_0"}


def write_weights(shape: dict[str, Any]) -> None:
    """Write a model of architecture ``llama`` with experts: matrices in one number format, norms and router in fp32.

    The output matrix may have another one, ``output_format``.
    """
    writer = gguf.GGUFWriter(shape["file"], "llama")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(shape["capacity"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["expert_hidden_size"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(shape["head_size"])
    # Both are the defaults of our model, norm_epsilon and rope_theta.
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_expert_count(shape["experts"])
    writer.add_expert_used_count(shape["experts_per_token"])
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[shape["format"]]))
    writer.add_tokenizer_model("no_vocab")
    for name, array, kind in tensors(shape):
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(shape: dict[str, Any]) -> Any:
    """Yield the name, the values and the number format of every tensor."""
    width, hidden, experts = shape["hidden_size"], shape["expert_hidden_size"], shape["experts"]
    heads = shape["heads"] * shape["head_size"]
    kv_heads = shape["kv_heads"] * shape["head_size"]
    random = np.random.default_rng(0)
    kind = getattr(gguf.GGMLQuantizationType, shape["format"])
    output_kind = getattr(gguf.GGMLQuantizationType, shape["output_format"])
    quantized: dict[tuple[int, ...], np.ndarray] = {}

    def random_matrix(dims: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
        return gguf.quants.quantize((shape["std"] * random.standard_normal(dims)).astype(np.float32), kind)

    def matrix(*dims: int) -> np.ndarray:
        # One matrix per shape, of which a stack holds as many copies: quantising takes most of the time.
        if dims not in quantized:
            quantized[dims] = random_matrix(dims, kind)
        return quantized[dims]

    def stack(*dims: int) -> np.ndarray:
        return np.stack([matrix(*dims)] * experts)

    norm = np.ones(width, dtype=np.float32)
    yield "token_embd.weight", matrix(shape["vocabulary"], width), kind
    yield "output.weight", random_matrix((shape["vocabulary"], width), output_kind), output_kind
    yield "output_norm.weight", norm, gguf.GGMLQuantizationType.F32
    for layer in range(shape["layers"]):
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", norm, gguf.GGMLQuantizationType.F32
        yield prefix + "ffn_norm.weight", norm, gguf.GGMLQuantizationType.F32
        yield prefix + "attn_q.weight", matrix(heads, width), kind
        yield prefix + "attn_k.weight", matrix(kv_heads, width), kind
        yield prefix + "attn_v.weight", matrix(kv_heads, width), kind
        yield prefix + "attn_output.weight", matrix(width, heads), kind
        router = (shape["std"] * random.standard_normal((experts, width))).astype(np.float32)
        yield prefix + "ffn_gate_inp.weight", router, gguf.GGMLQuantizationType.F32
        yield prefix + "ffn_gate_exps.weight", stack(hidden, width), kind
        yield prefix + "ffn_up_exps.weight", stack(hidden, width), kind
        yield prefix + "ffn_down_exps.weight", stack(width, hidden), kind


class Model:
    """The weights, loaded, with one sequence."""

    def __init__(self, shape: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(shape["file"].encode(), parameters)
        if not self._model:
            raise RuntimeError("the weights cannot be loaded")
        settings = llama_cpp.llama_context_default_params()
        # By default llama.cpp would compute a prompt in parts of 512 tokens, and ours computes it at once.
        settings.n_ctx = settings.n_batch = settings.n_ubatch = shape["capacity"]
        settings.n_threads = settings.n_threads_batch = shape["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("no context can be made")
        self._vocabulary = shape["vocabulary"]

    def decode_seconds(self, context: int, tokens: int) -> float:
        """Return the seconds of ``tokens`` steps behind ``context`` tokens, each with the likeliest token."""
        self._clear()
        self._run(np.arange(context) % self._vocabulary)
        start = time.perf_counter()
        for _ in range(tokens):
            # The choice of the token is timed, as it is for our engine.
            self._run(np.array([self._likeliest()]))
        return time.perf_counter() - start

    def prefill_seconds(self, tokens: int) -> float:
        """Return the seconds of a prompt, computed at once."""
        self._clear()
        start = time.perf_counter()
        self._run(np.arange(tokens) % self._vocabulary)
        return time.perf_counter() - start

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _run(self, tokens: np.ndarray) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _likeliest(self) -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        return int(logits.argmax())


def answer(**values: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(values), flush=True)


def main() -> None:
    """Write and load the weights, then answer the requests on standard input until it ends."""
    shape = json.loads(sys.argv[1])
    try:
        write_weights(shape)
        model = Model(shape)
        answer(version=version("llama-cpp-python"))
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "decode":
                answer(seconds=model.decode_seconds(request["context"], request["tokens"]))
            else:
                answer(seconds=model.prefill_seconds(request["tokens"]))
    except Exception as error:  # whatever it is, the parent says it in one line
        answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
