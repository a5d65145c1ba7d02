"""Experts made of dense layers have the first logits of the dense model in transformers; the rest is refused."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from qsparse_moe.interop.export_model import export_model
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.interop.upcycling_rules import Upcycling
from tests.interop.auto_models import build as build_own
from tests.interop.hugging_face_models import VOCABULARY, build, save

transformers = pytest.importorskip("transformers")

F = 36
WITHOUT_NOISE = {
    "copies": Upcycling(5, 3),
    "slices": Upcycling(6, 3, "slices"),
    "slices of several copies per token": Upcycling(12, 6, "slices", 3),
    "one copy in slices": Upcycling(4, 4, "slices"),
}


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def pair(request, tmp_path_factory):
    """A dense model of transformers, and the folder of it."""
    model = build(request.param)
    return model, save(model, tmp_path_factory.mktemp("dense") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("dense") / "llama")


def tokens():
    return torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


def relative(found, want):
    return ((found - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_the_first_logits_are_those_of_the_dense_model_in_transformers(pair, tmp_path, name):
    theirs, folder = pair
    upcycling = WITHOUT_NOISE[name]
    import_model(folder, tmp_path / "out", upcycling=upcycling)
    config, model, _ = load_export(tmp_path / "out")
    assert moe_layers(config.model) == (0, 1, 2)
    moe = config.model.moe
    assert (moe.num_experts, moe.experts_per_token) == (upcycling.experts, upcycling.experts_per_token)
    with torch.no_grad():
        output = model(tokens())
        assert relative(output.logits_BSV, theirs(tokens()).logits) <= 2e-6
    routed = output.stats["router/routed_LE"]
    assert upcycling.experts == upcycling.experts_per_token or routed.std() > 1, "the router must have chosen"


@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_every_expert_has_the_weights_of_its_part_of_the_dense_network(llama, tmp_path, name):
    upcycling = WITHOUT_NOISE[name]
    import_model(llama, tmp_path / "out", upcycling=upcycling)
    found = load_export(tmp_path / "out")[1].state_dict()
    dense = HuggingFaceWeights(llama)
    slices, size = upcycling.num_slices, F // upcycling.num_slices
    for layer in range(3):
        for expert in range(upcycling.experts):
            features = torch.arange(F).unflatten(0, (slices, size))[expert % slices]
            for matrix in ("w_gate", "w_up", "w_down"):
                whole = dense.tensor(f"layers.{layer}.dense.{matrix}")
                want = whole[features] if matrix == "w_down" else whole[:, features]
                assert found[f"layers.{layer}.moe.experts.{matrix}"][expert].equal(want)
        rows = found[f"layers.{layer}.moe.router.weight"].unflatten(0, (-1, slices))
        assert rows.eq(rows[:, :1]).all(), "the slices of a copy are chosen together"
        assert len(rows[:, 0].unique(dim=0)) == upcycling.experts // slices, "and no two copies"
        assert rows.std().item() == pytest.approx(0.02, rel=0.25)
    assert not found["layers.0.moe.router.weight"].equal(found["layers.1.moe.router.weight"])
    others = [name for name in dense.shapes if ".dense." not in name]
    assert all(found[name].equal(dense.tensor(name)) for name in others)


def test_noise_reaches_its_share_of_the_experts_weights_and_nothing_else(llama, tmp_path):
    import_model(llama, tmp_path / "plain", upcycling=Upcycling(4, 2))
    for folder in ("noisy", "again"):
        import_model(llama, tmp_path / folder, upcycling=Upcycling(4, 2, noise=0.5, noise_share=0.25))
    plain, noisy, again = (load_export(tmp_path / name)[1].state_dict() for name in ("plain", "noisy", "again"))
    for name, value in plain.items():
        assert noisy[name].equal(again[name])
        if "experts" not in name:
            assert noisy[name].equal(value)
            continue
        change = noisy[name] - value
        assert (change != 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
        rms = value[0].square().mean().sqrt()
        assert change[change != 0].std().item() == pytest.approx(0.5 * rms.item(), rel=0.06)
        assert all(not change[0].equal(change[expert]) for expert in range(1, 4)), "the experts differ"


@pytest.mark.parametrize(("name", "family"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
def test_transformers_opens_the_export_and_computes_the_dense_logits(tmp_path, name, family):
    theirs = build(name)
    import_model(save(theirs, tmp_path / "dense"), tmp_path / "experts", upcycling=Upcycling(4, 2))
    export_model(tmp_path / "experts", tmp_path / "out", format="hugging-face")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **eager)
    assert opened.config.model_type == family
    with torch.no_grad():
        assert relative(opened(tokens()).logits, theirs(tokens()).logits) <= 2e-6


def test_half_precision_files_stay_as_they_are(tmp_path):
    folder = save(build("qwen2").bfloat16(), tmp_path / "model")
    import_model(folder, tmp_path / "out", upcycling=Upcycling(4, 2, "slices"))
    found = load_export(tmp_path / "out")[1]
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    dense = HuggingFaceWeights(folder).tensor("layers.2.dense.w_up")
    assert found.layers[2].moe.experts.w_up[3].equal(dense[:, F // 2 :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--experts", "4", "--experts-per-token", "1"],
            "--experts-per-token (1) must be from 2 to --experts (4): the",
        ),
        (
            ["--experts", "4", "--experts-per-token", "5"],
            "--experts-per-token (5) must be from 2 to --experts (4): the",
        ),
        (["--experts", "4", "--slices", "2"], "--slices (2) has no meaning when --upcycle is copies"),
        (["--experts", "4", "--upcycle", "slices", "--slices", "0"], "--slices (0) must be at least 1"),
        (
            ["--experts", "6", "--experts-per-token", "4", "--upcycle", "slices"],
            "--experts (6) must be a multiple of the number of slices (4), so that a token's experts hold every slice",
        ),
        (
            ["--experts", "9", "--experts-per-token", "4", "--upcycle", "slices", "--slices", "3"],
            "--experts-per-token (4) must be a multiple of the number of slices (3)",
        ),
        (
            ["--experts", "10", "--experts-per-token", "5", "--upcycle", "slices"],
            "--slices (5) must divide the 36 hidden features of the dense layers; with --experts (10), one of [1, 2]",
        ),
        (["--experts", "4", "--noise", "-1"], "--noise (-1.0) must be a number of at least 0"),
        (["--experts", "4", "--noise", "1", "--noise-share", "0"], "--noise-share (0.0) must be above 0 and at most 1"),
        (["--experts", "4", "--noise-share", "0.5"], "--noise-share (0.5) has no meaning without --noise"),
        (["--noise", "0.1"], "--noise (0.1) has no meaning without --experts"),
        (["--upcycle", "slices"], "--upcycle (slices) has no meaning without --experts"),
    ],
)
def test_options_that_fit_no_model_are_refused(llama, tmp_path, capsys, options, message):
    assert run(["import", str(llama), "--output", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_model_with_experts_is_not_given_others(tmp_path):
    folder = save(build("mixtral"), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^experts \(4\) makes experts of the layers of a dense model, and .* has 5"):
        import_model(folder, tmp_path / "out", upcycling=Upcycling(4, 2))


def test_a_folder_with_a_sparsity_plan_is_not_given_experts(tmp_path):
    moe = {"num_dense_layers": 3, "dense_hidden_size": F, "num_shared_experts": 0, "shared_expert_gate": False}
    model = build_own("sparse", vocab_size=264, moe=moe)
    QSparseMoEForCausalLM.of(model).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"has a sparsity plan for the sites of its dense layers; leave it out, and na"
    ):
        import_model(tmp_path / "model", tmp_path / "out", tokenizer="bytes", upcycling=Upcycling(4, 2))


def test_the_verb_makes_experts_and_every_engine_generates_with_them(llama, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--experts", "6", "--experts-per-token", "4", "--upcycle", "slices", "--slices", "2", "--json"]
    assert run(["import", str(llama), "--output", str(out), *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert run(["import", str(llama), "--output", str(tmp_path / "dense"), "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)
    # 3 copies of the dense networks (three matrices of 48 x 36 in three layers) in place of one, and the routers.
    assert made["bytes"] - dense["bytes"] == 4 * 3 * (2 * 3 * 48 * F + 6 * 48)
    greedy = ["--prompt", "word1 word2", "--max-tokens", "4", "--temperature", "0", "--engine"]
    texts = set()
    for folder in (out, tmp_path / "dense"):
        for engine in ("torch", "gather", "auto"):
            assert run(["generate", str(folder), *greedy, engine]) == 0
            texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and "word" in texts.pop()
