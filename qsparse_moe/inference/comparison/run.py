"""Load a model and its reference from folders, and compare them on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qsparse_moe.data.batch import Batch
from qsparse_moe.data.loader import evaluation_batches
from qsparse_moe.data.own_text import OwnText
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import ArgumentError, without_fields
from qsparse_moe.inference.comparison.measure import Comparison, Prompts, compare
from qsparse_moe.inference.comparison.sides import Side
from qsparse_moe.inference.load import LoadedModel, load_model
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.distributed.ranks import choose_device

DENSE = "dense"
"""The reference that is the model itself with S = 0 everywhere."""


@dataclass(frozen=True)
class ComparedModels:
    """A comparison, and what was compared."""

    comparison: Comparison
    folder: Path
    step: int
    """Number of trained steps of the model."""
    sparsity: float
    """Mean S of the model's plan."""
    reference: str
    """``dense``, or the plan file or folder of the reference."""
    reference_sparsity: float
    num_sequences: int
    moe_layers: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        named = {name: value for name, value in vars(self).items() if name not in ("comparison", "folder")}
        return {"run_dir": str(self.folder), **named, **self.comparison.as_dict()}


def compare_folder(
    folder: Path | str,
    reference: Path | str = DENSE,
    *,
    plan: SparsityPlan | Path | str | None = None,
    num_sequences: int | None = None,
    files: Sequence[str] = (),
    num_prompts: int = 16,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch_size: int = 8,
    engine: str = "torch",
    weights: str = "auto",
    head: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> ComparedModels:
    """Compare the model of ``folder`` with a reference on held-out sequences.

    Args:
        folder: a run, one of its checkpoints, or an export.
        reference: ``dense`` for the same weights with S = 0 everywhere, a plan file for the same weights with that
            plan, or the folder of another model with its own plan.
        plan: the plan of the model in place of its own, or a file with one.
        num_sequences: number of validation sequences, evenly spaced; None is ``training.evaluation_rows``.
        files: files or globs whose text replaces the validation sequences.
        num_prompts: number of sequences whose beginning both models continue; 0 compares no generated text.
        prompt_tokens: largest number of tokens of a prompt; None is half of ``data.sequence_length``.
        new_tokens: largest number of new tokens; None is half of ``data.sequence_length``.
        batch_size: number of sequences that are computed together.
        engine: the engine that decodes; see ``inference.engine.resolve_engine``.
        weights: number format of the weights of both models; see ``inference.load.load_model``.
        head: number format of their output heads.
        device: where the models run.
        notify: called with the number of compared batches and of all.

    Raises:
        CheckpointError: a folder holds no trained model, or is damaged.
        ConfigError: an argument is wrong, or the reference has another vocabulary or other shapes.
        DataError: a file cannot be read or contains no text.
    """
    for name, value, least in (
        ("prompts", num_prompts, 0),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 1),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ArgumentError(f"{{{name}}} ({value}) must be at least {least}")
    chosen_device = choose_device(device, 0)
    loaded = load_model(folder, device=chosen_device, weights=weights, head=head, plan=plan)
    own = Side(loaded, loaded.model.sparsity_plan, str(folder))
    other = _reference(reference, own, lambda path: load_model(path, device=chosen_device, weights=weights, head=head))
    length = loaded.config.data.sequence_length
    prompts = Prompts(num_prompts, prompt_tokens or max(1, length // 2), new_tokens or max(1, length // 2))
    batches, rows = held_out_batches(loaded, num_sequences=num_sequences, files=files, batch_size=batch_size)
    found = compare(other, own, batches, prompts._replace(batch_size=batch_size, engine=engine), notify=notify)
    return ComparedModels(
        found,
        folder=Path(folder),
        step=loaded.step,
        sparsity=own.plan.mean,
        reference=str(reference),
        reference_sparsity=other.plan.mean,
        num_sequences=rows,
        moe_layers=tuple(layer.layer for layer in found.routed_layers),
    )


def _reference(name: Path | str, own: Side, load: Callable[[Path], LoadedModel]) -> Side:
    """Return the reference: the model's own weights with another plan, or another model."""
    path = Path(name)
    if path.is_dir():
        loaded = load(path)
        return Side(loaded, loaded.model.sparsity_plan, str(name))
    config = own.loaded.config.model
    if str(name) != DENSE and not path.is_file():
        raise ArgumentError(
            f"{{compare}} ({without_fields(name)}) must be {DENSE}, a plan file, or the folder of another model, and "
            "there is no such file or folder; name one that exists"
        )
    if config.sparsity.selection == "relu":
        raise ArgumentError(
            f"{{compare}} ({without_fields(name)}) changes nothing on {without_fields(own.name)}: "
            "model.sparsity.selection is relu, which selects the positive features whatever S is; name the folder of "
            "another model"
        )
    is_dense = str(name) == DENSE
    plan = SparsityPlan.uniform(config, 0.0) if is_dense else SparsityPlan.load(path)
    plan.check_fits(config, file=None if is_dense else path)
    return Side(own.loaded, plan, str(name))


def held_out_batches(
    loaded: LoadedModel, *, num_sequences: int | None, files: Sequence[str], batch_size: int
) -> tuple[list[Batch], int]:
    """Return validation sequences of the model's run, or all text of ``files``, and their number."""
    config = loaded.config
    if files:
        text = OwnText(files, config.data, loaded.tokenizer)
        return text.batches(batch_size), len(text)
    num_sequences = num_sequences or config.training.evaluation_rows
    data = load_data(config.data)
    batches = evaluation_batches(data, num_sequences=num_sequences, micro_batch_size=batch_size, rank=0, world_size=1)
    return batches, len(data.evaluation_sequences(num_sequences)[1])
