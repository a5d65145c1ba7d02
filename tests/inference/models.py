"""Small models whose attention and selections matter, and the logits of whole sequences at once."""

from __future__ import annotations

import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.inference.cached_model import TorchDecode, prefill
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan


def config(**settings):
    """Two layers of 64 features; what is not given is small.

    Epsilon and the base of the rotation are not the defaults, so that an engine with constants of its own fails.
    """
    moe = {"num_experts": 4, "expert_hidden_size": 32, "backend": "loop"} | settings.pop("moe", {})
    sparsity = {"backend": "torch"} | settings.pop("sparsity", {})
    return ModelConfig.model_validate(
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "init_std": 0.2, "norm_epsilon": 0.02, "rope_theta": 100.0}
        | {"moe": moe, "sparsity": sparsity}
        | settings
    )


def model(dtype=torch.float32, seed=3, **settings):
    """Return a model whose norms and biases differ from each other: the initial ones could be exchanged."""
    built = build_model(config(**settings), dtype=dtype, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.copy_(0.6 + 0.8 * torch.rand(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return built


def random_tokens(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def all_at_once(built, tokens_BS, **arguments):
    """``(B, S, V)`` fp32."""
    return built(tokens_BS, with_stats=False, **arguments).logits_BSV.float()


def difference_from_torch(built, engine, prompts, *, capacity, steps):
    """The largest difference of the logits of an engine and of the defining one, relative to the largest logit.

    Both see the same keys and values in each step. The tokens are the greedy ones of the defining engine; the cache
    slides, and the sequences have different lengths.
    """
    settings = {"batch": len(prompts), "capacity": capacity, "dtype": torch.float32, "slides": True}
    caches = [KeyValueCache.allocate(built.config, device=built.head.weight.device, **settings) for _ in range(2)]
    tokens = [random_tokens(length, seed=place).tolist() for place, length in enumerate(prompts)]
    logits, _ = (prefill(built, tokens, cache) for cache in caches)
    defining, worst = TorchDecode(built), 0.0
    for _ in range(steps):
        chosen_B = logits.argmax(-1).cpu()
        logits, other = defining.decode(chosen_B, caches[0]), engine.decode(chosen_B, caches[1])
        assert torch.equal(caches[0].positions_B, caches[1].positions_B)
        seen = logits.isfinite()
        assert torch.equal(seen, other.isfinite())
        worst = max(worst, ((logits - other)[seen].abs().max() / logits[seen].abs().max()).item())
        # One near tie that flips would be carried on by the cache.
        caches[1].key_LBHPC.copy_(caches[0].key_LBHPC)
        caches[1].value_LBHPC.copy_(caches[0].value_LBHPC)
    return worst


def plan_per_expert(built, selection):
    """Return a plan with an S of its own for every expert and place, with thresholds where the selection needs them."""
    draw = torch.Generator().manual_seed(0)
    places = SparsityPlan.from_config(built.config).values
    values = {
        place: tuple((torch.randint(0, 7, (len(old),), generator=draw) / 8).tolist()) for place, old in places.items()
    }
    plan = SparsityPlan(values)
    if selection == "threshold":
        plan = plan.with_thresholds({place: tuple(0.5 * s for s in old) for place, old in values.items()})
    return plan


@torch.no_grad()
def sliding_window(built, tokens_BS, window):
    """All at once, each token attending to the last ``window``: the slow definition, in every layer."""
    length = tokens_BS.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    added_SS = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf)

    def attend(query, key, value):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        scores = query @ key.mT * next(built.blocks()).attention.scale + added_SS.to(query.dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    hidden, _ = built.run_layers(
        built.embedding(tokens_BS), None, with_stats=False, attends=[attend] * built.config.num_layers
    )
    return built.logits(hidden)
