"""Rules about the router: groups of experts, its input, its biases, and forced routing.

E experts, A experts per token, S sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.model_rules import divisors, nearest
from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import layer_sites, moe_layers, site_sparsity

_GROUPS, _CHOSEN, _SCORE = (f"model.moe.{name}" for name in ("num_expert_groups", "groups_per_token", "group_score"))


def _expert_groups(config: ModelConfig) -> Iterator[Problem]:
    moe = config.moe
    groups, chosen, experts = moe.num_expert_groups, moe.groups_per_token, moe.num_experts
    if experts % groups:
        yield Problem(
            f"{_GROUPS} ({groups}) must divide model.moe.num_experts ({experts}); {nearest(groups, divisors(experts))}",
            (_GROUPS, "model.moe.num_experts"),
        )
        # The rules below assume groups of equal size.
        return
    if chosen > groups:
        yield Problem(
            f"{_CHOSEN} ({chosen}) must be at most {_GROUPS} ({groups}); lower the one or raise the other",
            (_CHOSEN, _GROUPS),
        )
    # More experts per token than experts is reported by another rule.
    elif moe.experts_per_token > chosen * (experts // groups) and moe.experts_per_token <= experts:
        needed = -(-moe.experts_per_token // (experts // groups))
        yield Problem(
            f"{_CHOSEN} ({chosen}) gives a token the choice of {chosen * (experts // groups)} of model.moe.num_experts "
            f"({experts}) experts in {_GROUPS} ({groups}), fewer than model.moe.experts_per_token "
            f"({moe.experts_per_token}); {needed} groups contain enough",
            (_CHOSEN, _GROUPS, "model.moe.num_experts", "model.moe.experts_per_token"),
        )
    yield from _group_score(config)


def _group_score(config: ModelConfig) -> Iterator[Problem]:
    moe = config.moe
    if moe.num_expert_groups == 1:
        if moe.group_score != "top2_sum":
            yield Problem(
                f"{_SCORE} ({moe.group_score}) has no meaning when {_GROUPS} is 1; remove it, or form groups",
                (_SCORE, _GROUPS),
            )
    elif moe.group_score == "top2_sum" and moe.num_experts == moe.num_expert_groups:
        yield Problem(
            f"{_SCORE} (top2_sum) needs at least 2 experts per group, and {_GROUPS} ({moe.num_expert_groups}) leaves 1 "
            f"of model.moe.num_experts ({moe.num_experts}); choose max, or form fewer groups",
            (_SCORE, _GROUPS, "model.moe.num_experts"),
        )


def _bias(config: ModelConfig) -> Iterator[Problem]:
    moe, path = config.moe, "model.moe.bias_update_steps"
    if moe.bias_update_steps is not None and not moe.bias_update_rate:
        yield Problem(
            f"{path} ({moe.bias_update_steps}) has no meaning when model.moe.bias_update_rate is 0; remove it, or set "
            "the rate",
            (path, "model.moe.bias_update_rate"),
        )


def _forced(config: ModelConfig) -> Iterator[Problem]:
    moe, path = config.moe, "model.moe.force_uniform_routing"
    if not moe.force_uniform_routing:
        return
    # Both act on the choice of experts, which is fixed. The router's losses may stay, because the scores still give
    # the weights.
    for name, off in (("num_expert_groups", 1), ("bias_update_rate", 0)):
        value = getattr(moe, name)
        if value != off:
            yield Problem(
                f"{path} (true) leaves the router no choice, so model.moe.{name} ({value}) must be {off}; set it to "
                f"{off}, or set {path} to false",
                (path, f"model.moe.{name}"),
            )


def _sparse_router_input(config: ModelConfig) -> Iterator[Problem]:
    if config.moe.router_input != "sparse":
        return
    start = "model.moe.router_input (sparse) needs one selection at expert_input for all experts of a layer"
    if config.sparsity.selection == "threshold":
        yield Problem(
            f"{start}, and model.sparsity.selection (threshold) has one threshold per expert; set router_input to "
            "dense, or choose another selection",
            ("model.moe.router_input", "model.sparsity.selection"),
        )
    if config.sparsity.selection == "shared":
        yield Problem(
            f"{start}, and model.sparsity.selection (shared) has one set of features per expert; set router_input to "
            "dense, or choose another selection",
            ("model.moe.router_input", "model.sparsity.selection"),
        )
    for layer in range(config.num_layers):
        values = _expert_input_sparsities(config, layer)
        if len(values) > 1:
            yield Problem(
                f"{start}, and model.sparsity.overrides give the experts of layer {layer} different S "
                f"({show(sorted(values))}); set router_input to dense, or override all experts alike",
                ("model.moe.router_input", "model.sparsity.overrides"),
            )
            # One message is enough: the layers differ by the same override.
            return


def _expert_input_sparsities(config: ModelConfig, layer: int) -> set[float]:
    """Return the values of S at ``expert_input`` of ``layer``; another rule checks that the overrides are valid."""
    if "expert_input" not in layer_sites(config, layer):
        return set()
    # SparsityPlan cannot be used here, because it belongs to a package above this one.
    values = [site_sparsity(config.sparsity, "expert_input")] * config.moe.num_experts
    for override in config.sparsity.overrides:
        if override.site not in (None, "expert_input"):
            continue
        try:
            chosen = (
                select(override.experts, len(values)) if layer in select(override.layers, config.num_layers) else ()
            )
        except ValueError:
            continue
        for expert in chosen:
            values[expert] = override.sparsity
    return set(values)


def untrained_router(config: ModelConfig) -> str | None:
    """Return why the loss would not train the router, with a way out; None if it does train it.

    This is not a rule of the configuration, because a run that was trained this way must stay readable; it is checked
    before a new run starts.
    """
    moe = config.moe
    if moe.experts_per_token > 1 or moe.num_experts == 1 or not moe_layers(config) or moe.router not in _UNNORMALISED:
        return None
    return (
        f"model.moe.router ({moe.router}) gives a token's experts weights that sum to 1, so with "
        "model.moe.experts_per_token (1) the weight is always 1 and the loss gives the router no gradient: only the "
        f"balance losses move it; choose model.moe.router={_UNNORMALISED[moe.router]}, or use at least 2 experts per "
        "token"
    )


_UNNORMALISED = {
    "softmax_topk_renormalized": "softmax_topk",
    "topk_softmax": "softmax_topk",
    "sigmoid_topk_renormalized": "sigmoid_topk",
}
"""Each router whose weights sum to 1, and the router with the same scores and no renormalization."""


ROUTER_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _expert_groups,
    _bias,
    _forced,
    _sparse_router_input,
)
