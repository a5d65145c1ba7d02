"""Continued training of a finished run: one step of AdamW by hand from what the checkpoint holds."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.ablation.allocation.continued import _trained, check_continued, continued_config, keep_idle_routers
from qsparse_moe.ablation.routing import Choice, with_choices
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.data.loader import TrainLoader
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import build_model
from qsparse_moe.runs.find import ModelFolder, find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.state import seed_random_states
from qsparse_moe.training.checkpoint.store import load_checkpoint, newest_checkpoint
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.loop import train
from tests.ablation.small_models import config, model_of, rows_of
from tests.support.runs import tiny_config, write_text

MOMENTS = ("exp_avg", "exp_avg_sq")


# The gradient has reached its last share of the straight-through one, and the router draws random numbers.
CHANGED = {
    "moe": {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "router_jitter": 0.3},
    "sparsity": {"default": 0.5, "backend": "torch", "gradient": "blend", "blend": {"end": 0.4, "ramp_steps": 2}},
}


@pytest.mark.parametrize(
    ("mode", "steps", "changed"), [("table", 1, {}), ("table", 2, {}), ("streaming", 1, {}), ("table", 1, CHANGED)]
)
def test_continued_training_takes_the_next_step_of_adam_at_a_tenth_of_the_peak_rate_on_the_next_sequences(
    tmp_path, mode, steps, changed
):
    write_text(tmp_path / "text")
    run = tiny_config(tmp_path, "run", engine="torch", steps=3, gradient_clipping=0.0, weight_decay=0.2, model=changed)
    ended = train(run.model_copy(update={"data": run.data.model_copy(update={"mode": mode})}))
    config, checkpoint = load_run_config(ended.run_dir), newest_checkpoint(ended.run_dir)
    data, plan = load_data(config.data), SparsityPlan.uniform(config.model, 0.25)
    folder = find_model(ended.run_dir)
    with open_distributed("cpu") as distributed:
        engine = _trained(folder, continued_config(folder, (), shard=False), plan, steps, data, distributed)
        trained = engine.model
        engine.close()
    assert trained.sparsity_plan is plan and not trained.training

    model = build_model(config.model)
    load_checkpoint(model, checkpoint)
    model.set_sparsity(plan)
    loader = TrainLoader(config, data, 0, 1)
    loader.load_state_dict(checkpoint.data_state)
    moments = {kind: {n: checkpoint.tensor(kind, n).double() for n, _ in model.named_parameters()} for kind in MOMENTS}
    assert all(moments["exp_avg"][name].any() for name in moments["exp_avg"])
    seed_random_states(config.training.seed, 3, 0)
    model.set_ste_share(0.4 if changed else 1.0)
    for number in range(4, 4 + steps):
        model.zero_grad()
        batches = loader.batches(number - 1)
        for batch in batches:
            tokens_BS, *_ = batch
            output = model(tokens_BS, **{name: getattr(batch, name) for name in batch._fields[1:]})
            (output.loss / len(batches)).backward()
        for name, parameter in model.named_parameters():
            mean, square = (moments[kind][name] for kind in MOMENTS)
            gradient = parameter.grad.double()
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            move = mean / (1 - 0.9**number) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
            rate, decay = 0.1 * 5e-3, 0.2 if parameter.ndim > 1 else 0.0
            parameter.data -= (rate * (move + decay * parameter.double())).float()
    for name, parameter in trained.named_parameters():
        # A feature or an expert at the border of a selection may change sides after a first step that was rounded.
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-5, atol=1e-6 if steps == 1 else 3e-5)


def test_ranks_that_cannot_share_the_global_batch_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny_config(tmp_path, "run", expert_parallel_size=2)))
    ranks = [Distributed(0, count, 0, torch.device("cpu")) for count in (1, 3, 4)]
    folder = ModelFolder(tmp_path, "run")
    # ZeRO-3 divides experts of any number over any number of ranks, so the ranks need not be a multiple of 2.
    check_continued(folder, (), ranks[0])
    check_continued(folder, (), ranks[2])
    with pytest.raises(ConfigError, match=r"training\.global_batch_size \(8\) must be a multiple of .* ranks \(3\), 6"):
        check_continued(folder, (), ranks[1])
    sharded = continued_config(folder, ["training.seed=7"], shard=True).training
    assert (sharded.engine, sharded.deepspeed.zero_stage, sharded.seed) == ("deepspeed", 3, 7)


@pytest.mark.parametrize(
    ("plan", "mode", "learns"),
    [
        ({0: Choice(2), 1: Choice(2)}, "router", (True, True)),
        # The first of two weights is at least half of both.
        ({0: Choice(1), 1: Choice(2, 0.5)}, "router", (False, False)),
        ({0: Choice(2, 0.6), 1: Choice(1)}, "router", (True, False)),
        # Weights as computed over all experts have a gradient.
        ({0: Choice(1), 1: Choice(1)}, "kept", (True, True)),
    ],
)
def test_a_router_whose_every_token_uses_one_expert_with_a_weight_of_one_stays_as_it_is(plan, mode, learns):
    model = model_of(config({"fewer_experts_weights": mode}, default=0.25)).train()
    model.set_sparsity(with_choices(model.sparsity_plan, plan))
    keep_idle_routers(model)
    (batch, _) = next(iter(rows_of()))
    output = model(batch.tokens_BS, targets_BS=batch.targets_BS)
    # The load balance loss reaches every router.
    output.loss.backward()
    assert tuple(bool(router.weight.grad.any()) for router in model.routers()) == learns
    assert model.embedding.weight.grad.any()
