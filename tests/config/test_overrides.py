"""Overrides on the command line, and names that are no setting."""

from __future__ import annotations

import pytest

from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.yaml_text import parse_yaml

BELOW_A_WRONG_VALUE = {
    ("training=[0,99]", "training.gradient_clipping=1"): "training ([0, 99]) must be a section (settings by name)",
    ("model.sparsity.quantization=[1]", "model.sparsity.quantization.sites=1"): (
        "model.sparsity.quantization ([1]) must be a section (settings by name)"
    ),
    ("data.sources.0.path=a.txt", "data.sources.0.path.0=b.txt"): (
        'data.sources.0.path.0 cannot be set: data.sources.0.path ("a.txt") is not a list; write the whole '
        "list as data.sources.0.path=[...]"
    ),
    ("metrics.hyperparameters.0=training.steps",): (
        "metrics.hyperparameters.0 does not exist: it is empty; write the whole list as metrics.hyperparameters=[...]"
    ),
    (f"data.sources.{5000 * '9'}.kind=text",): (
        "data.sources.999999999... does not exist: the last item is 0; write the whole list as data.sources=[...]"
    ),
}


@pytest.mark.parametrize("overrides", BELOW_A_WRONG_VALUE, ids=lambda overrides: overrides[-1][:40])
def test_an_override_below_a_wrong_value_is_reported(error_of, overrides):
    assert BELOW_A_WRONG_VALUE[overrides] in error_of("", *overrides)


NOT_ONE = "is not a setting"


SHEDULE = f"model.sparsity.shedule {NOT_ONE}; did you mean model.sparsity.schedule?"


KIN = f"data.sources.0.kin {NOT_ONE}; did you mean data.sources.0.kind?"


LIST = "a list of at least 1 (each item a section (settings by name))"


UNKNOWN = {
    "model.sparsity.shedule.shape=linear": SHEDULE,
    "steps=50": f"steps {NOT_ONE}; did you mean training.steps?",
    "model.num_experts=4": f"model.num_experts {NOT_ONE}; did you mean model.moe.num_experts?",
    "training.learning_rates=1": f"training.learning_rates {NOT_ONE}; did you mean training.learning_rate?",
    "training.zero_stag=1": f"training.zero_stag {NOT_ONE}; did you mean training.deepspeed.zero_stage?",
    "metrics.xyz=1": f"metrics.xyz {NOT_ONE}; metrics has interval, dead_expert_window, tensorboard, "
    "hyperparameters, variant, image_interval, peak_tflops, layer_gradients, profile_steps, profile_from",
    "warmup_steps=1": f"warmup_steps {NOT_ONE}; "
    "did you mean model.sparsity.schedule.warmup_steps or training.warmup_steps?",
    "xyz=1": f"xyz {NOT_ONE}; a run file has model, data, training, metrics",
    "data.sources.0.kin=text": KIN,
    "data.sources.first=1": f"data.sources.first {NOT_ONE}: data.sources takes {LIST}; its items are numbered from 0",
    "training.steps.now=1": f"training.steps.now {NOT_ONE}: training.steps takes a whole number of at least 1; "
    "write training.steps=VALUE",
    "data.sources.1.kind=text": "data.sources.1 does not exist: the last item is 0; "
    "write the whole list as data.sources=[...]",
    "model.sparsity.overrides.0.sparsity=0": "model.sparsity.overrides.0 does not exist: it is empty; "
    "write the whole list as model.sparsity.overrides=[...]",
    "training.steps": '"training.steps" is not an override; write PATH=VALUE, such as training.steps=50',
    "=50": '"=50" is not an override; write PATH=VALUE, such as training.steps=50',
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_override_names_the_nearest(error_of, override):
    assert error_of("", override) == UNKNOWN[override]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {sparsity: {shedule: {shape: linear}}}", SHEDULE),
        ("stepz: 50", "stepz is not a setting; did you mean training.steps?"),
        ("training: {1: 2}", "training.1 is not a setting; training has name, output_dir"),
        ("data: {sources: [{kin: text}]}", KIN),
    ],
)
def test_unknown_name_in_the_file_names_the_nearest(error_of, text, message):
    assert error_of(text).startswith(message)


def test_override_with_broken_yaml_names_the_setting(error_of):
    assert error_of("", "data.sources=[{").startswith("the value of data.sources, line 1, column 3, is not valid YAML")
    assert "the value of data.sources, line 1: the key a occurs twice" in error_of("", "data.sources={a: 1, a: 2}")


