"""Rules for experts made from a dense model, by which the first logits are those of the dense model, to rounding.

A dense feed-forward network of F hidden features is cut into s slices of F / s features, whose outputs add up to its
own; s is 1 for whole copies. Of every slice the model has E / s copies, and expert ``c * s + j`` is slice j of copy c.
All slices of a copy have the same router weights, so they have equal logits and are chosen together: A must be a
multiple of s. The weights of a token's experts sum to 1, so those of each slice sum to 1 / s, and the factor
``router_scaling_factor`` s restores the sum (arXiv 2410.07524 has the same groups of slices).

E experts, A experts per token, F hidden features of the dense network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qsparse_moe.config.model_rules import divisors
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import dense_hidden_size
from qsparse_moe.errors import ArgumentError, ConfigError

# The weights of a token's experts sum to 1 before the scaling factor.
_ROUTERS = ("softmax_topk_renormalized", "topk_softmax", "sigmoid_topk_renormalized")


@dataclass(frozen=True)
class Upcycling:
    """The experts that an import makes of every dense layer.

    Raises:
        ConfigError: the first logits would not be those of the dense model, or a value is out of its range.
    """

    experts: int
    """E, the number of experts per layer."""
    experts_per_token: int
    """A, at least 2: the weight of a single expert would always be 1, and the router would have no gradient."""
    upcycle: Literal["copies", "slices"] = "copies"
    """Whether an expert is a copy of the dense network, or one of its slices."""
    slices: int | None = None
    """Number of slices per copy; None: A, so that a token's experts are as large as the dense network."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to the experts' weights, in units of the root mean square of the
    weights of the expert's matrix; with noise the first logits are only near those of the dense model."""
    noise_share: float = 0.5
    """Share of the weights that receive noise."""

    def __post_init__(self) -> None:
        if not 2 <= self.experts_per_token <= self.experts:
            raise ArgumentError(
                f"{{experts_per_token}} ({self.experts_per_token}) must be from 2 to {{experts}} ({self.experts}): the "
                "weight of a single expert is always 1, which leaves the router without a gradient; raise it"
            )
        if self.upcycle == "copies" and self.slices is not None:
            raise ArgumentError(
                f"{{slices}} ({self.slices}) has no meaning when {{upcycle}} is copies; leave it out, or choose slices"
            )
        if self.slices is not None and self.slices < 1:
            raise ArgumentError(f"{{slices}} ({self.slices}) must be at least 1; leave it out")
        for name, value in (("experts", self.experts), ("experts_per_token", self.experts_per_token)):
            if value % self.num_slices:
                raise ArgumentError(
                    f"{{{name}}} ({value}) must be a multiple of the number of slices ({self.num_slices}), so that a "
                    "token's experts hold every slice equally often; change it, or set {slices}"
                )
        if not 0 <= self.noise < math.inf:
            raise ArgumentError(f"{{noise}} ({self.noise}) must be a number of at least 0; leave it out for no noise")
        if not 0 < self.noise_share <= 1:
            raise ArgumentError(f"{{noise_share}} ({self.noise_share}) must be above 0 and at most 1; 0.5 is usual")

    @property
    def num_slices(self) -> int:
        """The number of slices per copy, 1 for whole copies."""
        return (self.slices or self.experts_per_token) if self.upcycle == "slices" else 1

    def model(self, dense: ModelConfig) -> ModelConfig:
        """Return ``dense`` with experts in every layer.

        Raises:
            ConfigError: its hidden features cannot be divided into that many slices.
        """
        hidden = dense_hidden_size(dense)
        if hidden % self.num_slices:
            fitting = [number for number in divisors(hidden) if self.experts % number == 0]
            raise ArgumentError(
                f"{{slices}} ({self.num_slices}) must divide the {hidden} hidden features of the dense layers; with "
                f"{{experts}} ({self.experts}), one of {show(fitting)} does"
            )
        values = {
            "num_dense_layers": 0,
            "dense_hidden_size": None,
            "num_experts": self.experts,
            "experts_per_token": self.experts_per_token,
            "expert_hidden_size": hidden // self.num_slices,
            "router": "softmax_topk_renormalized",
            "router_scaling_factor": float(self.num_slices),
        }
        return dense.model_copy(update={"moe": dense.moe.model_copy(update=values)})


def upcycling_of(experts: int | None, **options: Any) -> Upcycling | None:
    """Return the experts that options ask for; None if there are none.

    Args:
        experts: E; None: the model stays as it is.
        options: the other fields of ``Upcycling``; None takes the default, which for ``experts_per_token`` is 2.

    Raises:
        ConfigError: an option is given that has no meaning without another one, or is out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if experts is None:
        for name, value in given.items():
            raise ArgumentError(
                f"{{{name}}} ({value}) has no meaning without {{experts}}, the number of experts to make; leave it "
                "out, or set that number"
            )
        return None
    if "noise_share" in given and not given.get("noise"):
        raise ArgumentError(
            f"{{noise_share}} ({given['noise_share']}) has no meaning without {{noise}}; leave it out, or set it"
        )
    return Upcycling(experts, **({"experts_per_token": 2} | given))


def check_experts(config: ModelConfig, dense: ModelConfig, source: Path) -> int:
    """Return the number of slices of the experts of ``config``, which start from the dense layers of ``source``.

    Raises:
        ConfigError: its first logits would not be those of the model ``dense``.
    """
    moe, hidden = config.moe, dense_hidden_size(dense)
    if hidden % moe.expert_hidden_size:
        raise _refusal(
            config, "expert_hidden_size", f"the {hidden} hidden features of the dense layers, or a divisor of them",
            source, f"set it to {hidden} for copies",
        )  # fmt: skip
    slices = hidden // moe.expert_hidden_size
    in_slices = f"because the dense layers are cut into {slices} slices (model.moe.expert_hidden_size)"
    for name in ("num_experts", "experts_per_token"):
        if getattr(moe, name) % slices:
            raise _refusal(config, name, f"a multiple of {slices}", source, f"{in_slices}; change one of the two")
    if moe.num_experts // moe.num_expert_groups % slices:
        raise _refusal(
            config, "num_expert_groups", f"such that a group has a multiple of {slices} experts", source,
            f"{in_slices}; form fewer groups",
        )  # fmt: skip
    if moe.router not in _ROUTERS:
        raise _refusal(
            config, "router", f"one of {', '.join(_ROUTERS)}", source, "whose weights sum to 1; choose one of them"
        )
    if moe.router_scaling_factor != slices:
        raise _refusal(
            config, "router_scaling_factor", f"{float(slices)}", source,
            f"{in_slices}; set it" if slices > 1 else "so that a token's experts add up to the dense layer; set it",
        )  # fmt: skip
    if moe.num_shared_experts:
        raise _refusal(
            config, "num_shared_experts", "0", source, "from which shared experts cannot be made; set it to 0"
        )
    if slices > 1 and moe.router_noise:
        raise _refusal(
            config,
            "router_noise",
            "0",
            source,
            f"{in_slices}, and noise would separate the slices of a copy; set it to 0",
        )
    return slices


def _refusal(config: ModelConfig, name: str, rule: str, source: Path, way_out: str) -> ConfigError:
    return ConfigError(
        f"model.moe.{name} ({show(getattr(config.moe, name))}) must be {rule} where experts start from the dense "
        f"layers of {source}, {way_out}"
    )
