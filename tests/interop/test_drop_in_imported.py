"""A model that was made sparse in transformers is imported with its plan, and computes the same here."""

from __future__ import annotations

import json

import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.drop_in.calibration import calibrate
from qsparse_moe.interop.drop_in.model import densify, sparsify
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.import_model import import_model
from qsparse_moe.interop.state_dict import load_export
from tests.interop.drop_in_models import MODELS, build, tokens, varied_plan
from tests.interop.hugging_face_models import save
from tests.interop.test_hugging_face import relative

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_the_imported_model_has_the_plan_and_the_logits(tmp_path, name):
    # Its default is a window, which has no effect at this length and is refused.
    theirs = build(name, **({"sliding_window": None} if name == "mistral" else {}))
    plan = sparsify(theirs, varied_plan(theirs), rescale="preserve", gradient="masked")
    done = import_model(save(theirs, tmp_path / "saved"), tmp_path / "imported")
    config, ours, _ = load_export(done.folder)
    assert ours.sparsity_plan == plan
    settings = config.model.sparsity
    assert (settings.selection, settings.rescale, settings.gradient) == ("topk", "preserve", "masked")
    with torch.no_grad():
        assert relative(ours(tokens()).logits_BSV, theirs(tokens()).logits) <= 2e-6
    densify(theirs)
    dense = save(theirs, tmp_path / "dense")
    assert HuggingFaceWeights(dense).plan is None


def test_thresholds_come_along(tmp_path):
    theirs = build("mixtral")
    plan = calibrate(theirs, [tokens(4, 17)], 0.5)
    sparsify(theirs, plan, selection="threshold")
    import_model(save(theirs, tmp_path / "saved"), tmp_path / "imported")
    config, ours, _ = load_export(tmp_path / "imported")
    assert config.model.sparsity.selection == "threshold"
    assert ours.sparsity_plan.thresholds == plan.thresholds
    with torch.no_grad():
        assert relative(ours(tokens()).logits_BSV, theirs(tokens()).logits) <= 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("selection"), r"saved/config\.json: qsparse_moe is not readable"),
        (lambda entry: entry["plan"]["values"].pop(), r"config\.json: sparsity plan: layer 1, .* has 0 values, but"),
        (lambda entry: entry.update(selection="threshold"), r"config\.json: sparsity plan: .* and no threshold"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path, change, message):
    theirs = build("mixtral")
    sparsify(theirs, 0.5)
    folder = save(theirs, tmp_path / "saved")
    settings = json.loads((folder / "config.json").read_text())
    change(settings["qsparse_moe"])
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        import_model(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
