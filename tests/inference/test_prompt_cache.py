"""A conversation computes each token once, and says what it would say if every turn began with an empty cache."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference import generator as generation
from qsparse_moe.inference.engine import ENGINES, resolve_engine
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.memory import MemoryDtypes, check_memory
from qsparse_moe.inference.prompt_cache import PromptCache
from tests.inference.models import model, random_tokens
from tests.inference.test_generator import RunConfig

CPU = torch.device("cpu")


def made(engine="torch", max_length=64, **settings):
    built = model(**settings)
    # No end of a document, so that every turn has all its tokens.
    built.hide_ids(range(256, 264))
    run = RunConfig.model_validate({"model": built.config.model_dump(), "data": {"sequence_length": max_length}})
    return Generator(built, ByteTokenizer(), run, engine=resolve_engine(engine, built))


@pytest.fixture
def computed(monkeypatch):
    """The number of tokens of each prefill."""
    counts, prefill = [], generation.prefill
    monkeypatch.setattr(
        generation,
        "prefill",
        lambda built, tokens, cache: counts.append(len(tokens[0])) or prefill(built, tokens, cache),
    )
    return counts


def talk(generator, prompts, kept, **settings):
    """The ids of the answer after each prompt; a prompt is given the ids of the conversation so far."""
    said, answers = [], []
    for prompt in prompts:
        said = prompt(said)
        stream = generator.stream(said, max_tokens=5, reuse=kept, **settings)
        list(stream)
        answers.append(list(stream.results[0].token_ids))
        said = said + answers[-1]
    return answers


TURNS = [lambda said, seed=seed: said + random_tokens(4 + seed, seed=seed).tolist() for seed in range(3)]


@pytest.mark.parametrize("engine", [s.name for s in ENGINES if s.name != "triton" and s.why_not(model()) is None])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_turns_compute_only_what_is_new_and_say_the_same(computed, engine, sparsity):
    generator = made(engine, sparsity={"default": sparsity})
    fresh = talk(generator, TURNS, None)
    assert computed == [4, 4 + 5 + 5, 4 + 5 + 5 + 5 + 6]
    computed.clear()
    assert talk(generator, TURNS, PromptCache()) == fresh
    # The last token of an answer was chosen and never computed.
    assert computed == [4, 1 + 5, 1 + 6]


def test_history_that_is_written_anew_is_computed_from_the_first_changed_token(computed):
    generator = made()
    turns = [TURNS[0], lambda said: [*said[:3], 99, *said[4:], 7], lambda said: said[:5]]
    assert talk(generator, turns, PromptCache()) == talk(generator, turns, None)
    # The third prompt is wholly held; its last token is computed for its logits.
    assert computed[:3] == [4, (4 + 5 + 1) - 3, 1]


def test_a_cache_that_has_slid_is_filled_anew(computed):
    generator, kept = made(max_length=12), PromptCache()
    list(generator.stream([1, 2, 3], max_tokens=20, reuse=kept))
    computed.clear()
    again = generator.stream([1, 2, 3, 4], max_tokens=5, reuse=kept)
    list(again)
    assert computed == [4] and again.statistics.reused_tokens == 0
    assert again.results == generator.generate([1, 2, 3, 4], max_tokens=5)


def test_a_turn_that_is_interrupted_leaves_what_was_computed(computed):
    generator, kept = made(), PromptCache()
    stream = generator.stream([1, 2, 3], max_tokens=9, reuse=kept)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    said = [1, 2, 3, *stream.results[0].token_ids]
    found = generator.stream([*said, 50], max_tokens=4, reuse=kept)
    list(found)
    assert (computed, len(said), found.statistics.reused_tokens) == ([3, 2], 7, 6)
    assert found.results[0].token_ids == generator.generate([*said, 50], max_tokens=4)[0].token_ids


def test_statistics_count_what_is_computed_and_the_cache_is_allocated_once():
    generator, kept = made(), PromptCache()
    memory = []
    for prompt in ([1, 2, 3], [1, 2, 3, 4, 5]):
        stream = generator.stream(prompt, max_tokens=1, reuse=kept)
        list(stream)
        found = stream.statistics
        memory.append((found.prompt_tokens, found.reused_tokens, found.cache_bytes, kept._cache.key_LBHPC.data_ptr()))
        assert found.prefill_tokens_per_second == pytest.approx(
            (found.prompt_tokens - found.reused_tokens) / found.prefill_seconds
        )
    bytes_of_64 = 2 * 2 * 64 * 64 * 4
    assert memory == [(3, 0, bytes_of_64, memory[0][3]), (5, 3, bytes_of_64, memory[0][3])]


def test_several_prompts_cannot_share_it_and_its_memory_is_counted_once():
    with pytest.raises(
        ConfigError, match=r"prompts \(2\) must be one where keys and values are reused; leave out reuse"
    ):
        made().stream([[1], [2]], reuse=PromptCache())
    fp32 = MemoryDtypes(torch.float32, torch.float32, torch.float32)
    sizes = {"batch": 1, "capacity": 10**12, "longest_prompt": 1, "dtypes": fp32, "device": CPU}
    with pytest.raises(ConfigError, match="of memory"):
        check_memory(model().config, **sizes)
    check_memory(model().config, **sizes, has_cache=True)


def test_the_memory_of_a_batch_is_that_of_its_longest_prompt(monkeypatch):
    asked = []
    monkeypatch.setattr(generation, "check_memory", lambda config, **sizes: asked.append(sizes))
    made().stream([[1, 2], [1, 2, 3, 4, 5], [1]], max_tokens=3)
    assert [(sizes["batch"], sizes["longest_prompt"], sizes["capacity"]) for sizes in asked] == [(3, 5, 8)]


@pytest.mark.parametrize(
    ("held", "prompt", "reused"),
    [(7, 7, 6), (8, 8, 7), (8, 5, 4), (9, 5, 0), (9, 8, 0), (5, 8, 5), (5, 9, 0), (0, 8, 0)],
)
def test_tokens_are_reused_until_the_first_has_been_replaced_or_the_prompt_would_replace_it(held, prompt, reused):
    cache = KeyValueCache.allocate(model().config, batch=1, capacity=8, dtype=torch.float32)
    kept = PromptCache()
    kept.begin([0], lambda: cache)
    kept.extend(range(held))
    assert kept.begin(range(prompt), lambda: cache) == (cache, reused)
    assert cache.positions_B.tolist() == [reused]
