"""What the pages of allocations, sensitivities, and grids are made from in tests, with a hostile name of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qsparse_moe.ablation.allocation.joint_report import as_dict
from qsparse_moe.ablation.routing import Choice, RoutingCell
from qsparse_moe.ablation.sensitivity.report import as_dict as sensitivity_dict
from qsparse_moe.ablation.sensitivity.routing_changes import PlanAgreement, RoutingChange, WithRouting
from tests.ablation.test_joint_report import allocation, result
from tests.ablation.test_results import outcome, two_variants
from tests.ablation.test_sensitivity_report import evaluated, sensitivity

RESULTS = Path(__file__).parents[2] / "results"
HOSTILE = "runs/<script>alert('1')</script> \"&amp; $(reboot) `x`"
SETTINGS = {"settings": ["model.sparsity.plan=plan.json", "model.sparsity.default=null"]}


def joint_content(*, run="runs/x", results=None):
    found = allocation(*(results or (result(0.5, trained=True), result(0.75))))
    return json.loads(json.dumps(as_dict(found, run_dir=run, output="plan.json") | SETTINGS))


def sensitivity_content(run="runs/x"):
    routing = tuple(
        RoutingChange(RoutingCell(layer, choice), 0.25 + layer, (0.125, 0.5 + layer), 0.0, 0.5, (0.25, 0.75), None)
        for choice in (Choice(0), Choice(2, skipped=0))
        for layer in (0, 1)
    )
    routed = WithRouting((0.12, 0.26, 0.37), 1.0, 0.999)
    plans = PlanAgreement((0.1, 0.2, 0.4), (0.125, 0.25, 0.375), 1.0, 0.99, routed)
    found = sensitivity(evaluated(), routing=routing, plans=plans)
    return found, json.loads(json.dumps(sensitivity_dict(found, run_dir=run, step=7)))


def grid_of(tmp_path):
    grid = two_variants(tmp_path)
    results = [outcome("dense", 0, 2.0), outcome("dense", 3, 2.25), outcome("half", 0, 2.5), outcome("half", 3, None)]
    results[3] = replace(results[3], error="exit code 1:\n <b>lost</b>")
    return grid, [
        replace(one, active_parameters=100 * (1 + (one.variant == "half")), sparsity=0.5 * (one.variant == "half"))
        for one in results
    ]
