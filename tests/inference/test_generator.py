"""The generator: batches, where sequences end, what is streamed, and what is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

import qsparse_moe
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference import generator as generator_module
from qsparse_moe.inference import memory
from qsparse_moe.inference.engine import resolve_engine
from qsparse_moe.inference.generator import Generator, Statistics
from qsparse_moe.inference.memory import MemoryDtypes, check_memory, free_bytes
from qsparse_moe.inference.sampling import Sampling
from tests.inference.models import all_at_once, model, random_tokens

torch.set_num_threads(1)
BYTES = ByteTokenizer()
PROMPTS = [[256, 10, 20, 30], [256], [256, 65, 66, 67, 68, 69, 70]]


def generator(*, built=None, length=64, **settings):
    built = built or model()
    built.hide_ids(range(257, 264))
    run = RunConfig.model_validate({"model": built.config.model_dump(), "data": {"sequence_length": length}})
    return Generator(built, BYTES, run, engine=resolve_engine("torch", built), **settings)


class Scripted:
    """A decode engine that generates a prescribed text for each sequence, whatever its tokens are."""

    name = "scripted"
    cache_dtype = None

    def __init__(self, *texts):
        self.texts = [list(text) for text in texts]
        self.batches = []

    def decode(self, tokens_B, cache):
        self.batches.append(cache.batch)
        logits_BV = torch.full((cache.batch, 264), -50.0)
        for row, text in zip(logits_BV, [text for text in self.texts if text], strict=True):
            row[text.pop(0)] = 50.0
        cache.advance()
        return logits_BV

    def figures(self):
        return {}


def scripted(monkeypatch, *texts):
    """A generator whose sequences have the given ids, and its engine."""
    made = generator()
    made.engine = Scripted(*texts)
    monkeypatch.setattr(
        "qsparse_moe.inference.generator.prefill", lambda model, tokens, cache: made.engine.decode(None, cache)
    )
    return made


def test_it_is_a_public_name():
    assert qsparse_moe.Generator is Generator and qsparse_moe.Sampling is Sampling


def greedy(built, prompt, num):
    """The slow version: all tokens at once for every new one."""
    tokens = list(prompt)
    log_probs = []
    for _ in range(num):
        row = all_at_once(built, torch.tensor([tokens]))[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        log_probs.append(row.max().item())
    return tokens[len(prompt) :], log_probs


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_batch_generates_for_each_prompt_what_full_forward_passes_give(sparsity):
    built = model(sparsity={"default": sparsity})
    made = generator(built=built)
    found = made.generate(PROMPTS, max_tokens=12)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        tokens, log_probs = greedy(built, prompt, 12)
        if 256 in tokens:
            tokens = tokens[: tokens.index(256)]
        assert list(generation.token_ids) == tokens
        assert generation.log_probabilities == pytest.approx(log_probs[: len(tokens)], abs=1e-4)
        assert generation.text == BYTES.decode(tokens)
        assert generation.stop_reason == ("max_tokens" if len(tokens) == 12 else "stop_token")


def test_streamed_pieces_join_to_the_returned_text():
    made, settings = generator(), {"max_tokens": 20, "sampling": Sampling(temperature=1.0), "seed": 3}
    texts, ids = [""] * 3, [[], [], []]
    stream = made.stream(PROMPTS, **settings)
    for step in stream:
        for new in step:
            texts[new.index] += new.text
            ids[new.index] += [] if new.token_id is None else [new.token_id]
    found = made.generate(PROMPTS, **settings)
    assert stream.results == found
    assert [(one.text, list(one.token_ids)) for one in found] == list(zip(texts, ids, strict=True))


def test_a_sequence_is_the_same_alone_and_in_a_batch():
    made = generator()
    settings = {"max_tokens": 16, "sampling": Sampling(temperature=1.0, top_p=0.95)}
    together = made.generate(PROMPTS, seed=[5, 6, 5], **settings)
    for prompt, seed, generation in zip(PROMPTS, (5, 6, 5), together, strict=True):
        assert made.generate(prompt, seed=seed, **settings)[0].token_ids == generation.token_ids
    assert made.generate(PROMPTS, seed=5, **settings)[1] == together[1], "the next prompts have the next seeds"
    assert made.generate(PROMPTS[0], seed=6, **settings)[0] != together[0]


def test_sequences_end_one_by_one_and_leave_the_batch(monkeypatch):
    made = scripted(monkeypatch, b"ab\n\nc", [*b"abcd", 256], [*b"a", 9])
    found = made.generate(["x", "y", "z"], max_tokens=4, stop=["\n\n"], stop_tokens=[9])
    assert [one.text for one in found] == ["ab", "abcd", "a"]
    assert [one.stop_reason for one in found] == ["stop_string", "max_tokens", "stop_token"]
    assert [bytes(one.token_ids) for one in found] == [b"ab\n\n", b"abcd", b"a"]
    assert made.engine.batches == [3, 3, 2, 2]


def test_the_token_that_begins_a_document_ends_a_sequence_with_and_without_other_stop_tokens(monkeypatch):
    for settings in ({}, {"stop_tokens": [9]}):
        made = scripted(monkeypatch, [*b"ab", 256], [*b"abcd"])
        found = made.generate(["x", "y"], max_tokens=4, **settings)
        assert [(one.text, one.stop_reason) for one in found] == [("ab", "stop_token"), ("abcd", "max_tokens")]
        assert [bytes(one.token_ids) for one in found] == [b"ab", b"abcd"]


def test_text_that_could_become_a_stop_string_is_held_back(monkeypatch):
    made = scripted(monkeypatch, "aEN€END".encode())
    steps = [step[0].text for step in made.stream("x", max_tokens=20, stop=["END"])]
    assert steps == ["a", "", "", "", "", "EN€", "", "", ""]
    made = scripted(monkeypatch, "aEN€".encode()[:-1])
    steps = [step[0].text for step in made.stream("x", max_tokens=5, stop=["END"])]
    assert steps == ["a", "", "", "", "EN\ufffd"], "the end shows what was held back"


def test_an_interrupted_stream_has_the_text_so_far(monkeypatch):
    made = scripted(monkeypatch, b"abcdef")
    stream = made.stream("x", max_tokens=6)
    for number, _ in enumerate(stream):
        if number == 2:
            break
    assert (stream.results[0].text, stream.results[0].stop_reason) == ("abc", None)
    with pytest.raises(RuntimeError, match="the steps of a GenerationStream run once; call Generator.stream again"):
        next(iter(stream))


def test_statistics_count_tokens_and_time_of_their_phases():
    made = generator()
    stream = made.stream(PROMPTS, max_tokens=5, sampling=Sampling(temperature=1.0))
    assert stream.statistics.prompt_tokens == 12 and stream.statistics.decode_tokens == 0
    total = sum(len(step) for step in stream)
    found = stream.statistics
    assert (found.engine, found.decode_tokens, found.decode_steps) == ("torch", total - 3, 4)
    assert found.cache_bytes == 2 * 2 * 3 * 12 * 64 * 4, "7 tokens of the longest prompt and 5 more"
    assert 0 < found.prefill_seconds < 5 and 0 < found.decode_seconds < 5
    assert found.decode_tokens_per_second == pytest.approx(found.decode_tokens / found.decode_seconds)
    assert found.prefill_tokens_per_second == pytest.approx(12 / found.prefill_seconds)


def test_rates_are_zero_before_anything_has_taken_time():
    nothing = Statistics("torch", prompt_tokens=3, cache_bytes=0, decode_tokens=2)
    assert nothing.prefill_tokens_per_second == nothing.decode_tokens_per_second == 0.0


def test_the_spelling_of_a_special_token_ends_a_sequence_at_that_token_and_not_where_it_is_spelled(monkeypatch):
    made = scripted(monkeypatch, [*b"a<end>b", 9, *b"c"], b"dzz")
    monkeypatch.setattr(made.tokenizer, "special_id", {"<end>": 9}.get, raising=False)
    found = made.generate(["x", "y"], max_tokens=20, stop=["<end>", "zz"])
    assert [(one.text, one.stop_reason) for one in found] == [("a<end>b", "stop_token"), ("d", "stop_string")]
    assert [bytes(one.token_ids) for one in found] == [b"a<end>b", b"dzz"]


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), (torch.bfloat16, 2)])
def test_the_cache_has_the_dtype_of_the_engine_or_else_that_of_the_model(monkeypatch, dtype, itemsize):
    asked = []
    monkeypatch.setattr(generator_module, "check_memory", lambda config, **sizes: asked.append(sizes))
    made = scripted(monkeypatch, b"ab")
    made.engine.cache_dtype = dtype
    stream = made.stream("x", max_tokens=2)
    list(stream)
    assert stream.statistics.cache_bytes == 2 * 2 * 1 * 4 * 64 * itemsize
    fp32 = torch.float32
    assert [one["dtypes"] for one in asked] == [MemoryDtypes(cache=dtype or fp32, activations=fp32, products=fp32)]
    assert [(one["capacity"], one["has_cache"]) for one in asked] == [(4, False)]


def test_a_prompt_longer_than_the_cache_is_refused_cut_or_slides():
    built = model()
    tokens = [256, *random_tokens(9).tolist()]
    with pytest.raises(ConfigError, match=r"prompts\[1\] \(10 tokens.*\) must be at most max_length \(6\) tokens long"):
        generator(built=built, max_length=6).stream([[1], tokens])
    cut = generator(built=built, max_length=6, overlong="truncate").generate(tokens, max_tokens=1)
    assert cut == generator(built=built, max_length=6).generate(tokens[-6:], max_tokens=1)
    slid = generator(built=built, max_length=6, overlong="slide").generate(tokens, max_tokens=1)[0]
    whole = generator(built=built, max_length=10).generate(tokens, max_tokens=1)[0]
    assert len({one.log_probabilities for one in (cut[0], slid, whole)}) == 3


def test_generation_continues_beyond_the_cache():
    made = generator(max_length=6)
    made.engine.model.hide_ids([256])
    stream = made.stream([[1, 2, 3]], max_tokens=20)
    assert sum(1 for _ in stream) == 20
    assert stream.statistics.cache_bytes == 2 * 2 * 6 * 64 * 4


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r'prompts \(none\) must hold at least one; give "" to begin a document'),
        ([[1], []], {}, r"prompts\[1\] \(no token\) must have at least one token; begin with .*, 256"),
        ([[1, 260]], {}, r"prompts\[0\] has the token id 260, which this model's tokenizer does not have"),
        ([[-1]], {}, r"prompts\[0\] has the token id -1"),
        ([[0, 256, 264]], {}, r"prompts\[0\] has the token id 264"),
        (["a", "b"], {"seed": [1]}, r"seed \(1 numbers\) must have one per prompt \(2\), or be one number"),
        ("a", {"max_tokens": 0}, r"max_tokens \(0\) must be at least 1"),
        ("a", {"stop": [""]}, r"stop \(\[''\]\) must hold strings of at least one character"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_computed(monkeypatch, prompts, settings, message):
    made = generator()
    monkeypatch.setattr(made.model, "forward", None)
    with pytest.raises(ConfigError, match=message):
        made.stream(prompts, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, r"max_length \(0\) must be at least 1 token; leave it out"),
        ({"overlong": "cut"}, r"overlong \('cut'\) must be one of refuse, slide, truncate"),
    ],
)
def test_wrong_settings_of_a_generator_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        generator(**settings)


def test_a_batch_too_large_for_the_memory_is_refused_before_allocation(monkeypatch):
    made = generator(max_length=2**40)
    monkeypatch.setattr("qsparse_moe.inference.kv_cache.torch.zeros", None)
    message = (
        r"prompts \(2 in one batch, with up to 1000000002 tokens each\) need about 1907\.\d\d GiB.* free; give fewer"
    )
    with pytest.raises(ConfigError, match=message):
        made.stream(["a", "b"], max_tokens=10**9)


def test_memory_is_compared_with_the_free_memory_of_the_machine_and_its_control_group(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CGROUP_FILES", ((limit, used),))
    whole_machine = free_bytes(cpu)
    assert whole_machine is not None and whole_machine > 2**20
    limit.write_text("5000000\n"), used.write_text("1000000\n")
    assert free_bytes(cpu) == 4_000_000
    limit.write_text("max\n")
    assert free_bytes(cpu) == pytest.approx(whole_machine, rel=0.5)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:   2000 kB\n")
    assert memory._available_memory(meminfo) == 2_048_000
    assert memory._available_memory(tmp_path / "none") is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    dtypes = MemoryDtypes(torch.float32, torch.float32, torch.float32)
    arguments = {"batch": 10**9, "capacity": 10**6, "longest_prompt": 1, "dtypes": dtypes, "device": cpu}
    check_memory(model().config, **arguments)
