"""Checks of option values that several verbs share. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qsparse_moe.errors import ConfigError
from qsparse_moe.training.distributed.launcher_environment import launcher_world_size

SITE_HELP = "The only site with S, such as expert_hidden."
"""Help of ``--site``."""
MODEL_HELP = "Run folder, checkpoint in it, or export (an imported model is one)."
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="File or glob (.jsonl, .parquet, else text) in place of the run's data; can be repeated.",
        show_default=False,
    ),
]
"""The text to measure on; its documents are divided into training and validation as those of a run are."""
ShardOption = Annotated[
    bool | None,
    typer.Option(
        "--shard/--no-shard",
        help="Divide the weights over the launcher's ranks, which gather those of one module at a time; default: as in "
        "training, that is with ZeRO-3 or expert parallelism.",
        show_default=False,
    ),
]
"""Whether a model that one device cannot hold is measured on several."""


def check_shard(shard: bool | None, verb: str) -> None:
    """Raise ConfigError if the weights are to be divided over ranks and there is only one.

    Args:
        shard: the option.
        verb: the verb, for the message.
    """
    if shard and launcher_world_size() == 1:
        raise ConfigError(
            "--shard divides the weights over the ranks of a launcher, and this process is the only one; start several "
            f"with deepspeed --num_gpus N --module qsparse_moe {verb} ..., or leave out --shard"
        )


def check_folder(option: str, folder: Path) -> None:
    """Raise ConfigError unless files can be written to ``folder``, which may not exist yet; nothing is created."""
    # The folder is created with the first file, so the nearest one that exists decides whether that will work.
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        where = "is a file" if above == folder else f"is below {above}, which is a file"
        raise ConfigError(f"{option} ({folder}) {where}; name a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{option} ({folder}) is in a folder without write permission; name another folder")


def check_result_file(output: Path | None) -> None:
    """Raise ConfigError unless the file ``--output`` can be written, whose folder may not exist yet.

    Called before a measurement, which takes long.
    """
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(f"--output ({output}) is a folder; name a file, such as {output / 'result.json'}")
    check_folder("the folder of --output", output.parent)


def check_no_effect(given: Mapping[str, object], *, beside: str) -> None:
    """Raise ConfigError if an option is given that another one leaves without effect.

    Args:
        given: the values by option; True is an option without a value. None, False, 0, and an empty text ask for
            nothing.
        beside: the other option, for the message.
    """
    idle = [name if value is True else f"{name} ({value})" for name, value in given.items() if value]
    if idle:
        has = "has" if len(idle) == 1 else "have"
        raise ConfigError(f"{' and '.join(idle)} {has} no effect with {beside}; leave out one of them")


def listed_names(option: str, text: str, known: Collection[str]) -> list[Any]:
    """Return the names in ``text``, which are separated by commas.

    Raises:
        ConfigError: one of them is not in ``known``.
    """
    # Any, because callers pass the names on as the literals that they have just been checked to be.
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"{option} {text!r} contains {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def check_name(option: str, name: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``name`` is in ``known``."""
    if name not in known:
        raise ConfigError(f"{option} {name!r} must be {' or '.join(known)}; choose one of them")


def check_site(site: str | None) -> None:
    """Raise ConfigError unless ``--site`` is a site of a model whose layers all have routed experts only, or None."""
    if site is not None:
        check_name("--site", site, ("attention_input", "attention_output", "expert_input", "expert_hidden"))


def check_sparsity(option: str, value: float | None) -> None:
    """Raise ConfigError unless ``value`` is None or in [0, 1)."""
    if value is not None and not 0.0 <= value < 1.0:
        raise ConfigError(f"{option} ({value}) must be in [0, 1): it is the fraction of features set to zero")
