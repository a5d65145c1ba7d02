"""Generate text with a trained model from prompts, token by token.

B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.data.tokenizer import TextTokenizer, meaningless_ids
from qsparse_moe.errors import ArgumentError, without_fields
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import DecodeEngine, EngineSettings, prepare_prefill, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.load import load_model
from qsparse_moe.inference.memory import MemoryDtypes, check_memory
from qsparse_moe.inference.native import Rows
from qsparse_moe.inference.prompt_cache import PromptCache
from qsparse_moe.inference.sampling import Sampler, Sampling
from qsparse_moe.inference.sequences import Generation, GrowingSequence, NewToken
from qsparse_moe.inference.stopping import check_stop_strings
from qsparse_moe.inference.weights import products_dtype
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.distributed.ranks import choose_device

Prompt = str | Sequence[int]
"""A text, which begins a document, or token ids, which are used unchanged."""
Overlong = Literal["refuse", "slide", "truncate"]
GREEDY = Sampling()


@dataclass
class Statistics:
    """Counts and times of one batch of prompts, so far."""

    engine: str
    prompt_tokens: int
    """Over all prompts."""
    cache_bytes: int
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were kept from an earlier prompt; see ``PromptCache``."""
    prefill_seconds: float = 0.0
    """Seconds until the first token of every sequence was chosen."""
    decode_steps: int = 0
    decode_tokens: int = 0
    """Over all sequences, without the first token of each, which comes from the prefill."""
    decode_seconds: float = 0.0
    """Seconds of the steps and the choice of their tokens, without what the caller does between two steps."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed prompt tokens per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second, over all sequences."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Generator:
    """Generates text with a trained model; see ``load``."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        config: RunConfig,
        *,
        engine: DecodeEngine,
        max_length: int | None = None,
        overlong: Overlong = "refuse",
        folder: Path | str = "",
        step: int = 0,
    ) -> None:
        """``model`` is in evaluation mode, and ``engine`` was built for it; the rest is as in ``load``."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.engine = engine
        self.max_length = config.data.sequence_length if max_length is None else max_length
        self.overlong = overlong
        self.folder = Path(folder)
        """Where the model was loaded from."""
        self.step = step
        """Steps that the model was trained."""
        if self.max_length < 1:
            raise ArgumentError(
                f"{{max_length}} ({self.max_length}) must be at least 1 token; leave it out for the model's"
            )
        if overlong not in get_args(Overlong):
            raise ArgumentError(
                f"{{overlong}} ({without_fields(repr(overlong))}) must be one of {', '.join(get_args(Overlong))}; "
                "choose one of them"
            )

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        engine: str = "auto",
        weights: str = "auto",
        head: str = "auto",
        rows: Rows = "auto",
        plan: SparsityPlan | Path | str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_length: int | None = None,
        overlong: Overlong = "refuse",
    ) -> Generator:
        """Load a trained model for generation.

        Args:
            folder: a run (its newest checkpoint is used), one checkpoint of a run, or an export.
            engine: ``auto`` for the first engine that can run the model, or a name of ``inference.engine.ENGINES``.
            weights: number format of the weights: ``auto`` (the format of training, or that of the export),
                ``fp32``, ``bf16``, ``int8`` (with one scale per row), or ``ternary`` for a model trained with ternary
                weights.
            head: number format of the output head: ``auto`` (int8 with int8 weights, else the dtype of the model),
                ``fp32``, ``bf16``, or ``int8``.
            rows: the rows of a matrix that a step reads, for engines that can skip some: those ``selected`` by at
                least one token, ``all``, or ``auto``, whichever is faster on this machine.
            plan: a sparsity plan that replaces the model's own, or a JSON file with one.
            device: where the model runs.
            max_length: number of tokens that the key-value cache holds per sequence: each token attends to the last
                ``max_length`` tokens, itself included. None: ``data.sequence_length``, the length of training.
            overlong: treatment of a prompt of more than ``max_length`` tokens. ``refuse``: an error; ``truncate``: its
                last ``max_length`` tokens are used; ``slide``: all of it is used, each token attending to the last
                ``max_length``. Generation itself may continue beyond ``max_length`` in every case: new tokens replace
                the oldest ones in the cache.

        Raises:
            CheckpointError: the folder holds no trained model, or is damaged.
            ConfigError: an argument is wrong, or the plan was made for another model.
            BackendUnavailable: the engine or the device cannot be used here.
        """
        loaded = load_model(folder, device=choose_device(device, 0), weights=weights, head=head, plan=plan)
        decode = resolve_engine(engine, loaded.model, settings=EngineSettings(*loaded.formats, rows=rows))
        prepare_prefill(loaded.model, decode, loaded.formats.weights)
        return cls(
            loaded.model,
            loaded.tokenizer,
            loaded.config,
            engine=decode,
            max_length=max_length,
            overlong=overlong,
            folder=folder,
            step=loaded.step,
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 200,
        sampling: Sampling = GREEDY,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        reuse: PromptCache | None = None,
    ) -> GenerationStream:
        """Check the arguments and return the steps to iterate over; prefill and decode run during the iteration.

        Args:
            prompts: one prompt or several, which are generated as one batch. An empty text begins a document.
            max_tokens: largest number of new tokens per sequence.
            sampling: the method that chooses a token.
            seed: one seed per sequence, or that of the first sequence; the following ones then use the next numbers.
                The random draws of a sequence depend on its own seed alone.
            stop: strings that end a sequence and are not included in its text; the spelling of a special token ends the
                sequence at that token.
            stop_tokens: ids that end a sequence, in addition to the document token.
            reuse: keys and values of an earlier prompt and its continuation, for one prompt at a time, such as the next
                turn of a conversation: only the tokens that it does not hold are computed. It then holds this sequence.

        Raises:
            ConfigError: an argument is wrong, a prompt is longer than ``max_length`` (see ``load``), or the batch is
                too large for the memory that is free.
        """
        starts = self._starts(prompts)
        if reuse is not None and len(starts) > 1:
            raise ArgumentError(
                f"{{prompts}} ({len(starts)}) must be one where keys and values are reused; leave out reuse"
            )
        seeds = [seed + index for index in range(len(starts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(starts):
            raise ArgumentError(
                f"{{seed}} ({len(seeds)} numbers) must have one per prompt ({len(starts)}), or be one number"
            )
        if max_tokens < 1:
            raise ArgumentError(f"{{max_tokens}} ({max_tokens}) must be at least 1")
        check_stop_strings(stop)
        # Decoding leaves out special tokens, so the spelling of one never occurs in the text and is found by its id.
        special_ids = {string: self.tokenizer.special_id(string) for string in stop}
        # In training, what follows this token is another document.
        ending = {self.tokenizer.document_token, *stop_tokens, *(i for i in special_ids.values() if i is not None)}
        sequences = [
            GrowingSequence(
                index,
                start,
                self.tokenizer,
                max_tokens=max_tokens,
                stop_tokens=ending,
                stop_strings=[string for string, i in special_ids.items() if i is None],
            )
            for index, start in enumerate(starts)
        ]
        longest = max(len(start) for start in starts)
        # Not always max_length: a short text needs no cache of the full length. That of a conversation is allocated
        # once and every turn adds to it, so it has the full length from the start.
        capacity = min(self.max_length, longest + max_tokens) if reuse is None else self.max_length
        # The embedding's dtype is that of the activations; the matrices behind sparse sites may be in bf16 beside it.
        weight = self.model.embedding.weight
        check_memory(
            self.config.model,
            batch=len(starts),
            capacity=capacity,
            longest_prompt=longest,
            dtypes=MemoryDtypes(
                cache=self.engine.cache_dtype or weight.dtype,
                activations=weight.dtype,
                products=products_dtype(self.model),
            ),
            device=weight.device,
            has_cache=reuse is not None and reuse.is_allocated,
        )
        return GenerationStream(self.model, self.engine, sequences, Sampler(sampling, seeds, starts), capacity, reuse)

    def generate(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Generation]:
        """Return the whole generated sequences, in the order of the prompts; the settings are those of ``stream``."""
        stream = self.stream(prompts, **settings)
        for _ in stream:
            pass
        return stream.results

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; those of a text begin with the document token."""
        if isinstance(prompt, str):
            return [self.tokenizer.document_token, *self.tokenizer.encode(prompt)]
        return list(prompt)

    def _starts(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of every prompt, checked, and truncated if ``overlong`` says so."""
        starts = [self.encode(prompt) for prompt in _as_batch(prompts)]
        if not starts:
            raise ArgumentError('{prompts} (none) must hold at least one; give "" to begin a document')
        unusable = set(meaningless_ids(self.config.model, self.tokenizer))
        for index, start in enumerate(starts):
            self._check_start(index, start, unusable)
        return [start[-self.max_length :] if self.overlong == "truncate" else start for start in starts]

    def _check_start(self, index: int, start: list[int], unusable: set[int]) -> None:
        if not start:
            raise ArgumentError(
                f"{{prompts[{index}]}} (no token) must have at least one token; begin with the document token, "
                f"{self.tokenizer.document_token}"
            )
        wrong = [i for i in start if not 0 <= i < vocab_size(self.config.model) or i in unusable]
        if wrong:
            raise ArgumentError(
                f"{{prompts[{index}]}} has the token id {wrong[0]}, which this model's tokenizer does not have; encode "
                "the text with the tokenizer of the model"
            )
        if len(start) > self.max_length and self.overlong == "refuse":
            raise ArgumentError(
                f"{{prompts[{index}]}} ({len(start)} tokens, with the one that begins a document where it is a text) "
                f"must be at most {{max_length}} ({self.max_length}) tokens long; shorten it, raise {{max_length}}, or "
                "set {overlong} to truncate (keep the last tokens) or slide"
            )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt, a text or token ids, as a batch of one."""
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast(Sequence[Prompt], [prompts] if is_single else prompts)


@dataclass
class GenerationStream:
    """The steps of one batch: iterate over it once; each step gives the ``NewToken`` of every sequence that goes on."""

    model: Transformer
    engine: DecodeEngine
    sequences: list[GrowingSequence]
    sampler: Sampler
    capacity: int
    reuse: PromptCache | None = None
    statistics: Statistics = field(init=False)
    _is_started: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        num_tokens = sum(len(sequence.prompt) for sequence in self.sequences)
        self.statistics = Statistics(self.engine.name, num_tokens, 0)

    @property
    def results(self) -> list[Generation]:
        """The sequences generated so far, in the order of the prompts."""
        return [sequence.generation() for sequence in self.sequences]

    def __iter__(self) -> Iterator[list[NewToken]]:
        if self._is_started:
            raise RuntimeError("the steps of a GenerationStream run once; call Generator.stream again")
        self._is_started = True
        return self._steps()

    def _steps(self) -> Iterator[list[NewToken]]:
        statistics = self.statistics
        start = time.perf_counter()
        running = list(self.sequences)
        cache, new_tokens = self._cache()
        statistics.cache_bytes = cache.num_bytes
        # The chosen tokens are copied to the CPU, so the device has finished its work when the clock is read.
        tokens_B, log_probs_B = self.sampler(prefill(self.model, new_tokens, cache))
        if self.reuse is not None:
            self.reuse.extend(new_tokens[0])
        statistics.prefill_seconds = time.perf_counter() - start
        while True:
            pairs = zip(running, tokens_B.tolist(), log_probs_B.tolist(), strict=True)
            yield [sequence.append(token, log_prob) for sequence, token, log_prob in pairs]
            # After the yield, so that the time of the caller between two steps is not counted.
            start = time.perf_counter()
            going = [place for place, sequence in enumerate(running) if sequence.stop_reason is None]
            if not going:
                return
            # Finished sequences leave the batch, so that a long one does not pay for the others.
            if len(going) < len(running):
                running, tokens_B = [running[place] for place in going], tokens_B[going]
                cache.keep(going)
                self.sampler.keep(going)
            logits_BV = self._decode(tokens_B, cache)
            if self.reuse is not None:
                self.reuse.extend(tokens_B.tolist())
            tokens_B, log_probs_B = self.sampler(logits_BV)
            statistics.decode_seconds += time.perf_counter() - start
            statistics.decode_steps += 1
            statistics.decode_tokens += len(running)

    def _cache(self) -> tuple[KeyValueCache, list[Sequence[int]]]:
        """Return the cache, and the tokens of each prompt that it does not hold yet."""
        prompts = [one.prompt for one in self.sequences]
        if self.reuse is None:
            return self._allocate(), list(prompts)
        cache, reused = self.reuse.begin(prompts[0], self._allocate)
        self.statistics.reused_tokens = reused
        return cache, [prompts[0][reused:]]

    def _allocate(self) -> KeyValueCache:
        weight = self.model.embedding.weight
        return KeyValueCache.allocate(
            self.model.config,
            batch=len(self.sequences),
            capacity=self.capacity,
            dtype=self.engine.cache_dtype or weight.dtype,
            device=weight.device,
            # Overlong prompts have been refused or cut before, and generation itself may go on beyond the capacity.
            slides=True,
        )

    # Here and not around the loop above, whose caller would then be in inference mode between two steps.
    @torch.inference_mode()
    def _decode(self, tokens_B: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        return self.engine.decode(tokens_B, cache)
