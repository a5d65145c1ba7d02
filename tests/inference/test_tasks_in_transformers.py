"""The harness on a model in transformers, which it wraps itself, has the scores that it has on the model here."""

from __future__ import annotations

import string

import pytest
import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.tokenizer import load_tokenizer
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


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer with one token per character, which begins every text with its document token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate([DOCUMENT, "?", *string.ascii_lowercase, *string.digits, " ", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, vocabulary[DOCUMENT])]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=DOCUMENT, bos_token=DOCUMENT)
    wrapped.save_pretrained(folder)
    return folder


def test_scores_in_transformers_are_those_here(tokenizer_folder, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from qsparse_moe.inference.tasks.model import HarnessModel
    from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM

    built = model(vocab_size=40, sparsity={"default": 0.5})
    run = RunConfig.model_validate({"model": built.config.model_dump(), "data": {"sequence_length": LENGTH}})
    generator = Generator(built, load_tokenizer(str(tokenizer_folder)), run, engine=resolve_engine("torch", built))
    wrapped = QSparseMoEForCausalLM.of(built), AutoTokenizer.from_pretrained(tokenizer_folder)
    settings = {"tokenizer": wrapped[1], "max_length": LENGTH, "batch_size": 3, "device": "cpu"}
    there = HFLM(pretrained=wrapped[0], add_bos_token=True, **settings)
    # For whole texts it adds a document token of its own, in front of that of the tokenizer.
    rolling = HFLM(pretrained=wrapped[0], add_bos_token=False, **settings)
    pairs = [("the sky is:", " blue"), ("a longer context than the model reads " * 2, " yes"), ("no", "thing")]
    here = HarnessModel(generator).loglikelihood([request(*pair) for pair in pairs])
    wanted = there.loglikelihood([request(*pair) for pair in pairs])
    for one, other in zip(here, wanted, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]
    folder = write_tasks(tmp_path)
    for name, harness in (("local_choice", there), ("local_generation", there), ("local_perplexity", rolling)):
        found = evaluate_tasks(generator, load_tasks([name], task_folder=folder))
        tasks = {"tasks": load_tasks([name], task_folder=folder).tasks, "groups": {}, "group_map": {}}
        with torch.no_grad():
            other = evaluate(harness, tasks, log_samples=False)["results"][name]
        for score in found.scores:
            assert score.value == pytest.approx(other[f"{score.metric},none"], abs=1e-5), name
