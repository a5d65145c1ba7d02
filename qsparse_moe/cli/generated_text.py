"""Print the output of ``qsparse-moe generate``: texts as they come, JSON objects, and the speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from qsparse_moe.cli.console import print_json
from qsparse_moe.cli.option_names import PromptNames, naming_options

if TYPE_CHECKING:
    from qsparse_moe.inference.generator import GenerationStream, Generator, Prompt
    from qsparse_moe.inference.prompt_cache import PromptCache
    from qsparse_moe.inference.sampling import Sampling
    from qsparse_moe.inference.sequences import Generation


class Settings(NamedTuple):
    """The settings with which every sequence of a call is generated."""

    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    """Seed of the first sequence."""
    with_stats: bool
    prompts: PromptNames = PromptNames()
    """The names of the prompts in messages."""


def open_stream(
    generator: Generator,
    prompts: Sequence[Prompt],
    settings: Settings,
    first: int = 0,
    *,
    reuse: PromptCache | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationStream:
    """Return the steps of a batch, whose first prompt is number ``first`` of the call."""
    with naming_options(settings.prompts, first=first):
        return generator.stream(
            prompts,
            max_tokens=settings.max_tokens,
            sampling=settings.sampling,
            # The seed follows the number of the prompt in the call, so that --batch-size does not change the text.
            seed=settings.seed + first,
            stop=settings.stop,
            stop_tokens=stop_tokens,
            reuse=reuse,
        )


def print_texts(generator: Generator, prompts: Sequence[str], settings: Settings, batch_size: int) -> None:
    """Print each prompt with its continuation, in order: the first that is unfinished as it comes.

    What was printed when the process is interrupted ends with a whole line.
    """
    for first, batch, stream in _batches(generator, prompts, settings, batch_size):
        # Only the last text of the call, not of every batch, ends without an empty line.
        with _Printer(_shown_starts(generator, batch), is_last=first + len(batch) == len(prompts)) as printer:
            for step in stream:
                for new in step:
                    printer.add(new.index, new.text, is_end=new.stop_reason is not None)
        report_speed(stream, settings)


def print_objects(generator: Generator, prompts: Sequence[str], settings: Settings, batch_size: int) -> None:
    """Print one JSON object for a single prompt, else one line per prompt as soon as its batch is done."""
    for first, batch, stream in _batches(generator, prompts, settings, batch_size):
        for step in stream:
            for new in step:
                # One object per line, unlike a list, can be read before the last batch is done.
                if new.stop_reason is not None and len(prompts) > 1:
                    content = _content(generator, batch[new.index], stream.results[new.index])
                    print(json.dumps({"index": first + new.index} | content, ensure_ascii=False), flush=True)
        if len(prompts) == 1:
            print_json(_content(generator, batch[0], stream.results[0]))
        report_speed(stream, settings)


def report_speed(stream: GenerationStream, settings: Settings) -> None:
    """Print the statistics of a batch on standard error if they are requested."""
    if not settings.with_stats:
        return
    found = stream.statistics
    lines = {
        "engine": found.engine,
        "key-value cache": f"{found.cache_bytes:,} bytes",
        "prefill": f"{found.prompt_tokens - found.reused_tokens} tokens in {found.prefill_seconds:.3f} s, "
        f"{found.prefill_tokens_per_second:.1f} tokens/s",
        "decode": f"{found.decode_tokens} tokens in {found.decode_seconds:.3f} s, "
        f"{found.decode_tokens_per_second:.1f} tokens/s",
        **{name.replace("_", " "): _shown(value) for name, value in stream.engine.figures().items()},
        **_share_of_limit(stream),
    }
    for name, value in lines.items():
        print(f"{name:<25}  {value}", file=sys.stderr, flush=True)


def _share_of_limit(stream: GenerationStream) -> dict[str, str]:
    """Return the share of the read bandwidth that the weights read by a step used, where the engine counts them."""
    from qsparse_moe.inference.row_costs import known_read_bandwidth

    read = stream.engine.figures().get("bytes_read")
    found = stream.statistics
    # The bandwidth is measured for a CPU's memory.
    if not read or not found.decode_steps or stream.engine.name != "native":
        return {}
    limit = known_read_bandwidth()
    share = read / limit * found.decode_steps / found.decode_seconds
    return {"share of the limit": f"{share:.2f} of a read bandwidth of {limit / 1e9:.1f} GB/s"}


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _batches(
    generator: Generator, prompts: Sequence[str], settings: Settings, batch_size: int
) -> Iterator[tuple[int, Sequence[str], GenerationStream]]:
    """Yield the number of the first prompt, the prompts, and the steps of every batch. All are checked first."""
    # open_stream checks its prompts and computes nothing before its first step.
    if len(prompts) > batch_size:
        for first in range(0, len(prompts), batch_size):
            open_stream(generator, prompts[first : first + batch_size], settings, first)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        yield first, batch, open_stream(generator, batch, settings, first)


def _shown_starts(generator: Generator, prompts: Sequence[str]) -> list[str]:
    """Return the text of every prompt as the model reads it."""
    starts = [generator.encode(prompt) for prompt in prompts]
    if generator.overlong == "truncate":
        # The model continues what remained of the prompt, so only that is shown as its beginning.
        starts = [start[-generator.max_length :] for start in starts]
    return [generator.tokenizer.decode(start) for start in starts]


def _content(generator: Generator, prompt: str, generation: Generation) -> dict[str, Any]:
    return {
        "run_dir": str(generator.folder),
        "step": generator.step,
        "prompt": prompt,
        "text": generation.text,
        "num_tokens": len(generation.token_ids),
        "stop_reason": generation.stop_reason,
        "token_ids": list(generation.token_ids),
        "log_probabilities": list(generation.log_probabilities),
    }


class _Printer:
    """Prints several growing texts one after the other, without waiting for the one whose turn it is."""

    def __init__(self, starts: Sequence[str], *, is_last: bool, write: Callable[[str], None] | None = None) -> None:
        self._waiting = list(starts)
        self._is_done = [False] * len(starts)
        self._turn = 0
        self._is_last = is_last
        self._write = write or (lambda text: typer.echo(text, nl=False))

    def __enter__(self) -> _Printer:
        self._flush()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # Interrupted: the texts behind the one whose turn it is are printed too.
        while kind is not None and self._turn < len(self._waiting):
            self._finish_turn()

    def add(self, index: int, text: str, *, is_end: bool) -> None:
        """Take what is new of one text."""
        self._waiting[index] += text
        self._is_done[index] = is_end
        self._flush()

    def _flush(self) -> None:
        while self._turn < len(self._waiting):
            self._write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._is_done[self._turn]:
                return
            self._finish_turn()

    def _finish_turn(self) -> None:
        last = self._is_last and self._turn == len(self._waiting) - 1
        # An empty line between two texts.
        self._write(self._waiting[self._turn] + ("\n" if last else "\n\n"))
        self._waiting[self._turn] = ""
        self._turn += 1
