"""What a task sets for generation, what its rows of results say, and its solved examples. Needs no lm_eval."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.sampling import Sampling
from qsparse_moe.inference.tasks.generation import TaskGeneration
from qsparse_moe.inference.tasks.load import LoadedTasks, _check, _matching, _set_shots
from qsparse_moe.inference.tasks.scores import TaskScore, _scores


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, TaskGeneration(None, (), Sampling())),
        ({"until": None, "max_gen_toks": None, "max_tokens": 5}, TaskGeneration(5, (), Sampling())),
        # The names of the length in the harness's order, not in that of the task.
        ({"max_completion_tokens": 4, "max_tokens": 3, "max_new_tokens": 2}, TaskGeneration(2, (), Sampling())),
        ({"max_new_tokens": 2, "max_gen_toks": 1}, TaskGeneration(1, (), Sampling())),
        ({"temperature": 0.0, "top_p": 0.9}, TaskGeneration(None, (), Sampling())),
        ({"repetition_penalty": 1.5}, TaskGeneration(None, (), Sampling(repetition_penalty=1.5))),
        (
            {"do_sample": True, "top_k": 5, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5},
            TaskGeneration(None, (), Sampling(1.0, 5, 0.75, 0.25, 1.5)),
        ),
        ({"temperature": 0.5, "top_k": 7}, TaskGeneration(None, (), Sampling(0.5, 7))),
        ({"num_beams": 1, "num_return_sequences": 1, "early_stopping": False}, TaskGeneration(None, (), Sampling())),
        ({"until": ["a", "", "b"]}, TaskGeneration(None, ("a", "b"), Sampling())),
    ],
)
def test_every_setting_of_a_task_is_that_of_generation(settings, found):
    before = dict(settings)
    assert TaskGeneration.of(settings, "mine") == found and settings == before


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "early_stopping"])
def test_settings_of_transformers_have_one_value_that_is_supported(name):
    with pytest.raises(ConfigError, match=rf"task mine: generation_kwargs\.{name} \(3\) is not supported"):
        TaskGeneration.of({name: 3}, "mine")
    with pytest.raises(ConfigError, match=r"task mine: top_k \(-1\) must be at least 0"):
        TaskGeneration.of({"do_sample": True, "top_k": -1}, "mine")


@pytest.mark.parametrize(
    ("asked", "length", "tokens"),
    [(None, 511, 255), (None, 512, 256), (None, 514, 256), (None, 2, 1), (None, 1, 1), (7, 8, 7), (1, 2, 1)],
)
def test_the_number_of_new_tokens_leaves_place_for_a_prompt(asked, length, tokens):
    assert TaskGeneration(asked, (), Sampling()).num_new_tokens(length, "mine") == tokens


def test_the_scores_of_a_task_are_its_metrics_by_filter_with_their_own_errors():
    row = {
        "alias": "mine",
        "acc,none": 0.5,
        "acc_stderr,none": 0.125,
        "acc,strict": 0.25,
        "acc_stderr,strict": "N/A",
        "perplexity,none": 7,
        "sample_len": 9,
    }
    found = {
        "n-samples": {"mine": {"original": 10, "effective": 4}},
        "n-shot": {"mine": 2},
        "versions": {"mine": 1.0},
        "higher_is_better": {"mine": {"acc": True, "perplexity": False}},
    }
    common = {"task": "mine", "num_samples": 4, "num_shots": 2, "version": "1.0"}
    assert _scores("mine", row, found) == [
        TaskScore(metric="acc", filter="none", value=0.5, standard_error=0.125, higher_is_better=True, **common),
        TaskScore(metric="acc", filter="strict", value=0.25, standard_error=None, higher_is_better=True, **common),
        TaskScore(metric="perplexity", filter="none", value=7.0, standard_error=None, higher_is_better=False, **common),
    ]
    names = [one.name for one in _scores("mine", row, found)]
    assert names == ["acc", "acc/strict", "perplexity"]
    assert _scores("mine", row, found)[1].as_dict() == common | {
        "name": "acc/strict",
        "metric": "acc",
        "filter": "strict",
        "value": 0.25,
        "standard_error": None,
        "higher_is_better": True,
    }
    # The row of a group has its value and nothing about documents.
    (group,) = _scores("all", {"acc,none": 0.75, "acc_stderr,none": 0.0625}, found)
    assert group == TaskScore("all", "acc", "none", 0.75, 0.0625, None, None, None, None)


class Task(SimpleNamespace):
    """Stands for a task of the harness."""

    def get_config(self, name):
        return self.num_fewshot

    def set_config(self, *, key, value):
        self.__dict__[key] = value

    def set_fewshot_seed(self, *, seed):
        self.seed = seed


@pytest.mark.parametrize(
    ("own", "asked", "used"), [(None, None, 0), (None, 3, 3), (5, None, 5), (5, 3, 3), (5, 0, 0), (0, 3, 0)]
)
def test_solved_examples_are_as_many_as_asked_unless_the_task_has_none(own, asked, used):
    task = Task(num_fewshot=own)
    _set_shots(task, asked)
    assert (task.num_fewshot, task.seed) == (used, 1234)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MULTIMODAL": True}, "task mine needs images, and the models of this package read and write text only"),
        ({"OUTPUT_TYPE": "image"}, "task mine needs the output type image"),
        ({"UNSAFE_CODE": True}, "task mine executes the code that the model writes"),
        ({"config": SimpleNamespace(generation_kwargs={"num_beams": 2})}, r"num_beams \(2\) is not supported"),
    ],
)
def test_what_a_task_needs_is_checked(settings, message):
    plain = {"OUTPUT_TYPE": "generate_until", "config": SimpleNamespace(generation_kwargs=None)}
    _check("mine", SimpleNamespace(**plain))
    for name in ("loglikelihood", "loglikelihood_rolling", "multiple_choice"):
        _check("mine", SimpleNamespace(OUTPUT_TYPE=name, UNSAFE_CODE=False, MULTIMODAL=False))
    with pytest.raises(ConfigError, match=message):
        _check("mine", SimpleNamespace(**plain | settings))


def test_some_task_generates_where_one_of_several_does():
    tasks = {name: SimpleNamespace(OUTPUT_TYPE=name) for name in ("loglikelihood", "generate_until")}
    assert LoadedTasks(tasks).generates
    assert not LoadedTasks({"loglikelihood": tasks["loglikelihood"]}).generates and not LoadedTasks().generates


def test_every_name_is_loaded_once_in_the_order_of_the_names():
    known = ["a_one", "b", "a_two"]
    manager = SimpleNamespace(all_tasks=known, match_tasks=lambda names: [n for n in known if n[0] == names[0][0]])
    assert _matching(["b", "a_two", "a_*", "b"], manager) == ["b", "a_two", "a_one"]