def test_overrides_are_read_as_yaml_and_later_ones_win(load):
    config = load(
        "training: {steps: 5}\n",
        "training.steps=6",
        "training.steps=7",
        "training.learning_rate=1e-4",
        "training.resume=true",
        "training.name=2024-01-01",
        "model.sparsity.sites.expert_hidden=0.5",
        "model.num_kv_heads=null",
        "model.sparsity.overrides=[{sparsity: 0.25, layers: 0-1, site: attention_input}]",
        " training.seed = 3",
    )
    assert config.training.steps == 7
    assert config.training.learning_rate == 1e-4
    assert config.training.resume is True
    assert config.training.name == "2024-01-01"
    assert config.training.seed == 3
    assert config.model.sparsity.sites.expert_hidden == 0.5
    assert config.model.sparsity.overrides[0].layers == "0-1"


def test_override_reaches_items_of_lists(load):
    text = "data: {sources: [{kind: text, path: a.txt}, {kind: text, path: [b.txt, c.txt]}]}\n"
    config = load(text, "data.sources.1.max_bytes=10", "data.sources.1.path.0=d.txt", "data.sources.0={weight: 2}")
    assert config.data.sources[1].max_bytes == 10
    assert config.data.sources[1].path == ("d.txt", "c.txt")
    assert (config.data.sources[0].path, config.data.sources[0].weight) == ("a.txt", 2.0)


def test_a_value_may_contain_further_equals_signs(load):
    text = "data: {sources: [{kind: text, path: a.txt}]}\n"
    config = load(text, "data.sources.0.path=day=2/hour=10/*.txt", "data.sources.0.separator='=='", "training.seed=3")
    assert (config.data.sources[0].path, config.data.sources[0].separator) == ("day=2/hour=10/*.txt", "==")
    assert config.training.seed == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("/data/plan.json", "/data/plan.json"),
        ("/data/day=1/plan.json", "/data/day=1/plan.json"),
        # A comment, a key, an alias, a tag, a list, and a number in YAML.
        ("/data/run #1", '"/data/run #1"'),
        ("/data/run: 1", '"/data/run: 1"'),
        ("*.txt", '"*.txt"'),
        ("!data", '"!data"'),
        ("[data]", '"[data]"'),
        ("4711", '"4711"'),
        (" é\U0001f600 ", '" é\U0001f600 "'),
        ("", '""'),
    ],
)
def test_a_text_becomes_an_override_that_is_read_as_the_same_text(load, value, text):
    assert override_of("training.output_dir", value) == f"training.output_dir={text}"
    if value:
        assert load("", override_of("training.output_dir", value)).training.output_dir == value


@pytest.mark.parametrize("value", [3, 0.5, True, None, [{"layers": 1, "sparsity": 0.5}], {"zero_stage": 2}])
def test_other_values_become_overrides_in_json(value):
    assert parse_yaml(override_of("a", value).removeprefix("a="), "a") == (value, [])


def test_override_reaches_items_of_the_default_list(load):
    assert load("", "data.sources.0.max_bytes=1000").data.sources[0].max_bytes == 1000
    assert load("").data.sources[0].max_bytes is None


def test_mapping_is_merged_into_a_section_and_a_list_replaces_a_list(load):
    text = "training: {deepspeed: {zero_stage: 2, reduce_bucket_size: 5}}\n"
    text += "data: {sources: [{max_bytes: 1}, {max_bytes: 2}]}\n"
    config = load(text, "training.deepspeed={zero_stage: 3}", "data.sources=[{max_bytes: 9}]")
    assert (config.training.deepspeed.zero_stage, config.training.deepspeed.reduce_bucket_size) == (3, 5)
    assert [source.max_bytes for source in config.data.sources] == [9]


def test_mapping_replaces_a_wrong_value(load):
    assert load("training: {deepspeed: 3}\n", "training.deepspeed={zero_stage: 0}").training.deepspeed.zero_stage == 0


def test_an_override_below_a_wrong_value_leaves_the_message_to_the_file(error_of):
    message = error_of("training: fast\n", "training.steps=3")
    assert message == 'training ("fast") must be a section (settings by name)'


def test_a_mapping_is_merged_at_every_depth(load):
    text = "training: {seed: 5, deepspeed: {zero_stage: 2, reduce_bucket_size: 5}}\n"
    config = load(text, "training={steps: 9, deepspeed: {zero_stage: 3}}")
    assert (config.training.steps, config.training.seed) == (9, 5)
    assert (config.training.deepspeed.zero_stage, config.training.deepspeed.reduce_bucket_size) == (3, 5)


@pytest.mark.parametrize(
    ("index", "shown"), [("999999999", "999999999"), ("9999999999", "999999999..."), ("2", "2"), ("0001", None)]
)
def test_an_index_is_named_up_to_nine_digits(load, error_of, index, shown):
    text = "data: {sources: [{max_bytes: 1}, {max_bytes: 2}]}\n"
    if shown is None:
        assert load(text, f"data.sources.{index}.max_bytes=7").data.sources[1].max_bytes == 7
        return
    assert error_of(text, f"data.sources.{index}.max_bytes=7") == (
        f"data.sources.{shown} does not exist: the last item is 1; write the whole list as data.sources=[...]"
    )
