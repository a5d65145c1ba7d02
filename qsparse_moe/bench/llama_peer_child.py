"""The child process of the decode benchmarks: llama.cpp, answering one JSON line per request.

The weights are random, or those of a trained model in a folder of numpy files (``llama_weights.py``). The process runs
in an environment of its own and imports llama_cpp, gguf and numpy, nothing of this package. D width, F hidden width of
an expert, E experts, V vocabulary, T tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

_FILE_TYPES = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "TQ2_0": "MOSTLY_TQ2_0"}


def write_weights(shape: dict[str, Any]) -> None:
    """Write a model with experts: matrices in one number format, norms and router in fp32.

    The output matrix may have another one, ``output_format``.
    """
    writer = gguf.GGUFWriter(shape["file"], shape["architecture"])
    writer.add_block_count(shape["layers"])
    writer.add_context_length(shape["capacity"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["expert_hidden_size"])
    writer.add_expert_feed_forward_length(shape["expert_hidden_size"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_size"])
    writer.add_value_length(shape["head_size"])
    writer.add_rope_dimension_count(shape["head_size"])
    writer.add_layer_norm_rms_eps(shape["norm_epsilon"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_expert_count(shape["experts"])
    writer.add_expert_used_count(shape["experts_per_token"])
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[shape["format"]]))
    writer.add_tokenizer_model("no_vocab")
    for name, array, kind in stored_tensors(shape) if shape["weights"] else random_tensors(shape):
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Tensors = Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]
"""The name, the values, and the number format of every tensor."""


def stored_tensors(shape: dict[str, Any]) -> Tensors:
    """Yield the tensors of a trained model."""
    folder = Path(shape["weights"])
    for number, name in enumerate(json.loads((folder / "names.json").read_text())):
        values = np.load(folder / f"{number}.npy")
        # Vectors, and the router, are fp32 in every file of llama.cpp.
        is_exact = values.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        chosen = "F32" if is_exact else shape["output_format" if name == "output.weight" else "format"]
        kind = getattr(gguf.GGMLQuantizationType, chosen)
        yield name, gguf.quants.quantize(values, kind), kind


def random_tensors(shape: dict[str, Any]) -> Tensors:
    """Yield random tensors of the architecture ``llama``."""
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

    def follow_seconds(self, tokens: list[int], clock: Callable[[], float]) -> float:
        """Return the seconds of a text, read token by token."""
        self._clear()
        start = clock()
        for token in tokens:
            self._run(np.array([token]))
        return clock() - start

    def write_logits(self, tokens: list[int], file: str) -> None:
        """Write the logits behind every token of a text, ``(T, V)`` fp32, to a file of numpy."""
        self._clear()
        logits = np.empty((len(tokens), self._vocabulary), dtype=np.float32)
        for number, token in enumerate(tokens):
            self._run(np.array([token]))
            logits[number] = self._logits()
        np.save(file, logits)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _run(self, tokens: np.ndarray) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _likeliest(self) -> int:
        return int(self._logits().argmax())

    def _logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))


def answer(**values: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(values), flush=True)


def carried_out(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    match request["do"]:
        case "decode":
            return {"seconds": model.decode_seconds(request["context"], request["tokens"])}
        case "prefill":
            return {"seconds": model.prefill_seconds(request["tokens"])}
        case "follow":
            clock = time.process_time if request["clock"] == "processor" else time.perf_counter
            return {"seconds": model.follow_seconds(request["tokens"], clock)}
        case "logits":
            model.write_logits(request["tokens"], request["file"])
            return {}
        case other:
            raise ValueError(f"{other!r} is no request")


def main() -> None:
    """Write and load the weights, then answer the requests on standard input until it ends."""
    shape = json.loads(sys.argv[1])
    try:
        write_weights(shape)
        model = Model(shape)
        answer(version=version("llama-cpp-python"))
        for line in sys.stdin:
            answer(**carried_out(model, json.loads(line)))
    except Exception as error:  # whatever it is, the parent says it in one line
        answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
