"""The text of a model card and the special tokens beside it, line by line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.config.schema import RunConfig, SourceConfig
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.companion_files import copy_generation_config, generation_settings, token_ids, write_json
from qsparse_moe.interop.model_card import _data, _losses, _public, _sizes, _sparsity, _training, model_card
from qsparse_moe.sparsity.plan import SparsityPlan


def source_of(folder, *, step=6, init_from=None):
    model = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 264}
    model |= {"moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 16, "num_dense_layers": 1}}
    training = {"global_batch_size": 8, "micro_batch_size": 2, "init_from": init_from}
    given = {"model": model, "data": {"sequence_length": 128}, "training": training}
    config = RunConfig.model_validate(given)
    plan = SparsityPlan.uniform(config.model, 0.0)
    return SimpleNamespace(
        config=config, plan=plan, step=step, folder=folder, max_length=99, dtype=lambda name, dtype: torch.bfloat16
    )


def write_metrics(folder, *rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_are_the_last_ones_up_to_the_step_of_the_weights(tmp_path):
    write_metrics(
        tmp_path,
        {"step": 2, "train/lm_loss": 5.0, "validation/loss": 4.0, "validation/perplexity": 54.59815},
        {"step": 4, "train/lm_loss": 3.0, "validation/loss": None, "more": 1.0},
        {"step": 6, "train/lm_loss": 2.5},
        {"step": 8, "train/lm_loss": 1.0, "validation/bits_per_byte": 1.0},
    )
    assert _losses(source_of(tmp_path)) == [
        ("`train/lm_loss`", "2.5000"),
        ("`validation/loss`", "4.0000"),
        ("`validation/perplexity`", "54.5981"),
    ]
    assert _losses(source_of(tmp_path, step=8))[-1] == ("`validation/bits_per_byte`", "1.0000")


def test_training_has_the_tokens_of_all_steps_and_imported_weights_have_none(tmp_path):
    lines = _training(source_of(tmp_path, step=1500, init_from="/home/somebody/runs/first")).splitlines()
    assert lines[2:] == [
        "| Data | the standard library of Python |",
        "| Steps | 1,500 |",
        f"| Tokens | {1500 * 8 * 128:,} |",
        "| Started from | first |",
    ]
    assert _training(source_of(tmp_path, step=0)) == "The weights were imported and not trained by qsparse_moe."


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("org/name", "org/name"),
        ("/a/b.txt", "b.txt"),
        ("./a/b", "b"),
        ("../b", "b"),
        ("~/x/b", "b"),
        ("b*.txt", "b*.txt"),
    ],
)
def test_paths_of_one_machine_are_cut_to_their_last_part(path, shown):
    assert _public(path) == shown


def test_data_has_its_kind_its_names_and_its_weight():
    def shown(**settings):
        return _data(SourceConfig.model_validate(settings))

    assert shown(kind="stdlib") == "the standard library of Python"
    assert shown(kind="hub", path="org/name", weight=0.5) == "data set org/name (weight 0.5)"
    assert shown(kind="jsonl", path=["/a/b.jsonl", "/c/d.jsonl"]) == "jsonl b.jsonl, d.jsonl"


def test_s_is_a_range_where_layers_or_experts_differ(tmp_path):
    source = source_of(tmp_path)
    values = source.plan.values | {(1, "expert_hidden"): (0.25, 0.5, 0.5, 0.75), (2, "attention_input"): (0.5,)}
    for layer in range(3):
        values[layer, "attention_output"] = (0.125,)
    source.plan = SparsityPlan(values)
    rows = dict(line.strip("| ").split(" | ") for line in _sparsity(source).splitlines()[4:])
    assert rows["`expert_hidden`"] == "0 to 0.75" and rows["`attention_input`"] == "0 to 0.5"
    assert rows["`attention_output`"] == "0.125" and rows["`expert_input`"] == "0"


def test_sizes_name_the_needed_parameters_only_where_some_are_not(tmp_path):
    source = source_of(tmp_path)
    rows = dict(_sizes(source, "stored"))
    assert "Needed after Q-Sparse" not in rows
    assert rows["Layers"] == "3, of which 2 have experts" and rows["Experts per layer"] == "4, 2 per token"
    assert (rows["Width"], rows["Width of an expert"], rows["Positions"]) == ("32", "16", "99")
    assert rows["Type of the weights"] == "bfloat16"
    attention, expert, router = 4 * 32 * 32, 3 * 32 * 16, 4 * 32
    dense = int(rows["Parameters"].replace(",", "")) - int(rows["Active parameters per token"].replace(",", ""))
    # Two of four experts in two layers are not used by a token.
    assert dense == 2 * 2 * expert and attention > router
    source.plan = SparsityPlan.uniform(source.config.model, 0.5)
    needed = int(dict(_sizes(source, "stored"))["Needed after Q-Sparse"].replace(",", ""))
    assert needed < int(rows["Active parameters per token"].replace(",", ""))


def test_a_card_names_its_format_and_the_command_that_made_it(tmp_path):
    own = model_card(
        source_of(tmp_path), "stored", model_type="qsparse_moe", name="mine", command="qsparse-moe export x"
    )
    assert own.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixture-of-experts\n"
    )
    assert "\n# mine\n" in own and own.endswith("## Export\n\n```bash\nqsparse-moe export x\n```\n")
    assert "`qsparse-moe generate FOLDER`" in own
    family = model_card(source_of(tmp_path), "stored", model_type="mixtral", name="mine", command=None)
    assert "- mixtral\n---" in family and "of the model type `mixtral`" in family and "## Export" not in family


def test_special_tokens_are_those_that_have_a_value_and_0_is_one(tmp_path):
    assert token_ids({"bos_token_id": 0, "eos_token_id": None, "pad_token_id": [3], "top_k": 5}) == {
        "bos_token_id": 0,
        "pad_token_id": [3],
    }
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}')
    assert generation_settings(source_of(tmp_path), SimpleNamespace()) == {"top_k": 5}


def test_a_generation_config_is_copied_or_made_of_the_special_tokens(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    (there / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": null, "hidden_size": 3}')
    copy_generation_config(there, here)
    assert json.loads((here / "generation_config.json").read_text()) == {"bos_token_id": 0}
    (here / "generation_config.json").unlink()
    (there / "config.json").write_text('{"hidden_size": 3}')
    copy_generation_config(there, here)
    assert not (here / "generation_config.json").exists()
    (there / "generation_config.json").write_text('{ "top_k":  5}')
    copy_generation_config(there, here)
    assert (here / "generation_config.json").read_text() == '{ "top_k":  5}', "byte by byte"
    for text, reason in (("{", "cannot be read"), ("[1]", "is no object of JSON, and must be one")):
        (there / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            copy_generation_config(there, here)
    write_json(here / "x.json", {"a": "é"})
    assert (here / "x.json").read_text("utf-8") == '{\n  "a": "é"\n}\n'
