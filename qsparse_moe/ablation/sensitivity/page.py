"""The page of sensitivities, made from the content of ``sensitivity.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.page.commands import PROGRAM, run_of
from qsparse_moe.ablation.page.parts import Command, Drawing, Page, Part, Section, Table
from qsparse_moe.ablation.sensitivity.figures import sensitivity_drawings
from qsparse_moe.ablation.sensitivity.report import (
    AGREEMENT_HEAD,
    CELLS_HEAD,
    READING,
    ROUTING_HEAD,
    agreement_rows,
    cheapest_rows,
    costliest_rows,
    plans_line,
    routing_rows,
)
from qsparse_moe.ablation.sensitivity.stored import StoredSensitivity, stored

_MAPS = (
    "Change of the loss when one cell has another S and everything else stays the same, in 1/1000 nats per token: blue "
    "is less loss, red more. Hatched cells have a 95 % interval over documents that contains 0. All maps have the same "
    "scale."
)
_FOLDER = "Paths are relative to the folder in which this report was made."


def sensitivity_page(content: Mapping[str, Any], drawings: Mapping[str, Drawing] | None = None) -> Page:
    """Return the page of sensitivities.

    Args:
        content: what ``sensitivity.json`` holds.
        drawings: the result of ``sensitivity_drawings`` for it if it is at hand.
    """
    found = stored(content)
    own = drawings or sensitivity_drawings(found)
    sections = [
        Section("Change of the loss by cell", [_MAPS, *(one for name, one in own.items() if name.startswith("map-"))]),
        Section(
            "Cells that cost most and least",
            [
                Table("The cells that cost most, each at its costliest S", CELLS_HEAD, costliest_rows(found)),
                Table("The cells that cost least at the largest S", CELLS_HEAD, cheapest_rows(found)),
            ],
        ),
    ]
    if found.routing:
        table = Table("Other ranks of choice in one layer", ROUTING_HEAD, routing_rows(found))
        sections.append(Section("Routing", [own["routing"], table]))
    if found.agreement or found.plans is not None:
        sections.append(Section("How good the estimates are", _agreement(found, own)))
    sections.append(Section("What to run next", [_FOLDER, *_commands(content)]))
    facts = [
        ("step of the checkpoint", f"{content['step']:,}"),
        ("loss", f"{content['loss']:.4f} nats per token"),
        ("mean S", f"{content['mean_sparsity']:.3f}"),
        ("validation sequences", f"{content['rows']:,}"),
        ("documents", f"{content['documents']:,}"),
        ("evaluations", f"{content['evaluations']:,}"),
    ]
    return Page(f"Sensitivities of {content['run_dir']}", facts, sections)


def _agreement(found: StoredSensitivity, drawings: Mapping[str, Drawing]) -> list[Part]:
    parts: list[Part] = []
    if found.agreement:
        table = Table("Estimate against evaluation", AGREEMENT_HEAD, agreement_rows(found))
        parts += [drawings["estimate"], table, READING]
    if found.plans is not None:
        parts += [drawings["plans"], plans_line(found.plans)]
    return parts


def _commands(content: Mapping[str, Any]) -> list[Command]:
    model = Path(content["run_dir"])
    run = run_of(model)
    allocate = [PROGRAM, "allocate", str(model), "--output", str(run / "plan.json")]
    again = [PROGRAM, "sensitivity", str(model), "--rows", str(4 * content["rows"]), "--estimate-only"]
    more = Command(
        "Estimates on four times as many sequences, for narrower intervals",
        [*again, "--output", str(run / "sensitivity-estimate")],
    )
    if not content.get("routing"):
        # A model without routed experts has no second sparsity.
        allocate += ["--sparsity", "0.6"]
        return [Command("Distribute a mean S of 0.6 where it changes the loss least", allocate), more]
    allocate += ["--budget", "bytes=0.5@batch=1"]
    return [
        Command("Spend half of the bytes of the dense model where they change the loss least", allocate),
        Command("The same at many budgets", [*allocate, "--force", "--front", "0.3:0.9:0.1"]),
        more,
    ]
