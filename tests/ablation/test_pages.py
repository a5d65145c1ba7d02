"""Parts of pages, and the pages of sensitivities and grids: every number in them, and that they need nothing else."""

from __future__ import annotations

import shlex
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.page import grid_page
from qsparse_moe.ablation.grid.report import report_drawings, report_sections, write_results
from qsparse_moe.ablation.page.html import html_of, write_page
from qsparse_moe.ablation.page.images import image_address, pixels, svg
from qsparse_moe.ablation.page.parts import Command, Drawing, Folded, Page, Section, Table
from qsparse_moe.ablation.sensitivity.figures import sensitivity_drawings
from qsparse_moe.ablation.sensitivity.page import sensitivity_page
from qsparse_moe.ablation.sensitivity.stored import stored
from tests.ablation.page_contents import HOSTILE, grid_of, sensitivity_content
from tests.ablation.test_results import outcome
from tests.support.pages import read_page

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def test_every_part_of_a_page_is_escaped_and_a_command_is_what_a_shell_reads():
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().set_title("<b>&\"'")
    arguments = ["qsparse-moe", "evaluate", HOSTILE, "it's"]
    parts = [HOSTILE, Table(HOSTILE, ("a<b", HOSTILE), [(HOSTILE, "&lt;")]), Command(HOSTILE, arguments)]
    drawing = Drawing(HOSTILE, figure, [Table("values", ("x",), [("1",)])])
    page = Page(
        HOSTILE, [(HOSTILE, HOSTILE)], [Section(HOSTILE, parts), Section(HOSTILE, [drawing, Folded(HOSTILE, ["<i>"])])]
    )
    text = html_of(page)
    found = read_page(text)
    assert found.headings == [HOSTILE] * 3 and found.tables[HOSTILE] == [["a<b", HOSTILE], [HOSTILE, "&lt;"]]
    assert found.paragraphs == [HOSTILE, HOSTILE, "<i>"] and list(found.images) == [HOSTILE]
    assert "<script" not in text and "<i>" not in text
    assert shlex.split(found.commands[0]) == arguments
    assert found.links.count(f"#{found.identifiers[0]}") == 1 and len(found.identifiers) == 4


def test_a_figure_is_text_and_lines_or_pixels_if_it_has_too_many_marks():
    figure = Figure(figsize=(3, 2), dpi=100)
    axes = figure.add_subplot()
    axes.set_title("a title")
    assert b"a title" in svg(figure) and svg(figure) == svg(figure)
    assert image_address(figure).startswith("data:image/svg+xml;base64,")
    assert pixels(figure).shape == (200, 300, 3) and pixels(figure).dtype == np.uint8
    # What makes it smaller leaves texts alone, whatever they look like, and every reference has its target.
    axes.set_title(' id="a1" style="b" x="1.23456" transform="rotate(-0 1 2)"')
    axes.plot([0, 1], [0, 1], "o")
    drawn = ElementTree.fromstring(svg(figure))
    assert axes.get_title() in ["".join(element.itertext()) for element in drawn.iter(f"{SVG}text")]
    named = {element.get("id") for element in drawn.iter()}
    assert {use.get(f"{LINK}href")[1:] for use in drawn.iter(f"{SVG}use")} <= named
    (style,) = drawn.iter(f"{SVG}style")
    used = {element.get("class") for element in drawn.iter()} - {None}
    assert (
        used and all(f".{name}{{" in style.text for name in used) and b" style=" not in svg(figure).split(b"<text")[0]
    )
    axes.plot(np.random.default_rng(0).uniform(size=8000), "o")
    assert len(svg(figure)) > 120_000 and image_address(figure).startswith("data:image/png;base64,iVBOR")


