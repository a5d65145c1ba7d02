"""Fine-tune LoRA adapters of a model of transformers with Q-Sparse inside.

    python examples/finetune_lora.py --steps 60

The script builds a small random Mixtral, puts Q-Sparse into it, and trains adapters of peft on its attention and, where
peft can adapt stacked parameters, on its experts. The adapters read the same sparse rows as the matrices beside them.
peft saves the adapters alone, so the plan is saved beside them. At the end, Q-Sparse is taken out again, and the loss
of the dense model is printed too.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from qsparse_moe import densify, sparsify

LENGTH = 64


def main() -> None:
    """Train adapters of a small model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")) / "argparse.py")
    parser.add_argument("--sparsity", type=float, default=0.5, help="S at every site")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("adapters"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    lora = LoraConfig(
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        # A random model has no features to adapt, so its embedding and head are trained whole.
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = get_peft_model(MixtralForCausalLM(config), lora)
    plan = sparsify(model, arguments.sparsity)
    ids = torch.tensor(list(arguments.text.read_bytes()[:500_000]))
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(arguments.steps):
        batch = rows[torch.randint(len(rows), (8,), generator=torch.Generator().manual_seed(step))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(arguments.output)
    plan.save(arguments.output / "sparsity_plan.json")
    densify(model)
    with torch.no_grad():
        dense = model(rows[:8], labels=rows[:8]).loss.item()
    adapted = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} at S {plan.mean:.2f}, dense {dense:.3f}, {adapted:,} in adapters")


if __name__ == "__main__":
    main()
