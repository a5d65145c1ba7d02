"""Generation: choice of a token, the window, where it ends, and text in whole characters."""

from __future__ import annotations

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.cli import generate as generate_module
from qsparse_moe.cli.app import run
from qsparse_moe.cli.generate import _until, check_prompt, choose_token, fit_prompt, next_tokens, text_pieces
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.tokenizer import ByteTokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training import evaluate

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()


class Counting:
    """A model whose next token is the last one plus one; it remembers how much it was shown."""

    head = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self):
        self.lengths = []

    def __call__(self, tokens_BS, *, with_stats):
        assert not with_stats
        self.lengths.append(tokens_BS.shape[1])
        logits_BSV = torch.nn.functional.one_hot((tokens_BS + 1) % 264, 264).float()
        return SimpleNamespace(logits_BSV=logits_BSV)


def test_next_tokens_follow_the_model_and_see_a_window():
    model = Counting()
    tokens = next_tokens(model, [5, 6], window=4, temperature=0.0, seed=0)
    assert list(islice(tokens, 5)) == [7, 8, 9, 10, 11]
    assert model.lengths == [2, 3, 4, 4, 4]


def test_a_prompt_longer_than_the_window_is_refused_or_keeps_its_last_tokens():
    assert fit_prompt([256, 1, 2, 3], 4, truncate=False) == [256, 1, 2, 3]
    message = (
        r"--prompt \(5 tokens .*\) must be at most data.sequence_length \(4\).* keep its last 4 tokens with --trunc"
    )
    with pytest.raises(ConfigError, match=message):
        fit_prompt([256, 1, 2, 3, 4], 4, truncate=False)
    assert fit_prompt([256, 1, 2, 3, 4], 4, truncate=True) == [1, 2, 3, 4]


def test_a_prompt_that_is_not_utf_8_is_named_with_the_byte_that_is_not():
    check_prompt("né €")
    prompt = "né".encode() + b"caf\xe9!"
    with pytest.raises(ConfigError, match=r"--prompt \('n\\xe9caf\\udce9!'\) must be UTF-8, and its byte 6 is not"):
        check_prompt(prompt.decode("utf-8", errors="surrogateescape"))


def test_greedy_tokens_are_the_argmax_of_a_real_model_s_full_forward():
    model = build_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2), seed=3).eval()
    tokens = [256, 10, 20]
    for token in islice(next_tokens(model, tokens, window=64, temperature=0.0, seed=0), 4):
        assert token == model(torch.tensor([tokens])).logits_BSV[0, -1].argmax()
        tokens = [*tokens, token]


def test_same_seed_gives_the_same_draws_and_another_seed_others():
    model = build_model(ModelConfig(hidden_size=16, num_layers=1, num_heads=2), seed=3).eval()
    draw = lambda seed: list(islice(next_tokens(model, [256], window=64, temperature=1.0, seed=seed), 12))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_draws_follow_the_tempered_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose_token(logits, 0.5, generator)] += 1
    assert counts / 4000 == pytest.approx((logits / 0.5).softmax(-1), abs=0.03)


@pytest.mark.parametrize("temperature", ["0", "1", "5"])
def test_ids_of_the_vocabularys_padding_are_never_taken_however_likely(tmp_path, monkeypatch, capsys, temperature):
    config = RunConfig(model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2, vocab_size=320))
    model = build_model(config.model, seed=3).eval()
    padding = torch.zeros(320)
    padding[257:] = 100.0
    model.head.register_forward_hook(lambda module, inputs, logits_BSV: logits_BSV + padding)
    monkeypatch.setattr(generate_module, "find_run", lambda path: path)
    monkeypatch.setattr(evaluate, "load_run", lambda folder, device: (config, model, 7))
    shown = []

    def record(tokens, last, max_tokens):
        # Past the end of a document too: the point is what may be drawn.
        shown.extend(islice(tokens, max_tokens))
        return iter(shown)

    monkeypatch.setattr(generate_module, "_until", record)
    options = ["--device", "cpu", "--temperature", temperature, "--max-tokens", "100", "--json"]
    assert run(["generate", str(tmp_path), *options]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 100
    assert max(shown) < 257 and (temperature == "0" or len(set(shown)) > 20)


def test_generation_ends_at_the_document_token_or_after_the_given_number():
    assert list(_until(iter([1, 2, 256, 3]), 256, 10)) == [1, 2]
    assert list(_until(iter([1, 2, 3, 4]), 256, 3)) == [1, 2, 3]
    drawn = iter([1, 2, 3])
    list(_until(drawn, 256, 2))
    assert next(drawn) == 3, "no token is computed that is not shown"


def test_pieces_end_with_whole_characters_and_join_to_the_text():
    ids = TOKENIZER.encode("né €!")
    pieces = list(text_pieces(iter(ids[1:]), [256, *ids[:1]], TOKENIZER))
    assert pieces == ["n", "é", " ", "€", "!", ""]


def test_what_stays_incomplete_is_shown_at_the_end():
    ids = TOKENIZER.encode("a€")[:-1]
    assert "".join(text_pieces(iter(ids), [256], TOKENIZER)) == "a\ufffd"
