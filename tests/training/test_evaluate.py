from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qsparse_moe.data.batch import Batch, make_batch
from qsparse_moe.data.packing import is_validation, text_digest
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import CheckpointError, ConfigError, DataError
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import build_model
from qsparse_moe.runs.folder import run_folder, write_config
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training import evaluate
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.evaluate import Evaluator, evaluate_run, load_run
from qsparse_moe.training.loop import train
from tests.data.test_tokenizer import save_tokenizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_finished_run_evaluates_to_the_loss_that_training_reported(make_config, precision):
    config = make_config(precision=precision, steps=3)
    result = train(config)
    evaluation = evaluate_run(result.run_dir)
    assert {key: getattr(evaluation, key) for key in result.validation} == result.validation
    assert (evaluation.step, evaluation.rows) == (3, 11)
    assert evaluation.unigram_bits_per_byte == load_data(config.data).unigram_bits_per_byte()
    assert evaluation.as_dict()["bits_per_byte"] == evaluation.bits_per_byte
    more = evaluate_run(result.run_dir, num_sequences=20)
    assert more.rows == 20 and more.loss != evaluation.loss


def test_user_files_evaluate_as_the_validation_sequences_of_the_same_text(make_config, tmp_path):
    """Return the validation documents as a file, cut where the last whole sequence ends, and as an uncut file."""
    config = make_config(steps=2)
    run_dir = train(config).run_dir
    want = evaluate_run(run_dir, num_sequences=10**6)
    texts = [
        text
        for text in open_source(config.data.sources[0], 0).texts()
        if is_validation(text_digest(text.encode()), config.data.validation_fraction)
    ]
    excess = sum(len(text.encode()) + 1 for text in texts) - (want.rows * config.data.sequence_length + 1)
    assert 0 < excess < len(texts[-1]) and texts[-1].isascii()
    found = evaluate_run(run_dir, files=[write_jsonl(tmp_path / "cut.jsonl", [*texts[:-1], texts[-1][:-excess]])])
    assert (found.rows, found.unigram_bits_per_byte) == (want.rows, None)
    assert (found.loss, found.bits_per_byte) == pytest.approx((want.loss, want.bits_per_byte), rel=1e-6)
    # What is behind the last whole row counts too: the labels of the text and no others.
    whole = evaluate_run(run_dir, files=[write_jsonl(tmp_path / "whole.jsonl", texts)])
    assert whole.rows == want.rows + 1
    num_labels = want.rows * config.data.sequence_length
    _, model, _ = load_run(run_dir)
    ids = [token for text in texts for token in [256, *text.encode()]][-excess - 1 :]
    batch = make_batch(np.array([ids]), document_token=256, attend_across_documents=False)
    with torch.no_grad():
        logits = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS).logits_BSV
    rest = torch.nn.functional.cross_entropy(logits[0], batch.targets_BS[0], reduction="sum").item()
    assert whole.loss == pytest.approx((want.loss * num_labels + rest) / (num_labels + excess), rel=1e-6)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_the_plan_of_the_run_given_as_another_plan_evaluates_the_same(make_config):
    run_dir = train(make_config(steps=2)).run_dir
    want = evaluate_run(run_dir)
    config, model, _ = load_run(run_dir)
    assert evaluate_run(run_dir, plan=model.sparsity_plan) == want
    assert want.sparsity == pytest.approx(model.sparsity_plan.mean)
    dense, sparse = (evaluate_run(run_dir, plan=SparsityPlan.uniform(config.model, s)) for s in (0.0, 0.9))
    assert (dense.sparsity, sparse.sparsity) == pytest.approx((0.0, 0.9)) and dense.loss != sparse.loss != want.loss


def test_a_file_without_text_is_named(make_config, tmp_path):
    run_dir = train(make_config(steps=1)).run_dir
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        evaluate_run(run_dir, files=[write_jsonl(tmp_path / "empty.jsonl", [""])])


