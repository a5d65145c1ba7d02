"""Tasks of lm-evaluation-harness on local files: every score is computed a second time from the model's own logits."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch

from qsparse_moe.errors import BackendUnavailable, ConfigError, DataError
from qsparse_moe.inference.tasks.generation import TaskGeneration
from qsparse_moe.inference.tasks.load import load_tasks
from qsparse_moe.inference.tasks.scores import evaluate_tasks
from tests.inference.models import all_at_once, model
from tests.inference.test_generator import greedy
from tests.support.tasks import CHOICES, TEXTS, write_tasks

pytest.importorskip("lm_eval")

from tests.inference.test_generator import generator

DOCUMENT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def one_list(monkeypatch):
    """Let the tests share the list of all tasks of the harness, which takes ten seconds to read."""
    import lm_eval.tasks

    monkeypatch.setattr("lm_eval.tasks.TaskManager", _manager(lm_eval.tasks.TaskManager))


@functools.cache
def _manager(made):
    return functools.cache(made)


@pytest.fixture(scope="module")
def built():
    built = model(sparsity={"default": 0.5})
    built.hide_ids(range(257, 264))
    return built


def harness_model(built, **settings):
    from qsparse_moe.inference.tasks.model import HarnessModel

    length = settings.pop("length", 64)
    return HarnessModel(generator(built=built, length=length), **settings)


def request(*arguments, kind="loglikelihood", task="mine"):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


def by_hand(built, context, continuation):
    """Log-probability of the continuation, one token after the other, and whether every token is the likeliest."""
    tokens = [DOCUMENT, *context.encode()]
    total, is_greedy = 0.0, True
    for token in continuation.encode():
        row_V = all_at_once(built, torch.tensor([tokens]))[0, -1].log_softmax(-1)
        total, is_greedy = total + row_V[token].item(), is_greedy and int(row_V.argmax()) == token
        tokens.append(token)
    return total, is_greedy


@pytest.mark.parametrize("token_by_token", [False, True])
def test_log_likelihoods_are_those_of_the_logits(built, token_by_token):
    pairs = [(f"{one['question']}:", choice) for one in CHOICES for choice in one["choices"]]
    # An empty context is the beginning of a document.
    pairs += [("trailing ", "space"), ("", "a whole document")]
    wrapped = harness_model(built, batch_size=4, token_by_token=token_by_token)
    found = wrapped.loglikelihood([request(*pair) for pair in pairs])
    for (log_prob, is_greedy), pair in zip(found, pairs, strict=True):
        # The harness scores a space at the end of a context together with what follows.
        wanted, greedy_wanted = by_hand(built, *(("trailing", " space") if pair[0] == "trailing " else pair))
        assert log_prob == pytest.approx(wanted, abs=1e-5)
        assert is_greedy == greedy_wanted
    assert wrapped.loglikelihood([request("nothing follows", "")]) == [(0.0, True)]
    assert wrapped.num_truncated == 0


def test_greedy_continuations_are_found(built):
    # Only ASCII comes back as the same bytes, so contexts whose likeliest byte is another are left out.
    continued = {context: greedy(built, [DOCUMENT, *context.encode()], 1) for context in ("a", "bc", "def", "ghi", "j")}
    ascii_only = {context: (chr(ids[0]), probs[0]) for context, (ids, probs) in continued.items() if ids[0] < 128}
    assert ascii_only
    found = harness_model(built).loglikelihood([request(context, text) for context, (text, _) in ascii_only.items()])
    for (log_prob, is_greedy), (_, wanted) in zip(found, ascii_only.values(), strict=True):
        assert is_greedy and log_prob == pytest.approx(wanted, abs=1e-5)


def test_a_long_context_loses_its_first_tokens(built):
    context, length = "0123456789" * 3, 16
    wrapped = harness_model(built, length=length)
    [(log_prob, _)] = wrapped.loglikelihood([request(context, "abc")])
    kept = torch.tensor([[*context.encode(), *b"ab"][-length:]])
    rows_SV = all_at_once(built, kept)[0, -3:].log_softmax(-1)
    assert log_prob == pytest.approx(sum(row[t].item() for row, t in zip(rows_SV, b"abc", strict=True)), abs=1e-5)
    assert wrapped.num_truncated == 1
    # The document token, 13 of the context, and all but the last of 3 are the 16 tokens that fit.
    wrapped.loglikelihood([request(context[:13], "abc")])
    assert wrapped.num_truncated == 1
    wrapped.loglikelihood([request(context[:14], "abc")])
    assert wrapped.num_truncated == 2
    with pytest.raises(DataError, match="of 17 tokens after a context, and the model reads 16 tokens at once"):
        wrapped.loglikelihood([request("a", "b" * 17)])


def test_a_whole_text_is_predicted_once_per_token_from_as_much_context_as_fits(built):
    text, length = "a rolling text of some length", 8
    tokens = text.encode()
    [found] = harness_model(built, length=length).loglikelihood_rolling([request(text)])
    wanted = 0.0
    # Windows of 8 predicted tokens, each after the one before; the last one is moved back to be full.
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        first = max(0, end - length)
        inputs = [DOCUMENT if first == 0 else tokens[first - 1], *tokens[first : end - 1]]
        rows_SV = all_at_once(built, torch.tensor([inputs]))[0].log_softmax(-1)
        wanted += sum(rows_SV[place - first, tokens[place]].item() for place in range(begin, end))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert harness_model(built).loglikelihood_rolling([request("")]) == [0.0]


def test_the_harness_scores_local_tasks(built, folder):
    tasks = load_tasks(["local_*"], task_folder=folder)
    assert tasks.generates and not load_tasks(["local_choice"], task_folder=folder).generates
    found = evaluate_tasks(generator(built=built), tasks, batch_size=3)
    scores = {(one.task, one.metric): one for one in found.scores}
    right = normed = 0
    for one in CHOICES:
        values = [by_hand(built, f"{one['question']}:", choice)[0] for choice in one["choices"]]
        right += values.index(max(values)) == one["answer"]
        # acc_norm divides by the number of characters of a choice.
        normed_values = [v / len(choice) for v, choice in zip(values, one["choices"], strict=True)]
        normed += normed_values.index(max(normed_values)) == one["answer"]
    accuracy = scores["local_choice", "acc"]
    assert accuracy.value == pytest.approx(right / 5) and 0 < right < 5
    assert scores["local_choice", "acc_norm"].value == pytest.approx(normed / 5)
    # Standard deviation of the five 0s and 1s over the root of their number.
    assert accuracy.standard_error == pytest.approx(math.sqrt(right / 5 * (1 - right / 5) / 4), abs=1e-6)
    assert (accuracy.num_samples, accuracy.num_shots, accuracy.version, accuracy.name) == (5, 0, "3", "acc")
    bits = -sum(by_hand_rolling(built, one["text"]) for one in TEXTS) / math.log(2)
    num_bytes = sum(len(one["text"].encode()) for one in TEXTS)
    assert scores["local_perplexity", "bits_per_byte"].value == pytest.approx(bits / num_bytes, abs=1e-5)
    assert scores["local_generation", "exact_match"].value == 0.0


def by_hand_rolling(built, text):
    [found] = harness_model(built).loglikelihood_rolling([request(text)])
    return found


def test_generated_text_ends_before_a_stop_string_or_at_the_largest_length(built, folder):
    contexts = [f"{one['question']}:" for one in CHOICES]
    wrapped = harness_model(built, batch_size=2)
    plain = {"max_gen_toks": 12, "until": []}
    texts = wrapped.generate_until([request(context, plain, kind="generate_until") for context in contexts])
    for context, text in zip(contexts, texts, strict=True):
        tokens, _ = greedy(built, [DOCUMENT, *context.encode()], 12)
        ended = tokens[: tokens.index(DOCUMENT)] if DOCUMENT in tokens else tokens
        assert text == bytes(ended).decode("utf-8", errors="replace")
    # The same requests with a stop string that occurs in the first text.
    stop = next(text for text in texts if len(text) > 3)[2]
    cut = wrapped.generate_until([request(one, plain | {"until": [stop]}, kind="generate_until") for one in contexts])
    assert cut == [text.split(stop)[0] for text in texts] != texts


def test_a_long_prompt_leaves_place_for_the_new_tokens(built):
    wrapped = harness_model(built, length=16)
    [text] = wrapped.generate_until([request("0123456789" * 3, {"max_gen_toks": 4}, kind="generate_until")])
    tokens, _ = greedy(built, list(("0123456789" * 3).encode()[-12:]), 4)
    assert text == bytes(tokens).decode("utf-8", errors="replace")
    assert wrapped.num_truncated == 1


def test_settings_of_generation_are_those_of_the_task():
    found = TaskGeneration.of({"until": "\n", "max_new_tokens": 7, "do_sample": False, "temperature": 0.7}, "mine")
    assert (found.max_tokens, found.stop, found.sampling.temperature) == (7, ("\n",), 0.0)
    drawn = TaskGeneration.of({"until": ["a", ""], "temperature": 0.7, "top_p": 0.9}, "mine")
    assert (drawn.stop, drawn.sampling.temperature, drawn.sampling.top_p) == (("a",), 0.7, 0.9)
    assert TaskGeneration.of({"do_sample": True}, "mine").sampling.temperature == 1.0
    # A task without a length gets half of a short context.
    assert drawn.num_new_tokens(64, "mine") == 32 and drawn.num_new_tokens(4096, "mine") == 256
    with pytest.raises(ConfigError, match=r"task mine: generation_kwargs.num_beams \(4\) is not supported"):
        TaskGeneration.of({"num_beams": 4}, "mine")
    with pytest.raises(ConfigError, match="task mine generates 7 tokens, which must be fewer than the 7"):
        found.num_new_tokens(7, "mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["local_choise"], "'local_choise' is no task, .*; the nearest names are local_choice"),
        (["none_*"], r"'none_\*' is no task"),
        (["hellaswagg"], "the nearest names are hellaswag"),
        ([], "must name at least one task"),
    ],
)
def test_unknown_tasks_are_refused_with_the_nearest_names(one_list, folder, names, message):
    with pytest.raises(ConfigError, match=message):
        load_tasks(names, task_folder=folder)


@pytest.mark.slow
def test_a_task_that_downloads_says_so_without_a_network(one_list, folder):
    with pytest.raises(DataError, match=r"task hellaswag: its data set .* cannot be loaded .*which needs a network"):
        load_tasks(["hellaswag"], task_folder=folder)


def test_a_task_without_its_file_and_a_folder_without_tasks_are_refused(folder, tmp_path):
    text = (folder / "local_choice.yaml").read_text().replace("local_choice", "lost")
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(DataError, match="task lost: .*or define the task on local files"):
        load_tasks(["lost"], task_folder=tmp_path)
    with pytest.raises(ConfigError, match="must be a folder with YAML files of tasks"):
        load_tasks(["lost"], task_folder=tmp_path / "none")


def test_tasks_that_a_model_cannot_do_are_refused(folder, tmp_path):
    text = (folder / "local_choice.yaml").read_text().replace("task: local_choice", "task: odd")
    (tmp_path / "odd.yaml").write_text(text + "\nunsafe_code: true\n")
    with pytest.raises(ConfigError, match="task odd executes the code that the model writes"):
        load_tasks(["odd"], task_folder=tmp_path)
    (tmp_path / "odd.yaml").write_text(text.replace("multiple_choice", "seq2seq"))
    with pytest.raises(ConfigError, match="task odd .*; (correct its YAML file, or )?leave it out"):
        load_tasks(["odd"], task_folder=tmp_path)
    generation = (folder / "local_generation.yaml").read_text().replace("local_generation", "odd", 1)
    (tmp_path / "odd.yaml").write_text(generation.replace("max_gen_toks: 12", "penalty_alpha: 0.6"))
    with pytest.raises(ConfigError, match=r"task odd: generation_kwargs.penalty_alpha \(0.6\) is not supported"):
        load_tasks(["odd"], task_folder=tmp_path)


def test_shots_and_limit_are_those_that_were_asked_for(built, folder, tmp_path):
    text = (folder / "local_choice.yaml").read_text().replace("task: local_choice", "task: shots")
    (tmp_path / "shots.yaml").write_text(text + "\nfewshot_split: test\n")
    found = evaluate_tasks(generator(built=built), load_tasks(["shots"], task_folder=tmp_path, shots=1), limit=2)
    assert {(one.num_samples, one.num_shots) for one in found.scores} == {(2, 1)}
    with pytest.raises(ConfigError, match=r"limit \(0\) must be at least 1"):
        evaluate_tasks(generator(built=built), load_tasks(["shots"], task_folder=tmp_path), limit=0)


def test_without_the_harness_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(BackendUnavailable, match=r"pip install qsparse-moe\[eval\]"):
        load_tasks(["hellaswag"])
