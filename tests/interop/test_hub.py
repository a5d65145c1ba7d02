"""Models by their names on the hub: from the cache, downloaded, and refused. The hub's client is replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from qsparse_moe import train
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop import hub
from qsparse_moe.interop.byte_tokenizer import write_byte_tokenizer
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.initial_weights import open_weights
from qsparse_moe.runs.find import find_initial_weights, is_hub_name
from qsparse_moe.runs.folder import load_run_config, run_folder
from tests.interop.stored_models import save_qwen3_moe
from tests.support.runs import tiny_config, write_text

NAME = "no-such-owner/model"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folder of a model in the cache."""
    folder = tmp_path_factory.mktemp("cache") / "snapshot"
    save_qwen3_moe(folder, num_layers=1, num_experts=2, hidden=8, width=16)
    return folder


@pytest.fixture
def asked(cached, monkeypatch, tmp_path):
    """The calls of the hub's client, which finds the model."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def failing(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def response(status):
    """What an error of the client needs of a response; its versions have it from different libraries."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


def test_a_name_is_imported_and_no_pickle_is_downloaded(asked, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    assert import_model(NAME, tmp_path / "out", tokenizer="bytes").model_type == "qsparse_moe"
    (name, options) = asked[0]
    assert name == NAME and len(asked) == 1
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    files += ["generation_config.json", "chat_template.jinja", "tokenizer_config.json"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "original/model.safetensors"]
    others += ["model.pt", "README.md", "modeling_model.py", "onnx/model.onnx", "model.gguf"]
    assert list(filter_repo_objects([*files, *others], **options)) == files


def test_a_run_starts_from_a_name_and_keeps_it(asked, cached, tmp_path):
    assert find_initial_weights(NAME).kind == "hub" and asked == [], "the command asks nothing before training"
    weights = open_weights(NAME)
    assert (weights.kind, weights.path) == ("hugging_face", cached)
    write_text(tmp_path / "text")
    config = tiny_config(tmp_path, "started", steps=1, engine="torch", init_from=NAME)
    sparsity = config.model.sparsity.model_copy(update={"default": 0.5, "backend": "torch"})
    moe = weights.model.moe.model_copy(update={"backend": "loop"})
    model = weights.model.model_copy(update={"sparsity": sparsity, "moe": moe})
    config = config.model_copy(update={"model": model})
    write_byte_tokenizer(cached)
    run_dir = train(config).run_dir
    assert load_run_config(run_dir).training.init_from == NAME


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("403", response=response(403)),
            f"{NAME}: is a gated model on the Hugging Face hub, and its files need a token of an account that has "
            f"accepted its terms; accept them at https://huggingface.co/{NAME}, and log in with hf auth login, or set ",
        ),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            f"{NAME}: is neither a folder nor a public model on the Hugging Face hub, and must be one of them; correct "
            "the name, or, for a private model, log in with hf auth login",
        ),
        (
            errors.LocalEntryNotFoundError("no network"),
            f"{NAME}: is neither a folder nor a model in the local cache of the Hugging Face hub, and the hub cannot "
            f"be reached (no network, or HF_HUB_OFFLINE is set); correct the name, or use hf download {NAME} "
            "--local-dir FOLDER on a machine with a network, and name the folder",
        ),
        (
            OSError(28, "No space left on device"),
            f"{NAME}: cannot be downloaded from the Hugging Face hub (",
        ),
    ],
    ids=["gated", "unknown", "offline", "disk"],
)
def test_a_model_that_cannot_be_had_is_one_message(tmp_path, monkeypatch, error, message):
    monkeypatch.chdir(tmp_path)
    failing(monkeypatch, error)
    with pytest.raises(CheckpointError) as caught:
        import_model(NAME, tmp_path / "out")
    assert str(caught.value).startswith(message) and list(tmp_path.iterdir()) == []
    write_text(tmp_path / "text")
    config = tiny_config(tmp_path, "started", engine="torch", init_from=NAME)
    with pytest.raises(CheckpointError) as caught:
        train(config)
    assert str(caught.value).startswith(f"training.init_from ({NAME}): {message}")
    assert not run_folder(config).exists()


def test_a_mistyped_folder_is_not_asked_of_the_hub(asked, tmp_path):
    (tmp_path / "runs").mkdir()
    assert is_hub_name(NAME) and is_hub_name("mistralai/Mixtral-8x7B-v0.1")
    for name in ("runs/first", "rnus/first", "./a/b", "/no/model", "owner/name/more", "model", "~/a/b"):
        assert not is_hub_name(name), name
    with pytest.raises(CheckpointError, match="is no folder, and the folder of a Hugging Face model, or its name on"):
        import_model("rnus/first", tmp_path / "out")
    assert hub.local_folder("runs") == hub.Path("runs") and asked == []
