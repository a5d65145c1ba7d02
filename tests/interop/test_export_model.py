"""Exports of trained runs: the format that fits, its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsparse_moe import train
from qsparse_moe.cli.app import run
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.export_model import export_model
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.state_dict import load_export
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.evaluate import load_run
from tests.data.test_tokenizer import save_tokenizer
from tests.interop.trained_sources import without_tensorboard
from tests.support.runs import tiny_config, write_text

transformers = pytest.importorskip("transformers")

MOE = {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "activation": "swiglu"}
MIXTRAL = {"moe": MOE, "qk_norm": False, "sparsity": {"default": 0.0, "backend": "torch"}}
TEXT = "The router, naïvely: 3 € \n<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("export") / "text").parent


def trained(folder, name, model, **settings):
    config = without_tensorboard(tiny_config(folder, name, engine="torch", model=model, steps=3, **settings))
    return train(config, [Recorder(config)]).run_dir


@pytest.fixture(scope="module")
def run_dir(folder):
    return trained(folder, "mixtral", MIXTRAL, checkpoint_interval=2)


@pytest.fixture(scope="module")
def exported(run_dir):
    export_model(run_dir, run_dir.parent / "exported", command="qsparse-moe export runs/mixtral --output exported")
    return run_dir.parent / "exported"


def test_a_run_of_a_family_is_opened_by_transformers(run_dir, exported):
    opened = transformers.AutoModelForCausalLM.from_pretrained(exported, experts_implementation="eager")
    assert type(opened).__name__ == "MixtralForCausalLM"
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    _, ours, _ = load_run(run_dir)
    with torch.no_grad():
        want, found = ours(ids).logits_BSV, opened(ids).logits
    assert ((found - want).abs().max() / want.abs().max()).item() <= 2e-6
    # The document token begins and ends a text, and the longest text is that of the training.
    settings = opened.generation_config
    assert (
        (settings.bos_token_id, settings.eos_token_id)
        == (256, 256)
        == (
            opened.config.bos_token_id,
            opened.config.eos_token_id,
        )
    )
    assert opened.config.max_position_embeddings == load_run(run_dir)[0].data.sequence_length
    produced = opened.generate(torch.tensor([[256, 72]]), max_new_tokens=3, do_sample=False)
    assert produced.shape[1] > 2


def test_bytes_are_the_ids_of_its_tokenizer(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer(TEXT.removesuffix("<|endoftext|>")).input_ids == [256, *TEXT[:-13].encode()]
    assert tokenizer(TEXT).input_ids[-1] == 256, "the document token has a spelling there"
    assert tokenizer.decode(list(TEXT[:-13].encode())) == TEXT[:-13]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 256, 257)


def test_an_export_of_a_run_comes_back_with_its_steps(run_dir, exported, tmp_path):
    import_model(exported, tmp_path / "imported")
    config, model, step = load_export(tmp_path / "imported")
    state = load_run(run_dir)[1].state_dict()
    assert step == 3 and all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert config.model.moe.router == "softmax_topk_renormalized"
    export_model(tmp_path / "imported", tmp_path / "again")
    want, found = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        for folder in (exported, tmp_path / "again")
    )
    assert found == want and {"model.safetensors", "config.json", "tokenizer.json"} < want.keys()


def test_the_card_has_the_figures_of_the_run(run_dir, exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n")
    last = read_metrics(run_dir / "metrics.jsonl")[-1]
    state = load_run(run_dir)[1]
    total = sum(parameter.numel() for parameter in state.parameters())
    # Two of four experts are idle: 3 matrices of 40 x 24 in each of 2 layers.
    active = total - 2 * 2 * 3 * 40 * 24
    for line in (
        "# exported",
        f"| Parameters | {total:,} |",
        f"| Active parameters per token | {active:,} |",
        "| Experts per layer | 4, 2 per token |",
        "| Type of the weights | float32 |",
        "| `expert_hidden` | 0 |",
        "| Steps | 3 |",
        f"| `train/lm_loss` | {last['train/lm_loss']:.4f} |",
        f"| `validation/loss` | {last['validation/loss']:.4f} |",
        "qsparse-moe export runs/mixtral --output exported",
    ):
        assert line in card.splitlines(), line
    assert "| Data | text" in card and str(run_dir.parent) not in card, "paths of this machine are not published"


def test_one_checkpoint_can_be_exported(run_dir, tmp_path):
    earlier = run_dir / "checkpoints" / "step-00000002"
    done = export_model(earlier, tmp_path / "out", dtype="bf16")
    assert (done.step, done.model_type) == (2, "mixtral")
    want = load_run(run_dir, checkpoint_folder=earlier)[1].embedding.weight.bfloat16()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["model.embed_tokens.weight"].equal(want)


def test_a_sparse_run_has_the_native_format_and_its_plan_in_the_card(folder, tmp_path):
    sparsity = {"sites": {"expert_hidden": 0.5}, "backend": "torch", "overrides": [{"sparsity": 0.25, "layers": 1}]}
    run_dir = trained(folder, "sparse", MIXTRAL | {"sparsity": sparsity})
    assert export_model(run_dir, tmp_path / "out").model_type == "qsparse_moe"
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert "| `expert_hidden` | 0.25 to 0.5 |" in card and "| `expert_input` | 0 to 0.25 |" in card
    with pytest.raises(CheckpointError) as caught:
        export_model(run_dir, tmp_path / "other", format="hugging-face")
    message = str(caught.value)
    assert message.startswith(f"{run_dir}: cannot be written in the format of a Hugging Face family (deepseek_v2, ")
    assert "The nearest is mixtral, and it does not have S at attention_input (0.25), which must be 0; " in message
    assert "S at expert_hidden (0.5), which must be 0" in message and "model." not in message
    assert message.endswith("Export it with --format native, or train a model with the settings of the family")
    assert not (tmp_path / "other").exists()
    # An export is a source too, and so is a bf16 one of it.
    export_model(tmp_path / "out", tmp_path / "half", dtype="bf16")
    first, half = (load_export(tmp_path / name) for name in ("out", "half"))
    assert first[0].model == half[0].model and first[1].sparsity_plan == half[1].sparsity_plan and half[2] == 3
    assert half[1].embedding.weight.equal(first[1].embedding.weight.bfloat16())


def test_the_dense_beginning_of_a_sparse_run_is_still_dense(folder, tmp_path):
    schedule = {"shape": "linear", "warmup_steps": 1, "ramp_steps": 2}
    sparsity = {"default": 0.5, "backend": "torch", "schedule": schedule}
    run_dir = trained(folder, "warm-up", MIXTRAL | {"sparsity": sparsity}, checkpoint_interval=1, keep_last=3)
    found = [export_model(path, tmp_path / path.name).model_type for path in list_checkpoints(run_dir)]
    # The second step is the first of the ramp, where S is still 0.
    assert found == ["mixtral", "mixtral", "qsparse_moe"]


def test_a_tokenizer_with_files_goes_along(folder, tmp_path):
    words = ["<unk>", "</s>", *(f"word{number}" for number in range(40))]
    save_tokenizer(tmp_path / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    (tmp_path / "words" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = without_tensorboard(tiny_config(folder, "words", engine="torch", model=MIXTRAL, steps=1))
    data = config.data.model_copy(update={"tokenizer": str(tmp_path / "words")})
    model = config.model.model_copy(update={"vocab_size": None})
    run_dir = train(config.model_copy(update={"data": data, "model": model})).run_dir
    export_model(run_dir, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("word3 word39").input_ids == [5, 41]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "word7"}], tokenize=False) == "word7"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["vocab_size"]) == (1, 48)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            {"moe": MOE | {"activation": "drelu", "router": "sigmoid_topk"}},
            'model.moe.activation ("drelu"), which is "swiglu" in mixtral; '
            'model.moe.router ("sigmoid_topk"), which is "softmax_topk_renormalized" in mixtral. ',
        ),
        (
            {"moe": MOE | {"bias_update_rate": 0.1, "num_shared_experts": 1}},
            'model.moe.bias_update_rate ("above 0"), which is 0.0 in mixtral; '
            "model.moe.shared_expert_hidden_size (24), which is 0 in mixtral. ",
        ),
        (
            {"sparsity": {"quantization": {"weights": "ternary", "activations": "int8"}}},
            "the number format at dense_hidden (model.sparsity.quantization: int8), which must be none; "
            "model.sparsity.quantization.weights (ternary), which must be none",
        ),
        (
            {"moe": MOE | {"num_dense_layers": 1, "router_scaling_factor": 2.5}},
            "model.moe.router_scaling_factor (2.5), which is 1.0 in",
        ),
    ],
    ids=["functions", "tensors", "quantized", "scaled"],
)
def test_every_setting_that_no_family_has_is_named(folder, change, reasons):
    from qsparse_moe.interop.families.expressible import find_expressing, nearest_family
    from qsparse_moe.sparsity.plan import SparsityPlan

    model = tiny_config(folder, "x", model=MIXTRAL | {"moe": MOE | {"num_dense_layers": 1}} | change).model
    plan = SparsityPlan.from_config(model)
    assert find_expressing(model, plan) is None
    assert reasons in "; ".join(nearest_family(model, plan)[1]) + ". "


def test_settings_of_the_training_prevent_nothing(folder):
    from qsparse_moe.interop.families.expressible import find_expressing
    from qsparse_moe.sparsity.plan import SparsityPlan

    training = {"router_noise": 0.1, "router_jitter": 0.1, "capacity_factor": 1.0, "router_z_coefficient": 0.3}
    training |= {"load_balance_coefficient": 0.2, "load_balance_scope": "micro_batch", "backend": "grouped"}
    for change, family in (
        (training | {"router": "topk_softmax"}, "mixtral"),
        ({"router_input": "sparse", "groups_per_token": 1, "group_score": "max"}, "mixtral"),
        ({"router": "softmax_topk"}, None),
    ):
        model = tiny_config(folder, "x", model=MIXTRAL | {"moe": MOE | change}).model
        assert find_expressing(model, SparsityPlan.from_config(model)) == family, change
    model = tiny_config(folder, "x", model=MIXTRAL | {"moe": MOE | {"router": "topk_softmax"}, "qk_norm": True}).model
    assert find_expressing(model, SparsityPlan.from_config(model)) == "qwen3_moe"


def test_only_an_earlier_export_is_replaced(exported, run_dir, tmp_path):
    theirs = tmp_path / "theirs"
    import_model(exported, tmp_path / "imported")
    transformers.AutoModelForCausalLM.from_pretrained(exported).save_pretrained(theirs)
    with pytest.raises(CheckpointError, match="is not an earlier export, so --force does not replace it"):
        export_model(run_dir, theirs, force=True)
    export_model(run_dir, tmp_path / "out")
    export_model(run_dir, tmp_path / "out", force=True, format="native")
    export_model(run_dir, tmp_path / "out", force=True, format="hugging-face")
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_verb_chooses_the_format(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["export", str(run_dir), "--output", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["format"], made["model_type"]) == ("hugging-face", "mixtral")
    assert (made["step"], made["folder"]) == (3, str(out))
    assert f"qsparse-moe export {run_dir} --output {out} --format auto" in (out / "README.md").read_text()
    assert run(["export", str(run_dir), str(out), "--force", "--format", "state-dict"]) == 0
    assert "model type qsparse_moe" in capsys.readouterr().out and (out / "config.yaml").is_file()
    assert run(["export", str(run_dir)]) == 2
    assert "error: the folder to create must be given once; name it with --output FOLDER" in capsys.readouterr().err
    assert run(["export", str(run_dir), str(out), "--output", str(out)]) == 2
    assert run(["export", str(Path(tmp_path) / "nothing"), "--output", str(out)]) == 2
    assert "nothing does not exist" in capsys.readouterr().err
