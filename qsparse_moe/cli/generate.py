"""``qsparse-moe generate``: continue a text with a trained model, with one full forward pass per token.

B batch (1), S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qsparse_moe.cli.console import print_json
from qsparse_moe.cli.run_folder import find_run
from qsparse_moe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from qsparse_moe.data.tokenizer import TextTokenizer
    from qsparse_moe.model.transformer import Transformer

# Decoding returns this character for bytes that are not a complete character yet.
_INCOMPLETE = "\ufffd"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("generate")(generate)


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue; without it, a new document.")] = "",
    truncate_prompt: Annotated[
        bool, typer.Option("--truncate-prompt", help="Keep only the last tokens of a prompt that is too long.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens; the document may end earlier.", min=1)
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the most likely token.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.", min=0)] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a prompt with the newest checkpoint of a run. The text is printed while it is generated."""
    run_dir = find_run(run)
    check_prompt(prompt)
    from qsparse_moe.data.tokenizer import load_tokenizer, meaningless_ids
    from qsparse_moe.training.distributed.ranks import choose_device
    from qsparse_moe.training.evaluate import load_run

    config, model, step = load_run(run_dir, choose_device(device, 0))
    tokenizer = load_tokenizer(config.data.tokenizer)
    model.hide_ids(meaningless_ids(config.model, tokenizer))
    window = config.data.sequence_length
    start = fit_prompt([tokenizer.document_token, *tokenizer.encode(prompt)], window, truncate=truncate_prompt)
    tokens = next_tokens(model, start, window=window, temperature=temperature, seed=seed)
    tokens = _until(tokens, tokenizer.document_token, max_tokens)
    if json:
        ids = list(tokens)
        text = tokenizer.decode([*start, *ids]).removeprefix(tokenizer.decode(start))
        print_json({"run_dir": str(run_dir), "step": step, "prompt": prompt, "text": text, "num_tokens": len(ids)})
        return
    for piece in text_pieces(tokens, start, tokenizer):
        typer.echo(piece, nl=False)
    typer.echo()


def check_prompt(prompt: str) -> None:
    """Raise ConfigError unless the prompt is text: Python decodes bytes that are not UTF-8 as lone surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        place = len(prompt[: error.start].encode("utf-8"))
        raise ConfigError(
            f"--prompt ({ascii(prompt)}) must be UTF-8, and its byte {place} is not; convert it, for example with "
            "iconv -t UTF-8, or use a terminal with a UTF-8 locale"
        ) from None


def fit_prompt(start: list[int], window: int, *, truncate: bool) -> list[int]:
    """Return the tokens to start from: all of ``start``, or with ``truncate`` its last ``window``.

    Raises:
        ConfigError: there are more than ``window``, and ``truncate`` is not set.
    """
    if len(start) > window and not truncate:
        raise ConfigError(
            f"--prompt ({len(start)} tokens with the one that begins a document) must be at most data.sequence_length "
            f"({window}), the window that the model was trained on; shorten it, or keep its last {window} tokens with "
            "--truncate-prompt"
        )
    return start[-window:]


def next_tokens(model: Transformer, start: list[int], *, window: int, temperature: float, seed: int) -> Iterator[int]:
    """Yield tokens after ``start`` without end; the model reads the last ``window`` of them, as in training."""
    import torch

    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(start)
    while True:
        with torch.inference_mode():
            tokens_BS = torch.tensor([tokens[-window:]], device=device)
            logits_V = model(tokens_BS, with_stats=False).logits_BSV[0, -1].float()
        tokens.append(choose_token(logits_V, temperature, generator))
        yield tokens[-1]


def choose_token(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return the most likely token at temperature 0, else a sample of ``softmax(logits / temperature)``."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = (logits_V / temperature).softmax(-1)
    return int(probs_V.multinomial(1, generator=generator))


def text_pieces(tokens: Iterator[int], start: list[int], tokenizer: TextTokenizer) -> Iterator[str]:
    """Yield the text of the prompt and then of the tokens, in pieces that end with complete characters."""
    ids = list(start)
    shown = tokenizer.decode(ids)
    yield shown
    text = shown
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            shown = text
    # An incomplete character at the end is printed as it is.
    yield text[len(shown) :]


def _until(tokens: Iterator[int], last: int, max_tokens: int) -> Iterator[int]:
    for _, token in zip(range(max_tokens), tokens, strict=False):
        if token == last:
            return
        yield token
