"""Generation from runs, checkpoints and exports; and the loss of a run computed token by token."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch

from qsparse_moe.config.load import load_config
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.inference.engine import ENGINES
from qsparse_moe.inference.evaluate import decoding_forward
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.load import load_model
from qsparse_moe.inference.sampling import Sampling
from qsparse_moe.interop.state_dict import export_run, load_export
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.evaluate import evaluate_run, load_run
from qsparse_moe.training.loop import train
from tests.data.test_tokenizer import save_tokenizer
from tests.support.runs import MIXED_MODEL, tiny_config, write_text

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("generate") / "text").parent


@pytest.fixture(scope="module")
def run_dir(folder):
    config = tiny_config(folder, "run", engine="torch", checkpoint_interval=3, keep_last=2, model=MIXED_MODEL)
    return train(config).run_dir


def say(path, **settings):
    return Generator.load(path, device="cpu", **settings).generate("abc", max_tokens=8)[0]


def test_a_run_its_checkpoint_and_its_export_generate_the_same(run_dir, tmp_path):
    export_run(run_dir, tmp_path / "out")
    _, newest = list_checkpoints(run_dir)
    found = say(run_dir)
    assert len(found.token_ids) == 8
    assert say(newest) == say(tmp_path / "out") == say(str(run_dir)) == found


def test_an_earlier_checkpoint_has_its_own_weights_and_sparsity(run_dir):
    earlier, _ = list_checkpoints(run_dir)
    loaded, newest = load_model(earlier), load_model(run_dir)
    assert (loaded.step, newest.step) == (3, 6)
    assert not loaded.model.head.weight.equal(newest.model.head.weight)
    assert 0 < loaded.model.sparsity_plan.mean < newest.model.sparsity_plan.mean
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_weights_are_stored_in_the_requested_format(run_dir, tmp_path):
    dtype = lambda **settings: load_model(run_dir, **settings).model.head.weight.dtype  # noqa: E731
    assert (dtype(), dtype(weights="bf16"), dtype(weights="fp32")) == (torch.float32, torch.bfloat16, torch.float32)
    export_run(run_dir, tmp_path / "out", dtype="bf16")
    assert load_model(tmp_path / "out").model.head.weight.dtype == torch.bfloat16
    assert len(say(run_dir, weights="bf16").token_ids) == 8
    with pytest.raises(
        ConfigError, match=r"weights \('int3'\) must be one of auto, fp32, bf16, int8, ternary; choose one"
    ):
        load_model(run_dir, weights="int3")


def test_int8_loads_the_rounded_model_for_every_engine(run_dir):
    exact, rounded = load_model(run_dir, weights="fp32").model, load_model(run_dir, weights="int8").model
    moved = (rounded.head.weight - exact.head.weight).abs()
    assert 0 < moved.max() <= 0.501 * exact.head.weight.abs().amax(-1).max() / 127
    assert torch.equal(rounded.embedding.weight, exact.embedding.weight) == (not exact.config.tie_embeddings)
    by_torch, by_auto = (say(run_dir, weights="int8", engine=engine) for engine in ("torch", "auto"))
    assert by_torch.token_ids == by_auto.token_ids


def test_loss_in_another_number_format_is_near_and_not_the_same(run_dir):
    def loss(weights):
        forward_of = partial(decoding_forward, weights=weights)
        return evaluate_run(run_dir, num_sequences=2, device="cpu", forward_of=forward_of).bits_per_byte

    exact = loss("auto")
    for weights in ("bf16", "int8"):
        assert 0 < abs(loss(weights) - exact) < 0.02 * exact, weights
    with pytest.raises(ConfigError, match=r"weights \(ternary\) must be those of a model"):
        loss("ternary")


def test_another_plan_is_used_and_checked_before_weights_are_read(run_dir, tmp_path, monkeypatch):
    config = load_run(run_dir)[0].model
    plan = SparsityPlan.uniform(config, 0.9)
    plan.save(tmp_path / "plan.json")
    assert load_model(run_dir, plan=plan).model.sparsity_plan == plan
    assert say(run_dir, plan=tmp_path / "plan.json") == say(run_dir, plan=plan)
    assert say(run_dir, plan=plan).log_probabilities != say(run_dir).log_probabilities
    monkeypatch.setattr("qsparse_moe.inference.load.load_trained", None)
    other = SparsityPlan.uniform(config.model_copy(update={"num_layers": 3}), 0.5)
    with pytest.raises(ConfigError, match="sparsity plan: layer 2, .* has .* values, .*model needs 0"):
        load_model(run_dir, plan=other)
    other.save(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/other.json: sparsity plan: layer 2, .* has .* values"):
        load_model(run_dir, plan=tmp_path / "other.json")


def test_a_plan_without_effect_is_refused(folder):
    settings = {"sparsity": {"default": 0.5, "selection": "relu", "gradient": "masked", "backend": "torch"}}
    made = train(tiny_config(folder, "relu", engine="torch", steps=1, model=settings)).run_dir
    plan = SparsityPlan.uniform(load_run(made)[0].model, 0.5)
    with pytest.raises(ConfigError, match="plan: a plan has no effect on this model, .*selection is relu"):
        load_model(made, plan=plan)


def test_a_folder_without_a_model_is_named(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist; name a folder made by qsparse-moe train"):
        Generator.load(run_dir.parent / "nothing")
    with pytest.raises(CheckpointError, match="is not a run folder: it contains no config.yaml"):
        Generator.load(tmp_path)
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(run_dir / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="contains no complete checkpoint"):
        Generator.load(tmp_path)


@pytest.mark.parametrize("what", ["missing", "extra", "of another shape"])
def test_an_export_with_other_tensors_is_refused(run_dir, tmp_path, what):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    export_run(run_dir, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "layers.1.attention.output.weight"
    if what == "extra":
        tensors["layers.9.extra"] = torch.zeros(1)
    else:
        tensor = tensors.pop(name)
        if what == "of another shape":
            tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="layers.9.extra" if what == "extra" else name):
        Generator.load(tmp_path / "out")


def test_an_export_goes_with_its_tokenizer(folder, tmp_path):
    vocabulary = [
        "<end>",
        "<unk>",
        *sorted({word for file in (folder / "text").iterdir() for word in file.read_text().split()}),
    ]
    tokenizer = save_tokenizer(
        tmp_path / "words", vocabulary=vocabulary, unknown="<unk>", settings={"eos_token": "<end>"}
    )
    config = tiny_config(folder, "words", engine="torch", steps=1, model={"vocab_size": None})
    data = config.data.model_copy(update={"tokenizer": str(tokenizer)})
    made = train(config.model_copy(update={"data": data})).run_dir
    export_run(made, tmp_path / "out")
    text = vocabulary[5]
    expected = Generator.load(made).generate(text, max_tokens=4)[0]
    shutil.rmtree(tokenizer), shutil.move(made, tmp_path / "elsewhere")
    assert load_export(tmp_path / "out")[0].data.tokenizer == str(tmp_path / "out" / "tokenizer")
    assert Generator.load(tmp_path / "out").generate(text, max_tokens=4)[0] == expected
    assert (tmp_path / "out" / "tokenizer").stat().st_mode & 0o700 == 0o700


# Hundreds of steps are too many for Triton's interpreter.
@pytest.mark.parametrize("engine", [spec.name for spec in ENGINES if spec.name != "triton"])
@pytest.mark.parametrize("across", [False, True], ids=["inside documents", "across documents"])
def test_the_loss_token_by_token_is_that_of_whole_sequences(folder, across, engine):
    config = tiny_config(folder, f"evaluate-{across}-{engine}", engine="torch", steps=6, model={"num_layers": 2})
    data = config.data.model_copy(update={"attend_across_documents": across})
    made = train(config.model_copy(update={"data": data})).run_dir
    own = folder / "short.jsonl"
    own.write_text("".join(json.dumps({"text": "abc de" * n}) + "\n" for n in (1, 2, 5, 1, 3, 1)))
    for arguments in ({"num_sequences": 11}, {"files": [str(own)]}):
        whole = evaluate_run(made, device="cpu", **arguments)
        forward_of = partial(decoding_forward, engine=engine)
        found = evaluate_run(made, device="cpu", forward_of=forward_of, **arguments)
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-5)
        assert (found.rows, found.step, found.sparsity) == (whole.rows, whole.step, whole.sparsity)


def test_the_decoded_loss_is_computed_by_decoding(run_dir, monkeypatch):
    lengths = []
    from qsparse_moe.inference import cached_model

    forward = cached_model._forward
    monkeypatch.setattr(
        cached_model, "_forward", lambda *arguments: (lengths.append(arguments[1].shape[1]), forward(*arguments))[1]
    )
    evaluate_run(run_dir, num_sequences=4, device="cpu", forward_of=partial(decoding_forward, engine="torch"))
    assert set(lengths) == {1} and len(lengths) >= 24
    assert load_config(run_dir / "config.yaml").data.sequence_length == 24


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_ids_of_the_padding_of_the_vocabulary_are_never_generated(folder, temperature):
    config = tiny_config(folder, f"padded-{temperature}", engine="torch", steps=1, model={"vocab_size": 320})
    generator = Generator.load(train(config).run_dir, engine="torch", device="cpu")
    padding = torch.zeros(320)
    padding[257:] = 100.0
    generator.model.head.register_forward_hook(lambda module, inputs, logits: logits + padding)
    stream = generator.stream([[256]] * 20, max_tokens=20, sampling=Sampling(temperature=temperature))
    shown = [new.token_id for step in stream for new in step if new.token_id is not None]
    assert len(shown) > 100 and max(shown) < 257
    assert temperature == 0 or len(set(shown)) > 20