def test_the_loss_is_the_mean_over_all_labels_and_the_bits_are_over_all_bytes(make_config):
    config = make_config(steps=2)
    _, model, _ = load_run(train(config).run_dir)
    data = load_data(config.data)
    table, rows = data.evaluation_sequences(11)
    batch = table.sequences(rows)
    losses = []
    with torch.no_grad():
        for row in range(len(rows)):
            logits = model(
                *(part[row : row + 1] for part in batch[:1]),
                positions_BS=batch.positions_BS[row : row + 1],
                documents_BS=batch.documents_BS[row : row + 1],
            ).logits_BSV
            log_probs = logits[0].double().log_softmax(-1)
            losses += [-log_probs[position, label].item() for position, label in enumerate(batch.targets_BS[row])]
    assert len(losses) == 11 * 24
    with open_distributed("cpu") as distributed:
        evaluator = Evaluator(data, num_sequences=11, micro_batch_size=3, distributed=distributed)
        found = evaluator(lambda b: model(b.tokens_BS, positions_BS=b.positions_BS, documents_BS=b.documents_BS))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / table.num_bytes(rows), rel=1e-6)


def test_bits_are_over_the_bytes_of_the_labels_and_a_document_token_has_none(make_config, tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"text": f"doc {number}"}) + "\n" for number in range(200)))
    config = make_config()
    source = config.data.sources[0].model_copy(update={"kind": "jsonl", "path": str(file)})
    data = load_data(config.data.model_copy(update={"sources": (source,)}))
    model = build_model(config.model).eval()
    table, rows = data.evaluation_sequences(4)
    labels = table.sequences(rows).targets_BS
    num_bytes = (labels < 256).sum().item()
    assert 0 < num_bytes < 0.95 * labels.numel()
    with open_distributed("cpu") as distributed:
        evaluator = Evaluator(data, num_sequences=4, micro_batch_size=2, distributed=distributed)
        found = evaluator(lambda b: model(b.tokens_BS, positions_BS=b.positions_BS, documents_BS=b.documents_BS))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * labels.numel() / num_bytes, rel=1e-9)


def test_a_loaded_model_has_the_weights_and_the_sparsity_of_its_last_step(make_config):
    result = train(make_config(steps=5))
    config, model, step = load_run(result.run_dir, dtype=torch.float64)
    assert step == 5 and model.config == config.model
    # One warm-up step, then a quarter of the target more in every step: the fifth has three quarters.
    assert model.sparsity_plan.mean == pytest.approx(0.75 * 0.5)
    # The library reads the file as well.
    stored = load_file(list_checkpoints(result.run_dir)[-1] / "rank-00000-of-00001.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.flatten().equal(stored[f"weight/{name}"].double()) for name, p in model.named_parameters())


def test_a_run_without_a_checkpoint_says_how_to_get_one(make_config):
    config = make_config()
    write_config(run_folder(config), config)
    with pytest.raises(CheckpointError, match=r"checkpoints: contains no complete checkpoint.*training\.resume=true"):
        load_run(run_folder(config))


def test_padding_of_the_vocabulary_changes_no_evaluation(make_config):
    """A model with padding has the same evaluation as one without, during the run and afterwards."""
    config = make_config(steps=2)
    padded = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 320})})
    result = train(padded)
    assert evaluate_run(result.run_dir).loss == result.validation["loss"]
    _, model, _ = load_run(result.run_dir)
    data = load_data(config.data)
    table, rows = data.evaluation_sequences(11)
    batch = table.sequences(rows)
    with torch.no_grad():
        logits = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS).logits_BSV
        want = torch.nn.functional.cross_entropy(logits[..., :257].flatten(0, 1), batch.targets_BS.flatten())
        model.hide_ids(range(257, 320))
        hidden = model(batch.tokens_BS, targets_BS=batch.targets_BS, documents_BS=batch.documents_BS).logits_BSV
        assert (hidden[..., 257:] == -torch.inf).all() and hidden[..., :257].isfinite().all()
        model.train()  # training reads every sequence, as before
        assert model(batch.tokens_BS).logits_BSV.isfinite().all()
    assert result.validation["loss"] == pytest.approx(want.item(), rel=1e-6)


