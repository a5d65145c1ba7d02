"""The tables of ``docs/layout.md``, as ``qsparse-moe layout`` finds them.

    python -m tests.readme.layout_page

writes the page anew. A table stands between a comment that names its config, and the next empty line.
"""

from __future__ import annotations

import re
from pathlib import Path

from qsparse_moe.accounting.layout_plan import Plan, find_layouts
from qsparse_moe.cli.layout import describe_machine
from qsparse_moe.config.load import load_config

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "layout.md"
GPUS = (8, 64, 512)
BATCH = ("data.sequence_length=4096", "training.global_batch_size=1024")
"""4.2 M tokens per step, which 512 ranks can share."""
TOKENS = 1e12
_TABLE = re.compile(r"(<!-- plan of (\S+) -->\n\n)((?:\|.*\n)*)")
_COLUMNS = (
    "GPUs",
    "settings",
    "GB of a GPU",
    "GB of host",
    "GB sent in node, between",
    "s per step",
    "MFU",
    "limit",
    "days",
)


def page_text(text: str) -> str:
    """Return the page with its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + plan_table(found[2]), text)


def plan_table(name: str) -> str:
    """Return the table of a recipe: the fastest layout that fits on each number of GPUs."""
    config = load_config(REPOSITORY / "configs" / "recipes" / f"{name}.yaml", BATCH)
    lines = [f"| {' | '.join(_COLUMNS)} |", f"| {' | '.join('---' for _ in _COLUMNS)} |"]
    for gpus in GPUS:
        best = find_layouts(config, describe_machine(gpus=gpus, gpu="h100-80gb"))[0]
        lines.append(f"| {' | '.join((str(gpus), *_cells(best)))} |")
    return "\n".join(lines) + "\n"


def _cells(plan: Plan) -> tuple[str, ...]:
    settings = " ".join(f"`{override}`" for override in plan.overrides) or "as in the recipe"
    within, between = (sum(getattr(one, part) for one in plan.sent) for part in ("within", "between"))
    time, training = plan.time, plan.config.training
    steps = TOKENS / (training.global_batch_size * plan.config.data.sequence_length)
    return (
        settings if plan.fits else f"none fits; the nearest: {settings}, which {plan.verdict}",
        f"{plan.device_need / 1e9:.1f}",
        f"{plan.host_need / 1e9:.1f}",
        f"{within / 1e9:.0f}, {between / 1e9:.0f}",
        f"{time.total:.3g}",
        f"{100 * time.utilisation:.0f} %",
        time.limit,
        f"{steps * time.total / 86400:,.0f}",
    )


if __name__ == "__main__":
    PAGE.write_text(page_text(PAGE.read_text()))
