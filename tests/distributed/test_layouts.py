"""The same run has the same losses in every layout; a resumed run has them too, exactly if its layout is the same."""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from qsparse_moe.training.engines.protocol import STATE_KINDS
from tests.distributed.conftest import (
    BALANCED,
    BALANCED_RESUMED,
    CUT,
    EVALUATED_STEP,
    FAULT_STEP,
    FAULTS,
    FP16,
    FULL,
    LATE,
    MIXED,
    RECOMPUTED,
    RECOMPUTED_PARTS,
    RESUMED,
    SKIPPED,
    TRAINED,
    TRANSFERS,
    UNEVEN,
    Runs,
    transfer_label,
)
from tests.support.metrics import same_in_every_run
from tests.support.runs import STEPS, STOP_STEP

pytestmark = pytest.mark.distributed

# Of losses near 5 and norms near 2. Measured: 7e-7 and 1e-6 as long as every layout selects the same features; where
# two are so near that rounding decides, a layout takes the other one, and the loss moves by up to 3e-5, the norm by
# 3e-5 of itself. bf16: 0 and 2e-6; it has 8 bits, so another processor's order of additions may move it by some 1e-4.
# The third is of the norms by layer. Measured: 8e-9 in the first step; Adam's own first step turns rounding into 8e-6
# under ZeRO-3 and with larger micro-batches, and later 4e-6, in bf16 5e-4.
# Rounding makes norms differ by 1e-7 in the first step. Adam's first update divides each gradient by its own magnitude,
# however small: in the second the norms were 3.1e-6 apart (larger micro-batches, MKL on a Zen 3), then 1e-6 again.
SAME_SELECTION = {"fp32": (3e-6, 1e-5, 3e-5), "bf16": (1e-3, 1e-2, 1e-2), "fp16": (1e-3, 1e-2, 1e-2)}
OTHER_SELECTION = {"fp32": (2e-4, 1e-3, 1e-3), "bf16": (5e-3, 5e-2, 5e-2), "fp16": (5e-3, 5e-2, 5e-2)}
# An expert whose load is near the mean may move its bias by 0.01 in either direction: the routers' losses were 1.3e-2
# apart.
OTHER_BIASES = {"fp32": OTHER_SELECTION["fp32"], "bf16": (2e-2, 5e-2, 5e-2)}
EARLY_STEPS = 2
BF16_AGAINST_FP32 = 2e-2

EVERYWHERE = [(layout, ranks) for ranks in (1, 2) for layout in TRAINED[ranks]]
VARIANTS = [
    (variant, ranks)
    for ranks in (1, 2)
    for variant in ("torch-larger", "zero2-larger", "torch-full", *(f"zero3-{mode}" for mode in RECOMPUTED_PARTS))
]


def series(outcome, key):
    return [report["losses"][key] for report in outcome["reports"]]


def assert_same_run(outcome, reference, precision, *, since=0, later=OTHER_SELECTION):
    """Losses, norms and the evaluation of the steps after ``since`` agree to rounding."""
    ours = [report for report in outcome["reports"] if report["step"] > since]
    theirs = [report for report in reference["reports"] if report["step"] > since]
    assert (
        [report["step"] for report in ours] == [report["step"] for report in theirs] == [*range(since + 1, STEPS + 1)]
    )
    for mine, other in zip(ours, theirs, strict=True):
        is_early = mine["step"] <= EARLY_STEPS
        of_loss, of_norm, of_layer = (SAME_SELECTION if is_early else later)[precision]
        assert mine["losses"] == pytest.approx(other["losses"], abs=of_loss)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=of_norm)
        assert mine["layer_grad_norms"] == (
            other["layer_grad_norms"] and pytest.approx(other["layer_grad_norms"], rel=of_layer)
        )
        assert mine["learning_rate"] == other["learning_rate"]
        assert mine["sparsity"] == other["sparsity"]
        assert (mine["loss_scale"], mine["skipped_steps"]) == (other["loss_scale"], other["skipped_steps"])
        assert (mine["validation"] is None) == (other["validation"] is None) == (mine["step"] % 3 != 0)
        if mine["validation"]:
            assert mine["validation"] == pytest.approx(other["validation"], rel=of_loss)
    assert outcome["result"]["validation"] == outcome["reports"][-1]["validation"]


