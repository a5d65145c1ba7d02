"""``qsparse-moe generate``: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qsparse_moe.cli.option_names import PromptNames, naming_options
from qsparse_moe.cli.option_values import check_no_effect
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model

if TYPE_CHECKING:
    from qsparse_moe.cli.generated_text import Settings
    from qsparse_moe.inference.generator import Generator


_BATCH_SIZE = 8

# Options with a long help, as types of their own, so that the signature below fits on a screen.
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="Text to continue; without it a document begins. May be repeated.", show_default=False),
]
PromptsFile = Annotated[Path | None, typer.Option(help="File with one prompt per line.", show_default=False)]
Interactive = Annotated[
    bool,
    typer.Option("--interactive", help="Read a line, answer it, and so on, with the tokenizer's chat template."),
]
Stops = Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.", show_default=False)]
MinP = Annotated[float, typer.Option(help="Draw from the tokens with this fraction of the largest probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens that have occurred less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws; the next prompts take the numbers after it.", min=0)]
Weights = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: auto (that of training or of the export), fp32, bf16, int8, ternary."
    ),
]
Head = Annotated[
    str,
    typer.Option(
        help="Number format of the output head: auto (int8 with int8 weights, else that of training), fp32, bf16, int8."
    ),
]
Rows = Annotated[
    Literal["auto", "selected", "all"],
    typer.Option(help="Rows of weights that an engine reads: selected, all, or what is faster (native only)."),
]
PlanFile = Annotated[Path | None, typer.Option(help="Sparsity plan in place of the model's.", show_default=False)]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens that each token attends to, itself included; without it those of training.", min=1),
]
Overlong = Annotated[
    Literal["refuse", "slide", "truncate"],
    typer.Option(help="What happens to a prompt of more than --max-length tokens."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print a JSON object at the end, or one line per prompt of several.")
]
TruncatePrompt = Annotated[bool, typer.Option("--truncate-prompt", help="The same as --overlong truncate.")]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("generate")(generate)


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder, checkpoint in it, or export.", show_default=False)],
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    interactive: Interactive = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens at most; a document may end earlier.", min=1)] = 200,
    stop: Stops = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    engine: Annotated[str, typer.Option(help="What decodes; auto: the fastest that can.")] = "auto",
    weights: Weights = "auto",
    head: Head = "auto",
    rows: Rows = "auto",
    plan: PlanFile = None,
    max_length: MaxLength = None,
    overlong: Overlong = "refuse",
    truncate_prompt: TruncatePrompt = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts that are generated together; default: 8.", min=1)
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs.")] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Report the speed on standard error.")] = False,
    json: Json = False,
) -> None:
    """Continue prompts with a trained model. Text is printed as it comes."""
    # The folder is checked before torch is imported, so that a mistyped name is reported at once.
    find_model(run)
    prompts = read_prompts(prompt or [], prompts_file)
    if interactive and (prompts or json):
        raise ConfigError(
            "--interactive reads its prompts from the terminal and prints text, so --prompt, --prompts-file and --json "
            "must be left out"
        )
    if interactive:
        check_no_effect({"--batch-size": batch_size}, beside="--interactive")
    if truncate_prompt and overlong == "slide":
        raise ConfigError(
            "--truncate-prompt and --overlong slide both treat prompts that are too long; keep one of them"
        )
    from qsparse_moe.cli.generated_text import Settings, print_objects, print_texts
    from qsparse_moe.inference.generator import Generator
    from qsparse_moe.inference.sampling import Sampling

    names = _prompt_names(prompts, prompts_file, interactive)
    with naming_options(names):
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        generator = Generator.load(
            run,
            engine=engine,
            weights=weights,
            head=head,
            rows=rows,
            plan=plan,
            device=device,
            max_length=max_length,
            overlong="truncate" if truncate_prompt else overlong,
        )
    settings = Settings(sampling, max_tokens, tuple(stop or ()), seed, stats, names)
    if interactive:
        _converse(generator, settings)
    else:
        # Without a prompt the model begins a document, which is what it does after the empty text.
        (print_objects if json else print_texts)(generator, prompts or [""], settings, batch_size or _BATCH_SIZE)


def _converse(generator: Generator, settings: Settings) -> None:
    from qsparse_moe.cli.conversation import converse
    from qsparse_moe.data.chat_template import load_chat_template

    converse(generator, load_chat_template(generator.tokenizer), settings)


def _prompt_names(prompts: list[str], file: Path | None, interactive: bool) -> PromptNames:
    if interactive:
        return PromptNames("the line", "the line")
    if file is not None:
        return PromptNames(f"--prompts-file ({file})", f"line {{number}} of --prompts-file {file}")
    return PromptNames() if len(prompts) > 1 else PromptNames("--prompt", "--prompt")


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line or of the lines of ``file``; none where neither is given.

    Raises:
        ConfigError: both are given, the file cannot be read or is empty, or a prompt is not UTF-8.
    """
    if file is None:
        for prompt in prompts:
            check_prompt(prompt)
        return prompts
    if prompts:
        raise ConfigError("--prompt and --prompts-file both give prompts; keep one of them")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts-file ({file}) cannot be read ({error}); it must be a UTF-8 text file with one prompt per line"
        ) from error
    # Not splitlines(): a form feed or a Unicode separator is part of a prompt.
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise ConfigError(f"--prompts-file ({file}) is empty; it must have one prompt per line")
    return lines


def check_prompt(prompt: str) -> None:
    """Raise ConfigError unless the prompt is text: Python represents bytes that are not UTF-8 by lone surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        # The position is counted in bytes, because bytes are what the user's terminal has sent.
        place = len(prompt[: error.start].encode("utf-8"))
        raise ConfigError(
            f"--prompt ({ascii(prompt)}) must be UTF-8, and its byte {place} is not; convert it, for example with "
            "iconv -t UTF-8, or use a terminal with a UTF-8 locale"
        ) from None
