"""Training a model of type ``qsparse_moe`` with transformers: the loss and the gradients of our own training."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from qsparse_moe.interop.auto_model.schedule import ScheduleCallback
from qsparse_moe.sparsity.schedule import scheduled_scale
from tests.interop.auto_models import build, left_padded, random_ids


def training_model(name="sparse", **changes):
    return build(name, **changes).train()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def own_gradients(model, ids):
    """Return the loss of our training and its gradients; ``model`` is not changed."""
    model = copy.deepcopy(model)
    output = model(ids, labels_BS=ids)
    output.loss.backward()
    return output, gradients(model)


def assert_equal(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", ["sparse", "tied", "ternary", "per-expert", "sparse-router"])
def test_loss_and_gradients_are_those_of_our_training(name):
    model, ids = training_model(name), random_ids(3, 10)
    wanted, gradient = own_gradients(model, ids)
    found = QSparseMoEForCausalLM.of(model)(ids, labels=ids)
    found.loss.backward()
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.aux_loss, wanted.losses["load_balance_loss"])
    assert wanted.loss > wanted.losses["lm_loss"], "the router losses are part of it"
    assert found.past_key_values is None
    assert_equal(gradients(model), gradient)


def test_in_evaluation_the_loss_is_that_of_the_language_model_alone():
    model, ids = build("sparse"), random_ids(3, 10)
    found = QSparseMoEForCausalLM.of(model)(ids, labels=ids)
    assert torch.equal(found.loss, model(ids, labels_BS=ids).losses["lm_loss"])
    assert found.loss.requires_grad


def test_padding_counts_in_no_loss():
    model = training_model()
    wrapped, rows = QSparseMoEForCausalLM.of(model), [random_ids(1, length, seed=length)[0] for length in (9, 5)]
    ids, mask = left_padded(rows)
    found = wrapped(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    # Each sequence alone. The balance loss is a mean over sequences, and the others are means over tokens.
    alone = [model(row[None], labels_BS=row[None]).losses for row in rows]
    means = {
        name: sum(number * losses[name] for number, losses in zip(numbers, alone, strict=True)) / sum(numbers)
        for name, numbers in {"lm_loss": (8, 4), "load_balance_loss": (1, 1), "router_z_loss": (9, 5)}.items()
    }
    moe = model.config.moe
    wanted = means["lm_loss"] + moe.load_balance_coefficient * means["load_balance_loss"]
    torch.testing.assert_close(found.loss, wanted + moe.router_z_coefficient * means["router_z_loss"])
    torch.testing.assert_close(found.aux_loss, means["load_balance_loss"])


@pytest.mark.parametrize("name", ["sparse", "sparse-router"])
def test_more_padding_changes_neither_the_loss_nor_a_gradient(name):
    model = training_model(name)
    wrapped = QSparseMoEForCausalLM.of(model)
    ids, mask = left_padded([random_ids(1, length, seed=length)[0] for length in (9, 5)])
    labels, found = ids.masked_fill(mask == 0, -100), []
    for front, behind in ((0, 0), (4, 0), (0, 3)):
        parts = [
            torch.nn.functional.pad(part, (front, behind), value=value)
            for part, value in ((ids, 7), (mask, 0), (labels, -100))
        ]
        loss = wrapped(parts[0], attention_mask=parts[1], labels=parts[2]).loss
        model.zero_grad()
        loss.backward()
        found.append((loss, gradients(model)))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for parameter_name, value in gradient.items():
            torch.testing.assert_close(value, found[0][1][parameter_name], rtol=1e-3, atol=1e-6, msg=parameter_name)


def test_a_row_of_padding_alone_changes_nothing():
    model = training_model("sparse")
    wrapped, ids = QSparseMoEForCausalLM.of(model), random_ids(2, 8)
    mask = torch.tensor([[1] * 8, [0] * 8])
    labels = ids.masked_fill(mask == 0, -100)
    found = wrapped(ids, attention_mask=mask, labels=labels)
    wanted = model(ids[:1], labels_BS=ids[:1])
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_recomputes_the_layers_and_keeps_the_gradients():
    model, ids = training_model("sparse"), random_ids(3, 10)
    _, gradient = own_gradients(model, ids)
    wrapped = QSparseMoEForCausalLM.of(model)
    wrapped.gradient_checkpointing_enable()
    calls = []
    handle = model.layers[1].moe.router.register_forward_hook(lambda *_: calls.append(1))
    found = wrapped(ids, labels=ids, use_cache=True)
    found.loss.backward()
    handle.remove()
    assert found.past_key_values is None
    assert len(calls) == 2
    assert_equal(gradients(model), gradient)
    wrapped.gradient_checkpointing_disable()
    assert model.activation_checkpointing == "none"


def test_reentrant_checkpointing_is_refused():
    wrapped = QSparseMoEForCausalLM.of(training_model())
    with pytest.raises(ConfigError, match=r"use_reentrant \(True\): must be False.*router losses; pass"):
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match=r"every_n_layers \(2\): must be 1"):
        wrapped.activation_checkpointing_enable(every_n_layers=2)


def test_arguments_of_another_loss_are_refused():
    wrapped, ids = QSparseMoEForCausalLM.of(training_model()), random_ids()
    with pytest.raises(ConfigError, match="num_items_in_batch: must be left out, because the loss is the mean"):
        wrapped(ids, labels=ids, num_items_in_batch=7)
    with pytest.raises(ConfigError, match="logits_to_keep: must be 0 with labels"):
        wrapped(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ConfigError, match="input_ids and inputs_embeds: neither is given"):
        wrapped()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains(tmp_path, checkpointing):
    """The first step of Trainer, with two micro-batches, is that of the mean of our two losses, and the loss falls."""
    model = training_model("sparse", sparsity={"default": 0.5})
    wrapped, rows = QSparseMoEForCausalLM.of(model), random_ids(4, 10)
    reference = copy.deepcopy(model)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(wrapped, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    own = []
    for _ in range(2):
        reference.zero_grad()
        parts = [reference(part, labels_BS=part).loss for part in rows.split(2)]
        loss = sum(parts) / 2
        loss.backward()
        own.append(loss.item())
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.05 * parameter.grad
    assert losses[:2] == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("name", ["sparse", "tied"])
def test_token_embeddings_are_resized_and_saved(name, tmp_path):
    model = build(name)
    wrapped, ids = QSparseMoEForCausalLM.of(model), random_ids()
    before = wrapped(ids).logits
    wrapped.resize_token_embeddings(90)
    after = wrapped(ids).logits
    assert after.shape[-1] == 90
    assert torch.equal(after[..., :83], before)
    assert (wrapped.config.vocab_size, wrapped.config.read()[0].vocab_size, model.config.vocab_size) == (90, 90, 90)
    assert (model.head.weight is model.embedding.weight) == (name == "tied")
    wrapped.save_pretrained(tmp_path)
    again = QSparseMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids + 6).logits, wrapped(ids + 6).logits)


def test_the_callback_follows_the_schedules_of_our_training(tmp_path):
    schedule = {"shape": "linear", "warmup_steps": 1, "ramp_steps": 2}
    blend = {"start": 1.0, "end": 0.0, "ramp_steps": 2}
    settings = {"default": 0.5, "schedule": schedule, "gradient": "blend", "blend": blend}
    model = training_model("sparse", sparsity=settings, moe={"bias_update_rate": 0.125})
    reference, target, rows = copy.deepcopy(model), model.sparsity_plan, random_ids(2, 10)
    wrapped, seen = QSparseMoEForCausalLM.of(model), []
    site = model.layers[1].moe.experts.hidden_site

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **others):
            seen.append((model.sparsity_plan.mean, site.ste_share))

        on_step_end = on_substep_end

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(wrapped, arguments, train_dataset=data, callbacks=[ScheduleCallback(), Watch()]).train()
    assert [mean / target.mean for mean, _ in seen] == pytest.approx([0.0, 0.0, 0.5, 1.0])
    assert [share for _, share in seen] == [1.0, 0.5, 0.0, 0.0]
    for step in range(4):
        reference.set_sparsity(target.scaled(scheduled_scale(model.config.sparsity.schedule, step)))
        routed_LE = reference(rows, labels_BS=rows).stats["router/routed_LE"]
        reference.update_router_bias(routed_LE, 0.125)
    assert torch.equal(model.router_bias_LE, reference.router_bias_LE)
    assert not torch.equal(model.router_bias_LE, training_model("sparse").router_bias_LE)
    assert all(router.hook is None for router in model.routers())
    assert wrapped.config.read()[1] == target