def test_a_vocabulary_that_is_not_set_is_the_tokenizers_and_one_too_small_is_refused(make_config, tmp_path):
    folder = tmp_path / "words"
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(298))]
    save_tokenizer(folder, vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = make_config(steps=2)
    data = config.data.model_copy(update={"tokenizer": str(folder)})

    def with_rows(vocab_size):
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        return config.model_copy(update={"data": data, "model": model})

    with pytest.raises(ConfigError, match=r"model\.vocab_size \(264\) must be at least the tokenizer's \(300\).*304"):
        train(with_rows(264))
    assert not run_folder(config).exists()
    result = train(with_rows(None))
    stored, model, _ = load_run(result.run_dir)
    assert stored.model.vocab_size == 304 and model.embedding.weight.shape[0] == 304
    # The same run, resumed without the setting, is the same run.
    again = with_rows(None)
    again = again.model_copy(update={"training": again.training.model_copy(update={"resume": True})})
    assert train(again).step == 2


def test_a_router_without_a_gradient_is_refused_before_anything_is_written(make_config):
    config = make_config(steps=2)
    moe = config.model.moe.model_copy(update={"experts_per_token": 1})
    config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    with pytest.raises(ConfigError, match=r"model\.moe\.router \(softmax_topk_renormalized\).*choose"):
        train(config)
    assert not run_folder(config).exists()


def two_batches():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    targets = torch.tensor([[2, 3, -100], [-100, 0, 7]])
    positions = torch.arange(3).expand(2, -1)
    one = Batch(tokens, targets, positions, None)
    return [one, Batch(tokens[:1] + 1, torch.tensor([[-100, 4, -100]]), positions[:1], None)]


def test_sums_are_over_the_labels_that_count_in_fp32_whatever_the_model_computes_in():
    alone = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    grads = []

    def forward(batch):
        grads.append(torch.is_grad_enabled())
        return ModelOutput(logits[: len(batch.tokens_BS)], None, {}, {})

    found = evaluate._sums(forward, two_batches(), alone)
    chances = logits.double().log_softmax(-1)
    counted = [(0, 0, 2), (0, 1, 3), (1, 1, 0), (1, 2, 7), (0, 1, 4)]
    want = -sum(chances[place].item() for place in counted)
    assert found.dtype == torch.float64 and found.tolist() == [pytest.approx(want, rel=1e-6), 5.0]
    assert grads == [False, False]


def test_the_checksum_is_of_the_tokens_that_count_and_their_labels():
    def checksum(batches):
        counts = torch.cat([batch.targets_BS.flatten() for batch in batches]) != -100
        return evaluate._checksum(batches, counts)

    batches = two_batches()
    first, rest = batches
    tokens, targets, more = first.tokens_BS, first.targets_BS, rest.tokens_BS
    padded = first._replace(tokens_BS=tokens.index_fill(1, torch.tensor([2]), 9).where(targets == -100, tokens))
    assert checksum([padded, rest]) == checksum(batches)
    split = [Batch(t, y, torch.arange(3)[None], None) for t, y in zip(tokens[:, None], targets[:, None], strict=True)]
    assert checksum([*split, rest]) == checksum(batches)
    changed = [
        [first._replace(tokens_BS=tokens + 1), rest],
        [first._replace(targets_BS=targets.where(targets == -100, 5)), rest],
        [first, rest._replace(tokens_BS=more + 1)],
        [rest, first],
    ]
    assert len({checksum(batches), *map(checksum, changed)}) == 5


@pytest.mark.parametrize(("loss", "perplexity"), [(8.0, 2980.957987), (699.0, 3.73e303), (701.0, float("inf"))])
def test_the_perplexity_of_a_diverged_run_is_finite_as_long_as_a_float_holds_it(monkeypatch, loss, perplexity):
    monkeypatch.setattr(evaluate, "_sums", lambda *_: torch.tensor([4 * loss, 4.0], dtype=torch.float64))
    alone = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    found = evaluate.mean_losses(None, (), 8, alone)
    assert found == {
        "loss": loss,
        "perplexity": pytest.approx(perplexity, rel=0.01),
        "bits_per_byte": pytest.approx(4 * loss / 8 / 0.6931471805599453),
    }
