"""``generate()`` and pipelines: the tokens of our own generator, with padding, caches, and sampling of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig, pipeline

from qsparse_moe.inference.cached_model import TorchDecode, prefill
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from tests.data.test_tokenizer import save_tokenizer
from tests.interop.auto_models import VOCABULARY, build, left_padded, random_ids

ROWS = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 5, 2)]
NEW = 8


@pytest.fixture(scope="module", params=["sparse", "int8", "threshold", "ternary"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def sparse():
    return build("sparse")


def own_greedy(model, rows):
    """Return the greedy tokens of our decode engine."""
    cache = KeyValueCache.allocate(model.config, batch=len(rows), capacity=64, dtype=torch.float32)
    engine, logits, found = TorchDecode(model), prefill(model, rows, cache), []
    for _ in range(NEW):
        found.append(logits.argmax(-1))
        logits = engine.decode(found[-1], cache)
    return torch.stack(found, 1).tolist()


def generated(wrapped, rows, **options):
    ids, mask = left_padded(rows)
    out = wrapped.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options)
    return out[:, ids.shape[1] :].tolist()


def test_greedy_tokens_are_those_of_our_generator_with_padding_in_front(model):
    wrapped = QSparseMoEForCausalLM.of(model)
    assert generated(wrapped, ROWS, do_sample=False) == own_greedy(model, ROWS)


def test_a_static_cache_eager_attention_and_no_cache_give_the_same_tokens(sparse):
    wanted = own_greedy(sparse, ROWS)
    wrapped = QSparseMoEForCausalLM.of(sparse)
    assert generated(wrapped, ROWS, do_sample=False, cache_implementation="static") == wanted
    assert generated(wrapped, ROWS, do_sample=False, use_cache=False) == wanted
    eager = QSparseMoEForCausalLM.of(sparse, attn_implementation="eager")
    assert generated(eager, ROWS, do_sample=False) == wanted


def test_sampling_follows_the_seed_and_beams_find_a_likelier_sequence(sparse):
    wrapped = QSparseMoEForCausalLM.of(sparse)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generated(wrapped, ROWS, do_sample=True, top_p=0.95))
    assert samples[0] == samples[1] != samples[2]
    beams = generated(wrapped, ROWS[:1], do_sample=False, num_beams=4)
    assert log_likelihood(sparse, ROWS[0], beams[0]) >= log_likelihood(sparse, ROWS[0], own_greedy(sparse, ROWS)[0])


@torch.no_grad()
def log_likelihood(model, prompt, continuation):
    ids = torch.tensor([prompt + continuation])
    scores = model(ids).logits_BSV[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(continuation)[:, None]).sum().item()


def test_continuous_batching_with_a_paged_cache_gives_the_same_tokens():
    """As the server does with ``--continuous-batching``."""
    wrapped = QSparseMoEForCausalLM.of(build("sparse"), eos_token_id=82, pad_token_id=0)
    found = wrapped.generate_batch(
        ROWS,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=82, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64),
        progress_bar=False,
    )
    wanted = generated(wrapped, ROWS, do_sample=False)
    assert [row.generated_tokens for row in found.values()] == wanted


def test_generation_in_training_mode_has_a_cache(sparse):
    wrapped = QSparseMoEForCausalLM.of(build("sparse")).train()
    assert generated(wrapped, ROWS, do_sample=False) == own_greedy(sparse, ROWS)


def test_a_pipeline_generates_text_from_a_folder(sparse, tmp_path):
    words = ["<unk>", "</s>", *(f"word{number}" for number in range(VOCABULARY - 2))]
    folder = save_tokenizer(
        tmp_path / "saved", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>", "pad_token": "<unk>"}
    )
    QSparseMoEForCausalLM.of(sparse).save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder), device_map="cpu")
    prompts = ["word3 word7 word1 word9", "word5 word5"]
    found = generate(prompts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_full_text=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = own_greedy(sparse, [tokenizer(prompt)["input_ids"] for prompt in prompts])
    for (result,), tokens in zip(found, wanted, strict=True):
        assert result["generated_text"].split() == tokenizer.decode(tokens).split()
