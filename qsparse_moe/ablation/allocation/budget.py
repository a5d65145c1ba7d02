"""Budgets as the command line states them: ``bytes=0.5@batch=1``, and the values of a front, ``0.3:0.9:0.1``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from qsparse_moe.errors import ConfigError
from qsparse_moe.training.distributed.launcher_environment import launcher_world_size

Quantity = Literal["sparsity", "parameters", "flops", "bytes", "ms"]
_LIMITED = tuple(name for name in get_args(Quantity) if name != "sparsity")
_BY_BATCH = ("bytes", "ms")
_EXAMPLE = "bytes=0.5@batch=1, flops=0.6, parameters=0.4, ms=0.5, or ms=0.2ms"
_MOST_POINTS = 50


@dataclass(frozen=True)
class Budget:
    """A limit of one cost per token, or per step of ``batch`` tokens."""

    quantity: Quantity
    value: float
    """Up to 1 a share of the cost of the dense model with all its experts per token, above 1 the cost itself."""
    batch: int = 1
    is_cost: bool = False
    """Whether a value up to 1 is the cost itself as well, as in ``ms=0.2ms``."""

    @classmethod
    def of_cost(cls, quantity: Quantity, cost: float, batch: int = 1) -> Budget:
        """Return the budget of a cost in the unit of the quantity."""
        return cls(quantity, cost, batch, is_cost=cost <= 1.0)

    @property
    def is_share(self) -> bool:
        """Return whether the value is a share of the cost of the dense model."""
        return self.value <= 1.0 and not self.is_cost

    def target(self, dense: float) -> float:
        """Return the limit in the unit of the quantity; ``dense`` is the cost of the dense model."""
        return self.value * dense if self.is_share else self.value

    @property
    def amount(self) -> str:
        """Return the value as ``parse_budget`` reads it, such as ``0.5``, ``205824``, or ``0.2ms``."""
        # All digits of a count: rounded down, the least possible budget would be refused.
        return f"{self.value:.15g}" + ("ms" if self.quantity == "ms" and not self.is_share else "")

    @property
    def text(self) -> str:
        """Return the budget as ``parse_budget`` reads it."""
        batch = f"@batch={self.batch}" if self.quantity in _BY_BATCH else ""
        return f"{self.quantity}={self.amount}{batch}"

    @property
    def name(self) -> str:
        """Return the budget for the names of files and figures, such as ``bytes-0.5``."""
        return f"{self.quantity}-{self.amount}"


def parse_budget(text: str) -> Budget:
    """Return the budget of ``--budget``.

    Raises:
        ConfigError: it is not one quantity with a positive value, or has a batch that does not change the cost.
    """
    limit, _, suffix = text.partition("@")
    name, equals, number = (part.strip() for part in limit.partition("="))
    if name not in _LIMITED or not equals:
        raise ConfigError(
            f"--budget ({text}) must be one of {', '.join(_LIMITED)} with a value, such as {_EXAMPLE}; a value up to 1 "
            "is a share of the dense model's cost"
        )
    has_unit = name == "ms" and number.endswith("ms")
    value = _positive(number.removesuffix("ms") if has_unit else number)
    if value is None:
        raise ConfigError(
            f"--budget ({text}): the value {number!r} must be a number above 0 without separators of thousands; up to "
            "1 it is a share of the dense model's cost, above 1 the cost itself, and ms=0.2ms is a time of 0.2 ms"
        )
    make = Budget.of_cost if has_unit else Budget
    return make(cast(Quantity, name), value, _batch(text, name, suffix))


def _batch(text: str, name: str, suffix: str) -> int:
    if not suffix:
        return 1
    key, _, number = (part.strip() for part in suffix.partition("="))
    if key != "batch" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"--budget ({text}): behind @ stands batch=B with a whole number B of at least 1, the tokens of one step"
        )
    if name != "bytes" and int(number) != 1:
        raise ConfigError(
            f"--budget ({text}): {name} is a cost of one token, so that batch can only be 1; leave @batch out, or "
            "limit bytes"
        )
    return int(number)


def parse_front(text: str) -> tuple[float, ...]:
    """Return the shares of ``--front``, ascending, both ends included.

    Raises:
        ConfigError: it is not LOW:HIGH:STEP with shares in (0, 1].
    """
    parts = [_positive(part) for part in text.split(":")]
    rule = f"--front ({text}) must be LOW:HIGH:STEP with 0 < LOW <= HIGH <= 1 and a STEP above 0, such as 0.3:0.9:0.1"
    if len(parts) != 3 or None in parts:
        raise ConfigError(rule)
    low, high, step = cast(list[float], parts)
    if not low <= high <= 1.0:
        raise ConfigError(rule)
    # A little more than a whole number of steps would be one step less by rounding.
    count = int((high - low) / step + 1e-9) + 1
    if count > _MOST_POINTS:
        raise ConfigError(f"--front ({text}) has {count} budgets, and at most {_MOST_POINTS} are allowed; raise STEP")
    return tuple(round(low + number * step, 10) for number in range(count))


def check_decoding(budget: Budget, *, decode: bool) -> None:
    """Raise ConfigError if the decode engine is to be measured under a launcher with several processes.

    Each would measure other times and, for a budget of ms, find another plan.
    """
    world_size = launcher_world_size()
    if world_size > 1 and (decode or budget.quantity == "ms"):
        option = "--decode" if decode else f"--budget ({budget.text})"
        raise ConfigError(
            f"{option} measures the decode engine in one process, and the launcher started {world_size} (WORLD_SIZE); "
            "start qsparse-moe allocate without it, or give a budget of bytes without --decode"
        )


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    # Not nan either, which is not above 0.
    return value if 0.0 < value < float("inf") else None
