"""Which options of ``qsparse-moe allocate`` go together. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from qsparse_moe.ablation.allocation.budget import Budget, Quantity, parse_budget, parse_front
from qsparse_moe.cli.option_values import check_sparsity
from qsparse_moe.errors import ConfigError

Value = TypeVar("Value")


def given_once(option: str, values: Sequence[Value] | None) -> Value | None:
    """Return the value of a budget's option, or None if it is not given.

    The options of budgets can be repeated for the parser, which would take the last of several values otherwise.

    Raises:
        ConfigError: it is given more than once.
    """
    if not values:
        return None
    if len(values) > 1:
        raise ConfigError(
            f"{option} is given {len(values)} times ({' and '.join(map(str, values))}), and a call has one budget; "
            "keep one of them, and use --budget with --front for several shares of a cost"
        )
    return values[0]


def joint_budgets(budget: str, front: str | None, *, others: Sequence[str], batch: int | None = None) -> list[Budget]:
    """Return the budget of the plan, and behind it those of the front.

    Args:
        budget: the value of ``--budget``.
        front: the value of ``--front``.
        others: the options of other budgets that are given.
        batch: the value of ``--batch``.

    Raises:
        ConfigError: a budget is malformed, ``others`` names a second one, or the batch is given as an option.
    """
    if others:
        raise ConfigError(
            f"--budget ({budget}) and {' and '.join(others)}: give one budget; --budget allocates both sparsities, the "
            "other options S alone"
        )
    first = parse_budget(budget)
    if batch is not None:
        own = f'write --budget "bytes={first.amount}@batch={batch}"'
        raise ConfigError(
            f"--batch ({batch}) belongs to --bytes; the batch of --budget ({budget}) is part of its value, and only "
            f"bytes has one: {own if first.quantity == 'bytes' else 'leave it out'}"
        )
    if front is None:
        return [first]
    shares = (Budget(first.quantity, share, first.batch) for share in parse_front(front))
    return [first, *(share for share in shares if share != first)]


def check_no_joint_options(given: Mapping[str, object]) -> None:
    """Raise ConfigError if an option is given that only --budget has.

    Args:
        given: the values by option; True is an option without a value, and None and False were not given.
    """
    wrong = [name if value is True else f"{name} ({value})" for name, value in given.items() if value]
    if wrong:
        verb, them = ("applies", "it") if len(wrong) == 1 else ("apply", "them")
        raise ConfigError(
            f"{' and '.join(wrong)} {verb} to a budget of both sparsities only; leave {them} out, or give --budget, "
            'such as --budget "bytes=0.5@batch=1", in place of a budget of S alone'
        )


def requested_budget(
    *,
    sparsity: float | None,
    parameters: float | None,
    flops: float | None,
    bytes_: float | None,
    batch: int | None = None,
) -> tuple[Quantity, float]:
    """Return the quantity that the budget of S alone limits, and the limit.

    Raises:
        ConfigError: not exactly one is given, S is outside [0, 1), another value is negative, or there is a batch for a
            cost of one token.
    """
    given: dict[Quantity, float | None] = {
        "sparsity": sparsity,
        "parameters": parameters,
        "flops": flops,
        "bytes": bytes_,
    }
    budgets = [(quantity, value) for quantity, value in given.items() if value is not None]
    if len(budgets) != 1:
        options = " and ".join(f"--{quantity}" for quantity, _ in budgets) or "no budget"
        raise ConfigError(
            f"{options}: give exactly one of --budget, for both sparsities, and --sparsity, --parameters, --flops, "
            "--bytes, for S alone"
        )
    quantity, target = budgets[0]
    # S has a check of its own, because it also has an upper limit: at S = 1 no feature would be left.
    check_sparsity("--sparsity", sparsity)
    if target < 0.0:
        raise ConfigError(
            f"--{quantity} ({target}) must be at least 0; qsparse-moe describe prints the value of the run"
        )
    if batch is not None and quantity != "bytes":
        raise ConfigError(
            f"--batch ({batch}) has no effect on --{quantity}, which is not counted per step; leave it out, or limit "
            "--bytes"
        )
    return quantity, target
