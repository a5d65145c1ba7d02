"""Train with a loop of your own: the model, the data, and the statistics, without ``qsparse_moe.train``.

    python examples/training_loop.py --steps 100

The loop starts dense, makes the hidden features of the experts sparser every ten steps, and prints the load of the
experts and the share of the energy that the selection keeps.
"""

from __future__ import annotations

import argparse

import torch

from qsparse_moe import SparsityPlan, build_model, expert_ratios, load_config, scalar_ratios
from qsparse_moe.config.shipped import shipped
from qsparse_moe.data.loader import TrainLoader
from qsparse_moe.data.token_data import load_data


def main() -> None:
    """Train a small model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("overrides", nargs="*", help="settings, such as model.hidden_size=64")
    arguments = parser.parse_args()
    config = load_config(shipped("tiny").path, arguments.overrides)
    data = load_data(config.data)
    loader = TrainLoader(config, data, rank=0, world_size=1)
    model = build_model(config.model, seed=config.training.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate)
    for step in range(arguments.steps):
        # A plan can be changed between any two steps; nothing is rebuilt.
        sparsity = min(0.75, 0.25 * (step // 10))
        model.set_sparsity(SparsityPlan.uniform(config.model, sparsity))
        batches = loader.batches(step)
        report = step % 10 == 0
        for batch in batches:
            output = model(
                batch.tokens_BS,
                targets_BS=batch.targets_BS,
                positions_BS=batch.positions_BS,
                documents_BS=batch.documents_BS,
                with_stats=report,
            )
            (output.loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report:
            # output.stats holds sums. The ratios have the names and the values of the recorded metrics.
            ratios = scalar_ratios(output.stats)
            # The same by layer and expert, tensors (L, E); NaN for an expert without a token.
            energy_LE = expert_ratios(output.stats)["expert_hidden/kept_energy"]
            print(
                f"step {step:4d}  loss {output.loss.item():.3f}  S {sparsity:.2f}  "
                f"load imbalance {ratios['router/load_imbalance']:.2f}  "
                f"zeros {ratios['sparsity/expert_hidden/zeros']:.3f}  "
                f"kept energy {ratios['sparsity/expert_hidden/kept_energy']:.3f}, "
                f"lowest of an expert {energy_LE[~energy_LE.isnan()].min():.3f}"
            )


if __name__ == "__main__":
    main()