def state_of(run_dir):
    checkpoint = Checkpoint(list_checkpoints(run_dir)[-1])
    return checkpoint, {
        (kind, name): checkpoint.tensor(kind, name) for kind in STATE_KINDS for name in checkpoint.shapes
    }


def test_the_reference_learns_and_clips(runs: Runs):
    losses = series(runs("torch-fp32", 1), "loss")
    assert losses[-1] < losses[0] - 0.5
    norms = [report["grad_norm"] for report in runs("torch-fp32", 1)["reports"]]
    assert min(norms) > 0.5, "clipping must bite, or the layouts are not compared under it"


@pytest.mark.parametrize(("layout", "ranks"), [item for item in EVERYWHERE if item != ("torch-fp32", 1)])
def test_every_layout_has_the_losses_of_the_plain_engine_on_one_rank(runs: Runs, layout, ranks):
    precision = layout.split("-")[1]
    assert_same_run(runs(layout, ranks), runs(f"torch-{precision}", 1), precision)


@pytest.mark.parametrize(("label", "ranks"), VARIANTS)
def test_micro_batches_and_recomputation_change_nothing(runs: Runs, label, ranks):
    assert_same_run(runs(label, ranks), runs("torch-fp32", 1), "fp32")


@pytest.mark.parametrize(("layout", "ranks"), [(layout, ranks) for ranks in (1, 2) for layout in MIXED])
def test_a_tied_head_dense_layers_and_shared_experts_have_their_losses_in_every_layout(runs: Runs, layout, ranks):
    precision = layout.split("-")[1]
    reference = runs(f"mixed-torch-{precision}", 1)
    assert_same_run(runs(f"mixed-{layout}", ranks), reference, precision)
    assert series(reference, "loss") != series(runs(f"torch-{precision}", 1), "loss")


@pytest.mark.parametrize(("layout", "ranks"), [(layout, ranks) for ranks in (1, 2) for layout in UNEVEN[ranks]])
def test_the_loss_is_the_mean_over_the_answers_of_all_micro_batches_and_ranks(runs: Runs, layout, ranks):
    assert_same_run(runs(f"uneven-{layout}", ranks), runs("uneven-whole", 1), "fp32")


@pytest.mark.parametrize(("layout", "ranks"), [(layout, ranks) for ranks in (1, 2) for layout in FULL])
def test_full_experts_drop_the_same_tokens_in_every_layout(runs: Runs, layout, ranks):
    reference, outcome = runs("capacity-torch-fp32", 1), runs(f"capacity-{layout}", ranks)
    assert_same_run(outcome, reference, "fp32")
    dropped, expected = (run["reports"][0]["stats"]["router/dropped_LE"] for run in (outcome, reference))
    assert dropped == expected and sum(map(sum, dropped)) >= 2 * 8 * 24 / 4


def biases(outcome):
    return [torch.tensor(report["router_bias_LE"]) for report in outcome["reports"]]


def saved_biases(run_dir):
    checkpoint = Checkpoint(list_checkpoints(run_dir)[-1])
    return {name: checkpoint.buffer(name) for name in checkpoint.buffer_shapes}


