"""Name the arguments of generation in error messages as the user typed them: by option, prompt, or line of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from qsparse_moe.errors import ArgumentError, BackendUnavailable

_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "max_length",
    "overlong",
    "stop",
    "weights",
    "head",
    "rows",
    "plan",
    "tasks",
    "task_folder",
    "limit",
    "batch_size",
    "compare",
    "prompt_tokens",
    "new_tokens",
    "experts",
    "experts_per_token",
    "upcycle",
    "slices",
    "noise",
    "noise_share",
)


@dataclass(frozen=True)
class PromptNames:
    """The names of prompts in messages: ``str`` names all of them, and an index one of a batch."""

    all: str = "--prompt"
    one: str = "--prompt number {number}"
    """With a field for the number of the prompt, from 1."""
    first: int = 0
    """Number of prompts before those of the batch."""

    def __str__(self) -> str:
        return self.all

    def __getitem__(self, index: int) -> str:
        # str.format would fail on the path of a file that contains braces.
        return self.one.replace("{number}", str(self.first + index + 1))


@contextmanager
def naming_options(prompts: PromptNames = PromptNames(), *, first: int = 0) -> Iterator[None]:
    """Raise the errors of the block with the names of options in place of those of Python arguments.

    Args:
        prompts: how a prompt is named.
        first: number of prompts before those of the block.
    """
    names = {name: f"--{name.replace('_', '-')}" for name in _OPTIONS}
    try:
        yield
    except ArgumentError as error:
        raise error.naming(names | {"prompts": replace(prompts, first=first)}) from None
    except BackendUnavailable as error:
        # Engines are chosen by the function that chooses all implementations, whose messages begin with the setting.
        if not str(error).startswith("engine ("):
            raise
        raise BackendUnavailable(f"--{error}") from None
