"""Small random models of transformers of every family that the drop-in takes, and a slow sparse reference of them."""

from __future__ import annotations

import contextlib

import torch

from qsparse_moe.sparsity.plan import SparsityPlan, num_selected
from qsparse_moe.sparsity.topk import topk_mask_reference

VOCABULARY = 83
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
MOE = DENSE | {"num_experts_per_tok": 2}
QWEN_MOE = MOE | {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 32}
MODELS = {
    "llama": ("Llama", DENSE),
    "mistral": ("Mistral", DENSE),
    "qwen2": ("Qwen2", DENSE),
    "qwen3": ("Qwen3", DENSE | {"head_dim": 16}),
    "mixtral": ("Mixtral", MOE | {"num_local_experts": 4}),
    "olmoe": ("Olmoe", MOE | {"num_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"head_dim": 16, "mlp_only_layers": [0]}),
}
EXPERT_SITES = ("expert_input", "expert_hidden")


def build(name, **settings):
    import transformers

    family, own = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**own | settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms are ones at first, and the routers of some families zeros.
            if parameter_name.endswith("norm.weight") or "gate.weight" in parameter_name:
                parameter.normal_(0.7, 0.3)
    return model.eval()


def tokens(rows=2, length=11, seed=1):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def layer_sites(model, layer):
    """The sites of a layer, written out apart from the package: (site, number of features, number of experts)."""
    config, block = model.config, model.model.layers[layer].mlp
    width = config.num_attention_heads * model.model.layers[layer].self_attn.head_dim
    found = [("attention_input", config.hidden_size, 1), ("attention_output", width, 1)]
    if not hasattr(block, "experts"):
        return [*found, ("dense_input", config.hidden_size, 1), ("dense_hidden", config.intermediate_size, 1)]
    hidden = getattr(config, "moe_intermediate_size", config.intermediate_size)
    found += [("expert_input", config.hidden_size, 4), ("expert_hidden", hidden, 4)]
    if hasattr(block, "shared_expert"):
        found += [("shared_input", config.hidden_size, 1), ("shared_hidden", 40, 1)]
    return found


def varied_plan(model):
    """S differs between layers, sites, and experts."""
    generator = torch.Generator().manual_seed(3)
    values = {}
    for layer in range(model.config.num_hidden_layers):
        for site, _, experts in layer_sites(model, layer):
            values[layer, site] = tuple((0.2 + 0.6 * torch.rand(experts, generator=generator)).tolist())
    return SparsityPlan(values)


def uniform_plan(model, sparsity=0.5):
    sites = [(layer, *site) for layer in range(model.config.num_hidden_layers) for site in layer_sites(model, layer)]
    return SparsityPlan({(layer, site): (sparsity,) * experts for layer, site, _, experts in sites})


def top_k(x, sparsity, gradient):
    mask = topk_mask_reference(x.detach(), num_selected(sparsity, x.shape[-1]))
    return x * mask if gradient == "masked" else x + (x * mask - x).detach()


@contextlib.contextmanager
def reference(model, plan, gradient):
    """Q-Sparse by its definition: every matrix selects for itself, and every expert runs on its own tokens."""
    handles, replaced = [], []

    def before(module, layer, site):
        select = lambda _, args: (top_k(args[0], plan.values[layer, site][0], gradient),)  # noqa: E731
        handles.append(module.register_forward_pre_hook(select))

    def feed_forward(module, layer, part):
        before(module.gate_proj, layer, f"{part}_input")
        before(module.up_proj, layer, f"{part}_input")
        before(module.down_proj, layer, f"{part}_hidden")

    for layer, block in enumerate(model.model.layers):
        for matrix in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            before(matrix, layer, "attention_input")
        before(block.self_attn.o_proj, layer, "attention_output")
        if hasattr(block.mlp, "experts"):
            sparsity = [plan.values[layer, site] for site in EXPERT_SITES]
            block.mlp.experts.forward = _experts(block.mlp.experts, *sparsity, gradient)
            replaced.append(block.mlp.experts)
            if hasattr(block.mlp, "shared_expert"):
                feed_forward(block.mlp.shared_expert, layer, "shared")
        else:
            feed_forward(block.mlp, layer, "dense")
    yield
    for handle in handles:
        handle.remove()
    for module in replaced:
        del module.forward


def _experts(module, input_sparsity, hidden_sparsity, gradient):
    def forward(x, expert_ids, weights):
        rows = []
        for token, (ids, shares) in enumerate(zip(expert_ids.tolist(), weights, strict=True)):
            outputs = []
            for expert, share in zip(ids, shares, strict=True):
                sparse = top_k(x[token], input_sparsity[expert], gradient)
                gate, up = (module.gate_up_proj[expert] @ sparse).chunk(2)
                hidden = top_k(module.act_fn(gate) * up, hidden_sparsity[expert], gradient)
                outputs.append(share * (module.down_proj[expert] @ hidden))
            rows.append(sum(outputs))
        return torch.stack(rows)

    return forward