@pytest.mark.parametrize(("layout", "ranks"), [(layout, ranks) for ranks in (1, 2) for layout in BALANCED])
def test_the_balance_loss_of_a_global_batch_is_that_of_one_rank_in_every_layout(runs: Runs, layout, ranks):
    precision = layout.split("-")[1]
    # The plain engine has no bf16 run on one rank here; the first layout of that precision is the reference.
    reference = runs(f"balanced-{'torch-fp32' if precision == 'fp32' else layout}", 1)
    outcome = runs(f"balanced-{layout}", ranks)
    assert_same_run(outcome, reference, precision, later=OTHER_BIASES)
    early = slice(0, EARLY_STEPS if precision == "fp32" else 1)
    assert torch.equal(torch.stack(biases(outcome)[early]), torch.stack(biases(reference)[early]))
    assert biases(outcome)[0].abs().max() > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_biases_move_once_per_step_however_the_batch_is_split_and_a_global_loss_depends_on_the_split(runs: Runs, ranks):
    whole, cut = runs("balanced-torch-fp32", ranks), runs("balanced-torch-fp32-cut", ranks)
    assert torch.equal(biases(whole)[0], biases(cut)[0]), "the same rows: the weights are those of the seed"
    for outcome in (whole, cut):
        for before, after in zip([torch.zeros(2, 8), *biases(outcome)], biases(outcome), strict=False):
            moved = (after - before).abs()
            assert ((moved < 1e-6) | ((moved - 0.01).abs() < 1e-6)).all()
    first = [outcome["reports"][0]["losses"]["load_balance_loss"] for outcome in (whole, cut)]
    assert first[0] != pytest.approx(first[1], abs=1e-4), "the first micro-batches see only themselves"
    for layout in CUT:
        assert_same_run(runs(f"balanced-{layout}-cut", ranks), cut, "fp32")


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_doubles_no_load_and_no_bias(runs: Runs, ranks):
    label, layout = RECOMPUTED
    recomputed, plain = runs(label, ranks), runs(f"balanced-{layout}", ranks)
    assert_same_run(recomputed, plain, "fp32")
    assert torch.equal(torch.stack(biases(recomputed)[:EARLY_STEPS]), torch.stack(biases(plain)[:EARLY_STEPS]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_biases_of_another_engine_and_number_of_ranks_are_resumed_exactly(runs: Runs, ranks):
    layout, written_by = BALANCED_RESUMED[ranks]
    stopped = runs("balanced-stopped", written_by)
    stored = saved_biases(runs.folder_of("balanced-stopped", written_by))
    assert torch.equal(torch.stack(list(stored.values())), biases(stopped)[-1])
    resumed = runs("balanced-resumed", ranks)
    assert resumed["context"] == {"start_step": STOP_STEP, "world_size": ranks}
    assert_same_run(resumed, runs(f"balanced-{layout}", ranks), "fp32", since=STOP_STEP)
    moved = (biases(resumed)[0] - biases(stopped)[-1]).abs()
    assert ((moved < 1e-6) | ((moved - 0.01).abs() < 1e-6)).all() and moved.max() > 0
    saved = saved_biases(runs.folder_of("balanced-resumed", ranks))
    assert torch.equal(torch.stack(list(saved.values())), biases(resumed)[-1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_stays_near_fp32(runs: Runs, ranks):
    for engine in ("torch", "zero1"):
        narrow, wide = series(runs(f"{engine}-bf16", ranks), "loss"), series(runs(f"{engine}-fp32", ranks), "loss")
        assert narrow == pytest.approx(wide, abs=BF16_AGAINST_FP32)
        assert narrow != wide


@pytest.mark.parametrize("layout", FP16)
def test_every_layout_skips_the_same_steps_in_fp16(runs: Runs, layout):
    reports = runs(layout, 2)["reports"]
    assert [report["skipped_steps"] for report in reports] == [1, 1, 1, 1, 2, 2]
    assert [report["loss_scale"] for report in reports] == [2**18, 2**17, 2**17, 2**17, 2**18, 2**17]
    assert Checkpoint(list_checkpoints(runs.folder_of(layout, 2))[-1]).adam_step == STEPS - 2


def test_gradient_norms_by_layer_are_the_plain_engines_in_every_layout(runs: Runs):
    """In the first step, whose weights are the same everywhere; in fp16 the second, after one that is skipped."""
    mixed = [(f"mixed-{layout}", ranks) for ranks in (1, 2) for layout in MIXED]
    for label, ranks in EVERYWHERE + mixed:
        model, precision = "mixed-" if label.startswith("mixed") else "", label.split("-")[-1]
        rounding = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}[precision]
        first = 1 if precision == "fp16" else 0
        want = runs(f"{model}torch-{precision}", 1)["reports"][first]["layer_grad_norms"]
        assert len(want) == 2 and abs(want[0] / want[1] - 1) > 2 * rounding, "else the layers could be mistaken"
        have = runs(label, ranks)["reports"][first]["layer_grad_norms"]
        assert have and have == pytest.approx(want, rel=rounding), (label, ranks)


def test_sums_are_those_of_the_whole_batch_in_every_layout(runs: Runs):
    want = runs("torch-fp32", 1)["reports"][0]["stats"]
    assert sum(map(sum, want["router/routed_LE"])) == 2 * 2 * 8 * 24, "layers x choices x rows x tokens"
    for layout, ranks in EVERYWHERE:
        if layout.endswith("fp32"):
            have = runs(layout, ranks)["reports"][0]["stats"]
            assert have.keys() == want.keys()
            # The first step's weights are the same everywhere, so its choices are too.
            assert have["router/routed_LE"] == want["router/routed_LE"]
            for name in want:
                torch.testing.assert_close(torch.tensor(have[name]), torch.tensor(want[name]), rtol=1e-5, atol=0)


def test_the_agreement_of_choices_between_evaluations_is_the_same_in_every_layout(runs: Runs):
    for layout, ranks in EVERYWHERE:
        precision = layout.split("-")[1]
        have, want = (
            run["reports"][-1]["choice_agreement_L"] for run in (runs(layout, ranks), runs(f"torch-{precision}", 1))
        )
        # Some tokens keep their experts and some do not, or the layouts are not compared.
        assert len(have) == 2 and all(0.3 < share < 1 for share in want)
        # A token whose two best experts are near each other may take the other one.
        assert have == pytest.approx(want, abs=0.01 if precision == "fp32" else 0.1), (layout, ranks)


def test_the_parts_of_a_step_are_timed_in_every_layout(runs: Runs):
    for layout, ranks in EVERYWHERE:
        seconds = runs(layout, ranks)["phase_seconds"]
        assert seconds.keys() == {"data", "forward", "backward", "update", "communication"}
        assert min(seconds.values()) > 0 or (ranks == 1 and seconds["communication"] == 0), (layout, ranks)


@pytest.mark.parametrize(("layout", "ranks"), [(layout, ranks) for ranks in (1, 2) for layout in RESUMED[ranks]])
def test_a_run_stopped_by_sigterm_resumes_to_the_exact_result_of_an_uninterrupted_one(runs: Runs, layout, ranks):
    whole, stopped = runs(layout, ranks), runs(f"{layout}-stopped", ranks)
    resumed = runs(f"{layout}-resumed", ranks)
    assert stopped["result"]["step"] == STOP_STEP and stopped["result"]["stopped_by"] == 15
    assert resumed["context"]["start_step"] == STOP_STEP
    ignored = {"seconds", "step_seconds", "tokens_per_second", "layer_grad_norms"}
    parts = stopped["reports"] + resumed["reports"]
    for mine, other in zip(parts, whole["reports"], strict=True):
        assert {k: mine[k] for k in mine.keys() - ignored} == {k: other[k] for k in other.keys() - ignored}
        was_read = mine["step"] <= STOP_STEP
        assert mine["layer_grad_norms"] == (other["layer_grad_norms"] if was_read else None)
    assert resumed["result"] == whole["result"]
    _, want = state_of(runs.folder_of(layout, ranks))
    checkpoint, have = state_of(runs.folder_of(f"{layout}-resumed", ranks))
    assert checkpoint.adam_step == STEPS - (whole["reports"][-1]["skipped_steps"] or 0)
    assert [key for key in want if not have[key].equal(want[key])] == []
    rows = rows_of(runs.folder_of(f"{layout}-resumed", ranks))
    assert rows == rows_of(runs.folder_of(layout, ranks))
    assert [row["step"] for row in rows if "router/dead_experts_window" in row] == [STOP_STEP + 1, STOP_STEP + 2]


def rows_of(run_dir):
    """Return the logged steps without times and without the gradient norms that not every part of a run has."""
    rows = [same_in_every_run(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return [{name: row[name] for name in row if not name.startswith("train/grad_norm/layer_")} for row in rows]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_is_resumed(runs: Runs, ranks):
    stopped, resumed = runs("late-stopped", ranks), runs("late-resumed", ranks)
    assert stopped["result"]["step"] == EVALUATED_STEP and stopped["result"]["validation"] is None
    assert [report["step"] for report in resumed["reports"]] == [*range(EVALUATED_STEP + 1, STEPS + 1)]
    assert rows_of(runs.folder_of("late-resumed", ranks)) == rows_of(runs.folder_of(LATE[ranks], ranks))


@pytest.mark.parametrize("layout", RESUMED[2])
def test_each_of_two_ranks_writes_half_of_the_state_and_reads_the_moments_that_it_holds(runs: Runs, layout):
    checkpoint = Checkpoint(list_checkpoints(runs.folder_of(layout, 2))[-1])
    count = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    sizes = [file.stat().st_size for file in checkpoint.path.glob("rank-*")]
    # Besides, each file has the random states of its rank and a header: 20 kB.
    assert len(sizes) == 2 and all(0 < size - 12 * count / 2 < 0.05 * 12 * count for size in sizes)
    reads = [outcome["elements_read"] for outcome in runs.outcomes[f"{layout}-resumed", 2]]
    moments = [read[kind] for kind in ("exp_avg", "exp_avg_sq") for read in reads]
    if layout.startswith(("torch", "zero0")):
        assert moments == [count] * 4, "every rank holds everything"
    else:
        assert moments[0] + moments[1] == moments[2] + moments[3] == count and max(moments) < 0.52 * count


@pytest.mark.parametrize(("source", "written_by", "target", "resumed_by"), TRANSFERS)
def test_any_layout_resumes_what_any_other_wrote(runs: Runs, source, written_by, target, resumed_by):
    resumed = runs(transfer_label(source, written_by, target), resumed_by)
    assert resumed["context"] == {"start_step": STOP_STEP, "world_size": resumed_by}
    assert_same_run(resumed, runs(target, resumed_by), target.split("-")[1], since=STOP_STEP)


@pytest.mark.parametrize("layout", SKIPPED)
def test_every_layout_skips_the_step_in_which_a_rank_is_not_finite(runs: Runs, layout):
    outcome, precision = runs(f"skipped-{layout}", 2), layout.split("-")[1]
    assert [report["skipped_steps"] for report in outcome["reports"]] == [0, 0, 1, 1, 1, 1]
    assert_same_run(outcome, runs(f"skipped-torch-{precision}", 2), precision, since=FAULT_STEP)
    assert series(outcome, "loss")[FAULT_STEP] != series(runs(f"torch-{precision}", 2), "loss")[FAULT_STEP]


@pytest.mark.parametrize("label", FAULTS)
def test_a_value_that_is_not_finite_stops_all_ranks_before_it_is_saved(runs: Runs, label):
    fault = FAULTS[label][1]
    outcomes = runs.outcomes[f"fault-{label}", 2]
    messages = {outcome["error"] for outcome in outcomes}
    assert len(messages) == 1, "every rank must say the same"
    message = messages.pop()
    assert message.startswith(f"TrainingDiverged: step {FAULT_STEP}: ")
    if fault["place"] == "output":
        assert f"the output of layer {fault['layer']} is not finite on rank {fault['rank']}" in message
    elif fault["place"] == "gradient":
        assert f"the gradient that enters layer {fault['layer'] - 1} from above is not finite on rank 1" in message
    else:
        assert "the gradient norm is" in message
    run_dir = runs.folder_of(f"fault-{label}", 2)
    kept = list_checkpoints(run_dir)
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in range(1, FAULT_STEP)]
    assert str(kept[-1]) in message
    _, state = state_of(run_dir)
    assert all(tensor.isfinite().all() for tensor in state.values())
