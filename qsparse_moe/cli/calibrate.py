"""``qsparse-moe calibrate``: find the thresholds of a run's sites and write them as a plan."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, ShardOption, check_shard, check_sparsity
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.shapes import model_sites, site_format
from qsparse_moe.errors import ConfigError
from qsparse_moe.metrics.natural_zeros import warn_of_natural_zeros
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config, no_checkpoint, write_atomically
from qsparse_moe.sparsity.plan import SparsityPlan, check_not_dense
from qsparse_moe.sparsity.schedule import scheduled_scale

if TYPE_CHECKING:
    from qsparse_moe.training.calibrate import Calibration

_SECTION = "model.sparsity"
# Thresholds are found for the run's own model, so no other setting may differ from it.
_SETTINGS_OF_S = ("preset", "plan", "default", "sites", "overrides")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("calibrate")(calibrate)


def calibrate(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="S in place of the run's, such as model.sparsity.default=0.5.", show_default=False),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="S at every site, in place of the run's.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file that gives S, in place of the run's.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="Number of training sequences; default: about 4,000 tokens per expert.", min=1)
    ] = None,
    data: DataOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
    shard: ShardOption = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the thresholds that give a run its S. Runs on one process or under the deepspeed launcher."""
    run_dir = find_model(run).path
    check_shard(shard, "calibrate")
    requested = requested_plan(run_dir, overrides=overrides or (), sparsity=sparsity, plan_file=plan)
    if is_rank_zero():  # on one rank only: another might check after this one has written the file
        check_output(output, force=force)
    from qsparse_moe.interop.trained_model import load_trained
    from qsparse_moe.training.calibrate import calibrate_run

    if is_rank_zero():
        warn_of_natural_zeros(run_dir)
    calibration = calibrate_run(
        run_dir,
        requested,
        num_sequences=rows,
        device=device,
        overrides=sources_overrides(data or (), load_run_config(find_model(run_dir).config_folder).data),
        load=load_trained,
        shard=shard,
    )
    if is_rank_zero():
        write_plan(calibration.plan, output, force=force)
        summary = summarize(calibration, run_dir, output)
        print_json(summary) if json else _print_summary(summary)


def requested_plan(
    folder: Path, *, overrides: Sequence[str] = (), sparsity: float | None = None, plan_file: Path | None = None
) -> SparsityPlan | None:
    """Return the S to calibrate for: that of the run's last step, or the one given in its place. Needs no torch.

    None is the S of an export's last step, which depends on a number that only its weight files contain.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: S is given in two ways, by a setting that is not one of S, for another model, or is 0
            everywhere; or the run's router does not allow thresholds.
    """
    _check_one_way(overrides, sparsity, plan_file)
    # Calibration ranks the features exactly, whatever the selection of the run is.
    found = find_model(folder)
    config = load_run_config(found.config_folder, [f"{_SECTION}.selection=topk", *overrides])
    if config.model.moe.router_input == "sparse":
        raise ConfigError(
            f"{folder}: its router reads the sparse tokens (model.moe.router_input is sparse), and thresholds differ "
            "between experts; only a run that was trained with router_input=dense can select by them"
        )
    step = found.step
    if step is None and found.kind != "export":
        raise no_checkpoint(folder)
    if sparsity is not None:
        plan = SparsityPlan.from_config(config.model).with_(sparsity=sparsity)
    elif plan_file is not None:
        plan = SparsityPlan.load(plan_file)
        plan.check_fits(config.model, file=plan_file)
    else:
        plan = SparsityPlan.from_config(config.model)
        # The run's own S may still have been rising at its last step; a setting in its place means the value itself.
        if not overrides and step is not None:
            scale = scheduled_scale(config.model.sparsity.schedule, max(0, step - 1))
            plan = plan.scaled(scale, config.model.moe.experts_per_token)
    check_not_dense(plan, folder)
    is_own = sparsity is None and plan_file is None and not overrides
    return None if is_own and step is None else plan


def _check_one_way(overrides: Sequence[str], sparsity: float | None, plan_file: Path | None) -> None:
    ways = {"--sparsity": sparsity is not None, "--plan": plan_file is not None, "settings": bool(overrides)}
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both give the S to calibrate for; keep one of them")
    check_sparsity("--sparsity", sparsity)
    for override in overrides:
        path, equals, _ = override.partition("=")
        # A text without "=" is reported by load_config. The final dot keeps a longer name with the same beginning out.
        if equals and not any(f"{path.strip()}.".startswith(f"{_SECTION}.{name}.") for name in _SETTINGS_OF_S):
            raise ConfigError(
                f"{path} does not set S, and only S may differ from the run; choose from "
                f"{', '.join(f'{_SECTION}.{name}' for name in _SETTINGS_OF_S)}"
            )