def test_a_page_is_written_whole(tmp_path):
    page = Page("a title", [], [])
    write_page(page, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == html_of(page)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_stored_sensitivities_are_those_that_were_measured():
    found, content = sensitivity_content()
    again = stored(content)
    assert again.changes == tuple(replace(change, exact_halves=None) for change in found.changes)
    assert (again.routing, again.plans) == (found.routing, found.plans)
    assert again.agreement == found.agreement and again.exact_seconds == 21.0
    old = {name: value for name, value in content.items() if name not in ("routing", "plans")}
    assert stored(old).routing == () and stored(old).plans is None


def test_sensitivities_have_every_number_of_their_json_and_a_hostile_name_is_text():
    _, content = sensitivity_content(HOSTILE)
    found = read_page(html_of(sensitivity_page(content)))
    assert found.headings[0] == f"Sensitivities of {HOSTILE}"
    for point in content["points"]:
        # Two maps of different sites may have the same S.
        (name,) = [
            n
            for n in found.tables
            if n == f"{point['site'].replace('_', ' ')}, S={point['sparsity']:.3g}, 1/1000 nats per token"
        ]
        rows = {row[0]: row[1:] for row in found.tables[name][1:]}
        assert rows[str(point["layer"])][point["expert"] or 0] == f"{1000 * point['exact']:+.4f}"
    most = found.tables["The cells that cost most, each at its costliest S"]
    assert [row[0] for row in most[1:]] == ["layer 0, attention_input", "layer 1, expert_hidden, expert 2"]
    least = found.tables["The cells that cost least at the largest S"]
    assert [row[0] for row in least[1:]] == ["layer 1, expert_hidden, expert 2", "layer 0, attention_input"]
    routing = found.tables["Other ranks of choice in one layer"][1:]
    assert [row[:2] for row in routing] == [[str(one["layer"]), one["change"]] for one in content["routing"]]
    assert routing[1][2:] == ["+1.2500 (+0.1250 to +1.5000)", "+0.5000 (+0.2500 to +0.7500)"]
    assert found.tables["Estimate against evaluation"][1][:3] == ["all", "3", "0.500"]
    (plans,) = [rows for rows in found.tables.values() if rows[0][0] == "plan"]
    assert plans[0] == ["plan", "estimate", "with evaluated routing", "evaluated"]
    assert plans[2] == ["1", "+0.200000", "+0.260000", "+0.250000"]
    allocate, front, again = map(shlex.split, found.commands)
    assert allocate == [
        *("qsparse-moe", "allocate", HOSTILE, "--output", f"{HOSTILE}/plan.json", "--budget", "bytes=0.5@batch=1")
    ]
    assert front == [*allocate, "--force", "--front", "0.3:0.9:0.1"] and again[4] == "24"
    # A model without routed experts has no second sparsity.
    dense = read_page(html_of(sensitivity_page(content | {"routing": []})))
    assert dense.commands[0].endswith("--sparsity 0.6") and "Routing" not in dense.headings


def test_the_figures_of_sensitivities_draw_the_numbers_of_their_json():
    found, content = sensitivity_content()
    drawings = sensitivity_drawings(stored(content))
    assert list(drawings) == list(sensitivity_drawings(found))
    axis = next(axis for axis in drawings["map-expert_hidden"].figure.axes if axis.get_title().endswith("S=0.75"))
    np.testing.assert_allclose(np.ma.filled(axis.images[0].get_array(), 0), [[0, 0, 200.0]])
    assert axis.get_yticklabels()[0].get_text() == "1"
    dots, routed, diagonal = drawings["plans"].figure.axes[0].lines
    assert routed.get_xydata().tolist() == [[0.125, 0.12], [0.25, 0.26], [0.375, 0.37]]
    legend = [text.get_text() for text in drawings["plans"].figure.axes[0].get_legend().get_texts()]
    assert legend == ["estimate, Spearman 1.000", "with evaluated routing, Spearman 1.000"]
    assert dots.get_xydata().tolist() == [[0.125, 0.1], [0.25, 0.2], [0.375, 0.4]]
    assert diagonal.get_xydata().tolist() == [[0.125, 0.125], [0.375, 0.375]]


def test_a_grid_has_the_numbers_of_its_report_its_unfinished_runs_and_the_next_command(tmp_path):
    grid, results = grid_of(tmp_path)
    command = ["qsparse-moe", "ablate", "a grid.yaml", "training.steps=2"]
    write_results(grid, results, tmp_path / "report", command=command)
    page = read_page((tmp_path / "report" / "report.html").read_text())
    quality = page.tables["Validation bits per byte"]
    assert quality[1:] == [
        ["dense", "2.0000", "2.2500", "2.1250 ± 0.1768", "+0.0000 ± 0.0000"],
        ["half", "2.5000", "–", "2.5000", "+0.5000"],
    ]
    assert page.tables["Cost"][0][:3] == ["variant", "mean S", "active"]
    assert [row[2] for row in page.tables["Cost"][1:]] == ["100", "200"]
    assert page.tables["Runs that did not finish"][1:] == [["half-seed3", "exit code 1: <b>lost</b>"]]
    assert page.headings[1:] == ["Figures", "Quality", "Cost", "Unfinished runs", "What to run next"]
    assert shlex.split(page.commands[0]) == command and len(page.commands) == 1
    drawings = report_drawings(grid, results)
    assert (
        list(page.images)
        == [one.title for one in drawings.values()]
        == ["Validation loss by S and experts", "Validation loss by active parameters"]
    )
    (loss,) = drawings["loss-by-sparsity"].figure.axes[:1]
    assert loss.containers[0].lines[0].get_xydata().tolist() == [[0.0, 1.0], [0.5, 1.0]]
    tags = EventAccumulator(str(tmp_path / "report" / "figures")).Reload().Tags()["images"]
    assert set(tags) == {f"ablation/{name}" for name in drawings}
    # Nothing is proposed where no command is known.
    assert read_page(html_of(grid_page(grid, report_sections(grid, results), results, {}, ()))).commands == []


def test_a_grid_proposes_seeds_for_open_claims_and_looks_closer_at_its_best_run(tmp_path):
    (tmp_path / "base.yaml").write_text("training: {engine: torch}\n")
    (tmp_path / "mini.yaml").write_text(
        "base: base.yaml\nseeds: [0, 3]\nvariants: {dense: , half: {model.sparsity.default: 0.5}}\n"
        "comparisons: [{name: open, source: s, order: [dense, half]}, "
        "{name: shut, source: s, close: [dense, half], within: 9}]\n"
    )
    grid = load_grid(tmp_path / "mini.yaml", output_dir=str(tmp_path / "out"))
    results = [outcome("dense", 0, 2.0), outcome("dense", 3, 2.0), outcome("half", 0, 2.1), outcome("half", 3, 2.01)]
    (grid.folder / "dense-seed0").mkdir(parents=True)
    page = grid_page(grid, report_sections(grid, results), results, report_drawings(grid, results), ["ablate", "x"])
    found = read_page(html_of(page))
    claims, sensitivity, tensorboard = found.commands
    assert claims == "ablate x" and any(text.startswith("Decide more claims: with") for text in found.paragraphs)
    assert sensitivity == f"qsparse-moe sensitivity {grid.folder / 'dense-seed0'}"
    assert tensorboard == f"qsparse-moe tensorboard {grid.folder}"
    assert [row[0] for row in found.tables["Verdicts"][1:]] == ["open", "shut"]
    head, *rows = found.tables["Differences"]
    assert {row[head.index("verdict")] for row in rows} == {"not decided", "holds"}
