"""The harness on a model in transformers, which it wraps itself, has the scores that it has on the model here.

Questions as plain text, and written by a chat template.
"""

from __future__ import annotations

import string

import pytest
import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.chat import open_template
from qsparse_moe.data.tokenizer import load_tokenizer
from qsparse_moe.errors import ConfigError, DataError
from qsparse_moe.inference.engine import resolve_engine
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.tasks.load import load_tasks
from qsparse_moe.inference.tasks.scores import evaluate_tasks
from tests.inference.models import model
from tests.inference.test_tasks import request
from tests.support.tasks import write_tasks

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

DOCUMENT = "<doc>"
LENGTH = 48


CHAT = (
    "{% for message in messages %}{{ '<doc>' + message['role'][0] + ':' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<doc>a:' }}{% endif %}"
)


def save_tokenizer(folder, **settings):
    """Save a tokenizer with one token per character, which begins every text with its document token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate([DOCUMENT, "?", *string.ascii_lowercase, *string.digits, " ", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, vocabulary[DOCUMENT])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=DOCUMENT, bos_token=DOCUMENT, unk_token="?", **settings
    )
    wrapped.save_pretrained(folder)
    return folder


def generator_of(tokenizer_folder):
    built = model(vocab_size=40, sparsity={"default": 0.5})
    run = RunConfig.model_validate({"model": built.config.model_dump(), "data": {"sequence_length": LENGTH}})
    return Generator(built, load_tokenizer(str(tokenizer_folder)), run, engine=resolve_engine("torch", built))


def test_scores_in_transformers_are_those_here(tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from qsparse_moe.inference.tasks.model import HarnessModel
    from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM

    tokenizer_folder = save_tokenizer(tmp_path / "tokenizer")
    generator = generator_of(tokenizer_folder)
    wrapped = QSparseMoEForCausalLM.of(generator.model), AutoTokenizer.from_pretrained(tokenizer_folder)
    settings = {"tokenizer": wrapped[1], "max_length": LENGTH, "batch_size": 3, "device": "cpu"}
    there = HFLM(pretrained=wrapped[0], add_bos_token=True, **settings)
    # For whole texts it adds a document token of its own, in front of that of the tokenizer.
    rolling = HFLM(pretrained=wrapped[0], add_bos_token=False, **settings)
    pairs = [("the sky is:", " blue"), ("a longer context than the model reads " * 2, " yes"), ("no", "thing")]
    here = HarnessModel(generator).loglikelihood([request(*pair) for pair in pairs])
    wanted = there.loglikelihood([request(*pair) for pair in pairs])
    for one, other in zip(here, wanted, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]
    folder = write_tasks(tmp_path / "tasks")
    for name, harness in (("local_choice", there), ("local_generation", there), ("local_perplexity", rolling)):
        found = evaluate_tasks(generator, load_tasks([name], task_folder=folder))
        tasks = {"tasks": load_tasks([name], task_folder=folder).tasks, "groups": {}, "group_map": {}}
        with torch.no_grad():
            other = evaluate(harness, tasks, log_samples=False)["results"][name]
        for score in found.scores:
            assert score.value == pytest.approx(other[f"{score.metric},none"], abs=1e-5), name


def test_questions_are_written_by_the_chat_template(tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from qsparse_moe.inference.tasks.model import HarnessModel
    from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM

    folder = save_tokenizer(tmp_path / "tokenizer", chat_template=CHAT)
    generator = generator_of(folder)
    there = HFLM(
        pretrained=QSparseMoEForCausalLM.of(generator.model),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=LENGTH,
        batch_size=3,
        device="cpu",
    )
    here = HarnessModel(generator, chat_template=open_template(generator.config.data, generator.tokenizer))
    context = here.apply_chat_template([{"role": "user", "content": "the sky is:"}])
    assert context == there.apply_chat_template([{"role": "user", "content": "the sky is:"}])
    (own,), (other,) = (one.loglikelihood([request(context, "blue")]) for one in (here, there))
    assert own[0] == pytest.approx(other[0], abs=1e-4) and own[1] == other[1]
    tasks = write_tasks(tmp_path / "tasks")
    for name in ("local_choice", "local_generation"):
        found = evaluate_tasks(generator, load_tasks([name], task_folder=tasks), chat=True)
        loaded = {"tasks": load_tasks([name], task_folder=tasks).tasks, "groups": {}, "group_map": {}}
        other = evaluate(there, loaded, log_samples=False, apply_chat_template=True, fewshot_as_multiturn=True)
        for score in found.scores:
            assert score.value == pytest.approx(other["results"][name][f"{score.metric},none"], abs=1e-5), name


def test_a_chat_without_a_template_and_an_answer_that_a_task_begins_are_refused(tmp_path):
    from qsparse_moe.inference.tasks.model import HarnessModel

    plain = generator_of(save_tokenizer(tmp_path / "plain"))
    tasks = load_tasks(["local_choice"], task_folder=write_tasks(tmp_path / "tasks"))
    with pytest.raises(DataError, match="has no chat template.*name a Jinja file in data.chat.template"):
        evaluate_tasks(plain, tasks, chat=True)
    with pytest.raises(ConfigError, match="HarnessModel has no chat template, .*; pass chat_template"):
        HarnessModel(plain).apply_chat_template([])
    other = generator_of(save_tokenizer(tmp_path / "other", chat_template=CHAT))
    template = open_template(other.config.data, other.tokenizer)
    wrapped = HarnessModel(other, chat_template=template)
    assert wrapped.apply_chat_template([{"role": "user", "content": "hi"}]) == "<doc>u:hi<doc>a:"
    with pytest.raises(ConfigError, match=r"begins the assistant's answer itself \(gen_prefix\)"):
        wrapped.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
