"""Fine-tune a model of transformers with Q-Sparse inside, by the Trainer of transformers.

    python examples/finetune_trainer.py --steps 60

The script builds a small random Mixtral, puts Q-Sparse into its attention and experts, and trains it on the text of
Python's standard library (or on ``--text``) while S rises from 0 to its target. The model is then saved, loaded again,
and made sparse by the plan in its ``config.json``. A model of your own takes the place of the random one with
``AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from qsparse_moe import sparsify
from qsparse_moe.interop.drop_in.model import current_plan
from qsparse_moe.interop.drop_in.trainer import SparsitySchedule
from qsparse_moe.interop.drop_in.zeros import measure_zeros

LENGTH = 64


def sequences(text: Path) -> list[dict[str, torch.Tensor]]:
    """Return the bytes of a file, as sequences of token ids that are their own labels."""
    ids = torch.tensor(list(text.read_bytes()[:500_000]))
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train, save, and load a small model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")) / "argparse.py")
    parser.add_argument("--sparsity", type=float, default=0.5, help="S at the end of the ramp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
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
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MixtralForCausalLM(config)
    sparsify(model, arguments.sparsity)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=max(1, arguments.steps // 6),
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=sequences(arguments.text),
        # The plan that the model has now is the target.
        callbacks=[SparsitySchedule(ramp_steps=arguments.steps // 2)],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(arguments.output)
    loaded = MixtralForCausalLM.from_pretrained(arguments.output)
    sparsify(loaded)  # the plan of config.json
    row = sequences(arguments.text)[0]["input_ids"][None]
    with torch.no_grad(), measure_zeros(loaded) as zeros:
        loss = loaded(row, labels=row).loss.item()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, S {current_plan(loaded).mean:.2f}, loaded again {loss:.3f}")
    for site, share in zeros.by_site().items():
        print(f"{site:16}  zeros {share:.3f}")


if __name__ == "__main__":
    main()
