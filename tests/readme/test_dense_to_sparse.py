"""The commands of docs/dense-to-sparse.md, one after the other, with a small model and what each of them must find."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.interop.state_dict import load_export
from tests.readme.blocks import REPOSITORY
from tests.readme.small_program import SMALL_RUN

PAGE = (REPOSITORY / "docs" / "dense-to-sparse.md").read_text(encoding="utf-8")
PROMPT = "def __init__(self"
SMALL = {
    "calibrate": ["--rows", "16"],
    "allocate": ["--rows", "16", "--rounds", "1", "--random", "1"],
    "generate": ["--engine", "native"],
}

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")


def commands() -> list[list[str]]:
    found = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in found for line in block.replace("\\\n", "").splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every command printed as JSON, by its verb and arguments; the working directory is where they ran."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    steps = {"dense": "60", "sparse": "40"}
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, verb, *arguments in commands():
            assert program == "qsparse-moe"
            if verb == "train":
                (name,) = (word.partition("=")[2] for word in arguments if word.startswith("training.name="))
                small = [
                    word for word in SMALL_RUN if not word.startswith(("data.sources", "training.evaluation_rows"))
                ]
                more = [*small, f"training.steps={steps[name]}", "training.engine=torch"]
                more += ["model.sparsity.schedule.ramp_steps=20"] if name == "sparse" else []
            else:
                more = SMALL.get(verb, [])
            printed = folder / "printed.json"
            with (
                printed.open("w") as stream,
                (folder / f"{verb}.txt").open("w") as messages,
                pytest.MonkeyPatch.context() as redirect,
            ):
                redirect.setattr("sys.stdout", stream)
                redirect.setattr("sys.stderr", messages)
                assert run([verb, *arguments, *more, "--json"]) == 0, arguments
            key = " ".join([verb, *arguments]) if verb != "train" else f"train {name}"
            found[key] = json.loads(printed.read_text())
        yield folder, found


def test_the_model_of_transformers_computes_and_generates_what_ours_does(results, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = results
    monkeypatch.chdir(folder)
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    tokens = tokenizer(PROMPT, return_tensors="pt")
    assert theirs.config.model_type == "mixtral"
    with torch.no_grad():
        ours = load_export("imported")[1](tokens["input_ids"]).logits_BSV
        want = theirs(**tokens).logits
    # Ids without a token are never generated here, and random there.
    known = len(tokenizer)
    assert ((ours - want)[..., :known].abs().max() / want.abs().max()).item() <= 2e-6
    text = tokenizer.decode(theirs.generate(**tokens, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert run(["generate", "imported", "--prompt", PROMPT, "--max-tokens", "20", "--engine", "torch"]) == 0
    assert text.startswith(PROMPT)


def test_the_import_has_the_loss_of_the_run(results):
    _, found = results
    assert found["evaluate imported"]["loss"] == pytest.approx(found["train dense"]["validation"]["loss"], rel=1e-6)


def test_plans_are_in_use_and_training_continues_under_the_allocated_one(results):
    _, found = results
    dense = found["evaluate imported"]["loss"]
    uniform = found["evaluate imported --sparsity 0.6"]["loss"]
    planned = found["evaluate imported --plan plan.json"]["loss"]
    trained = found["evaluate runs/sparse"]
    # So small a model loses little, so the losses of the three plans have no fixed order.
    assert len({dense, uniform, planned}) == 3
    assert trained["loss"] < min(dense, planned)
    assert trained["sparsity"] == pytest.approx(found["evaluate imported --plan plan.json"]["sparsity"])
    calibrated = found["calibrate imported --sparsity 0.6 --output thresholds.json"]
    assert calibrated["loss_topk"] == pytest.approx(uniform, rel=1e-6)


def test_generation_reads_only_what_the_zeros_leave(results):
    folder, found = results
    (generated,) = (value for key, value in found.items() if key.startswith("generate"))
    assert (generated["run_dir"], generated["num_tokens"]) == ("runs/sparse", 100)
    lines = (folder / "generate.txt").read_text().splitlines()
    stats = dict(re.split("  +", line, maxsplit=1) for line in lines if "  " in line)
    assert stats["engine"] == "native"
    read, dense = (int(stats[name].replace(",", "")) for name in ("bytes read", "bytes read without zeros"))
    # The head has no site, and S is 0.6 in front of every other matrix.
    assert 0.3 < read / dense < 0.8
