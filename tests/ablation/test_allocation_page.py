"""The page of an allocation: every number in it, and that it needs nothing else."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest

from qsparse_moe.ablation.allocation.budget import parse_budget
from qsparse_moe.ablation.allocation.commands import next_commands
from qsparse_moe.ablation.allocation.front_figures import methods
from qsparse_moe.ablation.allocation.page import (
    allocation_drawings,
    allocation_page,
    sparsity_drawings,
    sparsity_page,
)
from qsparse_moe.ablation.allocation.plan_figures import plan_drawings
from qsparse_moe.ablation.allocation.report import as_dict as sparsity_dict
from qsparse_moe.ablation.allocation.spent_figures import layer_sums, spent_drawings
from qsparse_moe.ablation.page.html import html_of
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.page_contents import HOSTILE, RESULTS, SETTINGS, joint_content
from tests.ablation.test_allocation_report import allocation as sparsity_allocation
from tests.ablation.test_allocation_report import comparison
from tests.ablation.test_joint_report import result
from tests.support.pages import read_page


def test_an_allocation_has_every_number_of_its_json_and_a_hostile_name_is_text():
    content = joint_content(run=HOSTILE)
    found = read_page(html_of(allocation_page(content)))
    assert found.headings[0] == f"Joint plans for {HOSTILE}"
    assert all(HOSTILE in " ".join(shlex.split(command)) for command in found.commands)
    assert found.headings[1:] == [
        "Front",
        "Every plan beside the joint one",
        "The plans",
        "Where the loss is spent",
        "What to run next",
    ]
    for budget in content["budgets"]:
        head, *rows = found.tables[budget["budget"]]
        assert head[:3] == ["plan", "loss", "against uniform"]
        less = {one["against"]: one["difference"] for one in budget["joint_less"]}
        for row, one in zip(rows, budget["outcomes"], strict=True):
            assert (row[0], row[1], row[2]) == (one["name"], f"{one['loss']:.4f}", f"{one['against_uniform']:+.4f}")
            assert row[3] == ("" if one["name"] == "joint" else f"{less[one['name']]:+.4f}")
            assert float(row[5]) == one["cost"] / content["dense"]["cost"]
        timed = {row[0]: row[1] for row in found.tables[f"{budget['budget']}: decoding with the engine native"][1:]}
        assert timed == {name: f"{one['tokens_per_second']:,.0f}" for name, one in budget["decoding"].items()}
    assert "bytes=0.5@batch=2: after 5 steps of training with each plan" in found.tables
    front = found.tables["Loss over the measured cost: bytes per step, as a share of the dense model's"]
    assert ["joint", "bytes=0.75@batch=2", "0.75", "1.5000"] in front and front[-1] == ["dense", "", "", "1.2500"]
    decode = found.tables["Loss over tokens per second of the decode engine native, measured"]
    assert ["S alone", "bytes=0.5@batch=2", "4000", "1.6000"] in decode
    assert "No plan A alone: the reason." in found.paragraphs


def front_of_different_plans():
    """Return a front whose three budgets, not in order, differ in every S, choice of ranks, and part of the loss."""
    content = joint_content(results=(result(0.5), result(0.75), result(0.25)))
    for number, budget in enumerate(content["budgets"]):
        plan, spent = budget["plans"]["joint"], budget["spent"]
        for entry in plan["values"]:
            entry["sparsity"] = [value + 0.01 * number + 0.001 * place for place, value in enumerate(entry["sparsity"])]
        plan["routing"][1]["top_p"] = 0.7 + 0.1 * number
        for one in (*spent["cells"], *spent["routing"]):
            one["change"] *= 1 + number
        spent["estimated"] *= 1 + number
        (dense,) = [one for one in budget["joint_less"] if one["against"] == "dense"]
        dense["difference"] = 0.25 + number
    return content


def test_every_budget_has_its_plan_and_where_it_spends_loss():
    content = front_of_different_plans()
    text = html_of(allocation_page(content))
    found = read_page(text)
    means = found.tables["S at expert hidden, mean of the experts, by budget"]
    assert means[0] == ["layer", "0.25", "0.5", "0.75"]
    added = found.tables["Loss that the joint plan adds, nats per token"]
    assert [row[0] for row in added[1:]] == [f"bytes={share}@batch=2" for share in (0.25, 0.5, 0.75)]
    for budget in content["budgets"]:
        name, spent = budget["budget"], budget["spent"]
        column = 1 + [row[0] for row in added[1:]].index(name)
        for entry in budget["plans"]["joint"]["values"]:
            site = entry["site"].replace("_", " ")
            own = [f"{value:.4f}" for value in entry["sparsity"]]
            if len(own) > 1:
                assert found.tables[f"S at {site}, {name}"][1 + entry["layer"]] == [str(entry["layer"]), *own]
            else:
                head, *rows = found.tables[f"S at sites without experts, {name}"]
                assert rows[entry["layer"]][head.index(site)] == own[0]
            if entry["site"] == "expert_hidden":
                assert means[1 + entry["layer"]][column] == f"{np.mean(entry['sparsity']):.4f}"
        title = "Experts per token by layer, and the share of the router weight at which a layer stops"
        share = f"{budget['plans']['joint']['routing'][1]['top_p']:g}"
        assert found.tables[f"{title}, {name}"][1:] == [["0", "1", "1"], ["1", "2", share]]
        chosen = found.tables["Experts per token, at most, by budget"]
        assert [row[column] for row in chosen[1:]] == ["1", f"2, top-p {share}"]
        (dense,) = [one for one in budget["joint_less"] if one["against"] == "dense"]
        assert added[column] == [
            *(name, f"{dense['difference']:+.4f}", "-1.0000 to +0.2500", f"{spent['estimated']:+.4f}")
        ]
        for one in spent["cells"]:
            table = found.tables[f"{one['site'].replace('_', ' ')}, 1/1000 nats per token, {name}"]
            assert table[1 + one["layer"]][1 + (one["expert"] or 0)] == f"{1000 * one['change']:+.4f}"
        assert [row[1] for row in found.tables[f"experts per token, 1/1000 nats per token, {name}"][1:]] == [
            f"{1000 * one['change']:+.4f}" for one in spent["routing"]
        ]
        title = "Loss that the joint plan of every budget spends, in 1/1000 nats per token"
        for table in (found.tables[f"{title}: by kind of change"], found.tables[f"{title}: by layer"]):
            assert table[column][0] == name
            assert sum(map(float, table[column][1:])) == pytest.approx(1000 * spent["estimated"], abs=1e-3)
    # The plan of the first budget is the one that the command wrote, and alone is unfolded.
    assert re.findall(r"<details open><summary>(.*?)</summary>", text) == [
        *("Plan of bytes=0.5@batch=2", "Loss spent at bytes=0.5@batch=2")
    ]
    assert text.count("<summary>Plan of") == text.count("<summary>Loss spent at") == 3
    assert "The joint plan of bytes=0.5@batch=2 is in plan.json." in " ".join(found.paragraphs)


def test_one_budget_is_shown_without_folds():
    content = joint_content(results=(result(0.5),))
    text = html_of(allocation_page(content))
    found = read_page(text)
    assert "The plan" in found.headings and "<details open>" not in text and "Plan of" not in text
    assert "S at expert hidden, bytes=0.5@batch=2" in found.tables and "methods-by-budget" not in text
    assert not {"plans-by-budget", "loss-by-budget"} & set(allocation_drawings(content))


def test_the_figures_of_all_budgets_draw_the_numbers_of_the_json():
    content = front_of_different_plans()
    found = allocation_drawings(content)
    ascending = [content["budgets"][place] for place in (2, 0, 1)]
    plans = [SparsityPlan.from_json(json.dumps(budget["plans"]["joint"])) for budget in ascending]
    images = {axis.get_title(): axis for axis in found["plans-by-budget"].figure.axes if axis.images}
    for site in ("attention_input", "expert_hidden"):
        (name,) = [name for name in images if name.startswith(site.replace("_", " "))]
        drawn = images[name].images[0].get_array()
        np.testing.assert_allclose(drawn, [[plan.sparsity(layer, site) for plan in plans] for layer in (0, 1)])
    experts = images["experts per token at most, share p of the weight"]
    np.testing.assert_allclose(experts.images[0].get_array(), [[1, 1, 1], [1.9, 1.7, 1.8]])
    assert [text.get_text() for text in experts.texts] == ["1", "1", "1", "2\np 0.9", "2\np 0.7", "2\np 0.8"]
    (axes,) = found["loss-by-budget"].figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bytes=0.25", "bytes=0.5", "bytes=0.75"]
    *bars, evaluated = axes.containers
    heights = np.array([[bar.get_height() for bar in container] for container in bars])
    np.testing.assert_allclose(heights.sum(axis=0), [1000 * budget["spent"]["estimated"] for budget in ascending])
    np.testing.assert_allclose(evaluated.lines[0].get_xydata(), [[0, 2250], [1, 250], [2, 1250]])


def test_parts_of_an_earlier_version_are_shown_with_the_limit_of_their_estimate():
    content = joint_content()
    del content["budgets"][0]["spent"]["routing_evaluated"]
    (told,) = [one for one in read_page(html_of(allocation_page(content))).paragraphs if "at about a tenth" in one]
    assert "is estimated here" in told and told.endswith("a new allocation evaluates it.")


def test_budgets_without_recorded_parts_say_so_and_invent_nothing():
    content = front_of_different_plans()
    for place in (0, 2):
        del content["budgets"][place]["spent"]
    text = html_of(allocation_page(content))
    found = read_page(text)
    added = found.tables["Loss that the joint plan adds, nats per token"][1:]
    assert [row[3] for row in added] == ["not recorded", "not recorded", "+0.4050"]
    assert [row[1] for row in added] == ["+2.2500", "+0.2500", "+1.2500"]
    assert "What the experts per token of a layer change alone is evaluated." in found.paragraphs
    (told,) = [paragraph for paragraph in found.paragraphs if "not recorded" in paragraph]
    assert "cannot be computed from what this report stores" in told
    assert re.findall(r"<summary>(Loss spent at .*?)</summary>", text) == ["Loss spent at bytes=0.75@batch=2"]
    drawn = set(allocation_drawings(content))
    assert "loss-by-cell-bytes-0.75" in drawn and not {"loss-by-cell-bytes-0.5", "loss-by-layer-bytes-0.25"} & drawn


def test_the_figures_of_an_allocation_draw_the_numbers_of_its_json():
    content = joint_content()
    found = allocation_drawings(content)
    own = ("plan", "experts-per-token", "loss-by-layer", "loss-by-cell")
    assert list(found) == [
        *("front", "front-decoding", "methods", "methods-after-training", "methods-by-budget"),
        *("plans-by-budget", "loss-by-budget"),
        *(f"{name}-bytes-{share}" for share in ("0.5", "0.75") for name in own),
    ]
    lines = {line.get_label(): line.get_xydata().tolist() for line in found["front"].figure.axes[0].lines}
    assert lines["joint"] == [[0.5, 1.5], [0.75, 1.5]] and lines["dense"] == [[0.0, 1.25], [1.0, 1.25]]
    assert "random 0" not in lines and found["front"].figure.axes[0].get_ylim()[1] < 9.0
    (axes,) = found["methods"].figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["S alone", "uniform", "random 0", "dense"]
    marks = [line.get_xydata().tolist() for line in axes.lines[:2]]
    assert marks == [[[-1.0, 0.0], [0.25, 0.0]], [[pytest.approx(-0.1), 0.0]]]
    (axes,) = found["methods-by-budget"].figure.axes
    assert axes.containers[0].lines[0].get_xydata().tolist() == [
        [0.5, pytest.approx(-0.1)],
        [0.75, pytest.approx(-0.1)],
    ]
    plan = SparsityPlan.from_json(json.dumps(content["budgets"][0]["plans"]["joint"]))
    drawn = [axis for axis in found["plan-bytes-0.5"].figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == ["sites without experts", "expert input", "expert hidden"]
    for axis in drawn[1:]:
        site = axis.get_title().replace(" ", "_")
        np.testing.assert_allclose(axis.images[0].get_array(), [plan.values[layer, site] for layer in (0, 1)])
        assert [text.get_text() for text in axis.texts] == ["0.50"] * 8
    (axes,) = found["experts-per-token-bytes-0.5"].figure.axes
    assert [bar.get_height() for bar in axes.patches] == [1, 2] and axes.texts[0].get_text() == "top-p\n0.7"
    bars = found["loss-by-layer-bytes-0.5"].figure.axes[0].containers
    layers, sums = layer_sums(content["budgets"][0]["spent"])
    assert layers == [0, 1] and list(sums)[-1] == "experts per token"
    for kind, container in zip(sums.values(), bars, strict=True):
        assert [bar.get_height() for bar in container] == pytest.approx([1000 * value for value in kind])
    total = sum(sum(kind) for kind in sums.values())
    assert total == pytest.approx(content["budgets"][0]["spent"]["estimated"])


def test_losses_and_gains_of_a_layer_are_stacked_away_from_0():
    cells = [
        {"layer": 0, "site": site, "expert": None, "change": change}
        for site, change in (("attention_input", 0.25), ("attention_output", -0.5), ("dense_input", 0.125))
    ]
    spent = {"estimated": -0.125, "evaluated": 0.0, "cells": cells, "routing": []}
    first, second, third = (c[0] for c in spent_drawings(spent)["loss-by-layer"].figure.axes[0].containers)
    assert (first.get_y(), first.get_height()) == (0.0, 250.0)
    assert (second.get_y(), second.get_height()) == (0.0, -500.0)
    assert (third.get_y(), third.get_height()) == (250.0, 125.0)


def test_a_difference_has_the_colour_of_its_interval():
    less = [
        {"against": str(n), "difference": 0.1, "interval": ends} for n, ends in enumerate([(-2, -1), (1, 2), (-1, 1)])
    ]
    (axes,) = methods("title", less).figure.axes
    assert [line.get_color() for line in axes.lines[1::2]] == ["tab:blue", "tab:orange", "0.55"]


def test_a_layer_without_a_site_has_grey_cells_and_a_dash():
    plan = SparsityPlan({(0, "dense_input"): (0.25,), (1, "expert_input"): (0.5, 0.75)})
    drawing = plan_drawings(plan)["plan"]
    images = [axis.images[0].get_array().filled(-1).tolist() for axis in drawing.figure.axes if axis.images]
    assert images == [[[0.25], [-1]], [[-1, -1], [0.5, 0.75]]] and "experts-per-token" not in plan_drawings(plan)
    assert [table.rows for table in drawing.values] == [
        [("0", "0.2500"), ("1", "–")],
        [("0", "–", "–"), ("1", "0.5000", "0.7500")],
    ]


def test_a_stored_allocation_without_the_newer_parts_has_a_page():
    content = json.loads((RESULTS / "allocation" / "tiny-e32a4-front.json").read_text())
    content["budgets"] = content["budgets"][:2]
    found = read_page(html_of(allocation_page(content)))
    assert sum("the estimate is not recorded" in text for text in found.paragraphs) == 1
    first = content["budgets"][0]
    rows = {row[0]: row for row in found.tables[first["budget"]][1:]}
    assert {one["name"]: f"{one['loss']:.4f}" for one in first["outcomes"]} == {k: row[1] for k, row in rows.items()}
    # The plan has sites of 32 experts.
    assert all(len(found.tables[f"S at expert hidden, {one['budget']}"][1]) == 33 for one in content["budgets"])
    assert len(found.commands) == 5


def test_the_next_commands_have_the_real_paths_and_a_smaller_budget():
    def arguments(run, output, *budgets, dense=4000.0):
        content = {"run_dir": run, "output": output, "settings": ["model.sparsity.plan=p"]}
        shares = [{"budget": text, "share": parse_budget(text).target(dense) / dense} for text in budgets]
        found = next_commands(content | {"budgets": shares})
        return [shlex.split(command.line) for command in found]

    train, evaluate, compare, generate, smaller, front = arguments("runs/a b", "p.json", "bytes=0.5@batch=4")
    assert train == [
        *("qsparse-moe", "train", "runs/a b/config.yaml", "training.name=a b-p", "training.init_from=runs/a b"),
        "model.sparsity.plan=p",
    ]
    assert evaluate == ["qsparse-moe", "evaluate", "runs/a b", "--plan", "p.json"]
    assert compare == [*evaluate, "--compare", "dense"]
    assert generate[:5] == ["qsparse-moe", "generate", "runs/a b", "--plan", "p.json"]
    given = ["--output", "p-bytes-0.4.json", "--folder", "runs/a b/allocation-bytes-0.4"]
    assert smaller == ["qsparse-moe", "allocate", "runs/a b", "--budget", "bytes=0.4@batch=4", *given]
    assert front[4] == "bytes=0.5@batch=4" and front[-3:] == ["--front", "0.3:0.9:0.1", "--decode"]
    # A checkpoint has the configuration of its run, and the front is not asked for twice.
    train, *_, smaller = arguments("runs/a/checkpoints/step-7", "p.json", "flops=0.3", "flops=0.1")
    assert train[2:4] == ["runs/a/config.yaml", "training.name=a-p"] and train[4].endswith("checkpoints/step-7")
    assert smaller[4] == "flops=0.05" and smaller[-1] == "runs/a/allocation-flops-0.05"
    assert arguments("r", "p.json", "bytes=2000@batch=1")[-1][4] == "bytes=1800@batch=1"
    # Of a cost and a front of shares, the smallest is the one with the smallest share.
    assert arguments("r", "p.json", "bytes=2000@batch=1", "bytes=0.7@batch=1")[-1][4] == "bytes=1800@batch=1"
    timed = arguments("r", "p.json", "ms=1.1ms@batch=1", dense=2.0)[-1]
    assert timed[4:6] == ["ms=0.99ms@batch=1", "--output"] and timed[-1] == "r/allocation-ms-0.99ms"


def test_an_allocation_of_s_alone_has_its_numbers_and_its_plan():
    after = (comparison("dense", 1.5, 1.0), comparison("uniform", 2.0, 0.0))
    found = sparsity_allocation(train_steps=5, after_training=after)
    content = json.loads(json.dumps(sparsity_dict(found, run_dir="runs/x", output="p.json") | SETTINGS))
    drawings = sparsity_drawings(content, found.plan)
    assert list(drawings) == ["methods", "methods-after-training", "plan"]
    page = read_page(html_of(sparsity_page(content, drawings)))
    assert [row[:2] for row in page.tables["Without training"][1:]] == [["allocated", "1.9000"], ["1 of 2", "2.5000"]]
    assert page.tables["Every plan less uniform S"][1] == ["allocated", "-0.100000", "-0.200000", "+0.000000"]
    # Uniform S less itself is no difference.
    title = "Every plan less uniform S, after 5 steps of training"
    assert [row[0] for row in page.tables[title][1:]] == ["dense"]
    assert page.tables["S at sites without experts"][1:] == [["0", "0.2500"], ["1", "0.7500"]]
    assert len(page.commands) == 4 and page.commands[1] == "qsparse-moe evaluate runs/x --plan p.json"
