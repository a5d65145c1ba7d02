"""The model card of an export: sizes, S by site, data, and losses, in the Markdown that model hubs show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qsparse_moe.accounting.parameters import count_with_embedding
from qsparse_moe.config.schema import RunConfig, SourceConfig
from qsparse_moe.config.shapes import model_sites, moe_layers
from qsparse_moe.interop.export_source import ExportDtype, ExportSource
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.runs.folder import METRICS_FILE
from qsparse_moe.version import __version__

MODEL_CARD = "README.md"
_LOSSES = ("train/lm_loss", "validation/loss", "validation/perplexity", "validation/bits_per_byte")


def model_card(source: ExportSource, dtype: ExportDtype, *, model_type: str, name: str, command: str | None) -> str:
    """Return the text of the card.

    Args:
        source: the exported model.
        dtype: the requested dtype.
        model_type: family of the format, or ``qsparse_moe``.
        name: name of the model.
        command: the command line of the export; None: it was not exported by one.
    """
    sections = [
        _front_matter(model_type),
        f"# {name}",
        _summary(source, model_type),
        "## Sizes\n\n" + _table(_sizes(source, dtype)),
        "## Sparsity\n\n" + _sparsity(source),
        "## Training\n\n" + _training(source),
    ]
    if command:
        sections.append(f"## Export\n\n```bash\n{command}\n```")
    return "\n\n".join(sections) + "\n"


def _front_matter(model_type: str) -> str:
    tags = "".join(f"\n- {tag}" for tag in ("mixture-of-experts", "qsparse_moe", model_type) if tag)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:{tags}\n---"


def _summary(source: ExportSource, model_type: str) -> str:
    if model_type == "qsparse_moe":
        return (
            f"A sparse mixture of experts of qsparse_moe {__version__}: `qsparse-moe generate FOLDER`, or, after "
            "`import qsparse_moe.interop`, `transformers.AutoModelForCausalLM.from_pretrained`."
        )
    return (
        f"A mixture of experts of the model type `{model_type}`, exported by qsparse_moe {__version__}. "
        "`transformers.AutoModelForCausalLM.from_pretrained` opens it, and so do programs that read its published "
        "format."
    )


def _sizes(source: ExportSource, dtype: ExportDtype) -> Iterator[tuple[str, str]]:
    model = source.config.model
    counted = count_with_embedding(model, source.plan)
    yield "Parameters", f"{counted.stored:,}"
    yield "Active parameters per token", f"{counted.active:,}"
    if counted.needed < counted.active:
        yield "Needed after Q-Sparse", f"{round(counted.needed):,}"
    yield "Layers", f"{model.num_layers}, of which {len(moe_layers(model))} have experts"
    yield "Width", f"{model.hidden_size}"
    yield "Experts per layer", f"{model.moe.num_experts}, {_experts_text(source)} per token"
    yield "Width of an expert", f"{model.moe.expert_hidden_size}"
    yield "Positions", f"{source.max_length}"
    yield "Type of the weights", str(source.dtype("embedding.weight", dtype)).removeprefix("torch.")


def _experts_text(source: ExportSource) -> str:
    """Return the experts per token, as a range where the plan gives layers different numbers."""
    most, plan = source.config.model.moe.experts_per_token, source.plan
    used = [plan.experts(layer, most) for layer in moe_layers(source.config.model)] or [most]
    numbers = f"{used[0]}" if min(used) == max(used) else f"{min(used)} to {max(used)} by layer"
    shares = [share for share in plan.top_p.values() if share < 1.0]
    if shares:
        numbers = f"at most {numbers}, as many as have a share of {min(shares):g} of the router weights or more,"
    return numbers if not shares and used == [most] * len(used) else f"{numbers} (of {most} that the router chooses)"


def _sparsity(source: ExportSource) -> str:
    """Return S by site, as a range where layers or experts differ."""
    rows = []
    for site in model_sites(source.config.model):
        values = [s for place, values in source.plan.values.items() if place[1] == site for s in values]
        least, most = min(values), max(values)
        rows.append((f"`{site}`", f"{most:g}" if least == most else f"{least:g} to {most:g}"))
    heading = "S is the fraction of the features in front of a weight matrix that is set to zero.\n\n"
    return heading + _table(rows, ("Site", "S"))


def _training(source: ExportSource) -> str:
    config = source.config
    rows = [("Data", "; ".join(_data(each) for each in config.data.sources)), ("Steps", f"{source.step:,}")]
    if source.step:
        rows.append(("Tokens", f"{source.step * _tokens_per_step(config):,}"))
    if config.training.init_from is not None:
        rows.append(("Started from", _public(config.training.init_from)))
    rows += _losses(source)
    if not source.step:
        return "The weights were imported and not trained by qsparse_moe."
    return _table(rows)


def _tokens_per_step(config: RunConfig) -> int:
    return config.training.global_batch_size * config.data.sequence_length


def _losses(source: ExportSource) -> list[tuple[str, str]]:
    """Return the last logged value of every loss up to the step of the weights."""
    rows = [row for row in read_metrics(source.folder / METRICS_FILE) if row["step"] <= source.step]
    last = {name: row[name] for row in rows for name in _LOSSES if row.get(name) is not None}
    return [(f"`{name}`", f"{last[name]:.4f}") for name in _LOSSES if name in last]


def _data(source: SourceConfig) -> str:
    paths = (source.path,) if isinstance(source.path, str) else source.path or ()
    names = ", ".join(_public(path) for path in paths)
    what = {"stdlib": "the standard library of Python", "hub": "data set"}.get(source.kind, source.kind)
    weight = f" (weight {source.weight:g})" if source.weight != 1 else ""
    return f"{what} {names}".strip() + weight


def _public(path: str) -> str:
    """Return a name on the hub as it is, and only the last part of a path, which belongs to one machine."""
    return Path(path).name if os.path.isabs(path) or path.startswith((".", "~")) else path


def _table(rows: Iterator[tuple[str, str]] | list[tuple[str, str]], heading: tuple[str, str] = ("", "")) -> str:
    lines = [heading, ("---", "---"), *rows]
    return "\n".join(f"| {first} | {second} |" for first, second in lines)
