"""Time ``qsparse-moe prepare`` beside the tokenizer alone and ``datasets.map`` with the same tokenizer.

The tokenizer alone encodes the texts, which are in memory, and gives its ids to Python; it is the limit of the others,
which also read the texts and write the tokens. Every contender uses the same number of cores and starts without caches.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_moe.bench.harness import fingerprint
from qsparse_moe.config.schema import DataConfig, SourceConfig
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.token_data import prepare_data
from qsparse_moe.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

ALONE, MAP, PREPARE = "tokenizer alone", "datasets.map", "qsparse-moe prepare"
# The size of the batches of datasets.map by default.
_BATCH = 1000
_END = "<|end|>"


@dataclass(frozen=True)
class PrepareBenchmark:
    """A benchmark of one source."""

    source: SourceConfig
    tokenizer: str | None
    """Name of the tokenizer; None: a byte-level BPE is made of the source's text first."""
    vocabulary: int
    """Number of tokens of a tokenizer that is made."""
    shard_bytes: int
    processes: int
    rounds: int


def run_prepare_benchmark(benchmark: PrepareBenchmark) -> dict[str, Any]:
    """Run every contender once per round, and return the seconds of each and the speeds relative to the tokenizer."""
    texts = list(open_source(benchmark.source, 0).texts())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name = benchmark.tokenizer or train_tokenizer(texts, benchmark.vocabulary, folder / "tokenizer")
        contenders = _contenders(benchmark, texts, name, folder)
        wall: dict[str, list[float]] = {contender: [] for contender in contenders}
        processor: dict[str, list[float]] = {contender: [] for contender in contenders}
        tokens: dict[str, int] = {}
        for _ in range(benchmark.rounds):
            for contender, call in contenders.items():
                # In turn within a round, so that a slow phase of the machine hits all of them.
                began, used = time.perf_counter(), _processor_seconds()
                tokens[contender] = call()
                wall[contender].append(time.perf_counter() - began)
                processor[contender].append(_processor_seconds() - used)
    assert len(set(tokens.values())) == 1, f"the contenders must make the same tokens, not {tokens}"
    return {
        "text_bytes": sum(len(text.encode("utf-8")) for text in texts),
        "documents": len(texts),
        "tokens": tokens[PREPARE],
        "processes": benchmark.processes,
        "seconds": {"wall": wall, "processor": processor},
        "speed_of_tokenizer": {
            clock: {name: _relative(seconds[ALONE], seconds[name]) for name in contenders}
            for clock, seconds in (("wall", wall), ("processor", processor))
        },
        "machine": fingerprint(),
    }


def _relative(limit: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(limit, other, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _processor_seconds() -> float:
    # Of this process, and of the processes that it has started and that have ended.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def train_tokenizer(texts: Sequence[str], vocabulary: int, folder: Path) -> str:
    """Make a byte-level BPE of the texts in ``folder``, and return its name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(f'{{"eos_token": "{_END}"}}', encoding="utf-8")
    return str(folder)


def _contenders(
    benchmark: PrepareBenchmark, texts: Sequence[str], name: str, folder: Path
) -> dict[str, Callable[[], int]]:
    from datasets import Dataset

    Dataset.from_dict({"text": list(texts)}).save_to_disk(str(folder / "text"))
    config = DataConfig(
        sources=(benchmark.source,),
        tokenizer=name,
        cache_dir=str(folder / "cache"),
        shard_bytes=benchmark.shard_bytes,
    )
    # The number of threads of the library tokenizers is fixed when it first encodes.
    os.environ["RAYON_NUM_THREADS"] = str(benchmark.processes)
    return {
        ALONE: lambda: _alone(texts, name),
        MAP: lambda: _mapped(folder / "text", name, benchmark.processes),
        PREPARE: lambda: _prepared(config, benchmark.processes),
    }


def _alone(texts: Sequence[str], name: str) -> int:
    encode = encoder(name)
    # One token more per document, as the others make.
    return sum(
        len(ids) + 1 for begin in range(0, len(texts), _BATCH) for ids in encode(list(texts[begin : begin + _BATCH]))
    )


def encoder(name: str) -> Callable[[list[str]], list[list[int]]]:
    """Return the function of a tokenizer's library that encodes a batch of texts, with nothing of this package."""
    if name == "bytes":
        return lambda texts: [list(text.encode("utf-8")) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(load_tokenizer(name).files[0]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class _MapFunction:
    """The function of ``datasets.map``, which every process makes its own tokenizer for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._encode: Callable[[list[str]], list[list[int]]] | None = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        self._encode = self._encode or encoder(self._name)
        return {"ids": self._encode(batch["text"])}


def _mapped(folder: Path, name: str, processes: int) -> int:
    from datasets import load_from_disk

    texts: Dataset = load_from_disk(str(folder))
    mapped = texts.map(
        _MapFunction(name),
        batched=True,
        batch_size=_BATCH,
        num_proc=processes if processes > 1 else None,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    ids = mapped.data.column("ids")
    return sum(len(chunk.flatten()) for chunk in ids.chunks) + len(mapped)


def _prepared(config: DataConfig, processes: int) -> int:
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    _, (source,) = prepare_data(config, processes=processes, verify=False, progress=lambda *_: None)
    return sum(source.tokens.values())