def check_output(output: Path, *, force: bool, example: str = "plan.json") -> None:
    """Raise ConfigError unless a file such as ``example`` may be written to ``output``; nothing is written."""
    if output.is_dir():
        raise ConfigError(f"--output ({output}) is a folder; name a file, such as {output / example}")
    if not output.parent.is_dir():
        raise ConfigError(
            f"--output ({output}) must be in a folder that exists; create {output.parent}, or name another file"
        )
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output ({output}) is in a folder without write permission; name another file")
    if output.exists() and not force:
        raise ConfigError(f"--output ({output}) exists and is not overwritten; name another file, or add --force")


def write_plan(plan: SparsityPlan, output: Path, *, force: bool) -> None:
    """Write the plan atomically; raise ConfigError as ``check_output`` does, or if the disk fails."""
    # Checked again, because another process may have written the file during the calibration.
    check_output(output, force=force)
    try:
        write_atomically(output, plan.to_json() + "\n")
    except OSError as error:
        raise ConfigError(f"--output ({output}) cannot be written ({error.strerror}); name another file") from None


def summarize(calibration: Calibration, run_dir: Path, output: Path) -> dict[str, Any]:
    """Return the result in the form of ``--json``."""
    # The plan is in the output file; in the summary it would be thousands of numbers.
    figures = {name: value for name, value in vars(calibration).items() if name not in {"plan", "sites"}}
    return {
        "run_dir": str(run_dir),
        "output": str(output),
        **figures,
        "sites": {site: asdict(found) for site, found in calibration.sites.items()},
        "settings": list(settings_for(load_run_config(find_model(run_dir).config_folder), output)),
    }


def settings_for(config: RunConfig, output: Path, *, selection: str = "threshold") -> Iterator[str]:
    """Yield the overrides that make a run like ``config`` use the plan ``output``; conflicting settings are unset."""
    settings = config.model.sparsity
    if selection == "threshold" or settings.selection == "threshold":
        yield f"{_SECTION}.selection={selection}"
    yield override_of(f"{_SECTION}.plan", str(output))
    # A plan excludes every other way to set S.
    for name in ("preset", "default"):
        if getattr(settings, name) is not None:
            yield f"{_SECTION}.{name}=null"
    for site, sparsity in settings.sites:
        if sparsity is not None:
            yield f"{_SECTION}.sites.{site}=null"
    if settings.overrides:
        yield f"{_SECTION}.overrides=[]"
    # A threshold belongs to one S, so S must not rise during the run.
    if selection == "threshold" and settings.schedule.ramp_steps:
        yield f"{_SECTION}.schedule.ramp_steps=0"
        yield f"{_SECTION}.schedule.shape=constant"
    # The preset that is unset above may also have set number formats, which are to stay.
    if settings.preset is not None and PRESETS[settings.preset].formats:
        for site in model_sites(config.model):
            yield f"{_SECTION}.quantization.sites.{site}={site_format(settings, site)}"


def _print_summary(summary: dict[str, Any]) -> None:
    console = result_console()
    title = f"Fraction of zeros after step {summary['step']}, on {summary['held_out_rows']} validation sequences"
    table = Table(title=title, title_justify="left")
    for column in (
        "site",
        "layers",
        "mean S",
        "exact top-K",
        "thresholds",
        "largest gap of a layer",
        "experts without tokens",
    ):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site, found in summary["sites"].items():
        shares = [f"{found[name]:.4f}" for name in ("sparsity", "zeros_topk", "zeros_threshold", "largest_gap")]
        table.add_row(site, str(found["layers"]), *shares, str(found["experts_without_rows"]))
    console.print(table)
    losses = f"{summary['loss_topk']:.4f} with exact top-K, {summary['loss_threshold']:.4f} with thresholds"
    console.print(f"loss              {losses}, nats per token")
    console.print(f"calibrated on     {summary['rows']} training sequences")
    console.print(f"plan              {summary['output']}", soft_wrap=True)
    console.print(f"to use it         {shlex.join(summary['settings'])}", soft_wrap=True)
