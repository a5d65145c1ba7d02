"""Initial weights that do not fit the run, or cannot be read, are refused before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsparse_moe import train
from qsparse_moe.config.load import load_config
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.families.registry import FAMILIES
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training import loop
from qsparse_moe.training.checkpoint.store import list_checkpoints
from tests.data.test_tokenizer import save_tokenizer
from tests.interop.trained_sources import DENSE, MOE, make
from tests.training.checkpoint.small_checkpoints import flip_a_byte


def refused(config, tmp_path, error=ConfigError):
    """Return the message of a refusal; nothing was written, and no data was read."""
    data = config.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(error) as caught:
        train(config.model_copy(update={"data": data}))
    assert not run_folder(config).exists() and not (tmp_path / "cache").exists()
    return str(caught.value)


@pytest.mark.parametrize("source", ["run", "export"])
def test_other_shapes_are_refused_with_the_settings_that_differ(folder, sources, tmp_path, source):
    model = DENSE | {"moe": MOE | {"expert_hidden_size": 32}}
    assert refused(make(folder, tmp_path / "runs", sources[source], model=model), tmp_path) == (
        f"training.init_from ({sources[source]}): layers.0.moe.experts.w_down has the shape (4, 24, 40) in the weights "
        "and (4, 32, 40) in the model (and 5 more tensors differ); they must be equal. Set the model's shapes as in "
        f"{sources[source] / 'config.yaml'}, or name other weights. Settings that differ: "
        "model.moe.expert_hidden_size (24 there, 32 here)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_embeddings": True}, "head.weight has the shape (257, 40) in the weights and none (no such tensor)"),
        (
            {"num_layers": 3},
            "layers.2.attention.key_norm.weight has the shape none (no such tensor) in the weights and (10,)",
        ),
        (
            {"moe": MOE | {"bias_update_rate": 0.0}},
            "layers.0.moe.router.expert_bias has the shape (4,) in the weights and none (no such tensor)",
        ),
    ],
    ids=["extra", "missing", "biases"],
)
def test_missing_and_extra_tensors_are_refused(folder, sources, tmp_path, change, message):
    found = refused(make(folder, tmp_path / "runs", sources["run"], model=DENSE | change), tmp_path)
    assert message in found and "Settings that differ: model." in found


def test_heads_of_another_size_are_refused_although_the_shapes_are_equal(folder, sources, tmp_path):
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_size": 20, "qk_norm": False}
    model = DENSE | heads | {"num_heads": 4, "num_kv_heads": 4, "head_size": 10}
    source = make(folder, tmp_path / "source", sources["run"], model=DENSE | heads, init_from=None, steps=1)
    run_dir = train(source).run_dir
    assert refused(make(folder, tmp_path / "runs", run_dir, model=model), tmp_path) == (
        f"model.num_heads (4) must be that of the weights of training.init_from ({run_dir}), 2, whose matrices have "
        "the same shapes and another meaning; set model.num_heads=2"
    )


def test_another_vocabulary_is_refused(folder, sources, tmp_path):
    config = make(folder, tmp_path / "runs", sources["export"])
    model = config.model.model_copy(update={"vocab_size": None})
    assert refused(config.model_copy(update={"model": model}), tmp_path) == (
        f"model.vocab_size (264) must be that of the weights of training.init_from ({sources['export']}), 257; set "
        "model.vocab_size=257"
    )


def test_another_tokenizer_is_refused(folder, sources, tmp_path):
    words = ["<unk>", "</s>", *(f"word{number}" for number in range(9))]
    save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    config = make(folder, tmp_path / "runs", sources["run"])
    other = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tmp_path / "words")})})
    assert refused(other, tmp_path) == (
        f"data.tokenizer ({tmp_path / 'words'}) must be the tokenizer of the weights of training.init_from "
        f"({sources['run']}), and it encodes text differently; set data.tokenizer=bytes"
    )
    own = other.training.model_copy(update={"init_from": None, "name": "words", "steps": 1})
    run_dir = train(other.model_copy(update={"training": own})).run_dir
    shutil.rmtree(tmp_path / "words")
    found = refused(make(folder, tmp_path / "runs", run_dir), tmp_path)
    assert found.endswith(f"and it encodes text differently; set data.tokenizer={run_dir / 'tokenizer'}")
    copied = config.data.model_copy(update={"tokenizer": str(run_dir / "tokenizer")})
    started = config.model_copy(
        update={"data": copied, "training": config.training.model_copy(update={"init_from": str(run_dir), "steps": 1})}
    )
    assert train(started).step == 1
    shutil.rmtree(run_dir / "tokenizer")
    found = refused(make(folder, tmp_path / "other", run_dir), tmp_path, CheckpointError)
    assert found.startswith(
        f"training.init_from ({run_dir}): the tokenizer of the weights cannot be compared: data.tokenizer "
        f"({tmp_path / 'words'}): "
    )


def test_a_folder_that_holds_no_weights_is_refused(folder, sources, tmp_path):
    def message(source):
        return refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)

    assert message(tmp_path / "nothing").startswith(
        f"training.init_from ({tmp_path}/nothing): {tmp_path}/nothing does not"
    )
    (tmp_path / "thesis").mkdir()
    assert "thesis is not a run folder: it contains no config.yaml" in message(tmp_path / "thesis")
    assert message("no-such-owner/model").endswith(
        "no-such-owner/model: is neither a folder nor a model in the local cache of the Hugging Face hub, and the hub "
        "cannot be reached (no network, or HF_HUB_OFFLINE is set); correct the name, or use hf download "
        "no-such-owner/model --local-dir FOLDER on a machine with a network, and name the folder"
    )
    (tmp_path / "thesis" / "config.json").write_text("{}")
    assert message(tmp_path / "thesis") == (
        f'training.init_from ({tmp_path}/thesis): {tmp_path}/thesis/config.json: model_type ("") is not a family that '
        f"can be read; name a model of one of these: {', '.join(FAMILIES)}"
    )
    with pytest.raises(CheckpointError, match=r"is a Hugging Face model, and training\.loop\.train alone reads runs"):
        loop.train(make(folder, tmp_path / "runs", tmp_path / "thesis"))
    with pytest.raises(CheckpointError, match=r"thesis contains config\.json .* qsparse-moe import .*thesis --output"):
        find_model(tmp_path / "thesis")
    (tmp_path / "empty").mkdir()
    shutil.copy(sources["run"] / "config.yaml", tmp_path / "empty")
    assert "checkpoints: contains no complete checkpoint" in message(tmp_path / "empty")
    with pytest.raises(
        CheckpointError, match=r"is an export, and training\.loop\.train alone reads runs and checkpoints"
    ):
        loop.train(make(folder, tmp_path / "runs", sources["export"]))


def test_a_damaged_checkpoint_is_refused(folder, sources, tmp_path):
    source = shutil.copytree(sources["run"], tmp_path / "source")
    checkpoint = list_checkpoints(source)[-1]
    flip_a_byte(checkpoint / "rank-00000-of-00001.safetensors")
    found = refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)
    file = checkpoint / "rank-00000-of-00001.safetensors"
    assert found.startswith(
        f"training.init_from ({source}): {file} does not have the checksum that it was written with"
    )
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} has " in refused(make(folder, tmp_path / "runs", source), tmp_path, CheckpointError)
    file.unlink()
    assert f"{file} is missing" in refused(make(folder, tmp_path / "runs", checkpoint), tmp_path, CheckpointError)


def test_a_damaged_export_is_refused(folder, sources, tmp_path):
    export = shutil.copytree(sources["parts"], tmp_path / "export")
    part = sorted(export.glob("*.safetensors"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:-8])

    def message():
        return refused(make(folder, tmp_path / "runs", export), tmp_path, CheckpointError)

    assert message().startswith(f"training.init_from ({export}): {part}: cannot be read (")
    part.unlink()
    assert message().startswith(f"training.init_from ({export}): {part}: cannot be read (")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value.index_fill(0, torch.tensor(3), torch.nan), "40 of 10280 values of {name} are not finite"),
        (lambda value: value.to(torch.int8), "{name} has the dtype torch.int8, which must be fp32, bf16, or fp16"),
    ],
    ids=["NaN", "int8"],
)
def test_weights_that_cannot_be_trained_on_are_refused(folder, sources, tmp_path, spoil, message):
    export, name = shutil.copytree(sources["export"], tmp_path / "export"), "head.weight"
    file = export / "model.safetensors"
    weights = load_file(file)
    metadata = {"format": "pt", "qsparse_moe": "qsparse_moe.state-dict/1", "step": "6"}
    save_file(weights | {name: spoil(weights[name])}, file, metadata=metadata)
    config = make(folder, tmp_path / "runs", export)
    with pytest.raises(CheckpointError) as caught:
        train(config)
    assert str(caught.value).startswith(f"training.init_from ({export}): {export}: {message.format(name=name)}")
    assert not run_folder(config).exists()


def test_the_command_refuses_before_torch_is_imported(sources, tmp_path, capsys):
    from qsparse_moe.cli.app import run

    config = Path(load_config.__code__.co_filename).parents[2] / "configs" / "tiny.yaml"
    arguments = ["train", str(config), f"training.output_dir={tmp_path}", f"training.init_from={tmp_path / 'nothing'}"]
    assert run(arguments) == 2
    assert f"error: training.init_from ({tmp_path}/nothing): " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
