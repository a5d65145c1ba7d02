from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint import list_checkpoints
from qsparse_moe.training.distributed import open_distributed
from qsparse_moe.training.evaluate import Evaluator, evaluate_run, load_run
from qsparse_moe.training.loop import train
from qsparse_moe.training.run_folder import run_folder, write_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_finished_run_evaluates_to_what_training_said(make_config, precision):
    config = make_config(precision=precision, steps=3)
    result = train(config)
    evaluation = evaluate_run(result.run_dir)
    assert {key: getattr(evaluation, key) for key in result.validation} == result.validation
    assert (evaluation.step, evaluation.rows) == (3, 11)
    assert evaluation.unigram_bits_per_byte == load_data(config.data).unigram_bits_per_byte()
    assert evaluation.as_dict()["bits_per_byte"] == evaluation.bits_per_byte
    more = evaluate_run(result.run_dir, num_rows=20)
    assert more.rows == 20 and more.loss != evaluation.loss


def test_the_loss_is_the_mean_over_all_labels_and_the_bits_are_over_all_bytes(make_config):
    config = make_config(steps=2)
    _, model, _ = load_run(train(config).run_dir)
    data = load_data(config.data)
    table, rows = data.evaluation_rows(11)
    batch = table.rows(rows)
    losses = []
    with torch.no_grad():
        for row in range(len(rows)):
            logits = model(
                *(part[row : row + 1] for part in batch[:1]),
                positions_BS=batch.positions_BS[row : row + 1],
                documents_BS=batch.documents_BS[row : row + 1],
            ).logits_BSV
            log_probs = logits[0].double().log_softmax(-1)
            losses += [-log_probs[position, label].item() for position, label in enumerate(batch.labels_BS[row])]
    assert len(losses) == 11 * 24
    with open_distributed("cpu") as distributed:
        evaluator = Evaluator(data, num_rows=11, micro_batch_size=3, distributed=distributed)
        found = evaluator(lambda b: model(b.tokens_BS, positions_BS=b.positions_BS, documents_BS=b.documents_BS))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / table.num_bytes(rows), rel=1e-6)


def test_a_loaded_model_has_the_weights_and_the_sparsity_of_its_last_step(make_config):
    result = train(make_config(steps=5))
    config, model, step = load_run(result.run_dir, dtype=torch.float64)
    assert step == 5 and model.config == config.model
    # One warm-up step, then a quarter of the target more in every step: the fifth has three quarters.
    assert model.sparsity_plan.mean == pytest.approx(0.75 * 0.5)
    stored = torch.load(list_checkpoints(result.run_dir)[-1] / "rank-00000-of-00001.pt", weights_only=True)["tensors"][
        "weight"
    ]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.equal(stored[name].double()) for name, p in model.named_parameters())


def test_a_run_without_a_checkpoint_says_how_to_get_one(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    with pytest.raises(CheckpointError, match=r"checkpoints: has no complete checkpoint.*training\.resume=true"):
        load_run(run_folder(config))
