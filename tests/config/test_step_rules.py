"""Rules about numbers of steps, ranks, and ZeRO stages, at both sides of their limit, with the values they propose."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import messages

DS = "training.deepspeed"
DECAY = {"training.learning_rate_schedule": "warmup_stable_decay"}
# The lowest ZeRO stage that each setting of the offload needs.
LOWEST_STAGE = {
    ("offload_optimizer", "none"): 0,
    ("offload_optimizer", "cpu"): 1,
    ("offload_optimizer", "nvme"): 3,
    ("offload_parameters", "none"): 0,
    ("offload_parameters", "cpu"): 3,
    ("offload_parameters", "nvme"): 3,
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "place"), LOWEST_STAGE)
def test_an_offload_needs_its_zero_stage(name, place, stage):
    settings = {f"{DS}.{name}": place, f"{DS}.zero_stage": stage}
    settings |= {f"{DS}.nvme_path": "/swap"} if place == "nvme" else {}
    found, needed = messages(settings), LOWEST_STAGE[name, place]
    assert len(found) == (stage < needed)
    start = f"{DS}.{name} ({place}) needs {DS}.zero_stage ({stage}) to be at least {needed}: "
    assert all(message.startswith(start) for message in found)


@pytest.mark.parametrize(
    ("optimizer", "parameters", "path", "start"),
    [
        ("nvme", "nvme", None, f"{DS}.nvme_path (null) must name a folder on a local disk when {DS}.offload_optimizer"),
        ("nvme", "nvme", "", f'{DS}.nvme_path ("") must name a folder on a local disk when {DS}.offload_optimizer is'),
        ("cpu", "nvme", None, f"{DS}.nvme_path (null) must name a folder on a local disk when {DS}.offload_parameters"),
        ("nvme", "cpu", None, f"{DS}.nvme_path (null) must name a folder on a local disk when {DS}.offload_optimizer"),
        ("cpu", "cpu", "/swap", f'{DS}.nvme_path ("/swap") has no meaning when neither'),
        ("none", "none", "", f'{DS}.nvme_path ("") has no meaning when neither'),
        ("cpu", "nvme", "/swap", None),
        ("nvme", "cpu", "/swap", None),
        ("none", "none", None, None),
    ],
)
def test_a_folder_is_given_exactly_where_something_is_offloaded_to_it(optimizer, parameters, path, start):
    settings = {
        f"{DS}.zero_stage": 3,
        f"{DS}.offload_optimizer": optimizer,
        f"{DS}.offload_parameters": parameters,
        f"{DS}.nvme_path": path,
    }
    found = messages(settings)
    assert len(found) == (start is not None)
    assert all(message.startswith(start) for message in found)


@pytest.mark.parametrize(("steps", "tenth"), [(5, 1), (9, 1), (10, 1), (19, 1), (20, 2), (300, 30)])
def test_a_schedule_without_its_decay_proposes_a_tenth_of_the_steps_and_at_least_one(steps, tenth):
    (message,) = messages(DECAY | {"training.steps": steps, "training.warmup_steps": 0})
    assert message.endswith(f"; a tenth of the steps is {tenth}")


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "proposed", "together"),
    [(50, 40, 20, "33 and 16", 60), (3, 100, 1, "2 and 1", 101), (100, 0, 101, "0 and 100", 101)],
)
def test_a_shortened_warm_up_and_decay_have_the_same_proportion_and_at_least_one_step_of_decay(
    steps, warmup, decay, proposed, together
):
    sizes = {"training.steps": steps, "training.warmup_steps": warmup, "training.decay_steps": decay}
    (message,) = messages(DECAY | sizes)
    assert message.endswith(f"for example to {proposed}, or train for at least {together} steps")


def test_a_run_without_a_decay_may_end_during_its_warm_up():
    assert messages({"training.steps": 300, "training.warmup_steps": 400}) == []


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"profile_from": 92, "profile_steps": 10}, 101),
        ({"profile_from": 101, "profile_steps": 1}, 101),
        ({"profile_from": 100, "profile_steps": 1}, None),
        ({"profile_from": 500, "profile_steps": 0}, None),
    ],
)
def test_a_profile_ends_within_the_run_unless_there_is_none(settings, last):
    found = messages({"training.steps": 100} | {f"metrics.{name}": value for name, value in settings.items()})
    assert len(found) == (last is not None)
    assert all(f"end with step {last}, which must be at most training.steps (100)" in message for message in found)
    assert all(message.endswith(f"train for at least {last} steps") for message in found)


@pytest.mark.parametrize("path", ["model", "training.deepspeed", "data.sources.0", "data.sources.0.kind"])
def test_a_section_or_an_item_of_a_list_is_no_column(path):
    settings = ["training.seed", path, "model.sparsity.overrides", "training.steps"]
    (message,) = messages({"metrics.hyperparameters": settings})
    assert message.startswith(
        f"metrics.hyperparameters ({path}) must name settings, not a section or an item of a list"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_changed_setting_of_the_loss_scale_is_refused_without_fp16(precision):
    changed = {"training.loss_scale.initial_power": 8, "training.loss_scale.minimum": 4}
    found = messages({"training.precision": precision} | changed)
    assert [message.split(" has no meaning")[0] for message in found] == [
        f"{path} ({value})" for path, value in changed.items()
    ]
    assert messages({"training.precision": "fp16"} | changed) == []


def test_the_only_size_of_groups_without_experts_is_one():
    dense = {"model.num_layers": 2, "model.moe.num_dense_layers": 2, "model.moe.num_experts": 6}
    assert messages(dense | {"training.expert_parallel_size": 1}) == []
    (message,) = messages(dense | {"training.expert_parallel_size": 4})
    assert message.startswith("training.expert_parallel_size (4) must be 1 when every layer is dense")


@pytest.mark.parametrize(
    ("hold", "ramp", "gradient", "number"),
    [(60, 40, "blend", 0), (61, 40, "blend", 1), (101, 0, "blend", 1), (101, 0, "ste", 0)],
)
def test_a_blend_ends_within_the_run(hold, ramp, gradient, number):
    same = {"model.sparsity.blend.end": 1.0} if not ramp else {}
    settings = {"training.steps": 100, "model.sparsity.gradient": gradient}
    if gradient == "blend":
        settings |= {"model.sparsity.blend.hold_steps": hold, "model.sparsity.blend.ramp_steps": ramp} | same
    found = messages(settings)
    assert len(found) == number
    assert all(message.endswith(f"train for at least {hold + ramp} steps") for message in found)
