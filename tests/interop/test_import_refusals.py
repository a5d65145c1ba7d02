"""What a Hugging Face folder may not have is named, with the file, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch

from qsparse_moe import train
from qsparse_moe.cli.app import run
from qsparse_moe.errors import BackendUnavailable, CheckpointError
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.named_tensors import num_not_finite
from tests.interop.hugging_face_models import NUM_WORDS, build, change_settings, change_tensors, save
from tests.interop.refused_settings import REFUSED
from tests.support.runs import tiny_config, write_text

pytest.importorskip("transformers")

QUERY = "model.layers.0.self_attn.q_proj.weight"
NEW = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder per family, and one in several files."""
    root = tmp_path_factory.mktemp("saved")
    model = build("mixtral")
    save(model, root / "mixtral")
    save(model, root / "sharded", max_shard_size="20KB")
    for name in ("qwen3_moe", "olmoe", "qwen2_moe", "llama", "mistral", "qwen2", "qwen3"):
        save(build(name), root / name)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    return lambda name="mixtral": shutil.copytree(saved / name, tmp_path / name)


def refused(folder):
    """The message; nothing was written."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        import_model(folder, folder.parent / "out")
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(("family", "settings", "message"), REFUSED)
def test_a_setting_that_is_not_supported_is_named_with_its_value(copy, family, settings, message):
    folder = copy(family)
    change_settings(folder, **settings)
    assert refused(folder).startswith(f"{folder / 'config.json'}: ")
    assert message in refused(folder)


def test_a_config_that_is_no_object_is_named(copy):
    folder = copy()
    (folder / "config.json").write_text("[1]")
    assert refused(folder) == f"{folder}/config.json: is [1], and must be an object of JSON; download it again"
    (folder / "config.json").write_text("{")
    assert refused(folder).startswith(f"{folder}/config.json: cannot be read (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"lacks the tensor {QUERY}, which the model"),
        (lambda tensors: tensors.update({NEW: torch.zeros(60)}), f"contains the tensor {NEW}, which the model of"),
        (
            lambda tensors: tensors.update({QUERY: torch.zeros(60, 43)}),
            f"{QUERY} has the shape (60, 43) in the file and (60, 44) by",
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(80, 44)}),
            "model.embed_tokens.weight has the shape (80, 44) in the file and (83, 44) by",
        ),
        (
            lambda tensors: tensors.update({QUERY: torch.zeros(60, 44, dtype=torch.int8)}),
            f"{QUERY} has the dtype I8, which must be one of F32, BF16, F16, F64; name weights that were not quantized",
        ),
        (
            lambda tensors: tensors[QUERY].view(-1)[:2].fill_(float("nan")),
            f"2 of 2640 values of {QUERY} are not finite, and all must be; download the file again",
        ),
    ],
    ids=["missing", "extra", "shape", "vocabulary", "dtype", "nan"],
)
def test_a_tensor_that_does_not_fit_is_named(copy, change, message):
    folder = copy()
    change_tensors(folder, change)
    assert message in refused(folder)


def test_values_that_are_not_finite_are_counted_and_large_ones_are_not():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
        assert num_not_finite(largest) == 0, "their sum overflows in some types"
        largest[1, 2], largest[3, 0], largest[0, 4] = float("nan"), float("inf"), -float("inf")
        assert num_not_finite(largest) == 3


def test_all_layers_of_another_number_are_missing_or_extra(copy):
    folder = copy()
    change_settings(folder, num_hidden_layers=4)
    assert re.search(r"lacks the tensor model\.layers\.3\.\S+ \(and 21 more\)", refused(folder))
    change_settings(folder, num_hidden_layers=2)
    assert re.search(r"contains the tensor model\.layers\.2\.\S+ \(and 21 more\)", refused(folder))


def test_a_truncated_shard_and_a_missing_one_are_named(copy):
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    found = refused(folder)
    assert re.match(rf"{shard}: cannot be read \(.*\), and every file of the model is needed; download it", found)
    shard.unlink()
    index = folder / "model.safetensors.index.json"
    assert refused(folder) == (
        f"{index}: names the file {shard.name}, which does not exist in the folder, and every file of the model is "
        "needed; download it again"
    )
    index.write_text("{}")
    assert refused(folder).startswith(f"{index}: cannot be read ('weight_map')")
    # A file outside of the folder is not read, even if it exists.
    (folder.parent / "outside").touch()
    index.write_text(json.dumps({"weight_map": {QUERY: "../outside"}}))
    assert f"{index}: names the file ../outside, which does not exist in the folder" in refused(folder)


def test_a_tensor_in_two_files_is_refused(copy):
    folder = copy("sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copy(folder / index[QUERY], folder / "model-twice.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index | {"twice": "model-twice.safetensors"}})
    )
    found = refused(folder)
    assert re.search(r"model-twice\.safetensors: contains \S+, which is in \S+ too, and a tensor must be", found)


def test_pickles_are_never_read(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder}: has its weights in pytorch_model.bin, which is a pickle and can run any program when it is read; "
        "only safetensors files are read. Download the model's safetensors files, or, if you trust its author, convert "
        "it with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )
    (folder / "pytorch_model.bin").unlink()
    assert "contains neither model.safetensors nor model.safetensors.index.json" in refused(folder)


def test_a_missing_or_too_large_tokenizer_is_refused(copy):
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["large"] = 83
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "cannot be used: model.vocab_size (83) must be at least the tokenizer's (84)" in refused(folder)
    (folder / "tokenizer.json").unlink()
    found = refused(folder)
    assert f"{folder} contains no tokenizer.json, and the tokenizer of the weights must be known; copy" in found
    assert found.endswith("Name another one with --tokenizer (tokenizer=... in Python)")
    config = tiny_config(write_text(folder.parent / "text").parent, "started", engine="torch", init_from=str(folder))
    with pytest.raises(CheckpointError, match=r"training\.init_from .* compared: .*contains no tokenizer\.json"):
        train(config)


def test_init_from_names_the_setting_in_front_of_the_file(copy):
    folder = copy()
    change_settings(folder, attention_bias=True)
    config = tiny_config(write_text(folder.parent / "text").parent, "started", engine="torch", init_from=str(folder))
    with pytest.raises(CheckpointError, match=rf"init_from \({folder}\): {folder}/config\.json: attention_bias"):
        train(config)
    assert not run_folder(config).exists()


def test_a_folder_that_is_no_hugging_face_model_is_refused(copy, tmp_path):
    done = copy()
    import_model(done, tmp_path / "done")
    assert "so it is a run or an export of this package and needs no import" in refused(tmp_path / "done")
    (tmp_path / "thesis").mkdir()
    assert "thesis: contains no config.json, and the folder of a Hugging Face model, or its name" in refused(
        tmp_path / "thesis"
    )
    assert (
        "name: is no folder, and the folder of a Hugging Face model, or its name on the hub (OWNER/NAME), is"
        in refused(tmp_path / "name")
    )


def test_nothing_but_an_earlier_export_is_replaced(copy, tmp_path):
    folder = copy()
    import_model(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists, and an export does not overwrite it"):
        import_model(folder, tmp_path / "out")
    assert import_model(folder, tmp_path / "out", force=True, dtype="bf16").files == 1


def test_a_missing_library_is_named(copy, tmp_path, monkeypatch):
    folder = copy()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BackendUnavailable, match=r'need safetensors, .* pip install "qsparse-moe\[hf\]"'):
        import_model(folder, tmp_path / "out")
    with pytest.raises(BackendUnavailable, match="Hugging Face models need safetensors"):
        HuggingFaceWeights(folder)


def test_the_verb_imports_and_the_other_verbs_read_the_result(copy, tmp_path, capsys):
    folder, out = copy("qwen3_moe"), tmp_path / "out"
    assert run(["import", str(folder), "--output", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["source"], made["folder"], made["step"], made["files"]) == (str(folder), str(out), 0, 1)
    assert made["bytes"] < (out / "model.safetensors").stat().st_size < made["bytes"] + 10_000
    assert run(["import", str(folder), "--output", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: exists, and an export does not overwrite it")
    assert run(["import", str(folder), "--output", str(out), "--force", "--dtype", "bf16"]) == 0
    assert f"{made['bytes'] // 2:,} bytes" in capsys.readouterr().out
    greedy = ["--prompt", "word1 word2", "--max-tokens", "4", "--temperature", "0", "--engine", "torch"]
    assert run(["generate", str(out), *greedy]) == 0
    assert "word" in capsys.readouterr().out
    assert run(["generate", str(folder), *greedy]) == 2
    assert f"qsparse-moe import {folder} --output FOLDER" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("word3 word40 word5 word7 " * 30)
    assert run(["import", str(folder), "--output", str(out), "--force"]) == 0
    capsys.readouterr()
    assert run(["evaluate", str(out), "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    # The document token, and then the words, whose ids are their numbers plus 2.
    ids = torch.tensor([1, *[5, 42, 7, 9] * 30])[None]
    with torch.no_grad():
        logits = build("qwen3_moe")(ids).logits[0, :-1, :NUM_WORDS]
    assert evaluation["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item(), rel=1e-5)
    assert (evaluation["sparsity"], evaluation["step"]) == (0, 0)
